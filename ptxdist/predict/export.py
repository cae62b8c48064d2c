"""Write a model as one file that needs no ptxdist, ONNX or torch.export, or as a bundle.

    model.onnx      metadata_props["ptxdist.json"]; one file, opset 18
    model.pt2       extra file "ptxdist.json"; needs torch alone
    model.ptxdist   see `bundle`

Owns: inputs, outputs and metadata of the first two. Refuses: other suffixes (SettingsError), models that cannot be
loaded (RunError, CheckpointError), files that would give other probabilities than the checkpoint (ExportError).

Input: grey levels uint8 (B, 1, size, size), air dark, B >= 1. Output: probability float32 of the same shape; of a model
with an image head also score float32 (B,). Three channels, normalisation, flip averaging if the card has it, the
sigmoid and the score are part of the graph, so the numbers are those of the checkpoint in fp32 on every engine. Only
uint8 is accepted: as a float, an image scaled to 0..1 would be taken for a black one.
"""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ptxdist import files
from ptxdist.errors import CheckpointError, ExportError, RunError, SettingsError
from ptxdist.executor import OnProgress
from ptxdist.places import EVALUATION, NOTHING, refuse_other
from ptxdist.predict.bundle import (
    SUFFIX,
    ModelCard,
    describe_run,
    load_model,
    local_point,
    point_at,
    read_members,
    write_bundle,
)
from ptxdist.predict.parity import BATCHES, Run, allowed_difference, comparison_images, largest_difference
from ptxdist.predict.predictor import Predictor
from ptxdist.records import SYNTHETIC, OperatingPoint
from ptxdist.rundir import read_evaluation
from ptxdist.train import encoders
from ptxdist.train.device import choose_device
from ptxdist.train.scoring import case_score, predict_probability

ONNX, PT2 = ".onnx", ".pt2"
ABOUT = "ptxdist.json"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT, SCORE = "image", "probability", "score"  # the score only with an image head
_OPSET = 18  # ONNX Runtime has it since 1.14


@dataclass(frozen=True)
class ExportResult:
    """A written file, and how it was compared with the checkpoint.

    `difference` is the largest of any probability or score, `limit` what was allowed, `images` how many images were
    compared, and `images_from` where they come from. A bundle holds the checkpoint itself: None, None, 0 and "".
    """

    out: Path
    sha256: str
    size_bytes: int
    difference: float | None
    limit: float | None
    images: int
    images_from: str


