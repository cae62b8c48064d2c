"""A finished run as one file that needs no ptxdist: ONNX or torch.export; or as a bundle.

    model.onnx      metadata_props["ptxdist.json"]; one file, opset 18
    model.pt2       extra file "ptxdist.json"; needs torch alone
    model.ptxdist   `bundle`

Owns: what the first two take and give, what they say of themselves, and how near to the checkpoint they have to be.
Refuses: endings that are none of these (SettingsError), files that would compute something else (ExportError), models
that cannot be loaded (RunError, CheckpointError). Called by: `cli`, the benchmarks.

Image uint8 (B, 1, size, size), grey levels, air dark -> probability float32 of the same shape, any B from 1 on. Three
channels, normalisation, flip averaging if the card has it, and the sigmoid are inside, so that the numbers are those
of the checkpoint in fp32 whoever runs them. uint8 only: an image scaled to 0..1 would pass for a black one as a float.
"""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ptxdist import files
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.render import resize
from ptxdist.cache.store import open_store
from ptxdist.dicom.pixels import Pixels
from ptxdist.errors import CheckpointError, ExportError, PtxdistError, RunError, SettingsError
from ptxdist.phantoms import anatomy, greys
from ptxdist.predict.bundle import SUFFIX, ModelCard, load_model, write_bundle
from ptxdist.predict.predictor import Predictor
from ptxdist.rundir import read_settings
from ptxdist.train.device import choose_device
from ptxdist.train.scoring import predict_probability

ONNX, PT2 = ".onnx", ".pt2"
ABOUT = "ptxdist.json"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "image", "probability"
LIMIT = 1e-4  # of a probability; operating points are searched in steps of 0.005
_PLAIN_LOGITS = 100  # up to which `LIMIT` holds; beyond it rounding shows, and the limit grows with the logits
_MOST_ROUNDING = 100  # times `LIMIT`, and no more, whatever the logits
_BATCHES = (1, 3, 4)  # sizes that parity is checked with: the smallest, an odd one, the one that was traced
_OPSET = 18  # what torch translates to; ONNX Runtime has it since 1.14

Run = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportResult:
    """A written file. `difference`, the largest of any probability from the checkpoint's, the `limit` it kept,
    `images` and `images_from` tell of the check; a bundle holds the checkpoint itself: None, None, 0 and "".
    """

    out: Path
    sha256: str
    size_bytes: int
    difference: float | None
    limit: float | None
    images: int
    images_from: str


def export_model(model: Path, out: Path, *, on_progress: Progress = lambda what, done, total: None) -> ExportResult:
    """Write `model`, a finished run or a bundle, to `out`, whose ending says as what.

    The bytes that are written have been loaded and compared with the checkpoint before; else nothing is written.
    """
    if out.suffix not in (ONNX, PT2, SUFFIX):
        raise SettingsError(f"{out}: what is written goes by the ending, which is one of {ONNX}, {PT2} and {SUFFIX}")
    _refuse_unwritable(out)
    if out.suffix == SUFFIX:
        if model.is_file():
            raise RunError(f"{model} is no run; if it is a bundle, copy it")
        return ExportResult(out, write_bundle(model, out), out.stat().st_size, None, None, 0, "")
    if out.suffix == ONNX:
        files.require_extra("export", "ONNX", *_ONNX_PACKAGES, otherwise=".pt2 needs torch alone")
    card, network = load_model(model)
    exact = card.model_copy(update={"precision": "fp32"})
    predictor = Predictor([exact], [network], choose_device("cpu"))
    on_progress("translation", 0, 1)
    content = encode(network, card, out.suffix)
    on_progress("translation", 1, 1)
    images, origin = _images(model, card.size_px)
    difference = largest_difference(predictor, load(content, out.suffix), images, on_progress=on_progress)
    limit = allowed_difference(predictor, images)
    if not difference <= limit:  # not a number is refused too
        raise ExportError(
            f"{out} would give other probabilities than the checkpoint: they differ by {difference:.2g}, and "
            f"{limit:.2g} is allowed ({len(images)} {origin}); nothing was written. Try the versions of torch, onnx "
            "and onnxruntime in constraints.txt, or the other format"
        )
    files.write_whole(out, content, error=CheckpointError)
    return ExportResult(out, files.sha256(content), len(content), difference, limit, len(images), origin)


def describe(card: ModelCard) -> dict[str, Any]:
    """What a file says of itself, as plain JSON: all that is needed to get from an image file to a mask."""
    shape = ["batch", 1, card.size_px, card.size_px]
    return {
        "format": "ptxdist export 1",
        "use": "research use only; not a medical device",
        "size_px": card.size_px,
        "input": {"name": INPUT, "dtype": "uint8", "shape": shape},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": shape},
        "before": "grey levels 0..255 of one frontal chest radiograph, air dark (MONOCHROME1 inverted); padded with 0 "
        "to a square, the image in its middle; resized by area averaging, or bilinearly where it has to grow",
        "inside": "three channels, ImageNet normalisation, network, sigmoid"
        + (", mean of the image and its mirror image" if card.flip_averaging else ""),
        "after": "probabilities up-sampled bilinearly (centres of px, corners not aligned) to the padded square, the "
        "padding cut off; threshold last: no px unless min_area_px of them reach top, else all that reach bottom",
        "flip_averaging_inside": card.flip_averaging,
        "operating_point": card.operating_point.model_dump(),
        "parity": "compared with the checkpoint in fp32 before it was written",
        "card": card.model_dump(mode="json"),
    }


