"""Predict radiographs with one model or with several: `Predictor`, the Python API of ptxdist.

Owns: how several models make one probability map, and the pipeline of decoding, network and masks. Refuses: models
that cannot be loaded (CheckpointError, RunError), files that are not radiographs (DicomError).

A file is read and fitted into a square as in `cache.render`, and a map is scaled back to the original resolution as in
`train.scoring`, so a held-out case gets the same mask as in `evaluate`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ptxdist.cache.likeness import look, unlike
from ptxdist.cache.render import fit_square, resize
from ptxdist.dicom.array import radiograph_of
from ptxdist.dicom.guard import bare, guarded
from ptxdist.dicom.pixels import Pixels
from ptxdist.dicom.radiograph import Radiograph, read_bytes, read_radiograph
from ptxdist.dicom.spacing import Spacing
from ptxdist.dicom.tags import Tags
from ptxdist.errors import CheckpointError, DicomError
from ptxdist.executor import ahead
from ptxdist.predict.bundle import ModelCard, load_model, point_at, refuse_different
from ptxdist.records import SYNTHETIC, OperatingPoint
from ptxdist.scores.working import calibrated
from ptxdist.train.device import Device, autocast, choose_device, choose_precision, one_thread_each
from ptxdist.train.scoring import case_score, mask_at, predict_probability, to_original

BATCH = 4  # images in a pass on a CPU, and at least so many: with fewer, oneDNN rounds differently
_GPU_BATCH = 16
_DECODERS = 4  # threads; together they decode an image in 3 ms, which is what a GPU needs for one
_AHEAD = 2  # batches decoded in advance

Item = TypeVar("Item")
_Maps = dict[int, tuple[Tensor, Tensor]]  # see `Predictor.probabilities`


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one radiograph, at the original resolution.

    `pixels` uint8 (rows, columns), air dark; `probability` float32 (rows, columns), 0..1; `mask` bool (rows, columns);
    `score` as `train.scoring.case_score` computes it, at the network's size; `calibrated` the probability that the
    image is positive, from the score, if the model's evaluation has a calibration; `content` the bytes of the file;
    `spacing` the size of a pixel in mm where the file can be trusted with it; `orientation` the patient's directions
    along a row and down a column, such as "LF", or ""; `unlike` says in which way the image is unlike the training
    images, "" if it is not or if that is not known; `flagged` is true with a mask, and without one if the score reaches
    the operating point's threshold of the score: such an image is not negative.
    """

    case_id: str
    pixels: Pixels = field(repr=False)
    probability: npt.NDArray[np.float32] = field(repr=False)
    mask: npt.NDArray[np.bool_] = field(repr=False)
    score: float
    content: bytes = field(repr=False)
    spacing: Spacing
    calibrated: float | None = None
    orientation: str = ""
    unlike: str = ""
    flagged: bool = False

    @property
    def area_px(self) -> int:
        """Number of pixels in the mask."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True)
class _Loaded:
    """A file ready for the network: `squares` uint8 (size, size), by size."""

    radiograph: Radiograph
    squares: dict[int, Pixels]
    content: bytes


class Predictor:
    """One model, or several whose probabilities are averaged, with an operating point.

    `cards` describe the models; `models` are on `device`, in inference mode. `image_head` says whether they have image
    heads. `caution` is a sentence to be shown with every answer, "" if there is none. To be used from one thread at a
    time.

    >>> predictor = ptxdist.Predictor.load("runs/first", device="cpu")
    >>> prediction = predictor.predict(next(Path("phantoms/dicom-images").rglob("*.dcm")))
    >>> prediction.mask.shape, prediction.probability.dtype, 0 <= prediction.score <= 1
    ((1024, 1024), dtype('float32'), True)
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        models: Sequence[nn.Module],
        device: torch.device,
        operating_point: OperatingPoint | None = None,
    ) -> None:
        self.cards, self.device = tuple(cards), device
        self.image_head = self.cards[0].pipeline.model.image_head
        refuse_different(self.cards, CheckpointError)
        self.models = tuple(model.to(device).to(memory_format=torch.channels_last).eval() for model in models)
        self.operating_point = operating_point or self.cards[0].operating_point
        self.flip_averaging = self.cards[0].flip_averaging
        self.caution = SYNTHETIC if any(card.synthetic for card in self.cards) else ""
        self._sizes = sorted({card.size_px for card in self.cards})

    @classmethod
    def load(
        cls,
        *models: str | os.PathLike[str],
        device: Device = "auto",
        operating_point: OperatingPoint | None = None,
        at: str | None = None,
    ) -> Predictor:
        """Load finished runs (folders) or bundles (files).

        Without an `operating_point`, that of the first model is used, as is its flip averaging; with `at`, a working
        point that is stored with it. `auto` takes a GPU if there is one. Raises RunError; CheckpointError, also for
        models of different findings, or with and without an image head, together; or SettingsError for a device that
        does not exist.
        """
        if not models:
            raise CheckpointError("no model to predict with: give a finished run or a bundle")
        loaded = [load_model(Path(model)) for model in models]
        if at is not None:
            operating_point = point_at(loaded[0][0], at)[0]
        return cls([card for card, _ in loaded], [model for _, model in loaded], choose_device(device), operating_point)

    def predict(self, image: str | os.PathLike[str] | npt.NDArray[Any]) -> Prediction:
        """Predict one DICOM or PNG file, or an array (rows, columns) of grey levels, air dark.

        An array of uint8 is taken as it is, of other integers and of floats the range of the values becomes 0..255; the
        prediction then has neither `case_id` nor `content`. Raises DicomError for what is not a radiograph.

        >>> predictor.predict(np.zeros((300, 200), np.uint8)).mask.shape
        (300, 200)
        """
        if isinstance(image, np.ndarray):
            return self._one(self._fitted(radiograph_of(image), b""))
        if not isinstance(image, str | os.PathLike):
            raise DicomError(f"{type(image).__name__}: give the path of a file, or a NumPy array (rows, columns)")
        return self.predict_content(read_bytes(Path(image)), name=Path(image).name)

    def predict_content(
        self, content: bytes, name: str = "", check: Callable[[Tags | None], None] = lambda file: None
    ) -> Prediction:
        """Predict the bytes of a file; a PNG needs the `name` of its file. Raises DicomError as `predict` does.

        `check` may refuse a file by its header, see `read_radiograph`.
        """
        return self._one(self._load(content, name, check))

    def _one(self, item: _Loaded) -> Prediction:
        result = next(self._predictions([item], self._maps([item], fewest=1)))
        if isinstance(result, DicomError):
            raise bare(result)  # not itself, or this frame and the file in it were kept by each other
        return result

    def predict_many(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[Path, Prediction | DicomError]]:
        """Predict many files, in their order; each path with its prediction, or with the DicomError.

        Files are decoded in threads while the network runs; at most a few batches are in memory. On a CPU,
        torch has one thread in the caller until the iterator has ended or is closed.
        """
        read = ((Path(path), _reader(Path(path))) for path in paths)
        return self.stream(read)

    def stream(
        self, items: Iterable[tuple[Item, Callable[[], tuple[bytes, str]]]], with_content: bool = True
    ) -> Iterator[tuple[Item, Prediction | DicomError]]:
        """As `predict_many`, for items with a function that returns content and file name.

        Without the content, of which some twenty are in memory at once, that of a prediction is empty.
        """

        def load(item: tuple[Item, Callable[[], tuple[bytes, str]]]) -> tuple[Item, _Loaded | DicomError]:
            try:
                with guarded():
                    content, name = item[1]()
                    radiograph = read_radiograph(content, name=name)
                    return item[0], self._fitted(radiograph, content if with_content else b"")
            except DicomError as error:
                return item[0], bare(error)

        size = BATCH if self.device.type == "cpu" else _GPU_BATCH
        loaded = ahead(load, items, threads=_DECODERS, most=_AHEAD * size)

        def run(
            batch: list[tuple[Item, _Loaded | DicomError]],
        ) -> tuple[list[tuple[Item, _Loaded | DicomError]], list[_Loaded], _Maps]:
            sound = [item for _, item in batch if isinstance(item, _Loaded)]
            return batch, sound, self._maps(sound, fewest=BATCH)

        batches = iter(lambda: list(itertools.islice(loaded, size)), [])
        for batch, sound, maps in one_thread_each(run, batches, self.device, size * self._sizes[-1] ** 2):
            predictions = self._predictions(sound, maps)
            for key, item in batch:
                yield key, item if isinstance(item, DicomError) else next(predictions)

    def _load(self, content: bytes, name: str, check: Callable[[Tags | None], None] = lambda file: None) -> _Loaded:
        return self._fitted(read_radiograph(content, name=name, check=check), content)

    def _fitted(self, radiograph: Radiograph, content: bytes) -> _Loaded:
        square = fit_square(radiograph.pixels)
        squares = {size: resize(square, size) for size in self._sizes}
        return _Loaded(radiograph, squares, content)

    @torch.inference_mode()
    def _maps(self, items: Sequence[_Loaded], fewest: int) -> _Maps:
        """Maps and scores of the items, by size; {} without items."""
        sizes = self._sizes if items else []
        return {size: self.probabilities([item.squares[size] for item in items], size, fewest) for size in sizes}

    @torch.inference_mode()
    def _predictions(self, items: Sequence[_Loaded], found: _Maps) -> Iterator[Prediction | DicomError]:
        share = {size: sum(card.size_px == size for card in self.cards) / len(self.cards) for size in self._sizes}
        for row, item in enumerate(items):
            parts = [(found[size][0][row], float(found[size][1][row]), share[size]) for size in self._sizes]
            yield self._predicted_or_reason(item, parts)  # no name here keeps it until the next one is asked for

    def _predicted_or_reason(
        self, item: _Loaded, parts: Sequence[tuple[Tensor, float, float]]
    ) -> Prediction | DicomError:
        try:
            with guarded():
                return self._predicted(item, parts)
        except DicomError as error:
            return bare(error)

    def _predicted(self, item: _Loaded, parts: Sequence[tuple[Tensor, float, float]]) -> Prediction:
        """The prediction from the map, the score and the share of each size."""
        radiograph = item.radiograph
        rows, columns = radiograph.pixels.shape
        probability: Tensor | None = None
        for square, _, share in parts:
            part = to_original(square, rows, columns)
            part = part if rows == columns else part.clone()  # which does not keep the whole square
            part = part if share == 1 else part.mul_(share)
            probability = part if probability is None else probability.add_(part)
        assert probability is not None
        score = sum(score * share for _, score, share in parts)
        whole = probability.float().cpu().numpy()
        mask = mask_at(torch.from_numpy(whole), self.operating_point, score).numpy()
        flagged = is_flagged(self.operating_point, score, int(np.count_nonzero(mask)))
        return Prediction(
            radiograph.header.case_id, radiograph.pixels, whole, mask, score, item.content, radiograph.spacing,
            self._calibrated(score), radiograph.header.orientation, self._unlike(item), flagged,
        )  # fmt: skip

    def _unlike(self, item: _Loaded) -> str:
        """In which way the image is unlike the training images of the first model, in words; "" if it is not known."""
        card, header = self.cards[0], item.radiograph.header
        if header.synthetic and card.profile is not None and not card.synthetic:
            return "a synthetic image"
        if card.profile is None or card.profile.likeness is None:
            return ""
        return unlike(look(item.squares[card.size_px], max(header.rows, header.columns)), card.profile.likeness)

    def _calibrated(self, score: float) -> float | None:
        platt = self.cards[0].evaluation.platt if len(self.cards) == 1 else None  # that of one model's scores
        return None if platt is None else float(calibrated(np.array([score]), platt)[0])

    def probabilities(self, squares: Sequence[Pixels], size: int, fewest: int) -> tuple[Tensor, Tensor]:
        """Mean probabilities (n, size, size) of the models of one size, and the scores (n,) that follow from them.

        Both are float32; a pass has at least `fewest` images.
        """
        stacked = torch.zeros(max(len(squares), fewest), 1, size, size, dtype=torch.uint8)
        stacked[: len(squares), 0] = torch.from_numpy(np.stack(squares))
        image = stacked.to(self.device)
        maps, heads = [], []
        for card, model in zip(self.cards, self.models, strict=True):
            if card.size_px != size:
                continue
            with autocast(self.device, choose_precision(card.precision, self.device)):
                predicted = predict_probability(model, image, self.flip_averaging)
            maps.append(predicted.probability[: len(squares)])
            if predicted.image is not None:
                heads.append(predicted.image[: len(squares)])
        probability = _mean(maps)
        return probability[:, 0], case_score(probability, _mean(heads) if heads else None)


def is_flagged(point: OperatingPoint, score: float, area_px: int) -> bool:
    """Whether an image is not negative: it has a mask, or its score reaches the point's and no mask remains."""
    return area_px > 0 or (point.image > 0 and point.admits(score))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).mean(0) if len(parts) > 1 else parts[0]


def _reader(path: Path) -> Callable[[], tuple[bytes, str]]:
    return lambda: (read_bytes(path), path.name)
