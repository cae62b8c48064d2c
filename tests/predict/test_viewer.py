"""The viewer's page in a real browser: files, mask, sliders, picture, what is saved; nothing else is fetched."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from browser import CHROMIUM, CONTRAST, Browser, browser
from serving import make_predictor, serving

from ptxdist import Prediction, Predictor
from ptxdist.dicom.png import PngHeader, decode_png, read_png_header
from ptxdist.predict.findings import position_of
from ptxdist.predict.gate import Limits
from ptxdist.predict.viewer import thresholds_at
from ptxdist.records import OperatingPoint

KEYS = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
STYLES = ("viewer.css", "report.css", "viewer.svg")
NAME = "Quagmire^Zebulon.dcm"
DRAWN = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
BUSY = "{status: 429, headers: {'Retry-After': '0'}}"
SECRETS = ("Quagmire", "Zebulon", "QX7", "19391207", "1.2.826.77")
# Grey level in the middle of the picture as it is shown.
GREY = "(c => c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data[0])($('radiograph'))"
# Pixels of the mask at any threshold: the area inside the path, whose corners are pixel corners.
AREA_OF_PATH = r"""
(() => {
  const path = document.querySelector('#mask .prediction').getAttribute('d') || '';
  let area = 0;
  for (const part of path.split('Z').filter(Boolean)) {
    let [x, y] = part.match(/M(\d+),(\d+)/).slice(1).map(Number), sum = 0;
    for (const [, kind, value] of part.matchAll(/([HV])(\d+)/g)) {
      if (kind === 'H') x = Number(value); else { sum += x * (value - y); y = Number(value); }
    }
    area += sum;
  }
  return area;
})()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, write_dicom: Callable[..., Path]) -> Path:
    """A radiograph that is wider than high."""
    noise = np.random.default_rng(5).integers(0, 256, (120, 160), dtype=np.uint8)
    return write_dicom(tmp_path_factory.mktemp("viewer") / NAME, cv2.GaussianBlur(noise, (15, 15), 0), "1.2.826.77.1")


@pytest.fixture(scope="module")
def predictor(file: Path) -> Predictor:
    """With an operating point of its own kind: another threshold for the smallest area, between the slider's steps."""
    loaded = make_predictor(OperatingPoint(top=0.5, min_area_px=0, bottom=0.5))
    low, high = np.quantile(loaded.predict(file).probability, (0.6, 0.9)).tolist()
    loaded.operating_point = OperatingPoint(top=high, min_area_px=300, bottom=low)
    return loaded


@pytest.fixture(scope="module")
def prediction(predictor: Predictor, file: Path) -> Prediction:
    return predictor.predict(file)


@pytest.fixture(scope="module")
def url(predictor: Predictor) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (chromium, chromium-browser or google-chrome in PATH)")
    with serving(predictor, Limits(max_bytes=2**20, a_minute=1000)) as (address, defects):
        yield address
        assert defects == []


@pytest.fixture(scope="module")
def chromium(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def upload(tab: Browser, *paths: Path) -> None:
    """Choose files as a person does, and wait for the result or the refusal."""
    tab.choose("#file", *paths)
    tab.wait("!sending && ($('result').hidden ? !$('problem').hidden : document.activeElement === $('result'))")


def press(tab: Browser, key: str, times: int = 1) -> None:
    for _ in range(times):
        tab.press(key, KEYS.get(key) or ord(key.upper()), "\r" if key == "Enter" else key if len(key) == 1 else "")


def tab_to(tab: Browser, name: str) -> None:
    """Press Tab until the element has the focus, which has to be seen."""
    for _ in range(40):
        press(tab, "Tab")
        if tab.run("document.activeElement.id") == name:
            assert tab.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth) >= 2"), (
                "the focus is seen"
            )
            return
    raise AssertionError(f"Tab does not lead to {name}")


def words(tab: Browser, name: str) -> str:
    return str(tab.run(f"$('{name}').innerText"))


def area(tab: Browser) -> int:
    """The area that is shown, once it is drawn; the path encloses as much."""
    tab.run(DRAWN)
    shown = int(re.sub(r"\D", "", words(tab, "area")))
    assert tab.run(AREA_OF_PATH) == shown
    return shown