def export_model(
    model: Path,
    out: Path,
    *,
    evaluation: Path | None = None,
    at: str | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> ExportResult:
    """Write `model`, a finished run or a bundle, to `out`, whose suffix names the format.

    The file is loaded and compared with the checkpoint before it is written; if it differs, nothing is written. The
    operating point is the model's own, or the one that the folder `evaluation` tuned on other data, or `at` a working
    point by its name, of that evaluation or else of the model.
    """
    if out.suffix not in (ONNX, PT2, SUFFIX):
        raise SettingsError(f"{out}: the suffix names the format and has to be one of {ONNX}, {PT2} and {SUFFIX}")
    _refuse_unwritable(out)
    if out.suffix == SUFFIX:
        if model.is_file() and evaluation is None and at is None:
            raise RunError(f"{model} is not a run folder; if it is a bundle, copy it")
        point = None
        if evaluation is not None or at is not None:
            point = _point(read_members(model)[0] if model.is_file() else describe_run(model)[0], evaluation, at)
        return ExportResult(out, write_bundle(model, out, point), out.stat().st_size, None, None, 0, "")
    if out.suffix == ONNX:
        files.require_extra("export", "ONNX", *_ONNX_PACKAGES, otherwise=".pt2 needs torch alone")
    card, network = load_model(model)
    if evaluation is not None or at is not None:
        card = card.at(*_point(card, evaluation, at))
    exact = card.model_copy(update={"precision": "fp32"})
    predictor = Predictor([exact], [network], choose_device("cpu"))
    on_progress("translation", 0, 1)
    content = encode(network, card, out.suffix)
    on_progress("translation", 1, 1)
    images, origin = comparison_images(model, card.size_px, on_progress=on_progress)
    difference = largest_difference(predictor, load(content, out.suffix), images, on_progress=on_progress)
    limit = allowed_difference(predictor, images)
    if not difference <= limit:  # NaN fails too
        raise ExportError(
            f"{out} would give other probabilities than the checkpoint: they differ by {difference:.2g}, and "
            f"{limit:.2g} is allowed (on {len(images)} {origin}); nothing was written. Try the versions of torch, onnx "
            "and onnxruntime in constraints.txt, or the other format"
        )
    files.write_whole(out, content, error=CheckpointError)
    return ExportResult(out, files.sha256(content), len(content), difference, limit, len(images), origin)


def _point(card: ModelCard, folder: Path | None, at: str | None) -> tuple[OperatingPoint, str]:
    if folder is None:
        assert at is not None
        return point_at(card, at)
    refuse_other(folder, EVALUATION, NOTHING, "folder")  # the last two are named by those who read them
    evaluation = read_evaluation(folder)
    point, words = local_point(card, evaluation, str(folder))
    if at is None:
        return point, words
    return point_at(card.at(point, words).model_copy(update={"evaluation": evaluation}), at)


def describe(card: ModelCard) -> dict[str, Any]:
    """The metadata of a file, as plain JSON: all that is needed to get from an image file to a mask."""
    model = card.pipeline.model
    start = "another model" if card.made_from else encoders.start_in_words(model)
    shape = ["batch", 1, card.size_px, card.size_px]
    head, needed = {}, ""
    if card.pipeline.model.image_head:
        needed = "the score reaches image, if there is one, and "
        head = {
            SCORE: {
                "name": SCORE,
                "dtype": "float32",
                "shape": ["batch"],
                "meaning": "how positive the image looks, 0..1: three quarters the image head's probability, one "
                "quarter the mean of the highest probabilities of the map, one pixel in 256",
            }
        }
    return {
        "format": "ptxdist export 1",
        "use": "research use only; not a medical device" + (f". {SYNTHETIC}" if card.synthetic else ""),
        "size_px": card.size_px,
        "input": {"name": INPUT, "dtype": "uint8", "shape": shape},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": shape},
        **head,
        "before": "grey levels 0..255 of one frontal chest radiograph, air dark (MONOCHROME1 inverted); padded with 0 "
        "to a square, the image in its middle; resized by area averaging, or bilinearly where it has to grow",
        "inside": "three channels, the normalisation of its encoder, network, sigmoid"
        + (", mean of the image and its mirror image" if card.flip_averaging else ""),
        "after": "probabilities up-sampled bilinearly (centres of px, corners not aligned) to the padded square, the "
        f"padding cut off; threshold last: no px unless {needed}min_area_px of them reach top, else all that reach "
        "bottom",
        "flip_averaging_inside": card.flip_averaging,
        "operating_point": card.operating_point.model_dump(),
        "parity": "compared with the checkpoint in fp32 before it was written",
        "encoder": f"{encoders.chosen(model).words}, started from {start}",
        "card": card.model_dump(mode="json"),
    }


def encode(network: nn.Module, card: ModelCard, suffix: str) -> bytes:
    """The content of a file `.onnx` or `.pt2`; `network` is not changed."""
    image = torch.zeros(BATCHES[-1], 1, card.size_px, card.size_px, dtype=torch.uint8)
    exported = _Exported(_folded(network, image[:1]), card.flip_averaging).requires_grad_(False)
    about = json.dumps(describe(card))
    with torch.no_grad():
        program = torch.export.export(exported, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    if suffix == ONNX:
        return _translate(program, f"{card.finding.title} segmentation: {card.name}. Research use only.", about)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights in channels_last, which are stored completely
        torch.export.save(program, file, extra_files={ABOUT: about})
    return file.getvalue()


def load(content: bytes, suffix: str) -> Run:
    """The network in the content of a file, as `parity.Run`: from uint8 (B, 1, size, size) to its outputs, float32."""
    if suffix == ONNX:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda image: tuple(map(np.asarray, session.run(None, {INPUT: image})))
    network = torch.export.load(io.BytesIO(content)).module()

    def run(image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], ...]:
        with torch.no_grad():
            found = network(torch.from_numpy(image))
        return tuple(part.numpy() for part in (found if isinstance(found, tuple) else (found,)))

    return run


class _Exported(nn.Module):
    """The graph that is written: image and mirror image in one pass, batch norms folded into convolutions."""

    def __init__(self, network: nn.Module, flip_averaging: bool) -> None:
        super().__init__()
        self._network, self._flip_averaging = network, flip_averaging

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = predict_probability(self._network, image, self._flip_averaging, one_pass=True)
        return found.probability if found.image is None else (found.probability, case_score(*found[1:]))


def _folded(network: nn.Module, image: Tensor) -> nn.Module:
    """A copy in inference mode whose batch norms are folded into the convolutions that they directly follow.

    Which do is seen in a pass over `image` (B, 1, H, W), since names do not tell for every encoder. Subclasses of
    nn.BatchNorm2d stay as they are: they may also apply an activation, as timm's BatchNormAct2d does.
    """
    network = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    last: list[Any] = [None, None]  # the convolution that was called last, and its output

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            last[:] = module, output
        elif type(module) is nn.BatchNorm2d and inputs[0] is last[1]:
            pairs.append((last[0], module))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    swaps: dict[nn.Module | None, nn.Module] = {}
    for convolution, norm in pairs:
        if calls[convolution] == calls[norm] == 1:
            swaps |= {convolution: fuse_conv_bn_eval(convolution, norm), norm: nn.Identity()}
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            setattr(parent, name, swaps.get(child, child))
    return network


def _translate(program: torch.export.ExportedProgram, title: str, about: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch and onnxscript
        translated = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT, SCORE][: len(program.graph_signature.user_outputs)],
            dynamic_shapes=({0: "batch"},),  # only the name; the program says what is dynamic
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert translated is not None
    proto = translated.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # contains paths of this machine
    proto.doc_string = title
    entry = proto.metadata_props.add()
    entry.key, entry.value = ABOUT, about
    return bytes(proto.SerializeToString())


def _refuse_unwritable(out: Path) -> None:
    """Raise CheckpointError, before any work, when it is already clear that the file cannot be written."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir():
        raise CheckpointError(f"{out} cannot be written: a folder has this name")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {folder} is not a folder that this user can write to")
