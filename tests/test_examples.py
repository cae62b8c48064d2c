"""The notebook runs in a Jupyter kernel, shows its progress there, and is stored without outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
SMALL = '"model.encoder": "small", "model.decoder_channels": [4, 4, 4, 4, 4], '


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_.*", "ignore::DeprecationWarning:zmq.*")
def test_the_notebook_goes_from_phantoms_to_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "small_network"))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    training = next(cell for cell in book.cells if "ptxdist.train(" in cell.source)
    assert "set={" in training.source
    training.source = training.source.replace("set={", "set={" + SMALL)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "23 labelled images, 2 shards written" in printed
    assert printed.count("mask (1024, 1024)") == 2
    assert (tmp_path / "notebook/run/report/index.html").is_file()
    shown = "".join(output.data["text/plain"] for output in training.outputs if output.output_type == "display_data")
    for words in ("trains on 17 images", "stage 1 epoch 1/1: train loss", "stage 2 of 2 is finished", "6 of 6"):
        assert words in shown


def test_it_is_stored_without_outputs_and_with_short_lines() -> None:
    book = json.loads(NOTEBOOK.read_text())
    nbformat.validate(book)
    for cell in book["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert all(len(line) <= 121 for line in cell["source"])