def count(probability: npt.NDArray[np.float32], threshold: float, smallest: int) -> int:
    px = int(np.count_nonzero(probability >= threshold))
    return px if px >= smallest else 0


def test_a_file_goes_up_and_the_sliders_are_moved_by_keyboard(
    chromium: Browser, url: str, file: Path, prediction: Prediction, predictor: Predictor
) -> None:
    chromium.open(url, 1280)
    press(chromium, "Tab", 2)
    assert chromium.run("document.activeElement.id") == "file", "the first thing after the link that skips"
    upload(chromium, file)
    assert area(chromium) == prediction.area_px > 0
    assert words(chromium, "score") == f"{prediction.score:.3f}"
    assert "Secondary Capture" in words(chromium, "area-more")
    assert chromium.run("[shown.width, shown.height, shown.grey.length]") == [160, 120, 160 * 120]
    assert words(chromium, "verdict").startswith(f"Pneumothorax marked: {prediction.area_px:,} pixels, ")
    place = position_of(prediction.mask, prediction.orientation)
    assert words(chromium, "verdict").endswith(f" % of the image; {place['side']}, {place['zone']} zone.")
    tab_to(chromium, "threshold")
    press(chromium, "ArrowRight", 3)
    point = predictor.operating_point
    thresholds = thresholds_at(point)
    threshold = thresholds[thresholds.index(point.bottom) + 3]
    assert area(chromium) == count(prediction.probability, threshold, point.min_area_px) != prediction.area_px
    assert words(chromium, "threshold-value") == f"{threshold:.3f}"
    assert chromium.run("$('threshold').getAttribute('aria-valuetext')") == words(chromium, "threshold-value")
    chromium.wait(f"$('said').textContent.includes('threshold {threshold:.3f}')")
    press(chromium, "Home")
    assert area(chromium) == count(prediction.probability, 0.005, point.min_area_px)
    press(chromium, "End")
    assert area(chromium) == 0
    assert words(chromium, "verdict") == (
        "Pneumothorax not marked, because no pixel reaches 0.995; a mask needs 300. "
        "This is not the model's operating point."
    )
    tab_to(chromium, "reset")
    press(chromium, "Enter")
    assert area(chromium) == prediction.area_px
    tab_to(chromium, "opacity")
    press(chromium, "End")
    assert area(chromium) == prediction.area_px
    assert chromium.run("getComputedStyle(document.querySelector('#mask .prediction')).fillOpacity") == "1"
    assert chromium.complaints() == []
    own = {url, *(f"{url}{name}" for name in (*STYLES, "picture.js", "save.js", "viewer.js", "api/maps"))}
    fetched = {address for address in chromium.requests() if not address.startswith(f"blob:{url}")}
    assert fetched - own == set()
    assert f"{url}api/maps" in fetched
    text = chromium.run("document.documentElement.outerHTML").replace(NAME, "")  # the user's own name of the file
    assert not [secret for secret in SECRETS if secret in text]
    sent = json.dumps([event for event in chromium.events if event.get("method") == "Network.requestWillBeSent"])
    assert not [secret for secret in SECRETS if secret in sent], "names of files stay in the browser"


def test_an_image_that_is_flagged_without_a_mask_does_not_read_as_negative(
    chromium: Browser, url: str, file: Path
) -> None:
    chromium.open(url, 1280)
    upload(chromium, file)
    chromium.run("Object.assign(shown.answer, {area_px: 0}).operating_point.image = shown.answer.score")
    chromium.run("shown.answer.operating_point.min_area_px = 1e9; list(); draw(); true")
    assert words(chromium, "verdict").startswith("Pneumothorax flagged by the score, but only ")
    assert words(chromium, "verdict").endswith("That is no negative answer: look at the whole image.")
    assert chromium.run("$('listing-words').textContent").endswith(": 1 flagged without a mask")
    assert chromium.run("$('list').textContent").count("flagged without a mask, score") == 1
    chromium.run("shown.answer.operating_point.image = 1; list(); draw(); true")
    assert words(chromium, "verdict").startswith("Pneumothorax not marked, because its score ")


