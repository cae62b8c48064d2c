"""The command `serve`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from ptxdist import places
from ptxdist.cli.options import PLACE, begin, json_option


@click.command(short_help="Open a local web page that predicts radiographs.")
@click.argument("model", type=PLACE)
@click.option("--with", "others", type=PLACE, multiple=True, help="A further model; probabilities are averaged.")
@click.option("--at", help="A stored working point of MODEL, such as sensitivity=0.95.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others can be reached from elsewhere."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8600, show_default=True, help="0: any free port.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True)
@json_option
def serve(
    model: Path | str,
    others: tuple[Path | str, ...],
    at: str | None,
    host: str,
    port: int,
    open_page: bool,
    device: str,
    as_json: bool,
) -> None:
    """Serve a local web page that predicts radiographs with MODEL, DICOM or PNG.

    Drop files on the page to see each radiograph with the mask outlined, score and area, and sliders for threshold and
    opacity. Without --host, only this machine can reach the page. Nothing is stored. Ctrl-C ends the server.

    \b
    Example:
      ptxdist serve runs/first --open
    """
    for place in (model, *others):
        places.refuse_other(place, places.RUN, places.BUNDLE)
    begin(f"loads {model}")
    from ptxdist import console, files

    files.require_extra("serve", "the viewer", "fastapi", "uvicorn")
    from ptxdist.predict import server
    from ptxdist.predict.gate import DEFAULT
    from ptxdist.predict.worker import Worker, predicting
    from ptxdist.storage.runs import local_run

    with server.listen(host, port) as listening:
        if not server.is_loopback(listening):
            console.say(
                f"warning: anybody who can reach {host} can use this model; there is no password, and radiographs "
                "are sent unencrypted. Put a proxy with both in front of it, or omit --host and use `ssh -L`"
            )
        models, limits = [local_run(place) for place in (model, *others)], DEFAULT
        with Worker(predicting, models, device, at, limits.max_bytes, compute_s=limits.compute_s) as worker:
            url = server.url_of(listening)
            if as_json:
                console.show_json({"url": url, "models": worker.about.names})
            else:
                console.say(f"the viewer is at {url} (Ctrl-C ends it); research use only, not a medical device")
            if open_page and click.launch(url) != 0:
                console.say("no browser could be started; open the address yourself")
            server.serve(worker, listening, host, lambda where: console.say(f"a defect in ptxdist: {where}"))
        console.say("the viewer has ended; nothing was stored")
