"""Records that a run writes as JSON: the content of these files (`rundir` has their names)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ptxdist.finding import FindingType, unless_pneumothorax

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Loss = Annotated[float, Field(ge=-1e100, le=1e100)]
ScoreThreshold = Annotated[float, Field(ge=0, le=1.001)]  # just above 1, no image is flagged
Name = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*\z")]
Intervals = dict[str, tuple[float, float]]
Measure = Literal["brightness", "contrast", "sharpness", "size", "layout"]
Percentiles = tuple[Annotated[float, Field(ge=0, le=1e9)], ...]
SYNTHETIC = "The model was trained on synthetic images only, so its answer on a real radiograph means nothing."


class Record(BaseModel):
    """A frozen record that is written as JSON; NaN and infinite values are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def when_known() -> Any:
    """A field of a record that is None by default, and then left out of JSON."""
    return Field(None, exclude_if=lambda value: value is None)


class Scores(Record):
    """Scores of a set of cases, each 0..1; None where they are not defined.

    `kaggle_dice`     mean Dice over all images, 1 where truth and prediction are empty, 0 where one of them is
    `positive_dice`   mean Dice over the positive images; None without such images
    `pooled_dice`     Dice over the pixels of all images together; 1 when truth and prediction are empty
    `sensitivity`     share of positive images with at least one pixel predicted; None without positive images
    `specificity`     share of negative images without a predicted pixel; None without negative images
    `all_empty_dice`  the Kaggle Dice that empty masks for all images would score
    """

    cases: Count
    positives: Count
    kaggle_dice: Share
    positive_dice: Share | None
    pooled_dice: Share
    sensitivity: Share | None
    specificity: Share | None
    all_empty_dice: Share

    @property
    def pooled_iou(self) -> float:
        """Intersection over union of the pixels of all images together, which the pooled Dice determines."""
        return self.pooled_dice / (2 - self.pooled_dice)

    @property
    def equals_all_empty(self) -> bool:
        """Whether not a single pixel was predicted, so that the scores are those of the baseline."""
        return self.sensitivity in (None, 0.0) and self.specificity in (None, 1.0)


class OperatingPoint(Record):
    """How a probability map becomes a mask: all pixels that reach `bottom`, if the image is taken for a positive one.

    It is if the case's score reaches `image` and `min_area_px` pixels reach `top`. Areas are in pixels of the original
    image. `top == bottom` is a pair of threshold and minimum area; the source used such a pair with `min_area_px` 0.
    `image` is searched for models with an image head. At 0 any score reaches it, and it is left out of JSON.
    """

    top: Share
    min_area_px: Count
    bottom: Share
    image: ScoreThreshold = Field(0.0, exclude_if=lambda value: value == 0)

    def admits(self, score: float) -> bool:
        """Whether a score reaches `image`; rounded to six digits, as it is written for people."""
        return round(score, 6) >= self.image

    @property
    def words(self) -> str:
        """The point as a sentence without its end: when a mask is empty, and of which pixels it is made."""
        needed = [f"the score reaches {self.image:g}"] if self.image else []
        if self.min_area_px:
            needed.append(f"{self.min_area_px:,} pixels reach {self.top:g}")
        made = f"made of all pixels that reach {self.bottom:g}"
        return f"a mask is empty unless {' and '.join(needed)}; it is {made}" if needed else f"a mask is {made}"


class EpochMetrics(Record):
    """One line of metrics.jsonl. `epoch` counts from 1; `averaged` marks the SWA weights, after the last epoch.

    Losses are means per case; `at_stage` scores at the stage's size, `at_full` at the original resolution.
    """

    stage: int
    epoch: int
    averaged: bool = False
    learning_rate: float
    train_loss: Loss | None
    val_loss: Loss
    at_stage: Scores
    at_full: Scores
    train_seconds: float
    val_seconds: float
    images_per_second: float | None


class StageHistory(Record):
    """The epochs of a stage that are finished when its training starts; () unless it resumes from a checkpoint."""

    stage: int
    epochs: tuple[EpochMetrics, ...]


class StageResult(Record):
    """Result of a finished stage: its epochs, the best of them, and its weights (a path below the run folder).

    `reused_from` names the run that trained it, if that was another one.
    """

    stage: int
    size_px: int
    fingerprint: str
    epochs: int
    workers: int
    seconds: float
    best: EpochMetrics
    history: tuple[EpochMetrics, ...]
    weights: Name
    weights_sha256: str
    reused_from: str | None = None