def test_the_picture_is_zoomed_moved_and_toned_by_keyboard(
    chromium: Browser, url: str, file: Path, prediction: Prediction
) -> None:
    """The picture has its own keys; buttons and sliders do the same."""
    chromium.open(url, 1280)
    upload(chromium, file)
    tab_to(chromium, "frame")
    whole = chromium.run("$('mask').getAttribute('viewBox')")
    assert [float(part) for part in whole.split()] == pytest.approx([0, 0, 160, 120], abs=0.5)
    press(chromium, "+", 3)
    chromium.run(DRAWN)
    left, top, width, height = map(float, chromium.run("$('mask').getAttribute('viewBox')").split())
    assert (width, height) == pytest.approx((160 / 1.25**3, 120 / 1.25**3), abs=0.5)
    assert (left + width / 2, top + height / 2) == pytest.approx((80, 60), abs=0.5), "the middle stays"
    assert words(chromium, "zoom").startswith("2.0")
    press(chromium, "ArrowRight", 40)
    chromium.run(DRAWN)
    assert float(chromium.run("$('mask').getAttribute('viewBox')").split()[0]) == pytest.approx(160 - width, abs=0.5)
    press(chromium, "0")
    chromium.run(DRAWN)
    assert chromium.run("$('mask').getAttribute('viewBox')") == whole
    grey = chromium.run(GREY)
    assert grey == pytest.approx(int(prediction.pixels[60, 80]), abs=3), "the grey levels of the file"
    press(chromium, "i")
    chromium.run(DRAWN)
    assert chromium.run(GREY) == 255 - grey
    tab_to(chromium, "fit" if chromium.run("!$('fit').disabled") else "inverted")
    press(chromium, " ")
    tab_to(chromium, "window")
    press(chromium, "Home")
    tab_to(chromium, "level")
    press(chromium, "Home")
    chromium.run(DRAWN)
    assert chromium.run(GREY) == 255, "all that is above the window is white"
    tab_to(chromium, "all-greys")
    press(chromium, "Enter")
    chromium.run(DRAWN)
    assert chromium.run(GREY) == grey
    assert chromium.run("[$('window').value, $('level').value]") == ["256", "128"]
    assert area(chromium) == prediction.area_px, "the mask does not depend on the picture"


def test_the_picture_is_zoomed_and_moved_by_mouse(chromium: Browser, url: str, file: Path) -> None:
    chromium.open(url, 1280)
    upload(chromium, file)
    x, y = chromium.run(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])($('frame').getBoundingClientRect())"
    )
    mouse = partial(chromium.call, "Input.dispatchMouseEvent")
    mouse(type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-600)
    chromium.wait("view.zoom > 3.9")
    before = chromium.run("[view.x, view.y]")
    for button, held in (("left", 1), ("right", 2)):
        mouse(type="mousePressed", x=x, y=y, button=button, buttons=held)
        mouse(type="mouseMoved", x=x + 50, y=y - 30, button=button, buttons=held)
        mouse(type="mouseReleased", x=x + 50, y=y - 30, button=button, buttons=0)
    chromium.run(DRAWN)
    factor = chromium.run("scale(shown)")
    assert chromium.run("[view.x, view.y]") == pytest.approx(
        [before[0] - 50 / factor, before[1] + 30 / factor], abs=0.5
    )
    assert chromium.run("[$('window').value, $('level').value]") == ["256", "98"]
    assert chromium.complaints() == []


