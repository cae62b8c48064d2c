"""ptxdist from Python: from image files to a prediction without the command line, in about a minute on a CPU.

Run it as a script, or cell by cell in an editor that knows `# %%`. Every function has a docstring: try
`help(ptxdist.train)`.
"""

# %%
from pathlib import Path

import ptxdist
from ptxdist.events import Event
from ptxdist.records import EpochMetrics

work = Path("notebook")  # everything is written here; delete it to start again

# %% [markdown]
# **Data.** Synthetic radiographs with the files of the SIIM-ACR challenge: DICOM images, a table of masks, and a table
# of patients. With data of your own, start with `preprocess`.

# %%
data = work / "phantoms"
if not data.exists():
    ptxdist.phantom(data, cases=24, positive_share=0.5)

# %% [markdown]
# **Cache.** Images and masks at the sizes that will be trained, split by patient into folds. A second call checks the
# cache and rewrites only what has changed.

# %%
built = ptxdist.preprocess(
    data / "dicom-images", data / "train-rle.csv", work / "cache", patients=data / "patients.csv", size=(64, 96)
)
print(f"{len(built.catalog.labelled)} labelled images, {built.written} shards written")

# %% [markdown]
# **Training.** `smoke` is a pipeline of two short stages; `paper` is the real one. `set` changes any setting by its
# name. `on_event` is called with the events listed in `ptxdist.events.Event`. Training takes place in this process, or
# with `workers` on so many Ray workers.


# %%
def show(event: Event) -> None:
    """Print a line for each epoch."""
    if isinstance(event, EpochMetrics):
        print(f"stage {event.stage} epoch {event.epoch}: validation loss {event.val_loss:.3f}")


result = ptxdist.train(work / "cache", pipeline="smoke", run=work / "run", set={"train.device": "cpu"}, on_event=show)
print(f"Kaggle Dice {result.evaluation.scores.kaggle_dice:.3f}, report: {work / 'run' / 'report' / 'index.html'}")

# %% [markdown]
# **Evaluation.** `train` has already evaluated the run on the held-out fold. `evaluate` does this for any finished
# runs, for example for an ensemble. Scores come with 95 % intervals by patient, if there are five patients at least.

# %%
evaluation = ptxdist.evaluate(work / "run")
span = evaluation.intervals.get("kaggle_dice", "too few patients for an interval")
empty = evaluation.scores.all_empty_dice
print(f"Kaggle Dice {evaluation.scores.kaggle_dice:.3f}, {span}; predicting nothing scores {empty:.3f}")

# %% [markdown]
# **Prediction** for one file: a mask and probabilities at the original resolution, as NumPy arrays.

# %%
predictor = ptxdist.Predictor.load(work / "run", device="cpu")
prediction = predictor.predict(next((data / "dicom-images").rglob("*.dcm")))
print(f"{prediction.case_id}: score {prediction.score:.3f}, mask {prediction.mask.shape}, {prediction.area_px} pixels")
