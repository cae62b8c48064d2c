"""`model.init`: the model that the first stage of a run starts from, and what is recorded of it.

A run, a bundle or a file with weights of the whole network, trained at any size. Refuses: models of other settings and
files that do not fit (CheckpointError), runs that are not finished (RunError).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptxdist import files
from ptxdist.cache.catalog import Catalog, hold_out, read_catalog
from ptxdist.cache.salt import read_salt
from ptxdist.config import ModelSettings, Settings
from ptxdist.errors import CheckpointError, PtxdistError
from ptxdist.records import Origin, ParentModel
from ptxdist.rundir import read_origin, read_settings
from ptxdist.scores.tables import refuse_other_split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptxdist.predict.bundle import ModelCard

_HEAD = "image_head."


@dataclass(frozen=True)
class _Model:
    """Weights of a whole network, the sha256 of their file, and the card of a run or bundle."""

    weights: Mapping[str, Tensor]
    sha256: str
    card: ModelCard | None


def origin_of(settings: Settings, cache: Path, catalog: Catalog) -> Origin:
    """What the network of a run will be made from: the training cases of its fold, and the model of `model.init`.

    `catalog` is that of the `cache`. Raises CheckpointError or RunError when that model cannot be had or does not fit.
    """
    fold = settings.pipeline.fold
    train = [case for case in catalog.labelled if case.fold >= 0 and case.fold != fold]
    model, parent = settings.pipeline.model, None
    if model.init is not None:
        source = _read(Path(model.init))
        fresh, unused = _check(model, source, model.init)
        before = read_origin(Path(model.init)) if Path(model.init).is_dir() else None
        seen = _seen(Path(model.init), cache, catalog, fold)
        parent = ParentModel(
            kind="file" if source.card is None else "run" if Path(model.init).is_dir() else "bundle",
            name=source.card.name if source.card else None,
            weights_sha256=source.sha256,
            fingerprint=source.card.fingerprint if source.card else None,
            images=before.images if before else source.card.training_images if source.card else None,
            fresh=fresh,
            unused=unused,
            seen=seen[0] if seen else None,
            seen_by=seen[1] if seen else None,
            finding=source.card.finding if source.card and source.card.finding.is_other(catalog.finding) else None,
            parent=before.parent if before else source.card.made_from if source.card else None,
        )
    positives = sum(bool(case.masks) for case in train)
    return Origin(images=len(train), positives=positives, finding=catalog.finding, parent=parent)


def load_init(network: nn.Module, place: str, sha256: str) -> None:
    """Load the weights at `place` into the network of a first stage; parts that they lack stay as they are.

    Raises CheckpointError when they are not those of `sha256` any more.
    """
    source = _read(Path(place))
    if source.sha256 != sha256:
        raise CheckpointError(f"{place} was altered since this training began; start the run anew")
    own = network.state_dict()
    network.load_state_dict(own | {key: value for key, value in source.weights.items() if key in own})


def _read(path: Path) -> _Model:
    from ptxdist.predict.bundle import SUFFIX, read_model
    from ptxdist.train.encoders import read_weights

    if not path.exists():
        raise CheckpointError(f"no model at {path}: give a run, a bundle or a file with weights of the whole network")
    if path.is_dir() or path.suffix == SUFFIX:
        card, weights = read_model(path)
        return _Model(weights, card.weights_sha256, card)
    return _Model(read_weights(path), files.sha256(path), None)


def _check(model: ModelSettings, source: _Model, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of the network that the weights lack, and those of the weights that the network lacks.

    Raises CheckpointError unless that is at most the image head.
    """
    import torch

    from ptxdist.train.encoders import misfits
    from ptxdist.train.unet import build_unloaded

    if source.card:
        other = source.card.pipeline.model
        names = ("encoder", "decoder_channels", "input_mapping")
        differing = [
            f"model.{name} {getattr(other, name)} (here {getattr(model, name)})"
            for name in names
            if getattr(other, name) != getattr(model, name)
        ]
        if differing:
            raise CheckpointError(f"{place} has other settings: {', '.join(differing)}; give this run the same")
    with torch.device("meta"):
        expected = build_unloaded(model).state_dict()
    has = [any(key.startswith(_HEAD) for key in keys) for keys in (expected, source.weights)]
    if has[0] != has[1]:
        expected = {key: value for key, value in expected.items() if not key.startswith(_HEAD)}
    found = {key: value for key, value in source.weights.items() if has[0] or not key.startswith(_HEAD)}
    if faults := misfits(expected, found):
        raise CheckpointError(
            f"{place}: not the weights of this network; {'; '.join(faults)}; compare model.encoder, "
            "model.decoder_channels and model.input_mapping"
        )
    head = ("image head",)
    return (head if has[0] and not has[1] else (), head if has[1] and not has[0] else ())


def _seen(source: Path, cache: Path, catalog: Catalog, fold: int) -> tuple[int, str] | None:
    """Number of held-out cases on whose "patient" or "image" the run `source` was trained; None if that is not known.

    Names of patients are hashed with the salt of their cache: with another one, only equal files are recognised.
    """
    try:
        settings = read_settings(source)
        other_cache, other_fold = Path(settings.data.cache), settings.pipeline.fold
        other = hold_out(read_catalog(other_cache), other_fold, ())
        refuse_other_split(source, other, other_fold)
    except (PtxdistError, OSError):
        return None
    held_out = [case for case in catalog.labelled if case.fold == fold]
    train = [case for case in other.labelled if case.split == "train"]
    salt = read_salt(cache)
    if salt and salt == read_salt(other_cache):
        groups = {case.group for case in train}
        known = "nothing" not in (catalog.leakage.grouped_by, other.leakage.grouped_by)
        return sum(case.group in groups for case in held_out), "patient" if known else "image"
    digests = {case.digest for case in train}
    return sum(case.digest in digests for case in held_out), "image"