def test_several_files_have_names_and_an_order(
    chromium: Browser, url: str, file: Path, prediction: Prediction, tmp_path: Path
) -> None:
    """All are sent one after the other; Previous, Next and the keys N and P show their results."""
    letter, image = tmp_path / "letter.txt", tmp_path / "image.png"
    letter.write_text("Dear colleague, " * 40)
    cv2.imwrite(str(image), prediction.pixels)
    chromium.open(url, 1280)
    upload(chromium, file, letter, image)
    assert words(chromium, "place") == "1 of 3"
    assert chromium.run("$('previous').disabled && !$('next').disabled")
    rows = chromium.run("[...$('list').children].map(item => item.textContent)")
    marked = f"marked, {prediction.area_px:,} pixels, score {prediction.score:.3f}"
    assert words(chromium, "listing-words") == "All 3 files: 2 marked, 1 refused"
    assert rows == [f"{NAME}{marked}", "letter.txtrefused", f"image.png{marked}"]
    assert chromium.run("document.querySelector('#list [aria-current]').textContent") == NAME
    chromium.run("$('file').focus()")
    tab_to(chromium, "next")
    press(chromium, "Enter")
    assert words(chromium, "problem") == "letter.txt was not predicted. This file is not a DICOM file (no DICM prefix)."
    assert chromium.run("$('result').hidden && $('said').textContent === ''"), (
        "no status of another file beside the alert"
    )
    press(chromium, "Enter")
    assert words(chromium, "result-title") == "Result for image.png"
    assert "nothing has checked" in words(chromium, "cautions")
    assert area(chromium) == prediction.area_px
    assert chromium.run("$('next').disabled && document.activeElement === $('previous')"), "the focus is not lost"
    assert chromium.run("$('save-seg').disabled")
    tab_to(chromium, "frame")
    press(chromium, "p", 1)
    assert words(chromium, "problem").startswith("letter.txt")
    chromium.run("files[0].maps = null, go(0)")
    chromium.wait("!$('result').hidden")
    assert area(chromium) == prediction.area_px, "what was dropped is sent again"
    chromium.run("real = fetch, fetch = () => Promise.reject(), files[0].maps = null, go(0)")
    chromium.wait("!$('problem').hidden")
    assert "The server does not answer" in words(chromium, "problem")
    chromium.run(f"fetch = () => {{ fetch = real; return Promise.resolve(new Response('{{}}', {BUSY})); }}, go(0)")
    chromium.wait("!$('result').hidden")
    assert area(chromium) == prediction.area_px, "it is tried again, also after the time that the server names"


def test_mask_overlay_and_seg_are_saved(
    chromium: Browser, url: str, tmp_path: Path, file: Path, prediction: Prediction, predictor: Predictor
) -> None:
    pytest.importorskip("highdicom")
    source, uid = pydicom.dcmread(file), "1.2.826.0.1.3680043.8.498"
    source.StudyInstanceUID, source.SeriesInstanceUID = f"{uid}.1", f"{uid}.2"
    source.save_as(tmp_path / "a.dcm")
    out = tmp_path / "saved"
    chromium.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(out))
    chromium.open(url, 1280)
    upload(chromium, tmp_path / "a.dcm")
    for kind in ("mask", "overlay", "seg"):
        tab_to(chromium, f"save-{kind}")
        press(chromium, "Enter")
    names = ("a-mask.png", "a-overlay.png", "a-seg.dcm")
    end = time.monotonic() + 30
    while not all((out / name).is_file() for name in names):
        assert time.monotonic() < end, list(out.iterdir())
        time.sleep(0.02)
    mask = decode_png((out / "a-mask.png").read_bytes())
    assert read_png_header((out / "a-mask.png").read_bytes()) == PngHeader(120, 160, 8, colour=False)
    assert np.array_equal(mask, prediction.mask * np.uint8(255))
    assert np.array_equal(pydicom.dcmread(out / "a-seg.dcm").pixel_array > 0, prediction.mask)
    overlay = cv2.imread(str(out / "a-overlay.png"))
    assert overlay.shape[1] == 160
    coloured = (overlay.max(axis=2) - overlay.min(axis=2) > 40)[:120]
    assert coloured[prediction.mask].mean() > 0.5 > coloured[~prediction.mask].mean()
    assert chromium.complaints() == []
    tab_to(chromium, "threshold")
    press(chromium, "ArrowRight")
    chromium.run(DRAWN)
    assert chromium.run("$('save-seg').disabled")
    assert "operating point" in words(chromium, "seg-note")


