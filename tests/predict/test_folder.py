"""`ptxdist predict`: what it writes and rejects, reruns, locks; the round trip through DICOM SEG."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from browser import CHROMIUM, CONTRAST, browser
from click.testing import CliRunner
from imagecodecs import jpeg2k_encode
from locking import NO_LOCKS, failing, held
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from ptxdist import Predictor
from ptxdist.cli import cli
from ptxdist.errors import BusyError, CatalogError, LabelError, RunError
from ptxdist.executor import processes
from ptxdist.files import read_json, write_json
from ptxdist.labels import rle
from ptxdist.predict import folder as command
from ptxdist.predict import inputs
from ptxdist.predict import page as prediction_page
from ptxdist.predict import predictor as predictor_module
from ptxdist.predict.findings import position_of, read_finished
from ptxdist.predict.folder import Finding, predict_files
from ptxdist.predict.inputs import find_inputs, read_headers
from ptxdist.predict.page import COLUMNS
from ptxdist.records import OperatingPoint
from ptxdist.report.report import write_report
from ptxdist.scores.external import score_predictions
from ptxdist.train.evaluate import evaluate_runs

SECRETS = ("Quagmire", "Zebulon", "QX7-HOSPITAL", "19391207", "MAPPED-PERSON")  # of conftest
ALWAYS = OperatingPoint(top=0.0, min_area_px=0, bottom=0.0)
PAGE = prediction_page.Context("nodule", "a nodule", ("a", "b"), "no rule", "Means nothing.", rejected=1, repeated=2)
SIZES = {"1.2.1": (96, 128), "1.2.2": (160, 96), "1.2.3": (128, 128), "1.2.4": (120, 130), "1.2.5": (64, 96)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, write_dicom: Callable[..., Path]) -> Path:
    """Five radiographs: JPEG, MONOCHROME1, 16 bit, JPEG 2000, JPEG beside them; and a file that is none."""
    folder = tmp_path_factory.mktemp("predict") / "Quagmire_Zebulon"
    random = np.random.default_rng(3)
    common = {"StudyInstanceUID": "1.2.7", "SeriesInstanceUID": "1.2.8", "StudyDate": "20260101"}
    for number, (uid, shape) in enumerate(SIZES.items()):
        pixels = cv2.GaussianBlur(random.integers(0, 256, shape, dtype=np.uint8), (15, 15), 0)
        tags = common | ({"PhotometricInterpretation": "MONOCHROME1"} if number == 1 else {})
        wide = pixels.astype(np.uint16) * 200 if number == 2 else pixels
        path = write_dicom(folder / f"study{number}" / f"{number}.dcm", wide, uid, raw=number in (1, 3), **tags)
        if number == 3:
            file = pydicom.dcmread(path)
            file.PixelData = encapsulate([jpeg2k_encode(wide, codecformat="J2K", reversible=True)])
            file["PixelData"].VR, file.file_meta.TransferSyntaxUID = "OB", JPEG2000Lossless
            file.save_as(path)
    whole = write_dicom(folder / "broken.dcm", np.full((64, 64), 80, np.uint8), "1.2.6", **common)
    whole.write_bytes(whole.read_bytes()[:-300])
    return folder


@pytest.fixture(scope="module")
def predictor(finished_run: Path, images: Path) -> Predictor:
    """The run with an operating point at which some pixels are in the mask, and some are not."""
    loaded = Predictor.load(finished_run, device="cpu")
    values = loaded.predict(images / "study2" / "2.dcm").probability
    middle = float(np.quantile(values, 0.7))
    return Predictor.load(
        finished_run, device="cpu", operating_point=ALWAYS.model_copy(update={"top": middle, "bottom": middle})
    )


def read_table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def done(predictor: Predictor, finished_run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one command, all kinds of them."""
    out = tmp_path_factory.mktemp("predict-out") / "out"
    result = predict_files([images], out, predictor, [finished_run], outputs=("masks", "overlays", "seg"))
    assert (result.predicted, result.kept, result.rejected, result.repeated) == (5, 0, 1, 0)
    return out


