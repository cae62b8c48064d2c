"""One training of a run at a time, and no folder made for what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ptxdist.errors import BusyError, RunError
from ptxdist.run.pipeline import only_training
from ptxdist.rundir import SETTINGS


def test_a_second_training_is_refused_until_the_first_one_has_ended_however_it_does(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    code = (
        "import sys, time; from pathlib import Path; from ptxdist.run.pipeline import only_training\n"
        "with only_training(Path(sys.argv[1])):\n"
        "    print('mine', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with (
            pytest.raises(BusyError, match=r"another `ptxdist train` works on .*one; wait for it or stop it"),
            only_training(run),
        ):
            pass
        other.kill()
    with only_training(run):
        pass


def test_what_is_refused_leaves_no_folder_and_a_run_keeps_its_own(tmp_path: Path) -> None:
    new, run = tmp_path / "runs" / "new", tmp_path / "run"
    with pytest.raises(RunError, match="refused"), only_training(new):
        raise RunError("refused")
    assert list(tmp_path.iterdir()) == []
    with only_training(run):
        (run / SETTINGS).write_text("{}")
    assert (run / SETTINGS).is_file()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="cannot be made: Not a directory; give another folder"),
        only_training(tmp_path / "file" / "run"),
    ):
        pass
