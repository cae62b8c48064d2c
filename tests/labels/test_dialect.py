"""The dialect of a table: all four give the same masks, the right one is found, a wrong table is rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptxdist.errors import LabelError, SettingsError
from ptxdist.finding import load_finding
from ptxdist.labels import rle
from ptxdist.labels.dialect import (
    DIALECTS,
    SIIM,
    Detection,
    Dialect,
    check_mask_files,
    detect_dialect,
    parse_dialect,
    to_siim,
)
from ptxdist.labels.tables import read_labels
from ptxdist.phantoms import anatomy

Mask = npt.NDArray[np.uint8]
Table = dict[str, tuple[str, ...]]
ABSOLUTE = Dialect("absolute", "columns")
NAMES = ("relative-columns", "relative-rows", "absolute-columns", "absolute-rows")


def write(mask: Mask, dialect: Dialect) -> str:
    """A mask in a dialect, by its definition."""
    flat = mask.reshape(-1, order="F" if dialect.order == "columns" else "C")
    numbers, end = [], 0
    edges = np.flatnonzero(np.diff(flat != 0, prepend=False, append=False)).tolist()
    for first, after in zip(edges[::2], edges[1::2], strict=True):
        numbers += [first + 1 if dialect.starts == "absolute" else first - end, after - first]
        end = after
    return " ".join(map(str, numbers)) or "-1"


def table_of(masks: Sequence[Mask], dialect: Dialect = SIIM) -> Table:
    return {f"1.{number}": (write(mask, dialect),) for number, mask in enumerate(masks)}


def sizes_of(masks: Sequence[Mask]) -> dict[str, tuple[int, int]]:
    return {f"1.{number}": (mask.shape[0], mask.shape[1]) for number, mask in enumerate(masks)}


def detect(masks: Sequence[Mask], dialect: Dialect = SIIM) -> Detection:
    return detect_dialect(table_of(masks, dialect), sizes_of(masks))


def resized(masks: Sequence[Mask], height: int, width: int) -> list[Mask]:
    return [np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8) for mask in masks]


@pytest.fixture(scope="module")
def pneumothoraces() -> list[Mask]:
    """100 masks as the phantoms have them, uint8 (128, 128)."""
    masks: list[Mask] = []
    for index in range(100):
        rng = np.random.default_rng((5, index))
        chest = anatomy.pose(rng, "PA" if rng.random() < 0.6 else "AP")
        union = np.maximum.reduce(anatomy.draw_masks(rng, chest))
        masks.append(np.asarray(cv2.resize(union, (128, 128), interpolation=cv2.INTER_AREA)))
    return masks


def lungs(index: int) -> list[npt.NDArray[np.uint8]]:
    """The two lungs of a phantom, uint8 (128, 128) each."""
    chest = anatomy.pose(np.random.default_rng((6, index)), "PA")
    return [anatomy.fill(lung.outline(anatomy.ANGLES) / 8, 128) for lung in chest.lungs]


def effusions(index: int) -> Mask:
    """The lowest part of the right lung of a phantom, and often of the left one, uint8 (128, 128)."""
    rng, mask = np.random.default_rng((7, index)), np.zeros((128, 128), np.uint8)
    for lung in lungs(index)[: 1 + index % 3 // 2]:
        rows = np.flatnonzero(lung.any(axis=1))
        lung[: rows[0] + int(len(rows) * rng.uniform(0.5, 0.9))] = 0
        mask |= lung
    return mask[:, :: rng.choice((-1, 1))]


@st.composite
def small_masks(draw: st.DrawFn) -> Mask:
    """A mask of any shape, from empty to full."""
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    density = draw(st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (random.random((height, width)) < density).astype(np.uint8)


# --- translation --------------------------------------------------------------------------------------------------


@given(small_masks(), st.sampled_from(DIALECTS))
def test_a_mask_comes_back_the_same_from_every_dialect(mask: Mask, dialect: Dialect) -> None:
    text = to_siim(f" {write(mask, dialect)} ", dialect, *mask.shape)
    assert np.array_equal(rle.decode(text, *mask.shape), mask)
    assert text == rle.encode(mask)


def test_a_run_may_go_on_over_the_border_of_a_line_and_touch_the_next_one() -> None:
    # 2 rows of 3 px, numbered 1 2 3 / 4 5 6: px 2, 3, 4 and px 5.
    mask = rle.decode(to_siim("2 3 5 1", Dialect("absolute", "rows"), 2, 3), 2, 3)
    assert mask.tolist() == [[0, 1, 1], [1, 1, 0]]
    # The same numbers down the columns are 1 3 5 / 2 4 6; touching runs become one.
    assert to_siim("2 3 5 1", ABSOLUTE, 2, 3) == "1 4"


def test_text_of_the_challenge_itself_is_left_as_it_is() -> None:
    assert to_siim(" 3 4 0 2 ", SIIM, 1, 1) == "3 4 0 2"


@pytest.mark.parametrize(
    ("text", "dialect", "reason"),
    [
        ("0 4", ABSOLUTE, "starts at pixel 0, but absolute starts count from 1"),
        ("5 2 3 1", ABSOLUTE, "do not increase"),
        ("5 2 6 1", ABSOLUTE, "overlap"),
        ("12 2", ABSOLUTE, "ends at pixel 13, past the 4x3 image"),
        ("1 1 12 2", Dialect("absolute", "rows"), "ends at pixel 13, past the 4x3 image"),
        ("2 99 3 1", ABSOLUTE, "ends at pixel 100, past"),
        ("9223372036854775807 9223372036854775807", ABSOLUTE, "ends at pixel 18446744073709551613, past"),
        ("10 3", Dialect("relative", "rows"), "ends at pixel 13, past the 4x3 image"),
        ("9223372036854775807 1 1 1", Dialect("relative", "rows"), "past the 4x3 image"),
        ("-1 -1", ABSOLUTE, "negative gap"),
        ("1 2 3", ABSOLUTE, "pairs of numbers"),
    ],
)
def test_a_text_that_is_no_mask_of_the_dialect_is_refused(text: str, dialect: Dialect, reason: str) -> None:
    with pytest.raises(LabelError, match=reason):
        to_siim(text, dialect, 3, 4)


def test_dialects_have_names_and_an_unknown_name_is_answered_with_all_of_them() -> None:
    assert tuple(dialect.name for dialect in DIALECTS) == NAMES
    assert [parse_dialect(name) for name in NAMES] == list(DIALECTS)
    with pytest.raises(SettingsError, match=r"'columns'; expected one of relative-columns, relative-rows, abs"):
        parse_dialect("columns")


# --- which one it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=NAMES)
def test_the_dialect_of_many_masks_is_found_and_proven(pneumothoraces: list[Mask], dialect: Dialect) -> None:
    found = detect(pneumothoraces, dialect)
    assert (found.dialect, found.given, found.starts_proven, found.upright_proven) == (dialect, False, True, True)
    turned = [line for line in found.evidence if "turned by 90 degrees" in line]  # what rows cannot be told from
    assert found.proven == found.order_proven == (dialect.order == "columns") == (not turned)
    assert any("lie on their side" in line for line in found.evidence)
    assert any("masks do not fit their image" in line for line in found.evidence)


@pytest.mark.parametrize("dialect", DIALECTS, ids=NAMES)
def test_few_masks_of_oblong_images_are_enough(pneumothoraces: list[Mask], dialect: Dialect) -> None:
    masks = resized(pneumothoraces[:12], 150, 100) + resized(pneumothoraces[12:40], 100, 100)
    found = detect(masks, dialect)
    assert (found.dialect, found.starts_proven, found.order_proven) == (dialect, True, dialect.order == "columns")
    assert not found.proven, "40 masks do not say whether they are upside down"
    assert any("of neighbouring runs start one" in line and line.startswith("not ") for line in found.evidence)


def test_few_masks_of_square_images_are_read_as_columns_and_the_evidence_says_so(pneumothoraces: list[Mask]) -> None:
    for dialect in (SIIM, ABSOLUTE):
        found = detect(pneumothoraces[:20], dialect)
        assert (found.dialect, found.starts_proven, found.order_proven) == (dialect, True, False)
        rows = dialect.name.replace("columns", "rows")
        assert f"not ruled out: {rows}; {dialect.name} is assumed" in found.evidence[-1]
        assert any("too few positive images to judge areas and anatomy (20 of 50)" in e for e in found.evidence)


def test_masks_of_one_run_are_read_with_relative_starts_and_the_evidence_says_so() -> None:
    found = detect_dialect({"a": ("5 3",), "b": ("9 1",), "c": ()}, {"a": (8, 8), "b": (9, 9)})
    assert (found.dialect, found.starts_proven, found.order_proven) == (SIIM, False, False)
    assert any("not ruled out: absolute-columns" in line for line in found.evidence)


@pytest.mark.parametrize("masks", [{}, {"a": ()}, {"b": ("5 3",)}], ids=["empty", "negative", "other-images"])
def test_without_a_mask_nothing_is_proven(masks: Mapping[str, tuple[str, ...]]) -> None:
    found = detect_dialect(masks, {"a": (8, 8)})
    assert (found.dialect, found.order_proven) == (SIIM, False)
    assert found.evidence == ("there is no mask to detect the encoding from",)


def test_masks_in_one_lung_or_in_one_corner_are_not_taken_for_rows(pneumothoraces: list[Mask]) -> None:
    left = [mask if mask[:, :64].sum() > mask[:, 64:].sum() else mask[:, ::-1] for mask in pneumothoraces]
    corner = []
    for number in range(0, 540, 3):
        mask = np.zeros((64, 64), np.uint8)
        mask[number % 30 :, number // 30 :][:20, :10] = 1
        corner.append(mask)
    for masks in (left, corner):
        found = detect(masks)
        assert (found.dialect, found.order_proven) == (SIIM, False)


def test_a_few_huge_masks_do_not_outweigh_the_others(pneumothoraces: list[Mask]) -> None:
    lung = np.zeros((128, 128), np.uint8)
    lung[10:118, 5:60] = 1
    for dialect in DIALECTS[:2]:
        found = detect([*pneumothoraces, *[lung] * 8], dialect)
        assert (found.dialect, found.order_proven) == (dialect, dialect == SIIM)


def test_masks_without_a_file_prove_too_where_all_files_have_one_size(pneumothoraces: list[Mask]) -> None:
    table, sizes = table_of(pneumothoraces, Dialect("relative", "rows")), sizes_of(pneumothoraces[:5])
    assert detect_dialect(table, sizes).dialect.name == "relative-rows"
    mixed = detect_dialect(table, {**sizes, "negative": (99, 99)})
    assert (mixed.dialect, mixed.order_proven) == (SIIM, False)
    # One that is too large for the size of the others is no reason to refuse the table.
    assert detect_dialect({**table, "2.1": ("0 99999",)}, sizes).dialect.name == "relative-rows"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_mask_that_does_not_fit_among_many_that_do_is_named(pneumothoraces: list[Mask]) -> None:
    for dialect, text in ((SIIM, "16380 5"), (ABSOLUTE, "16380 6")):
        table = {**table_of(pneumothoraces, dialect), "1.7": (text,)}
        with pytest.raises(LabelError) as caught:
            detect_dialect(table, sizes_of(pneumothoraces), where=lambda case_id, text: f"line of {case_id} and {text}")
        assert str(caught.value).startswith(
            f"line of 1.7 and {text}: the mask of 1.7 does not fit its image: a run ends at pixel 16385, past the "
            f"128x128 image (16384 pixels) (read as {dialect.name}, which fits 99 of 100 masks; correct the mask, or"
        )


def noise(masks: Sequence[Mask]) -> list[Mask]:
    random = np.random.default_rng(1)
    return [(random.random(mask.shape) < 0.05).astype(np.uint8) for mask in masks]


def whole_lungs(masks: Sequence[Mask]) -> list[Mask]:
    lungs = np.zeros((128, 128), np.uint8)
    lungs[20:100, 20:36] = lungs[20:100, 92:108] = 1
    return [np.roll(lungs, number % 5, axis=0) for number in range(len(masks))]


def dots(masks: Sequence[Mask]) -> list[Mask]:
    found = []
    for number in range(len(masks)):
        mask = np.zeros((128, 128), np.uint8)
        mask[number, 50:53] = 1
        found.append(mask)
    return found


def inverted(masks: Sequence[Mask]) -> list[Mask]:
    return [1 - mask for mask in masks]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (noise, r"only \d+% of neighbouring runs start one column apart"),
        (whole_lungs, r"one constant mask fits them all \(mean Dice 0.9\d\)"),
        (inverted, "one in ten masks covers 100% of its image or more"),
        (dots, r"half of the masks cover less than 0\.0\d\d% of their image"),
    ],
    ids=["noise", "lungs", "inverted", "tiny"],
)
def test_a_table_that_looks_wrong_in_every_dialect_is_refused(pneumothoraces, spoil, reason) -> None:  # type: ignore[no-untyped-def]
    masks = spoil(pneumothoraces)
    with pytest.raises(LabelError, match=rf"fits no mask encoding: relative-columns: {reason}") as caught:
        detect(masks)
    assert all(f"{name}: " in str(caught.value) for name in NAMES)
    assert "--dialect" in str(caught.value)
    given = detect_dialect(table_of(masks), sizes_of(masks), SIIM)
    assert (given.dialect, given.given, given.order_proven) == (SIIM, True, False)
    assert "looks wrong as relative-columns, which was given" in given.evidence[-1]


def test_one_mask_for_all_is_noticed_in_images_of_any_size() -> None:
    text = rle.encode_spans(np.array([[6000 * column + 1000, 6000 * column + 3000] for column in range(1000, 1300)]))
    table = {f"1.{number}": (text,) for number in range(60)}
    with pytest.raises(LabelError, match=r"one constant mask fits them all \(mean Dice 1\.00\)"):
        detect_dialect(table, dict.fromkeys(table, (6000, 5000)))


def test_masks_of_images_of_another_size_are_refused(pneumothoraces: list[Mask]) -> None:
    table = table_of(pneumothoraces)
    larger = dict.fromkeys(table, (256, 256))
    with pytest.raises(LabelError, match="relative-columns: only 0% of neighbouring runs start one column apart"):
        detect_dialect(table, larger)
    smaller = dict.fromkeys(table, (32, 32))
    with pytest.raises(LabelError, match=r"relative-columns: \d+ of 100 masks do not fit their image \(the first one"):
        detect_dialect(table, smaller)


def test_a_dialect_that_is_given_is_not_judged_but_has_to_fit(pneumothoraces: list[Mask]) -> None:
    table, sizes = table_of(pneumothoraces), sizes_of(pneumothoraces)
    rows = detect_dialect(table, sizes, Dialect("relative", "rows"))
    assert (rows.dialect.name, rows.given) == ("relative-rows", True)
    assert "the masks lie on their side" in rows.evidence[-1]
    right = detect_dialect(table, sizes, SIIM)
    assert not any("wrong" in line for line in right.evidence)
    with pytest.raises(LabelError, match=r"the label table: the mask of 1\.0 does not fit its image: absolute starts"):
        detect_dialect(table, sizes, ABSOLUTE)


def test_without_any_image_the_dialect_cannot_be_detected() -> None:
    with pytest.raises(LabelError, match="without the size of any image"):
        detect_dialect({"a": ("5 3",)}, {})


# --- masks that are turned or inverted, as a table and as images -----------------------------------------------------


TURNS = {
    "transposed": np.transpose,
    "turned": np.rot90,
    "turned back": lambda mask: np.rot90(mask, -1),
    "upside down": np.flipud,
    "half turn": lambda mask: np.rot90(mask, 2),
    "inverted": lambda mask: 1 - mask,
}


@pytest.mark.parametrize("name", TURNS)
def test_masks_that_are_turned_or_inverted_are_refused_or_not_proven(pneumothoraces: list[Mask], name: str) -> None:
    turned = [TURNS[name](mask) for mask in pneumothoraces]
    with pytest.raises(LabelError, match=r"^labels: the mask images look wrong: .* write them again"):
        check_mask_files(table_of(turned), sizes_of(turned), Path("labels"))
    if name in ("transposed", "turned"):  # rows, it seems, and then upright or mirrored
        assert not detect(turned).proven
    else:
        with pytest.raises(LabelError, match="fits no mask encoding"):
            detect(turned)


def test_upright_mask_images_are_proven_where_there_are_enough(pneumothoraces: list[Mask]) -> None:
    found = check_mask_files(table_of(pneumothoraces), sizes_of(pneumothoraces), Path("labels"))
    assert found.proven
    assert any("left and right are not told apart" in line for line in found.evidence)
    assert found.evidence[-1].startswith("not transposed: the masks lie on their side")
    few = check_mask_files(table_of(pneumothoraces[:20]), sizes_of(pneumothoraces[:20]), Path("labels"))
    assert not few.proven
    assert few.evidence[-1] == "not ruled out: transposed"


@pytest.mark.parametrize("count", [1, 3, 40])
def test_few_masks_that_are_inverted_are_refused_too(pneumothoraces: list[Mask], count: int) -> None:
    masks = [1 - mask for mask in pneumothoraces[:count]]
    message = f"{count} of {count} positive images are covered by more than half"
    with pytest.raises(LabelError, match=message):
        check_mask_files(table_of(masks), sizes_of(masks), Path("labels"))
    with pytest.raises(LabelError, match=message):
        detect(masks)


def test_one_inverted_mask_among_many_is_named_and_nothing_is_proven(pneumothoraces: list[Mask]) -> None:
    masks = [*pneumothoraces[:-1], 1 - pneumothoraces[-1]]
    for found in (detect(masks), check_mask_files(table_of(masks), sizes_of(masks), Path("labels"))):
        assert not found.proven
        assert any(line.endswith("half of their image and may be inverted: 1.99") for line in found.evidence)


# --- the real table -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_table(real_data: Path) -> Table:
    return read_labels(real_data / "siim-real" / "train-rle.csv.gz")


@pytest.fixture(scope="module")
def real_masks(real_table: Table) -> dict[str, list[Mask]]:
    """Masks of every 40th positive image of the real table, uint8 (1024, 1024)."""
    some = [case_id for case_id, texts in real_table.items() if texts][::40]
    return {case_id: [rle.decode(text, 1024, 1024) for text in real_table[case_id]] for case_id in some}


def test_the_real_table_is_proven_to_be_relative_and_in_columns(real_table: Table) -> None:
    table = real_table
    found = detect_dialect(table, dict.fromkeys(table, (1024, 1024)))
    assert (found.dialect, found.proven) == (SIIM, True)
    columns, rows, absolute, _ = found.readings
    assert (columns.masks, columns.misfits, columns.fault, absolute.misfits) == (3_576, 0, "", 3_576)
    # Values of the 500 sampled images; those of all 2,669 are beside the limits in `evidence`.
    assert columns.line_share == pytest.approx(0.94, abs=0.01)
    assert columns.median_area == pytest.approx(0.0079, abs=0.0005)
    assert columns.constant_dice == pytest.approx(0.146, abs=0.01)
    assert columns.left_right == pytest.approx(0.86, abs=0.02)
    assert columns.up_down == pytest.approx(-0.12, abs=0.02)
    assert columns.upper == pytest.approx(0.81, abs=0.03)
    assert (rows.left_right, rows.up_down) == (columns.up_down, columns.left_right)


@pytest.mark.parametrize("dialect", DIALECTS[1:], ids=NAMES[1:])
def test_the_real_table_written_in_another_dialect_is_found_to_be_in_that_one(
    real_table: Table, real_masks: dict[str, list[Mask]], dialect: Dialect
) -> None:
    written = {case_id: tuple(write(mask, dialect) for mask in masks) for case_id, masks in real_masks.items()}
    found = detect_dialect(written, dict.fromkeys(written, (1024, 1024)))
    assert (found.dialect, found.starts_proven, found.order_proven) == (dialect, True, dialect == ABSOLUTE)
    for case_id, texts in written.items():
        assert tuple(to_siim(text, dialect, 1024, 1024) for text in texts) == real_table[case_id]


@pytest.mark.parametrize("dialect", DIALECTS, ids=NAMES)
@pytest.mark.parametrize("finding", ["lung", "pleural effusion"])
def test_other_findings_have_limits_of_their_own(finding: str, dialect: Dialect) -> None:
    masks = [np.maximum(*lungs(number)) if finding == "lung" else effusions(number) for number in range(60)]
    table, sizes, (_, limits) = table_of(masks, dialect), sizes_of(masks), load_finding(finding)
    found = detect_dialect(table, sizes, limits=limits)
    assert found.dialect == dialect
    assert (found.starts_proven, found.order_proven) == (True, dialect.order == "columns")
    assert found.upright_proven == (finding != "lung"), "lungs have no place of their own"
    with pytest.raises(LabelError, match=r"fits no mask encoding: .*; masks of another finding need --finding"):
        detect_dialect(table, sizes)
    for name in ("transposed", "turned", "inverted", *(["upside down"] if finding != "lung" else [])):
        turned = [TURNS[name](mask) for mask in masks]
        with pytest.raises(LabelError, match="look wrong"):
            check_mask_files(table_of(turned), sizes_of(turned), Path("labels"), limits=limits)
    assert check_mask_files(table_of(masks), sizes, Path("labels"), limits=limits).order_proven