def test_the_submission_is_the_challenges_and_says_what_the_masks_say(
    done: Path, predictor: Predictor, images: Path
) -> None:
    lines = (done / "submission.csv").read_text().split("\n")
    assert lines[0] == "ImageId,EncodedPixels"
    assert lines[-1] == ""
    rows = dict(read_table(done / "submission.csv")[1:])
    assert set(rows) == set(SIZES)
    assert len(set(rows.values()) - {"-1"}) >= 2
    for number, (uid, shape) in enumerate(SIZES.items()):
        mask = cv2.imread(str(done / "masks" / f"{uid}.png"), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        assert mask.shape == shape
        assert set(np.unique(mask)) <= {0, 255}
        assert rows[uid] == rle.encode(mask)
        prediction = predictor.predict(images / f"study{number}" / f"{number}.dcm")
        assert np.mean(prediction.mask != (mask > 0)) < 1e-3, "a single image is rounded differently"
        finding = Finding.model_validate(read_json(done / "findings" / f"{uid}.json", ""))
        assert finding.area_px == np.count_nonzero(mask)
        assert finding.encoded_pixels == rows[uid]
        assert (finding.rows, finding.columns) == shape
        assert finding.area_mm2 is None
        assert "Secondary Capture" in finding.mm2_reason
        assert (done / "overlays" / f"{uid}.jpg").is_file()


def test_the_table_of_findings_is_sorted_by_score_and_says_what_the_findings_say(done: Path) -> None:
    head, *rows = read_table(done / "findings.csv")
    assert tuple(head) == COLUMNS, "no name of a file, unless it is asked for"
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    for row in rows:
        finding = Finding.model_validate(read_json(done / "findings" / f"{row[0]}.json", ""))
        assert row[3:5] == ["yes" if finding.area_px else "no", str(finding.area_px)]
        assert (row[6], row[7]) == (finding.side or "", finding.zone or "")
        assert bool(finding.side) == bool(finding.area_px)


def test_the_page_shows_marked_images_first_and_the_rest_as_a_table(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File names are escaped; in the table no spreadsheet runs them."""
    page = (done / "index.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 5
    assert "<script" not in page
    assert "://" not in page, "nothing is fetched"
    assert [page.index(f">{uid}<") > 0 for uid in SIZES] == [True] * 5

    findings = [Finding.model_validate(read_json(path, "")) for path in sorted((done / "findings").iterdir())]
    findings[0] = findings[0].model_copy(update={"area_px": 0, "score": 0.9, "side": None, "unlike": "darker <b>"})
    findings[0] = findings[0].model_copy(update={"flagged": True})
    findings[3] = findings[3].model_copy(update={"area_px": 7, "score": 0.1, "side": "both sides", "calibrated": 0.3})
    out, names = shutil.copytree(done, tmp_path / "out"), {uid: f"=<b>{uid[-1]}.dcm" for uid in SIZES}
    monkeypatch.setattr(prediction_page, "PICTURES", 4)
    prediction_page.write_page(out, findings, names, PAGE)
    prediction_page.write_table(out, findings, names)
    page = (out / "index.html").read_text()
    assert "<h1>4 of 5 images are marked, 1 more is flagged without a mask</h1>" in page
    assert page.count("flagged by its score, without a mask") == 1
    assert "not marked" not in page, "a flagged image does not read as negative"
    assert page.count("<img ") == 4
    places = [page.index(f"=&lt;b&gt;{uid[-1]}.dcm") for uid in ("1.2.4", "1.2.1")]
    assert places == sorted(places), "marked ones first, whatever their score"
    assert page.index('<table class="rest">') < places[1]
    assert "darker &lt;b&gt;" in page
    assert "<b>" not in page
    assert PAGE.caution in page
    assert "1 file was rejected" in page
    assert "2 files repeat others" in page
    assert "so many had a nodule" in page, "what a probability is, where there is one"
    table = read_table(out / "findings.csv")
    assert table[0][:2] == ["ImageId", "file"]
    assert {row[1] for row in table[1:]} == {f"'=<b>{uid[-1]}.dcm" for uid in SIZES}
    assert {row[0]: (row[4], row[-1]) for row in table[1:]}["1.2.1"] == ("no", "yes"), "marked, flagged"


def test_names_that_are_no_text_are_kept_escaped(
    predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    """Bytes that are not UTF-8, control characters, and those that reverse the direction of reading."""
    folder = tmp_path / "in"
    folder.mkdir()
    hostile = {"1.2.1": b"\xff\xfe.dcm", "1.2.2": b"\x1b[31m.dcm", "1.2.5": "\u202egnp.dcm".encode()}
    for uid, name in hostile.items():
        number = [*SIZES].index(uid)
        shutil.copy(images / f"study{number}" / f"{number}.dcm", os.fsencode(folder) + b"/" + name)
    predict_files([folder], tmp_path / "out", predictor, [finished_run], outputs=(), keep_names=True)
    rows = {row[0]: row[1] for row in read_table(tmp_path / "out" / "findings.csv")[1:]}
    assert rows == {"1.2.1": "\\udcff\\udcfe.dcm", "1.2.2": "\\x1b[31m.dcm", "1.2.5": "\\u202egnp.dcm"}
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert [name in page for name in rows.values()] == [True] * 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_complaint(done: Path, tmp_path: Path) -> None:
    """With a caution, an image that is unlike others, and one in the table; in both modes, wide and narrow."""
    out = shutil.copytree(done, tmp_path / "out")
    findings = [Finding.model_validate(read_json(path, "")) for path in sorted((done / "findings").iterdir())]
    (out / "overlays" / f"{findings[0].case_id}.jpg").unlink()
    findings = [finding.model_copy(update={"unlike": "darker than nearly all of them"}) for finding in findings]
    prediction_page.write_page(out, findings, None, PAGE)
    with browser(tmp_path / "chromium") as tab:
        for width, dark in ((1280, False), (390, True)):
            tab.open((out / "index.html").as_uri(), width, dark=dark)
            assert tab.run(CONTRAST) == []
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("[...document.images].filter(image => image.naturalWidth !== 384).length") == 0
            assert tab.complaints() == []
            assert [url for url in tab.requests() if not url.startswith("data:")] == [(out / "index.html").as_uri()]


@pytest.mark.parametrize(
    ("place", "orientation", "side", "zone"),
    [
        ((0, 0), "", "left of the image", "upper"),
        ((8, 9), "", "right of the image", "lower"),
        ((0, 0), "LF", "patient's right", "upper"),
        ((4, 9), "LF", "patient's left", "middle"),
        ((0, 0), "RF", "patient's left", "upper"),
        ((0, 0), "LH", "patient's right", "lower"),
        ((0, 9), "FL", "patient's right", "lower"),  # turned by 90 degrees
        ((0, 0), "AF", "left of the image", "upper"),  # a lateral view has no sides
        ((0, 0), "LR", "left of the image", "upper"),
    ],
)
def test_side_and_zone_of_a_mask(place: tuple[int, int], orientation: str, side: str, zone: str) -> None:
    mask = np.zeros((9, 10), bool)
    mask[place] = True
    assert position_of(mask, orientation) == {"side": side, "zone": zone}
    assert position_of(~mask, orientation)["side"] == "both sides"
    assert position_of(mask & False, orientation) == {}


def test_a_finding_of_an_older_version_gets_its_place_and_its_flag(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    found = read_json(out / "findings" / "1.2.1.json", "")
    before = {name: found.pop(name) for name in ("side", "zone", "flagged")}
    write_json(out / "findings" / "1.2.1.json", found)
    again = read_finished(out, "1.2.1", found["digest"], (), ALWAYS)
    assert again is not None
    assert {"side": again.side, "zone": again.zone, "flagged": again.flagged} == before
    write_json(out / "findings" / "1.2.1.json", found | {"area_px": 0, "encoded_pixels": "-1", "score": 0.3})
    for image, flagged in ((0.0, False), (0.3, True), (0.4, False)):
        point = OperatingPoint(image=image, top=0.5, min_area_px=0, bottom=0.5)
        empty = read_finished(out, "1.2.1", found["digest"], (), point)
        assert empty is not None
        assert empty.flagged is flagged


@pytest.mark.parametrize(
    "damage",
    [{"encoded_pixels": "x y"}, {"encoded_pixels": "99999 3"}, {"rows": -5}, {"rows": 10**9}, {"case_id": "1.2.2"}],
    ids=str,
)
def test_a_damaged_finding_of_an_older_version_is_made_anew(tmp_path: Path, damage: dict[str, object]) -> None:
    sound: dict[str, object] = {
        "case_id": "1.2.1", "digest": "d", "rows": 9, "columns": 9, "score": 0.5, "area_px": 3, "area_mm2": None,
        "mm2_plane": "", "mm2_reason": "", "seg_reason": "", "encoded_pixels": "1 3",
    }  # fmt: skip
    (tmp_path / "findings").mkdir()
    for content, is_sound in ((sound, True), (sound | damage, False)):
        write_json(tmp_path / "findings" / "1.2.1.json", content)
        assert (read_finished(tmp_path, "1.2.1", "d", (), ALWAYS) is not None) == is_sound


def test_the_folder_and_its_masks_can_be_scored(done: Path, tmp_path: Path) -> None:
    """The noise of an untrained network is no truth in a folder, so it is given as a table with its encoding."""
    truth = done / "submission.csv"
    for predictions, words in ((done, "folder of ptxdist predict"), (done / "masks", "mask")):
        found = score_predictions(predictions, truth, truth_dialect="relative-columns")
        assert (found.cases, found.scores["pooled_dice"].value) == (5, 1.0)
        assert words in found.predictions
    changed = shutil.copytree(done, tmp_path / "changed")
    (changed / "submission.csv").write_bytes(truth.read_bytes()[:-1])
    with pytest.raises(LabelError, match=r"submission.csv has another checksum .*; rerun `ptxdist predict`, or give"):
        score_predictions(changed, truth)


def test_nothing_predicted_is_minus_one(finished_run: Path, images: Path, tmp_path: Path) -> None:
    never = OperatingPoint(top=1.0, min_area_px=2**30, bottom=1.0)
    predictor = Predictor.load(finished_run, device="cpu", operating_point=never)
    predict_files([images / "study4"], tmp_path / "out", predictor, [finished_run], outputs=("seg",))
    assert (tmp_path / "out" / "submission.csv").read_bytes() == b"ImageId,EncodedPixels\n1.2.5,-1\n"
    assert (
        json.loads((tmp_path / "out" / "findings" / "1.2.5.json").read_text())["seg_reason"] == "nothing is predicted"
    )
    assert predict_files([images / "study4"], tmp_path / "out", predictor, [finished_run], outputs=("seg",)).kept == 1


def test_only_rejects_name_paths_and_only_seg_names_the_patient(done: Path) -> None:
    rejects = read_table(done / "rejects.csv")
    assert rejects[0] == ["path", "reason"]
    assert [row[0].rsplit("/", 1)[1] for row in rejects[1:]] == ["broken.dcm"]
    for name, content in contents(done).items():
        for secret in (b"Quagmire", b"QX7-HOSPITAL", b"19391207"):
            assert secret not in content or name.startswith("seg/") or name == "rejects.csv", name


def test_a_mask_goes_through_dicom_seg_unchanged(done: Path) -> None:
    import SimpleITK

    seen = 0
    for uid in SIZES:
        mask = cv2.imread(str(done / "masks" / f"{uid}.png"), cv2.IMREAD_UNCHANGED) > 0
        path = done / "seg" / f"{uid}.dcm"
        assert path.is_file() == mask.any()
        if not mask.any():
            continue
        seen += 1
        reference = pydicom.dcmread(path).ReferencedSeriesSequence[0]
        assert reference.SeriesInstanceUID == "1.2.8"
        assert reference.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == uid
        back = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0] > 0
        assert back.shape == mask.shape
        dice = 2 * np.count_nonzero(back & mask) / (np.count_nonzero(back) + np.count_nonzero(mask))
        assert dice == 1.0
    assert seen >= 2


def test_dciodvfy_finds_no_error_in_a_segmentation(done: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (Debian: apt-get install dicom3tools)")
    checked = 0
    for path in (done / "seg").glob("*.dcm"):
        found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        errors = [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("Error")]
        assert errors == []
        checked += 1
    assert checked


def test_the_same_command_goes_on_and_does_nothing_twice(
    done: Path, predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    whole = contents(out)
    (out / "masks" / "1.2.2.png").unlink()
    (out / "findings" / "1.2.3.json").unlink()
    (out / "findings" / "1.2.4.json").write_text("{")
    overlay = out / "overlays" / "1.2.5.jpg"
    overlay.write_bytes(overlay.read_bytes()[:-9])
    result = predict_files([images], out, predictor, [finished_run], outputs=("masks", "overlays"))
    assert (result.predicted, result.kept) == (4, 1)
    after = contents(out)
    tables = {f"findings/1.2.{n}.json" for n in (2, 3, 4, 5)} | {"findings.csv", "index.html"}  # their last digits
    assert {name for name in after if after[name] != whole[name]} <= tables
    assert {name: after[name] for name in after if name.startswith(("masks", "sub", "rej"))} == {
        name: whole[name] for name in whole if name.startswith(("masks", "sub", "rej"))
    }
    assert not list(out.rglob("*.tmp"))


def test_another_operating_point_or_another_model_is_refused(done: Path, finished_run: Path, images: Path) -> None:
    before = contents(done)
    other = Predictor.load(finished_run, device="cpu", operating_point=ALWAYS)
    with pytest.raises(RunError, match=r"operating point.*--out"):
        predict_files([images], done, other, [finished_run])
    two = Predictor.load(finished_run, finished_run, device="cpu")
    with pytest.raises(RunError, match="models"):
        predict_files([images], done, two, [finished_run, finished_run])
    assert contents(done) == before


def test_processes_write_the_same_bytes(
    done: Path, predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_FILES_A_TASK", 3)
    with processes(2) as executor:
        predict_files(
            [images], tmp_path / "out", predictor, [finished_run], device="cpu", executor=executor, workers=2,
            outputs=("masks", "overlays"),
        )  # fmt: skip
    found, whole = contents(tmp_path / "out"), contents(done)
    for name in found:
        if not name.startswith("findings/"):
            assert found[name] == whole[name], name
        else:
            drop = {"seg_reason": "", "sha256": {}}
            assert json.loads(found[name]) | drop == json.loads(whole[name]) | drop


def test_a_zip_file_is_read_safely(predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(images / "study0" / "0.dcm", "../../outside/0.dcm")
        file.write(images / "study1" / "1.dcm", "/etc/1.dcm")
        file.write(images / "study1" / "1.dcm", "again/1.dcm")
        file.writestr("bomb.dcm", bytes(200 * 2**20))
        file.writestr("notes.txt", "Quagmire")
    result = predict_files([archive], tmp_path / "out", predictor, [finished_run], outputs=("masks",))
    assert (result.predicted, result.rejected, result.repeated) == (2, 1, 1)
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {"1.2.1.png", "1.2.2.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"images.zip", "out"}
    assert "has 209,715,200 bytes unpacked" in read_table(tmp_path / "out" / "rejects.csv")[1][1]


def test_a_mask_of_too_many_pieces_rejects_its_file_only(
    predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rle, "MOST_RUNS", 0)
    always = Predictor(predictor.cards, predictor.models, predictor.device, ALWAYS)
    with pytest.raises(CatalogError, match=r"none of the 1 files could be used, .* has a mask of .* pieces of columns"):
        predict_files([images / "study0"], tmp_path / "out", always, [finished_run], outputs=("masks",))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_and_files_that_are_no_images(images: Path, tmp_path: Path) -> None:
    """A zip file that was appended to has several members of one name; only images among the others are read."""
    archive, first, second = tmp_path / "images.zip", images / "study0" / "0.dcm", images / "study1" / "1.dcm"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(first, "CD/IM1")
        file.write(second, "CD/IM1")
        for name in ("LICENSE", "LOCKFILE", "CD/IM2.png"):
            file.writestr(name, b"text" * (name == "LICENSE"))
    inputs = find_inputs([archive])
    assert [item.shown for item in inputs] == [f"{archive}:CD/IM1"] * 2
    assert [item.read() for item in inputs] == [first.read_bytes(), second.read_bytes()]
    assert [item.case_id for item in read_headers(inputs)] == ["1.2.1", "1.2.2"]

    report = tmp_path / "CD" / "report.dcm"
    report.parent.mkdir()
    report.write_bytes(bytes(128) + b"DICM\2\0\2\0UI\x1e\x001.2.840.10008.5.1.4.1.1.88.11\0")
    with pytest.raises(CatalogError, match=r"no DICOM files .* \(1 other files: "):
        find_inputs([report.parent])
    shutil.copy(first, report.parent / "IM1")
    assert [Path(item.path).name for item in find_inputs([report.parent])] == ["IM1"]
    assert len(find_inputs([report])) == 1, "a file that is named is tried, and rejected with the reason"


def test_a_compression_that_is_not_supported_is_not_called_damage(images: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(images / "study0" / "0.dcm", "one.dcm")
    content = bytearray(archive.read_bytes())
    for start in (content.index(b"PK\3\4") + 8, content.index(b"PK\1\2") + 10):
        content[start] = 9  # Deflate64, as Windows makes it for large files
    archive.write_bytes(content)
    [found] = read_headers(find_inputs([archive]))
    assert found.reason == "is compressed in its zip file by a method that is not supported; unpack it first"


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # of writing the files
def test_one_id_with_two_contents_and_ids_that_are_no_uid(
    predictor: Predictor, finished_run: Path, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    pixels = np.full((64, 64), 90, np.uint8)
    write_dicom(tmp_path / "in" / "a.dcm", pixels, "ID_0011fe81e")
    write_dicom(tmp_path / "in" / "b.dcm", pixels + 1, "ID_0011fe81e")
    always = Predictor(predictor.cards, predictor.models, predictor.device, ALWAYS)
    result = predict_files([tmp_path / "in"], tmp_path / "out", always, [finished_run], outputs=("seg",))
    assert (result.predicted, result.rejected) == (1, 1)
    assert read_table(tmp_path / "out" / "rejects.csv")[1][0].endswith("b.dcm")
    finding = json.loads((tmp_path / "out" / "findings" / "ID_0011fe81e.json").read_text())
    assert "no valid SOPInstanceUID" in finding["seg_reason"]
    assert not (tmp_path / "out" / "seg").exists()


@pytest.mark.parametrize("where", ["header", "decoding", "map", "files"])
def test_whatever_goes_wrong_with_a_file_is_its_own_reject(
    predictor: Predictor,
    finished_run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    module, name = {
        "header": (inputs, "read_header"),
        "decoding": (predictor_module, "read_radiograph"),
        "map": (predictor_module, "to_original"),
        "files": (command, "write_case"),
    }[where]
    function, calls = getattr(module, name), []

    def fail(*args, **named):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == 2:
            raise MemoryError("Quagmire") if where == "map" else RecursionError("Quagmire")
        return function(*args, **named)

    monkeypatch.setattr(module, name, fail)
    paths = [images / f"study{number}" for number in range(5)]
    result = predict_files(paths, tmp_path / "out", predictor, [finished_run], outputs=())
    assert (result.predicted, result.rejected) == (4, 1)
    [reason] = [row[1] for row in read_table(tmp_path / "out" / "rejects.csv")[1:]]
    assert f"Error in {module.__name__.rpartition('.')[2]}.py, line" in reason
    assert "Quagmire" not in reason


def test_odd_headers_and_names_stop_nothing(
    finished_run: Path, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    """An age of 5,000 digits, a PNG whose name is not UTF-8, and spacings of one value, of none, and of text."""
    pixels = cv2.GaussianBlur(np.random.default_rng(3).integers(0, 256, (64, 64), dtype=np.uint8), (9, 9), 0)
    common = {"StudyInstanceUID": "1.2.7", "SeriesInstanceUID": "1.2.8"}
    for number, tags in enumerate(({"PatientAge": "9" * 5000}, {"PixelSpacing": "0.14"}, {"PixelSpacing": [0, 1]})):
        write_dicom(tmp_path / "in" / f"{number}.dcm", pixels, f"1.2.{number}", **common, **tags)
    odd = write_dicom(tmp_path / "in" / "text.dcm", pixels, "1.2.9", PixelSpacing=[0.25, 0.25], **common)
    odd.write_bytes(odd.read_bytes().replace(b"0.25\\0.25", b"0x25\\a.25"))
    name = tmp_path / "in" / os.fsdecode(b"r\xf6ntgen.png")
    name.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    always = Predictor.load(finished_run, device="cpu", operating_point=ALWAYS)
    result = predict_files([tmp_path / "in", name], tmp_path / "out", always, [finished_run], outputs=("seg",))
    assert (result.predicted, result.rejected) == (4, 1)
    assert sorted(path.stem for path in (tmp_path / "out" / "seg").iterdir()) == ["1.2.0", "1.2.1", "1.2.2"]
    reason = json.loads((tmp_path / "out" / "findings" / "1.2.9.json").read_text())["seg_reason"]
    assert reason.startswith("has a header from which no DICOM SEG can be made (")
    assert b"r\xf6ntgen.png" in (tmp_path / "out" / "rejects.csv").read_bytes()
    done = CliRunner().invoke(
        cli, ["predict", str(finished_run), str(name), str(tmp_path / "in"), "--out", str(tmp_path / "other"), "--json"]
    )
    assert (done.exit_code, json.loads(done.stdout)["rejected"]) == (0, 1)


def test_bad_input_is_refused_and_leaves_nothing(
    predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunError, match="other files"):
        predict_files([images], tmp_path / "other", predictor, [finished_run])
    with pytest.raises(CatalogError, match="nothing at"):
        predict_files([tmp_path / "nowhere"], tmp_path / "out", predictor, [finished_run])
    with pytest.raises(CatalogError, match=r"none of the 1 files .*the first one is "):
        predict_files([images / "broken.dcm"], tmp_path / "out", predictor, [finished_run])
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "none"), str(images), "--out", str(tmp_path / "x")])
    assert done.exit_code == RunError.exit_code
    assert f"nothing at {tmp_path / 'none'}" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_second_process_is_refused(predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path) -> None:
    with held(tmp_path / ".lock"), pytest.raises(BusyError, match="another `ptxdist predict` is writing"):
        predict_files([images / "study4"], tmp_path, predictor, [finished_run])
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    assert predict_files([images / "study4"], tmp_path, predictor, [finished_run]).predicted == 1


@pytest.mark.parametrize("name", [*NO_LOCKS, "EIO"])
def test_only_a_conflict_is_another_process(
    name: str,
    predictor: Predictor,
    finished_run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the file system has no locks, the command continues; another failure is reported as what it is."""
    failing(monkeypatch, name)
    if name == "EIO":
        with pytest.raises(RunError, match="cannot be locked: Input/output error"):
            predict_files([images / "study4"], tmp_path, predictor, [finished_run])
    else:
        assert predict_files([images / "study4"], tmp_path, predictor, [finished_run]).predicted == 1
        assert "without locks" in caplog.text
    assert "another" not in caplog.text


def test_a_command_that_was_killed_early_does_not_stand_in_the_way(
    predictor: Predictor, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "predict.json.ptxdist-0123abcd.tmp").write_text("{")
    assert predict_files([images / "study4"], tmp_path, predictor, [finished_run]).predicted == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_command_prints_what_it_did(finished_run: Path, images: Path, tmp_path: Path) -> None:
    words = [
        "predict",
        finished_run,
        images,
        "--out",
        tmp_path / "out",
        "--threshold",
        "0.2",
        "--min-area",
        "7",
        "--json",
    ]
    done = CliRunner().invoke(cli, [*map(str, words), "--device", "cpu", "--write", "masks"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert (printed["predicted"], printed["rejected"]) == (5, 1)
    assert printed["operating_point"] == {"top": 0.2, "min_area_px": 7, "bottom": 0.2}
    wrong = CliRunner().invoke(cli, [*map(str, words), "--write", "pictures"])
    assert wrong.exit_code == 2


def test_nothing_that_a_run_leaves_names_a_patient(finished_run: Path, tmp_path: Path) -> None:
    """The DICOM files of its cache hold these names, in their headers, their folders and the patient map."""
    copy = Path(shutil.copytree(finished_run, tmp_path / "run"))
    evaluate_runs([copy])
    write_report(copy)
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert {"index.html", "cases.csv", "predictions.csv", "settings.json", "metrics.jsonl"} <= {f.name for f in files}
    for path in files:
        content = str(path.relative_to(copy)).encode() + path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path
