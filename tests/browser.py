"""A headless Chromium, spoken to through its DevTools pipe: what a page looks like, fetches and complains about."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_S = 60
# Words of a page whose contrast with their ground is less than 4.5 to 1 (WCAG AA), with their contrast.
CONTRAST = """
(() => {
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest('style')) continue;
    const style = getComputedStyle(node);
    const ink = parts(node.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push([walker.currentNode.data.trim().slice(0, 40), ratio]);
  }
  return faint;
})()
"""


class Browser:
    """One tab. `events` has all that the browser told of it, in order."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = os.fdopen(write, "wb", 0), os.fdopen(read, "rb", 0)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Result of a DevTools command; RuntimeError when the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, url: str, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Load a page in a window of this size, in CSS px, and wait until it is drawn."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")  # else another place of the same page is no load
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        images = "[...document.images].filter(image => image.src)"
        self.run(f"Promise.all({images}.map(image => image.decode())).then(() => true)")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression in the page, awaited; RuntimeError when it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go; `code` is its virtual key code, `text` what it types."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)

    def screenshot(self, path: Path, **clip: float) -> None:
        """The whole page as PNG, or the part x, y, width, height of it."""
        if not clip:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1})["data"]
        path.write_bytes(base64.b64decode(data))

    def print_pdf(self, path: Path) -> None:
        """The page as printed on A4."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69}
        data = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True, **paper)["data"]
        path.write_bytes(base64.b64decode(data))

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression holds in the page; RuntimeError after a while."""
        self.run(f"new Promise(done => {{ (function look() {{ {condition} ? done() : setTimeout(look, 20); }})(); }})")

    def choose(self, selector: str, *paths: Path) -> None:
        """Choose files in an input of this kind."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=list(map(str, paths)))

    def drop(self, path: Path, x: int, y: int) -> None:
        """Drag a file there, in CSS px, and let it go."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def requests(self) -> list[str]:
        """URLs of all that the page asked for since it was opened."""
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [item["request"]["url"] for item in sent]

    def complaints(self) -> list[str]:
        """What the page wrote to the console, and errors that it threw."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def close(self) -> None:
        """Let go of the pipes."""
        self._write.close()
        self._read.close()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], TIMEOUT_S)[0]:
                raise RuntimeError(f"the browser has said nothing for {TIMEOUT_S} s")
            part = self._read.read(1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in this folder, and no way but to 127.0.0.1; it ends with the block."""
    to_browser, from_browser = os.pipe(), os.pipe()
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}", "--remote-debugging-pipe",
    ]  # fmt: skip
    # The browser reads commands from descriptor 3 and writes to 4.
    shell = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    tab = None
    try:
        tab = Browser(to_browser[1], from_browser[0])
        yield tab
    finally:
        process.terminate()
        process.wait(timeout=30)
        if tab:
            tab.close()