def encode(network: nn.Module, card: ModelCard, suffix: str) -> bytes:
    """The content of a file `.onnx` or `.pt2`; `network` stays as it is."""
    image = torch.zeros(_BATCHES[-1], 1, card.size_px, card.size_px, dtype=torch.uint8)
    exported = _Exported(network, card.flip_averaging).requires_grad_(False)
    about = json.dumps(describe(card))
    with torch.no_grad():
        program = torch.export.export(exported, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    if suffix == ONNX:
        return _translate(program, f"Pneumothorax segmentation: {card.name}. Research use only.", about)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights in channels_last, which are stored whole all the same
        torch.export.save(program, file, extra_files={ABOUT: about})
    return file.getvalue()


def load(content: bytes, suffix: str) -> Run:
    """What `encode` has written, as a function from uint8 (B, 1, size, size) to float32 of the same shape."""
    if suffix == ONNX:
        import onnxruntime

        how = onnxruntime.SessionOptions()
        how.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, how, providers=["CPUExecutionProvider"])
        return lambda image: np.asarray(session.run([OUTPUT], {INPUT: image})[0])
    network = torch.export.load(io.BytesIO(content)).module()

    def run(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(image)).numpy())

    return run


class _Exported(nn.Module):
    """The graph that is written: image and mirror image in one pass, batch norms as part of the convolutions."""

    def __init__(self, network: nn.Module, flip_averaging: bool) -> None:
        super().__init__()
        self._network, self._flip_averaging = _folded(network), flip_averaging

    def forward(self, image: Tensor) -> Tensor:
        return predict_probability(self._network, image, self._flip_averaging, one_pass=True)[1]


def _folded(network: nn.Module) -> nn.Module:
    """A copy in inference mode whose batch norms are folded into its convolutions."""
    network = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    for module in list(network.modules()):
        for convolution, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):  # 0, 1: torchvision's downsample
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return network


def _translate(program: torch.export.ExportedProgram, title: str, about: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and onnxscript to each other
        translated = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},),  # the name; what is dynamic stands in the program
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert translated is not None
    proto = translated.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # names files of this machine
    proto.doc_string = title
    entry = proto.metadata_props.add()
    entry.key, entry.value = ABOUT, about
    return bytes(proto.SerializeToString())


@torch.no_grad()
def largest_difference(
    predictor: Predictor, run: Run, images: Sequence[Pixels], *, on_progress: Progress = lambda what, done, total: None
) -> float:
    """Largest difference of any probability, predictor against `run`, over batches of several sizes.

    `images` uint8 (size, size), at least one; they are used again where there are too few. NaN if a probability is.
    """
    found, first = 0.0, 0
    for size in _BATCHES:
        batch = np.stack([images[number % len(images)] for number in range(first, first + size)])
        first += size
        expected = predictor.probabilities(list(batch), batch.shape[-1], fewest=1).numpy()
        found = float(np.maximum(found, np.abs(run(batch[:, None])[:, 0] - expected).max()))  # keeps NaN
        on_progress("comparison with the checkpoint", first, sum(_BATCHES))
    return found


@torch.no_grad()
def allowed_difference(predictor: Predictor, images: Sequence[Pixels]) -> float:
    """What rounding may change: LIMIT, or more for a network whose logits reach hundreds and thousands.

    Those of a trained network stay within tens. After an epoch or two they may not, and then the checkpoint's own fp32
    is some 1e-7 of the largest logit away from exact arithmetic.
    """
    logits = [predictor.models[0](torch.from_numpy(image[None, None].copy())) for image in images]
    largest = max(float(part.abs().amax()) for part in logits)
    return LIMIT * min(max(1.0, largest / _PLAIN_LOGITS), _MOST_ROUNDING)


def _images(model: Path, size_px: int) -> tuple[list[Pixels], str]:
    """Images to compare on, and what they are: held-out ones of the run's cache where it is there, else phantoms."""
    wanted = sum(_BATCHES)
    if model.is_dir():
        cache = Path(read_settings(model).data.cache)
        try:
            cases, store = read_catalog(cache).cases, open_store(cache, size_px)
        except PtxdistError:
            pass
        else:
            held_out = [row for row, case in enumerate(cases[: store.cases]) if case.split == "val"]
            held_out.sort(key=lambda row: not cases[row].masks)
            half = wanted // 2
            rows = held_out[:half] + held_out[half:][::-1][:half]  # positive ones first, negative ones last
            if rows:
                return [np.array(store.sample(row)[0]) for row in rows], "held-out images of the run's cache"
    return [resize(image, size_px) for image in _phantoms(wanted)], "phantoms, as the run's cache is not there"


def _phantoms(number: int) -> Iterator[Pixels]:
    for index in range(number):
        rng = np.random.default_rng((0, index))
        chest = anatomy.pose(rng, "PA")
        union = np.maximum.reduce(anatomy.draw_masks(rng, chest))
        yield greys.draw_image(rng, chest, union)


def _refuse_unwritable(out: Path) -> None:
    """CheckpointError, before any work, when the file can surely not be written."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir():
        raise CheckpointError(f"{out} cannot be written: a folder has this name")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {folder} is no folder that may be written to")
