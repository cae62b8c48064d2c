"""The viewer's server over real connections: answers equal to `predict`'s, errors, nothing stored."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pydicom
import pytest
import torch
from click.testing import CliRunner
from serving import DICOM, ask, error_of, make_predictor, parts_of, raw, serving
from slow_worker import work

from ptxdist import Predictor
from ptxdist.cli import cli
from ptxdist.errors import AddressError, RunError
from ptxdist.labels import rle
from ptxdist.phantoms.dataset import draw_file
from ptxdist.places import RESULT, SETTINGS
from ptxdist.predict import server
from ptxdist.predict.findings import position_of
from ptxdist.predict.gate import Limits
from ptxdist.predict.viewer import EXAMPLE_SEED, levels_of, page_files, thresholds_at
from ptxdist.predict.worker import Worker
from ptxdist.records import SYNTHETIC, OperatingPoint
from ptxdist.train.scoring import mask_at

SECRETS = ("Quagmire", "Zebulon", "QX7-HOSPITAL", "19391207", "1.2.826.77")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, write_dicom: Callable[..., Path]) -> list[Path]:
    """Radiographs: JPEG; wide, 16 bit, of a known spacing."""
    folder = tmp_path_factory.mktemp("serve") / "Quagmire_Zebulon"
    random = np.random.default_rng(3)
    pixels = [
        cv2.GaussianBlur(random.integers(0, 256, shape, dtype=np.uint8), (15, 15), 0)
        for shape in ((128, 96), (90, 160))
    ]
    dx = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "Modality": "DX", "ImagerPixelSpacing": [2.0, 2.0]}
    return [
        write_dicom(folder / "a.dcm", pixels[0], "1.2.826.77.1", BodyPartExamined="CHEST"),
        write_dicom(folder / "b.dcm", pixels[1].astype(np.uint16) * 200, "1.2.826.77.2", **dx),
    ]


@pytest.fixture(scope="module")
def predictor(files: list[Path]) -> Predictor:
    """Untrained, with an operating point between the slider's steps at which some pixels are in the mask."""
    loaded = make_predictor(OperatingPoint(top=0.5, min_area_px=0, bottom=0.5))
    low, high = np.quantile(loaded.predict(files[0]).probability, (0.5, 0.7)).tolist()
    loaded.operating_point = OperatingPoint(top=high, min_area_px=40, bottom=low)
    return loaded


@pytest.fixture(scope="module")
def quick(predictor: Predictor) -> Iterator[tuple[str, list[str]]]:
    """A server that waits for nothing long, and the defects that it reports."""
    with serving(predictor, Limits(a_minute=10**6, head_s=0.2, patience_s=0.2)) as found:
        yield found


@pytest.fixture(scope="module")
def url(predictor: Predictor) -> Iterator[str]:
    with serving(predictor) as (address, defects):
        yield address
        assert defects == []


def test_the_answer_is_what_predict_finds(url: str, predictor: Predictor, files: list[Path]) -> None:
    for path in files:
        prediction = predictor.predict(path)
        status, headers, content = ask(url, "POST", "/api/predict", path.read_bytes())
        assert (status, headers["content-type"]) == (200, "application/json")
        found = json.loads(content)
        assert 0 < found["area_px"] == prediction.area_px < prediction.mask.size
        assert (found["rows"], found["columns"]) == prediction.mask.shape
        assert np.array_equal(rle.decode(found["encoded_pixels"], *prediction.mask.shape) > 0, prediction.mask)
        assert found["score"] == round(prediction.score, 6)
        assert (found["side"], found["zone"]) == tuple(position_of(prediction.mask, prediction.orientation).values())
        assert found["operating_point"] == predictor.operating_point.model_dump()
        if path.name == "b.dcm":
            assert (found["area_mm2"], found["mm2_plane"]) == (prediction.area_px * 4, "detector")
        else:
            assert found["area_mm2"] is found["px_mm2"] is None
            assert "Secondary Capture" in found["mm2_reason"]