class TunedPoint(Record):
    """The operating point with the best Kaggle Dice, and an honest estimate of its scores.

    `kind` is "pair" (threshold, minimum area) or "triplet" (top threshold, minimum area, bottom threshold). `scores`
    are those of `point` on the cases on which it was chosen, and so too high. `estimate` is to be reported: each case
    is masked by the point chosen on the cases of the other `folds`, which share no patient with it; `points` are these
    points, `intervals` its 95 % intervals. Where the model had a point of its own, `gains` are the differences of the
    estimate from the scores at that point, with `gain_intervals`.
    `surface` has the mean Kaggle Dice on all cases for each of `thresholds` (rows; for a triplet the bottom one, at
    the best top) and each of `areas_px`; None where no point is tried.
    """

    kind: str
    point: OperatingPoint
    scores: Scores
    estimate: Scores
    intervals: Intervals = {}
    folds: int
    gains: dict[str, float] | None = when_known()
    gain_intervals: Intervals | None = when_known()
    points: tuple[OperatingPoint, ...]
    thresholds: tuple[float, ...]
    areas_px: tuple[int, ...]
    surface: tuple[tuple[float | None, ...], ...]


class Reliability(Record):
    """Predicted against observed: `things` by their predicted probability, in bins of equal width.

    They are "px", "images" by their scores, or "images, calibrated".
    `predicted` is the mean probability in a bin, `observed` the share that is positive; empty bins are left out.
    `error` is the expected calibration error: the mean of |predicted - observed| over all things (Naeini et al. 2015).
    Predicting the positive share for all would score 0. `interval` is in results of older versions only.
    """

    things: str
    counts: tuple[int, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    error: float
    interval: tuple[float, float] | None = when_known()


class WorkingPoint(Record):
    """A threshold of the score of an image for a wanted `target` of sensitivity or specificity per image (`kind`).

    An image whose score reaches `threshold` is flagged. The other numbers are cross-fitted: each case is flagged by the
    threshold that was chosen on the cases of other patients. `hits` and `misses` are positive images, `alarms` and
    `rejections` negative ones; `flagged` is the share of images that are flagged. `ppv` and `npv` are the shares of
    right answers among flagged and other images at a `prevalence` (share of positive images); None if there are none.
    """

    kind: Literal["sensitivity", "specificity"]
    target: Share
    threshold: ScoreThreshold
    hits: Count
    misses: Count
    alarms: Count
    rejections: Count
    sensitivity: Share
    specificity: Share
    intervals: Intervals = {}
    flagged: Share
    prevalence: Share
    ppv: Share | None
    npv: Share | None

    @property
    def name(self) -> str:
        """What it is called on the command line: sensitivity=0.95."""
        return f"{self.kind}={self.target:g}"


class Platt(Record):
    """The probability that an image is positive is 1 / (1 + exp(-(slope * log-odds of its score + intercept)))."""

    slope: float
    intercept: float


class Subgroup(Record):
    """Scores of the cases that have one property, such as view AP; `small` marks those too few to conclude from."""

    by: str
    name: str
    scores: Scores
    intervals: Intervals = {}
    small: bool


class SharedPatients(Record):
    """Scores of validation cases whose patient is in training, and of those whose patient is not; None without any.

    `known_from` is where the patients come from: "catalog" or "patient map".
    """

    known_from: str
    shared: Scores | None
    shared_intervals: Intervals = {}
    apart: Scores | None
    apart_intervals: Intervals = {}


class Likeness(Record):
    """How training images look: 0.1, 5, 95, 99.9 % of each measure of `cache.likeness`; mean image, 16x16 in hex."""

    ranges: dict[Measure, tuple[float, float, float, float]] = Field(min_length=5)
    layout: Annotated[str, Field(pattern=r"\A[0-9a-f]{512}\z")]


class Profile(Record):
    """What a set of images is like: numbers, and the 5th, 25th, 50th, 75th and 95th percentile of some properties.

    `mask_share` is the area of a mask as a share of its image, of positive images; `brightness` the mean grey level at
    the network's size, 0..255; `age` in years, where it is known; `side_px` the longer side of the original image. ()
    without values. `views` are numbers of images by view. `synthetic` says that all are known to be phantoms.
    `likeness` is None for few images, and in files of older versions.
    """

    images: Annotated[Count, Field(ge=1)]
    positives: Count
    mask_share: Percentiles
    brightness: Percentiles
    age: Percentiles
    side_px: Percentiles
    views: dict[Annotated[str, Field(pattern=r"\A[A-Za-z]{1,16}\z")], Count]
    synthetic: bool = Field(False, exclude_if=lambda value: not value)
    likeness: Likeness | None = when_known()

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {*map(len, (self.mask_share, self.brightness, self.age, self.side_px))}
        if max(self.positives, 0, *self.views.values()) > self.images or lengths - {0, 5}:
            raise ValueError("more positives or more of a view than images, or not five percentiles")
        if self.mask_share and not self.positives:
            raise ValueError("areas of masks without a positive image")
        return self


class SeenImages(Record):
    """Evaluated images that a model was trained on: with `equal` pixels, or that only look the same (`alike`).

    `patients` are others whose patient is in the training, None if patients cannot be compared. `case_ids` are the ids
    of all of these. `without` are the scores of the other images, None if there are none.
    """

    equal: int
    alike: int
    patients: int | None
    case_ids: tuple[str, ...]
    without: Scores | None
    without_intervals: Intervals = {}


class Elsewhere(Record):
    """An evaluation of models on data that they were not trained with: a cache, of which `split` was evaluated.

    `models` are names, with the sha256 of their weights; `point_from` says where the operating point was chosen. `here`
    is what the evaluated images are like, `there` the training images of the first model. `there` and `seen` are None
    where a model is too old to know.
    """

    data: str
    split: Literal["all", "train", "val"]
    models: tuple[str, ...]
    weights_sha256: tuple[str, ...]
    point_from: str
    here: Profile
    there: Profile | None
    seen: SeenImages | None


class EvaluationResult(Record):
    """Scores of the last stage's weights on cases they have not seen, at the original resolution.

    `scores` are those at `threshold`, with masks below `min_area_px` emptied. In an evaluation `elsewhere` they are at
    `point`, the model's operating point, whose lower threshold is `threshold`. `intervals` are the 95 % intervals by
    name (also `pooled_iou` and `auroc`), by patient; a score from too few patients has none. `auroc` is that of the
    image-level score (see `image_head`); None without both kinds of images. `tuned` is () with too few patients.
    `folds` are the folds whose cases were evaluated, `runs` is the number of runs. `image_head` says what the score of
    an image is: False: the highest probability of its map; True: also the image head's (`train.scoring.case_score`).
    `calibration` is that of pixels, of images by their scores, and of images by `platt`, cross-fitted. `roc` are points
    (1 - specificity, sensitivity) of the score, `working` the points that were asked for. `finding` is what the true
    masks show. Fields with a default are missing in results of older versions.
    """

    threshold: Share
    min_area_px: Count
    flip_averaging: bool
    runs: int = 1
    folds: tuple[int, ...] = (0,)
    point: OperatingPoint | None = when_known()
    scores: Scores
    auroc: Share | None = None
    intervals: Intervals = {}
    at_other_thresholds: dict[str, Scores]
    tuned: tuple[TunedPoint, ...] = ()
    calibration: tuple[Reliability, ...] = ()
    platt: Platt | None = when_known()
    roc: tuple[tuple[float, float], ...] = Field((), exclude_if=lambda value: not value)
    working: tuple[WorkingPoint, ...] = Field((), exclude_if=lambda value: not value)
    subgroups: tuple[Subgroup, ...] = ()
    shared_patients: SharedPatients | None = None
    image_head: bool = Field(False, exclude_if=lambda value: not value)
    finding: FindingType = unless_pneumothorax()
    elsewhere: Elsewhere | None = when_known()
    seconds: float

    @property
    def best_tuned(self) -> TunedPoint | None:
        """The tuned point with the best estimate, which becomes the model's own point; None if nothing was tuned."""
        return max(self.tuned, key=lambda tuned: tuned.estimate.kaggle_dice, default=None)


class PipelineResult(Record):
    """Result of a finished pipeline."""

    pipeline: str
    stages: tuple[StageResult, ...]
    evaluation: EvaluationResult
    seconds: float


class Environment(Record):
    """What is read of environment.json: versions of packages, and the commit of ptxdist."""

    model_config = ConfigDict(extra="ignore")
    packages: dict[str, str] = {}
    commit: str | None = None


class ParentModel(Record):
    """The model that a run's first stage started from: `model.init`, a run, a bundle or a file of weights.

    `fingerprint` (of its last stage: settings, code and data) and `images`, its number of training images, are None
    where they are not known. `fresh` are parts of the network that it lacked, `unused` those of its parts that the
    network lacks. `seen` is the number of held-out cases whose patient or, with `seen_by` "image", whose file it was
    trained on; None: not known. `finding` is what it segments, if that is not the run's finding. `parent` is the model
    that it started from itself.
    """

    kind: Literal["run", "bundle", "file"]
    name: str | None
    weights_sha256: str
    fingerprint: str | None
    images: int | None
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    seen: int | None
    seen_by: Literal["patient", "image"] | None
    finding: FindingType | None = when_known()
    parent: ParentModel | None = None


class Origin(Record):
    """What the network of a run is made from: its training images, and the model it started from.

    `finding` is what their masks show.
    """

    images: int
    positives: int
    finding: FindingType = unless_pneumothorax()
    parent: ParentModel | None = None
    profile: Profile | None = when_known()