def test_the_example_is_opened_by_keyboard_and_said_to_be_synthetic(chromium: Browser, url: str) -> None:
    chromium.open(url, 1280)
    press(chromium, "Tab", 3)
    assert chromium.run("document.activeElement.id") == "example"
    press(chromium, "Enter")
    chromium.wait("document.activeElement === $('result') && !sending")
    assert "This radiograph is synthetic" in words(chromium, "synthetic")
    assert words(chromium, "result-title") == "Result for synthetic example.dcm"
    assert chromium.run("$('radiograph').getAttribute('aria-label')").startswith("Drawing of a chest radiograph.")
    assert chromium.run("$('try').hidden")


def test_the_smallest_area_can_be_left_out(
    chromium: Browser, url: str, file: Path, prediction: Prediction, predictor: Predictor
) -> None:
    chromium.open(url, 1280)
    upload(chromium, file)
    chromium.run("$('threshold').value = shown.thresholds.findIndex((t, i) => shown.reach[i + 1] < 300)")
    chromium.run("$('threshold').dispatchEvent(new Event('input'))")
    assert area(chromium) == 0
    chromium.run("$('smallest').click()")
    assert 0 < area(chromium) < predictor.operating_point.min_area_px


def test_an_image_threshold_empties_the_mask_and_can_be_left_out(
    chromium: Browser,
    url: str,
    file: Path,
    prediction: Prediction,
    predictor: Predictor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = predictor.operating_point.model_copy(update={"image": 0.9999})
    monkeypatch.setattr(predictor, "operating_point", point)
    chromium.open(url, 1280)
    upload(chromium, file)
    assert area(chromium) == 0
    score = f"{prediction.score:.3f}"
    assert words(chromium, "verdict") == f"Pneumothorax not marked, because its score {score} is below 0.9999."
    assert point.words in words(chromium, "point")
    assert words(chromium, "smallest-words") == "no mask for a score below 0.9999, and none of fewer than 300 pixels"
    chromium.run("$('smallest').click()")
    assert area(chromium) == prediction.area_px > 0


def test_a_file_can_be_dropped(chromium: Browser, url: str, file: Path, prediction: Prediction) -> None:
    chromium.open(url, 1280)
    chromium.drop(file, 600, 400)
    chromium.wait("!$('result').hidden")
    assert area(chromium) == prediction.area_px


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Dear colleague, " * 40, "This file is not a DICOM file"),
        (b"", "This file is empty (0 bytes)."),
        (bytes(2**20 + 1), "This file has more than the 1,048,576 bytes"),
    ],
    ids=["text", "empty", "large"],
)
def test_a_refusal_is_a_sentence_and_leaves_no_mask(
    chromium: Browser, url: str, file: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    chromium.open(url, 1280)
    upload(chromium, file)
    (tmp_path / NAME).write_bytes(content)
    chromium.choose("#file", tmp_path / NAME)
    chromium.wait("!$('problem').hidden")
    assert words(chromium, "problem").startswith(f"{NAME} was not predicted. {reason}")
    assert words(chromium, "said") == "", "no status of what went before"
    chromium.wait("document.activeElement === $('file')")
    assert chromium.run("$('result').hidden && $('problem').getAttribute('role') === 'alert'")
    chromium.choose("#file", file)
    chromium.wait("$('problem').hidden && !$('result').hidden")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_it_fits_and_stands_out_from_its_ground(
    chromium: Browser, url: str, file: Path, width: int, dark: bool
) -> None:
    chromium.open(url, width, dark=dark)
    upload(chromium, file)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run(CONTRAST) == []
    assert words(chromium, "area-more").startswith("No mm²"), "the words under a number are seen"
    box = "(({x, y, width, height}) => [x, y, width, height])($('%s').getBoundingClientRect())"
    image, mask = chromium.run(f"[{box % 'radiograph'}, {box % 'mask'}]")  # at one moment: the page may still move
    assert image == pytest.approx(mask, abs=0.5)
    small = "[...document.querySelectorAll('input, button')].filter(item => !item.closest('[hidden]'))"
    assert chromium.run(f"{small}.every(item => (item.closest('label') || item).getBoundingClientRect().height >= 24)")
    assert chromium.complaints() == []