def test_the_maps_hold_the_mask_of_every_threshold(url: str, predictor: Predictor, files: list[Path]) -> None:
    for path in files:
        prediction, point = predictor.predict(path), predictor.operating_point
        status, headers, content = ask(url, "POST", "/api/maps", path.read_bytes())
        assert status == 200
        parts = parts_of(headers, content)
        assert parts["answer"] == ask(url, "POST", "/api/predict", path.read_bytes())[2]
        assert json.loads(parts["shape"]) == list(prediction.pixels.shape)
        assert parts["picture"] == prediction.pixels.tobytes()
        thresholds = json.loads(parts["thresholds"])
        levels = np.frombuffer(parts["levels"], np.uint8).reshape(prediction.mask.shape)
        assert len(thresholds) == 201
        for index, threshold in enumerate(thresholds):
            assert np.array_equal(levels > index, prediction.probability >= threshold)
        top, bottom = thresholds.index(point.top), thresholds.index(point.bottom)
        assert np.count_nonzero(levels > top) >= point.min_area_px
        assert np.array_equal(levels > bottom, prediction.mask)


def test_levels_are_exact_at_the_very_thresholds() -> None:
    for point in (
        OperatingPoint(top=0.45, min_area_px=0, bottom=0.45),
        OperatingPoint(top=1.0, min_area_px=0, bottom=0.0),
        OperatingPoint(top=0.3331, min_area_px=0, bottom=0.1),
    ):
        thresholds = thresholds_at(point)
        assert thresholds == sorted(set(thresholds))
        at = np.asarray(thresholds, np.float32)
        near = np.concatenate([at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(1))])
        near = np.resize(near, (700, 3))  # more than a block of rows
        levels = levels_of(near, thresholds)
        for index, threshold in enumerate(thresholds):
            same = OperatingPoint(top=threshold, min_area_px=0, bottom=threshold)
            assert np.array_equal(levels > index, mask_at(torch.from_numpy(near), same, 1.0).numpy())


def test_a_large_picture_is_made_smaller_and_its_levels_are_not(
    url: str, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    path = write_dicom(tmp_path / "large.dcm", np.full((2200, 1100), 90, np.uint8), "1.2.9", raw=True)
    parts = parts_of(*ask(url, "POST", "/api/maps", path.read_bytes())[1:])
    assert (json.loads(parts["shape"]), parts["picture"]) == ([2048, 1024], bytes([90]) * 2048 * 1024)
    assert len(parts["levels"]) == 2200 * 1100


def test_a_png_is_predicted_and_cautions_come_with_the_answer(
    url: str, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), cv2.GaussianBlur(np.random.default_rng(4).integers(0, 256, (80, 60), np.uint8), (9, 9), 0))
    status, _, content = ask(url, "POST", "/api/predict", path.read_bytes(), {"Content-Type": "image/png"})
    found = json.loads(content)
    assert (status, found["area_px"]) == (200, predictor.predict(path).area_px)
    png = "A PNG does not say what it shows: nothing has checked that this is a frontal chest radiograph."
    assert found["cautions"] == [png]
    monkeypatch.setattr(predictor, "caution", SYNTHETIC)
    monkeypatch.setattr(predictor, "_unlike", lambda item: "darker than nearly all of them")
    found = json.loads(ask(url, "POST", "/api/predict", path.read_bytes())[2])
    unlike = "This image is unlike the training images: darker than nearly all of them."
    assert found["cautions"] == [SYNTHETIC, unlike, png]
    page = page_files(predictor, 1)[""][1].decode()
    assert f'id="caution">{SYNTHETIC}</p>' in page, "it is said before a file is chosen"


