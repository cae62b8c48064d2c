"""The command `score`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from commands import ptxdist

from ptxdist.cli import cli

TRUTH = "ImageId,EncodedPixels\na,0 4\nb,-1\nc,8 2\nc,0 4\nd,-1\n"
PREDICTED = "ImageId,EncodedPixels\nd,-1\nc,8 6\nb,60 2\na,-1\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "p.csv", tmp_path / "t.csv"
    for path, text in zip(paths, (PREDICTED, TRUTH), strict=True):
        path.write_text(text)
    return paths


def score(*words: object) -> Result:
    return CliRunner().invoke(cli, ["score", *map(str, words)])


def test_a_table_in_the_terminal(files: tuple[Path, Path]) -> None:
    done = ptxdist("score", files[0], "--truth", files[1], "--size-px", "8")
    text = " ".join(done.stdout.split())
    assert "4 images, 2 positive, 1 of them with a predicted pixel; 95 % intervals by images (4)" in text
    assert "Compare with: `Dice.front` of MRM" in text
    assert "images: 4 of 4" in done.stderr


def test_json_and_markdown(files: tuple[Path, Path]) -> None:
    done = score(files[0], "--truth", files[1], "--size-px", 8, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["cases"] == 4
    found = {field: item["value"] for field, item in content["scores"].items()}
    assert found["kaggle_dice"] == pytest.approx((1 + 2 * 2 / (6 + 6)) / 4)
    assert (found["sensitivity"], found["specificity"], found["false_alarm_px"]) == (0.5, 0.5, 1.0)
    assert content["scores"]["kaggle_dice"]["all_empty"] == 0.5
    done = score(files[0], "--truth", files[1], "--size-px", 8, "--markdown")
    assert done.stdout.startswith("| 4 images, 2 positive | value |")
    assert "note: " in done.stderr, "four masks do not prove an encoding"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("gone.csv",), 4, "nothing at gone.csv"),
        ((".",), 4, "has no mask images"),
        (("p.csv", "--threshold", "0.5"), 3, "leave out --threshold"),
        (("p.csv", "--dialect", "rows"), 3, "unknown mask encoding"),
        (("p.csv", "--size-px", "2"), 4, "see --size-px"),
        (("short.csv",), 4, "--subset scores the 1 images that are in both"),
    ],
)
def test_bad_input_ends_with_a_sentence(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(files[0].parent)
    Path("short.csv").write_text("ImageId,EncodedPixels\na,-1\n")
    done = score(*words, "--truth", "t.csv")
    assert (done.exit_code, message in done.stderr) == (code, True), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
