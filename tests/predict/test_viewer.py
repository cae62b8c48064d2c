"""The viewer's page in a real browser: upload, drawing of the mask, sliders; nothing else is fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from browser import CHROMIUM, CONTRAST, Browser, browser
from serving import make_predictor, serving

from ptxdist import Prediction, Predictor
from ptxdist.predict.gate import Limits
from ptxdist.predict.viewer import thresholds_at
from ptxdist.records import OperatingPoint

KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowRight": 39}
NAME = "Quagmire^Zebulon.dcm"
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


def upload(tab: Browser, path: Path) -> None:
    """Choose a file as a person does, and wait for the result or the refusal."""
    tab.choose("#file", path)
    tab.wait("!sending && ($('result').hidden ? !$('problem').hidden : document.activeElement === $('result'))")


def press(tab: Browser, key: str, times: int = 1) -> None:
    for _ in range(times):
        tab.press(key, KEYS[key], "\r" if key == "Enter" else "")


def words(tab: Browser, name: str) -> str:
    return str(tab.run(f"$('{name}').innerText"))


def area(tab: Browser) -> int:
    """The area that is shown, once it is drawn; the path encloses as much."""
    tab.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
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
    assert chromium.run("[$('radiograph').naturalWidth, $('radiograph').naturalHeight]") == [160, 120]
    press(chromium, "Tab")
    assert chromium.run("document.activeElement.id") == "threshold"
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
    assert "too few pixels" in words(chromium, "area-more")
    press(chromium, "Tab")
    assert chromium.run("document.activeElement.id") == "reset"
    press(chromium, "Enter")
    assert area(chromium) == prediction.area_px
    press(chromium, "Tab")
    assert chromium.run("document.activeElement.id") == "opacity"
    press(chromium, "End")
    assert area(chromium) == prediction.area_px
    assert chromium.run("getComputedStyle(document.querySelector('#mask .prediction')).fillOpacity") == "1"
    assert chromium.complaints() == []
    own = {url, *(f"{url}{name}" for name in ("viewer.css", "report.css", "viewer.js", "viewer.svg", "api/maps"))}
    fetched = {address for address in chromium.requests() if not address.startswith(f"blob:{url}")}
    assert fetched - own == set()
    assert f"{url}api/maps" in fetched
    text = chromium.run("document.documentElement.outerHTML")
    assert not [secret for secret in ("Quagmire", "Zebulon", "QX7", "19391207", "1.2.826.77") if secret in text]


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
    assert "the score is too low" in words(chromium, "area-more")
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
    assert words(chromium, "problem").startswith(reason)
    chromium.wait("document.activeElement === $('file')")
    assert chromium.run("$('result').hidden && $('problem').getAttribute('role') === 'alert' && !$('file').disabled")
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
    box = "(({x, y, width, height}) => [x, y, width, height])($('%s').getBoundingClientRect())"
    image, mask = chromium.run(f"[{box % 'radiograph'}, {box % 'mask'}]")  # at one moment: the page may still move
    assert image == pytest.approx(mask, abs=0.5)
    small = "[...document.querySelectorAll('input, button')].filter(item => !item.closest('[hidden]'))"
    assert chromium.run(f"{small}.every(item => (item.closest('label') || item).getBoundingClientRect().height >= 24)")
    assert chromium.complaints() == []
