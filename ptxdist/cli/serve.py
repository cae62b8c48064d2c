"""The command serve: parse, call, print.

Owns: its options. Refuses: command lines that do not parse. Called by: click.
"""

from __future__ import annotations

from pathlib import Path

import click

from ptxdist.cli.options import PLACE, json_option


@click.command()
@click.argument("model", type=PLACE)
@click.option("--with", "others", type=PLACE, multiple=True, help="A further model; probabilities are averaged.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others let others in.")
@click.option("--port", type=click.IntRange(0, 65535), default=8600, show_default=True, help="0: any free one.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True)
@json_option
def serve(
    model: Path | str,
    others: tuple[Path | str, ...],
    host: str,
    port: int,
    open_page: bool,
    device: str,
    as_json: bool,
) -> None:
    """Open a local web page on which MODEL looks at radiographs, one DICOM file at a time.

    Drop a file there: the radiograph with the mask outlined, sliders for threshold and opacity, score and area. Only
    this machine reaches the page unless --host says otherwise; nothing is stored. Ctrl-C ends it.

    Example: ptxdist serve runs/exp4 --open
    """
    from ptxdist import console, files

    files.require_extra("serve", "the viewer", "fastapi", "uvicorn")
    from ptxdist.predict import server
    from ptxdist.predict.predictor import Predictor
    from ptxdist.storage.runs import local_run

    with server.listen(host, port) as listening:
        if not server.is_loopback(listening):
            console.say(
                f"warning: everybody who reaches {host} can use this model; there is no password, and radiographs "
                "travel unencrypted. Put a proxy with both before it, or leave --host out and use `ssh -L`"
            )
        predictor = Predictor.load(*map(local_run, (model, *others)), device=device)  # type: ignore[arg-type]
        url = server.url_of(listening)
        if as_json:
            console.show_json({"url": url, "models": [card.name for card in predictor.cards]})
        else:
            console.say(f"the viewer is at {url} (Ctrl-C ends it); research use only, not a medical device")
        if open_page and click.launch(url) != 0:
            console.say("no browser could be opened; open the address yourself")
        server.serve(predictor, listening, host, lambda where: console.say(f"a defect of ptxdist: {where}"))
        console.say("the viewer has ended; nothing was stored")