def test_the_mask_as_dicom_seg(url: str, predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    path, uid = files[0], "1.2.826.0.1.3680043.8.498"
    source = pydicom.dcmread(path)
    source.StudyInstanceUID, source.SeriesInstanceUID = f"{uid}.1", f"{uid}.2"
    source.save_as(tmp_path / "a.dcm")
    status, headers, content = ask(url, "POST", "/api/seg", (tmp_path / "a.dcm").read_bytes())
    assert (status, headers["content-type"]) == (200, "application/dicom")
    segment = pydicom.dcmread(io.BytesIO(content))
    assert segment.Modality == "SEG"
    assert np.array_equal(segment.pixel_array > 0, predictor.predict(path).mask)
    dark = cv2.imencode(".png", np.zeros((64, 64), np.uint8))[1].tobytes()
    assert error_of(ask(url, "POST", "/api/seg", dark))[0] == 422


def test_the_example_is_a_drawing_that_the_server_accepts(url: str, predictor: Predictor) -> None:
    status, headers, content = ask(url, "GET", "/example.dcm")
    assert (status, headers["content-type"]) == (200, "application/dicom")
    assert content == draw_file(EXAMPLE_SEED)
    assert ask(url, "POST", "/api/predict", content)[0] == 200


def test_refusals_are_sentences(url: str, files: list[Path], tmp_path: Path, write_dicom: Callable[..., Path]) -> None:
    grey = np.full((64, 64), 80, np.uint8)
    ct = write_dicom(tmp_path / "ct.dcm", grey.astype(np.int16), "1.2.3", Modality="CT").read_bytes()
    whole = files[0].read_bytes()
    for content, reason in (
        (ct, "This file is of modality CT; a chest radiograph is one of CR, DX, RG."),
        (b"Quagmire " * 99, "This file is not a DICOM file (no DICM prefix)."),
        (b"", "This file is empty (0 bytes)."),
        (cv2.imencode(".png", np.dstack([grey, grey, grey + 9]))[1].tobytes(), "This file is a colour PNG"),
        (whole[:-300], "This file is cut off or damaged"),
    ):
        for path in ("/api/predict", "/api/maps"):
            status, words = error_of(ask(url, "POST", path, content))
            assert status == 422
            assert words.startswith(reason)
    assert error_of(ask(url, "POST", "/api/predict", b"no", {"Content-Type": "Application/DICOM; a=b"}))[0] == 422
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        status, words = error_of(ask(url, "POST", "/api/predict", whole, {"Content-Type": kind}))
        assert (status, "application/dicom" in words) == (415, True)
    assert error_of(ask(url, "GET", "/docs"))[0] == error_of(ask(url, "GET", "/api/nothing"))[0] == 404
    assert error_of(ask(url, "GET", "/api/predict"))[0] == 405


def test_other_pages_cannot_ask(url: str, files: list[Path]) -> None:
    host, content = urlsplit(url).netloc, files[0].read_bytes()
    for name in ("evil.example", "evil.example:80", "localhost.evil.example", "[", ""):
        assert error_of(ask(url, "GET", "/", headers={"Host": name}))[0] == 421
        assert error_of(ask(url, "POST", "/api/predict", content, {**DICOM, "Host": name}))[0] == 421
    for name in ("localhost:1234", "127.0.0.1", "[::1]:8600", host):
        assert ask(url, "GET", "/", headers={"Host": name})[0] == 200
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert error_of(ask(url, "POST", "/api/predict", content, DICOM | headers))[0] == 403
    own = {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert ask(url, "POST", "/api/predict", content, DICOM | own)[0] == 200


def test_every_answer_has_the_headers_and_the_page_names_nothing_outside(url: str, files: list[Path]) -> None:
    answers = [
        ask(url, "GET", "/"),
        ask(url, "GET", "/viewer.js"),
        ask(url, "GET", "/nothing"),
        ask(url, "GET", "/", headers={"Host": "evil.example"}),
        ask(url, "POST", "/api/predict", b"no"),
        ask(url, "POST", "/api/maps", files[0].read_bytes()),
    ]
    for _, headers, _ in answers:
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
        assert headers["server"] is headers["access-control-allow-origin"] is headers["set-cookie"] is None
    page = answers[0][2].decode()
    assert "&lt;b&gt;untrained&lt;/b&gt;" in page
    assert "Research use only; not a medical device." in page
    loaded = re.findall(r'(?:href|src)="([^"#][^"]*)"', page)
    assert len(loaded) == 6
    for name in loaded:
        status, headers, content = ask(url, "GET", name)
        assert (status, headers["content-type"].split(";")[0] != "text/html") == (200, True)
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", content)
    assert "style=" not in page, "the policy allows no style in the page"


def test_every_refusal_is_ours(url: str) -> None:
    """In JSON, with a sentence and the security headers, also where uvicorn or Starlette would refuse."""
    post = b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/dicom\r\n"
    for sent, status in (
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000, 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a:\n" * 101, 431),
        (post + b"Content-Length: x\r\n\r\n", 400),
        (post + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (post + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n", 413),
        (post + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100, 411),
        (post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"GET /viewer.js/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"BREW /a/b HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        *(
            (post + b"Origin: " + origin + b"\r\n\r\n", 403)
            for origin in (b"http://[", b"http://[::1", b"//[x]", b"\xe9", b"http://localhost\r\nOrigin: http://a")
        ),
        *(
            (b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", 421)
            for host in (
                b"[",
                b"a@localhost",
                b"localhost#.a",
                b"localhost/a",
                b"localhost:a",
                b"local\thost",
                b"[localhost]",
            )
        ),
    ):
        head, _, body = raw(url, sent).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        assert b"content-security-policy: default-src 'none'" in head.lower()
        assert b"connection: close" in head.lower()
        words = json.loads(body)["error"]
        assert words.endswith(".")
        assert len(words.split()) > 4


def test_a_file_that_takes_too_long_or_crashes_the_process_ends_no_other_request() -> None:
    with Worker(work, compute_s=1) as worker, serving(worker, Limits()) as (url, defects):
        assert ask(url, "POST", "/api/predict", b"one")[2] == b"one"
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(ask, url, "POST", "/api/predict", b"sleep")
            time.sleep(0.2)
            waiting = pool.submit(ask, url, "POST", "/api/maps", b"two")
            assert ask(url, "GET", "/nothing")[0] == 404, "meanwhile others are answered"
            assert error_of(slow.result()) == (422, "This file was given up: it took more than 1 s to compute.")
            assert waiting.result()[2] == b"two"
        status, words = error_of(ask(url, "POST", "/api/predict", b"crash"))
        assert (status, "no other file is affected" in words) == (500, True)
        assert ask(url, "POST", "/api/predict", b"three")[2] == b"three"
        assert defects == ["the process that predicts ended with code 9"]
        worker._process.kill()
        worker._process.join()
        assert ask(url, "POST", "/api/predict", b"four")[2] == b"four", "it is not blamed for that"
        process = worker._process
    assert not process.is_alive()


def test_a_process_that_is_stopped_or_killed_before_a_file_ends_neither_server_nor_file() -> None:
    """A pipe to a stopped process takes 0.2 MB and then blocks; one to a process that is about to end takes a file."""
    large = bytes(3_000_000)
    with Worker(work, compute_s=2) as worker, serving(worker, Limits()) as (url, defects):
        for number, size in ((signal.SIGSTOP, 10), (signal.SIGSTOP, len(large)), (signal.SIGKILL, len(large))):
            os.kill(worker._process.pid or 0, number)
            assert ask(url, "POST", "/api/predict", large[:size])[2] == large[:size], "a new process predicts it"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, url, "POST", "/api/predict", b"sleep")
            time.sleep(0.5)
            os.kill(worker._process.pid or 0, signal.SIGSTOP)
            assert error_of(asked.result()) == (422, "This file was given up: it took more than 2 s to compute.")
        assert defects == []
    with Worker(work, "deaf", compute_s=0.5) as worker, serving(worker, Limits()) as (url, defects):
        status, words = error_of(ask(url, "POST", "/api/predict", large))
        assert (status, "receives no files at present" in words) == (503, True)
        assert defects == ["the process that predicts received no file twice"]


@pytest.mark.parametrize(("broken", "words"), [("error", "no model at nowhere"), ("crash", "ended with code 7")])
def test_a_worker_that_cannot_start_says_why(broken: str, words: str) -> None:
    with pytest.raises(RunError, match=words), Worker(work, broken, compute_s=1):
        pass


def test_several_at_a_time_get_their_own_answers(url: str, files: list[Path]) -> None:
    alone = [ask(url, "POST", "/api/predict", path.read_bytes())[2] for path in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: ask(url, "POST", "/api/predict", path.read_bytes())[2], files * 2))
    assert together == alone * 2


def test_a_defect_tells_its_place_and_no_value(files: list[Path]) -> None:
    class Broken(Predictor):
        def predict_content(self, content: bytes, name: str = "", check: object = None) -> object:  # type: ignore[override]
            raise ValueError("Quagmire")

    sound = make_predictor(OperatingPoint(top=0.5, min_area_px=0, bottom=0.5))
    with serving(Broken(sound.cards, sound.models, sound.device)) as (url, defects):
        status, words = error_of(ask(url, "POST", "/api/maps", files[0].read_bytes()))
    assert (status, "defect" in words) == (500, True)
    assert [re.sub(r"\d+", "N", place) for place in defects] == ["ValueError in worker.py, line N"]
    assert "Quagmire" not in words


def test_the_command_serves_stores_nothing_names_nobody_and_ends_with_ctrl_c(
    finished_run: Path, files: list[Path], tmp_path: Path
) -> None:
    for name in ("here", "tmp"):
        (tmp_path / name).mkdir()
    paths = [str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]]
    command = [sys.executable, "-m", "ptxdist", "serve", str(finished_run), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--json"], cwd=tmp_path / "here", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    try:
        assert process.stdout
        printed = json.loads(_object(process.stdout))
        found = [ask(printed["url"], "POST", path, files[0].read_bytes()) for path in ("/api/predict", "/api/maps")]
        here = Predictor.load(finished_run, device="cpu").predict(files[0])
        px = here.mask.size // 1000  # another number of threads rounds differently, no more
        assert json.loads(found[0][2])["area_px"] == pytest.approx(here.area_px, abs=px)
        refused = [ask(printed["url"], "POST", "/api/predict", b"Quagmire"), ask(printed["url"], "GET", "/Quagmire")]
        assert [item[0] for item in [*found, *refused]] == [200, 200, 422, 404]
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "nothing was stored" in err
    answers = [*found, *refused]
    texts = [out, err, *(str(headers) + content.decode("latin-1") for _, headers, content in answers)]
    assert [secret for secret in SECRETS for text in texts if secret in text] == []
    assert list((tmp_path / "here").iterdir()) == []
    left = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert left == []


@pytest.fixture
def no_model(tmp_path: Path) -> str:
    """A folder that looks like a finished run, with damaged files."""
    for name in (SETTINGS, RESULT):
        (tmp_path / name).touch()
    return str(tmp_path)


def test_a_port_in_use_and_a_foreign_address_are_refused_before_the_model_is_loaded(no_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli, ["serve", no_model, "--port", port])
        assert done.exit_code == AddressError.exit_code
        assert f"port {port}" in done.stderr
        assert "--port" in done.stderr
    done = CliRunner().invoke(cli, ["serve", no_model, "--host", "192.0.2.1", "--port", "0"])
    assert done.exit_code == AddressError.exit_code
    assert "--host" in done.stderr


def test_a_warning_says_who_can_reach_it(no_model: str) -> None:
    for host, reached in (("127.0.0.1", False), ("0.0.0.0", True)):
        done = CliRunner().invoke(cli, ["serve", no_model, "--host", host, "--port", "0"])
        assert done.exit_code == RunError.exit_code
        assert ("no password" in done.stderr) == reached
    for host, reached in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        with server.listen(host, 0) as listening:
            assert server.is_loopback(listening) != reached
            name = urlsplit(server.url_of(listening)).hostname
            assert name == (socket.gethostname().lower() if reached else "127.0.0.1")


def _object(stream: io.TextIOBase | object) -> str:
    """The first JSON object of a stream of lines."""
    text = ""
    for line in stream:  # type: ignore[attr-defined]
        text += line
        if line.startswith("}") or text.rstrip().endswith("}"):
            return text
    raise AssertionError(f"no JSON, only {text!r}")
