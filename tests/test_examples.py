"""The examples run, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_notebook_goes_from_phantoms_to_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "notebook.py"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[1:3]] == ["stage 1 epoch 1", "stage 2 epoch 1"]
    assert (tmp_path / "notebook/run/report/index.html").is_file()
    assert names["evaluation"].scores == names["result"].evaluation.scores
    assert names["prediction"].mask.shape == names["prediction"].pixels.shape
