"""Files that cannot be used become rejects; too many of them stop the command."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_files import Renewal, digests, rejects_of
from tiny_caches import column

from ptxdist.cache import render, scan
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import verify
from ptxdist.errors import CatalogError, LabelError, StoreError


def test_bad_files_become_rejects_and_stop_nothing(small_dataset, tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom"))
    files = sorted(dicom.rglob("*.dcm"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])  # a positive or negative case: its header is whole
    (dicom / "empty.dcm").touch()
    for number in range(10):  # so that three of 36 are less than a tenth
        write_dicom(dicom / f"more{number}.dcm", np.zeros((32, 32), np.uint8), f"2.{number}")
    (dicom / "text.dcm").write_text("not DICOM")
    out = tmp_path / "cache"
    result = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    truncated = files[1].relative_to(dicom).as_posix()
    found = rejects_of(out)  # test_dicom has the reasons in full
    assert set(found) == {"empty.dcm", "text.dcm", truncated}
    for name, reason in (("empty.dcm", "is empty"), ("text.dcm", "is not a DICOM file"), (truncated, "is cut off")):
        assert found[name].startswith(reason)
    assert {reject.path: reject.reason for reject in result.catalog.rejects} == rejects_of(out)
    [rejected] = [case for case in read_catalog(out).cases if case.split == "rejected"]
    assert (result.paths[rejected.case_id], rejected.fold) == (truncated, -1)
    store = open_store(out, 48)
    index = column(store, "case_id").tolist().index(rejected.case_id)
    assert Counter(column(store, "split").tolist())["rejected"] == 1
    assert column(store, "split")[index] == "rejected"
    assert not store.sample(index)[0].any()
    assert result.catalog.sides()["rejected"]["cases"] == 1

    before = digests(out)
    sides = result.catalog.sides()  # a rejected case is on neither
    assert result.catalog.leakage.val_cases == sides["val"]["cases"]

    again = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    assert (again.written, again.catalog.rejects) == (0, result.catalog.rejects)
    assert digests(out) == before
    files[1].write_bytes(content)
    mended = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    assert mended.written == 2
    assert truncated not in rejects_of(out)
    assert open_store(out, 48).sample(index)[0].any()


def test_file_that_changes_meanwhile_is_tried_again_by_the_next_run(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dicom, out = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom")), tmp_path / "cache"
    path = min(dicom.rglob("*.dcm"))
    content = path.read_bytes()

    def take_away(step: str, done: int, total: int) -> None:
        if (step, done) == ("headers", total):
            path.unlink()

    result = preprocess(dicom, small_dataset.labels, out, sizes_px=(32,), on_progress=take_away)
    assert [reject.reason for reject in result.catalog.rejects] == ["cannot be read: No such file or directory"]
    path.write_bytes(content)
    again = preprocess(dicom, small_dataset.labels, out, sizes_px=(32,))
    assert (again.written, again.catalog.rejects) == (1, ())
    assert open_store(out, 32).sample(0)[0].any()


@pytest.mark.parametrize(
    "error", [MemoryError, RecursionError, lambda text: UnicodeDecodeError("utf-8", b"", 0, 1, text)]
)
def test_whatever_goes_wrong_with_a_file_is_its_own_reject_until_the_next_run(  # type: ignore[no-untyped-def]
    small_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[str], Exception]
) -> None:
    out, files = tmp_path / "cache", sorted(small_dataset.dicom.rglob("*.dcm"))[:2]
    contents = [path.read_bytes() for path in files]

    def failing(number: int, function):  # type: ignore[no-untyped-def]
        def read(content: bytes, *args, **named):  # type: ignore[no-untyped-def]
            if content == contents[number]:
                raise error("Quagmire")
            return function(content, *args, **named)

        return read

    with monkeypatch.context() as patched:
        patched.setattr(scan, "read_header", failing(0, scan.read_header))
        patched.setattr(render, "read_radiograph", failing(1, render.read_radiograph))
        result = preprocess(small_dataset.dicom, small_dataset.labels, out, sizes_px=(32,))
        patched.setattr(scan, "read_header", failing(0, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            preprocess(small_dataset.dicom, small_dataset.labels, out, sizes_px=(32,))
    assert len(result.catalog.rejects) == 2
    reasons = rejects_of(out)
    for path, module in zip(files, ("scan", "render"), strict=True):
        reason = reasons[path.relative_to(small_dataset.dicom).as_posix()]
        assert f"({type(error('')).__name__} in {module}.py, line " in reason
        assert "Quagmire" not in reason
    again = preprocess(small_dataset.dicom, small_dataset.labels, out, sizes_px=(32,))
    assert (again.written, again.catalog.rejects) == (1, ())


@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_too_many_rejects_are_an_error_that_shows_the_first(small_dataset, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    dicom, out = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom")), tmp_path / "cache"
    for path in sorted(dicom.rglob("*.dcm"))[:3]:
        path.write_bytes(path.read_bytes()[: 200 if damage == "header" else -500])
    with pytest.raises(CatalogError) as caught:
        preprocess(dicom, small_dataset.labels, out, sizes_px=(32,))
    assert str(caught.value).startswith("3 of 24 files cannot be used, more than a tenth; the reasons are in ")
    assert str(out / "rejects.csv") in str(caught.value)
    assert "is cut off" in str(caught.value)
    assert caught.value.exit_code == 6
    assert len(rejects_of(out)) == 3
    assert (out / "32.zarr").exists() == (damage == "pixels")
    with pytest.raises(StoreError):
        open_store(out, 32)


@pytest.mark.parametrize("wrong", ["images", "labels", "patients"])
def test_wrong_input_is_refused_before_anything_is_written(small_dataset, tmp_path: Path, wrong: str) -> None:  # type: ignore[no-untyped-def]
    paths = {"images": small_dataset.dicom, "labels": small_dataset.labels, "patients": small_dataset.patients}
    paths[wrong] = tmp_path / "nowhere"
    with pytest.raises((CatalogError, LabelError), match="nowhere"):
        preprocess(out=tmp_path / "cache", sizes_px=(32,), **paths)
    assert not (tmp_path / "cache").exists()


def test_ids_of_another_kind_are_shown(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    header, *rows = small_dataset.labels.read_text().splitlines()
    ends = {"write ids without .dcm or .png": ".dcm", "do both belong to the same data set?": "-x"}
    for hint, end in ends.items():
        table = tmp_path / "labels.csv"
        table.write_text("\n".join([header, *(row.replace(",", f"{end},", 1) for row in rows)]))
        with pytest.raises(
            CatalogError, match=r"none of the 24 images in .* has a label in .* \(ids of images: "
        ) as caught:
            preprocess(small_dataset.dicom, table, tmp_path / "cache", sizes_px=(32,))
        assert str(caught.value).endswith(f"{end}): {hint}")


def test_renewal_with_too_many_rejects_leaves_the_cache_to_be_trained_on(renewal: Renewal) -> None:
    """Such as after a wrong --dicom; rejects.csv then has the reasons, and everything else is as it was."""
    before = digests(renewal.cache)
    for number in range(40):
        renewal.file(number).unlink()
        renewal.file(number).touch()
    with pytest.raises(CatalogError, match="40 of 300 files cannot be used"):
        renewal.run()
    assert len(rejects_of(renewal.cache)) == 40
    assert verify(renewal.cache) == []
    now = digests(renewal.cache)
    assert {name for name in before if now[name] != before[name]} == {"rejects.csv", "manifest.json"}
    assert open_store(renewal.cache, 32).cases == 300
