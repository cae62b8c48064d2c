"""Settings: every file loads, sources come in order, and what is wrong is named with its source and a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptxdist import config
from ptxdist.config import YEAR_S, Section, Settings, added, complete, differences, fingerprint, restore, snapshot
from ptxdist.errors import SettingsError
from ptxdist.resolve import find, load_settings

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = sorted(path.stem for path in (ROOT / "pipelines").glob("*.toml"))

STAGES = [  # size, epochs, batch, swa, schedule, threshold: the values of the source (data-facts)
    ("exp1", [(256, 35, 40, 0, "plateau", 0.5)]),
    ("exp2", [(256, 35, 40, 0, "plateau", 0.55)]),
    ("exp3", [(256, 35, 40, 0, "plateau", 0.55), (512, 10, 14, 0, "plateau", 0.55)]),
    ("exp4", [(256, 60, 40, 0, "plateau", 0.55), (512, 29, 14, 0, "plateau", 0.55)]),
    ("paper", [(256, 100, 64, 5, "cosine", 0.55), (512, 70, 16, 5, "cosine", 0.55)]),
]


def refusal(**given: object) -> str:
    """Message of the error with which settings are refused."""
    with pytest.raises(SettingsError) as caught:
        load_settings(**{"pipeline": "paper", **given})  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    return str(caught.value)


def pipeline_file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


stages = st.builds(
    config.StageSettings,
    size_px=st.sampled_from([32, 64, 256, 1024]),
    epochs=st.integers(5, 200),
    batch_size=st.integers(8, 128),
    learning_rate=st.floats(1e-8, 10),
    schedule=st.sampled_from(["plateau", "cosine", "constant"]),
    swa_epochs=st.integers(0, 5),
    threshold=st.floats(0.01, 0.99),
    augmentation=st.sampled_from(["none", "siim"]),
)
all_settings = st.builds(
    Settings,
    data=st.builds(config.DataSettings, cache=st.text(min_size=1)),
    train=st.builds(config.TrainSettings, workers=st.integers(1, 8), precision=st.sampled_from(["fp32", "bf16"])),
    pipeline=st.builds(
        config.PipelineSettings,
        name=st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True),
        purpose=st.text(),
        seed=st.integers(0, 2**31 - 1),
        stages=st.lists(stages, min_size=1, max_size=3).map(tuple),
    ),
)


@given(all_settings)
@settings(max_examples=40)
def test_settings_survive_snapshot_and_restore(example: Settings) -> None:
    plain = json.loads(json.dumps(snapshot(example)))
    assert restore(plain) == example
    assert fingerprint(restore(plain)) == fingerprint(example)
    assert list(differences(plain, snapshot(example))) == []


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_loads_and_opens_with_purpose_source_and_target(name: str) -> None:
    pipeline = load_settings(name).pipeline
    assert pipeline.name == name
    assert pipeline.purpose
    assert pipeline.source
    assert pipeline.target
    assert (ROOT / "pipelines" / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.parametrize(("name", "expected"), STAGES)
def test_experiments_have_the_values_of_the_source(name: str, expected: list[tuple[object, ...]]) -> None:
    pipeline = load_settings(name).pipeline
    found = [(s.size_px, s.epochs, s.batch_size, s.swa_epochs, s.schedule, s.threshold) for s in pipeline.stages]
    assert found == expected
    assert {stage.learning_rate for stage in pipeline.stages} == {1e-3}
    assert {stage.augmentation for stage in pipeline.stages} == {"siim"}
    assert pipeline.model.encoder_weights == "imagenet"
    assert pipeline.model.input_mapping == ("learned" if name == "exp1" else "repeat")
    assert pipeline.model.decoder_channels == (256, 128, 64, 32, 16)
    assert {(stage.plateau_factor, stage.plateau_patience) for stage in pipeline.stages} == {(0.2, 5)}


def test_first_stage_of_exp3_is_the_stage_of_exp2() -> None:
    exp2, exp3 = load_settings("exp2").pipeline, load_settings("exp3").pipeline
    assert (exp2.stages[0], exp2.model, exp2.seed) == (exp3.stages[0], exp3.model, exp3.seed)


@pytest.mark.parametrize("site", ["local", "gpu"])
def test_every_site_loads_on_top_of_the_defaults(site: str) -> None:
    assert load_settings("smoke", site=site).train.device == {"local": "cpu", "gpu": "gpu"}[site]


def test_later_sources_win(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text("[train]\nworkers = 3\n[data]\ncache = 'site'\n")
    from_site = load_settings("smoke", site=str(site))
    assert (from_site.train.workers, from_site.data.cache) == (3, "site")
    from_set = load_settings("smoke", site=str(site), assignments=["train.workers=4", "data.cache=set"])
    assert (from_set.train.workers, from_set.data.cache) == (4, "set")
    named = load_settings(
        "smoke", site=str(site), assignments=["train.workers=4"], options={"train.workers": 5, "data.cache": None}
    )
    assert (named.train.workers, named.data.cache) == (5, "site")


def test_stages_are_numbered_from_one_and_a_star_means_all() -> None:
    found = load_settings("paper", assignments=["stages.*.epochs=9", "pipeline.stages.2.epochs=7", "seed=3"]).pipeline
    assert [stage.epochs for stage in found.stages] == [9, 7]
    assert found.seed == 3


def test_differences_name_the_leaf_with_both_values() -> None:
    old, new = load_settings("paper"), load_settings("paper", assignments=["stages.2.epochs=7", "train.workers=2"])
    assert list(differences(snapshot(old), snapshot(new))) == [
        "pipeline.stages.2.epochs: 70 -> 7",
        "train.workers: 1 -> 2",
    ]


def test_settings_cannot_be_changed() -> None:
    loaded = load_settings("smoke")
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.workers = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("train.wokers=2", "unknown setting 'wokers' (did you mean 'workers'?)"),
        ("stages.1.epchs=2", "unknown setting 'epchs' (did you mean 'epochs'?)"),
        ("dta.cache=x", "unknown setting 'dta' (did you mean 'data'?)"),
        ("train.workers=two", "train.workers: Input should be a valid integer, found 'two'"),
        ("stages.1.epochs=0.5", "pipeline.stages.1.epochs: Input should be a valid integer"),
        ("stages.2.threshold=1.0", "pipeline.stages.2.threshold: Input should be less than 1"),
        ("stages.1.learning_rate=nan", "finite number"),
        ("stages.1.size_px=100", "multiple of 32"),
        ("train.collective_timeout_s=1e308", "less than or equal to 31622400"),
        ("stages.3.epochs=1", "no stage '3'; the pipeline has stages 1 to 2"),
        ("stages.1=1", "such as stages.1.epochs"),
        ("model=1", "'pipeline.model' is a group; set one of: encoder, encoder_weights"),
        ("seed.x=1", "'pipeline.seed' is a value"),
        ("seed", "expected key=value"),
    ],
)
def test_wrong_assignment_is_named_with_the_way_out(assignment: str, named: str) -> None:
    message = refusal(assignments=[assignment])
    assert message.startswith(f"--set {assignment}: ")
    assert named in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[stages]]\nsize_px = 64\nepchs = 1", "unknown setting 'pipeline.stages.1.epchs' (did you mean 'epochs'?)"),
        ("[[stages]]\nsize_px = 64\nepochs = '1'\nbatch_size = 8", "pipeline.stages.1.epochs: Input should be a valid"),
        ("[[stages]]\nsize_px = 64\nepochs = 1", "pipeline.stages.1.batch_size: Field required"),
        ("stages = 5", "'pipeline.stages' must be a group of settings, found 5"),
        ("model = 'unet'\n[[stages]]\nsize_px = 64", "'pipeline.model' must be a group of settings, found 'unet'"),
        ("seed = 1", "pipeline.stages: Field required"),
        ("seed == 1", "cannot be read as TOML"),
        ("seed = " + "[" * 100_000, "cannot be read as TOML"),
        ("[[stages]]\nsize_px = 64\nepochs = 1\nbatch_size = 8\nlearning_rate = nan", "learning_rate: Input should be"),
        (
            "[[stages]]\nsize_px = 8192\nepochs = 1\nbatch_size = 8",
            "size_px: Input should be less than or equal",
        ),
        (
            "[[stages]]\nsize_px = 64\nepochs = 2\nbatch_size = 8\nswa_epochs = 3",
            "swa_epochs (3) is more than epochs (2)",
        ),
    ],
)
def test_wrong_pipeline_file_is_named_with_the_key(tmp_path: Path, text: str, named: str) -> None:
    path = pipeline_file(tmp_path, text)
    message = refusal(pipeline=path)
    assert message.startswith(path)
    assert named in message


def test_a_byte_order_mark_as_editors_write_it_is_no_error(tmp_path: Path) -> None:
    path = pipeline_file(tmp_path, "[[stages]]\nsize_px = 64\nepochs = 1\nbatch_size = 8")
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes().replace(b"\n", b"\r\n"))
    assert load_settings(path).pipeline.stages[0].size_px == 64


def test_wrong_value_in_a_site_file_is_laid_on_that_file(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text("[train]\nworkers = 'many'\n")
    assert refusal(site=str(site)).startswith(f"{site}: train.workers: ")


def test_more_workers_than_the_global_batch_are_refused() -> None:
    message = refusal(options={"train.workers": 17})
    assert "17 workers cannot share the global batch of 16 cases of stage 2 of pipeline 'paper'" in message
    assert "at most 16 workers or set pipeline.stages.2.batch_size" in message
    assert load_settings("paper", options={"train.workers": 16}).train.workers == 16


def test_unknown_pipeline_suggests_the_nearest_and_lists_all() -> None:
    message = refusal(pipeline="exp44")
    assert "no pipeline 'exp44' (did you mean 'exp4'?)" in message
    assert all(name in message for name in PIPELINES)
    assert "no settings file nowhere.toml" in refusal(pipeline="nowhere.toml")


def test_own_files_come_before_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "paper.toml").write_text("[[stages]]\nsize_px = 64\nepochs = 1\nbatch_size = 2\n")
    monkeypatch.chdir(tmp_path)
    assert find("pipelines", "paper").resolve() == tmp_path.resolve() / "pipelines" / "paper.toml"
    assert [stage.size_px for stage in load_settings("paper").pipeline.stages] == [64]
    assert len(load_settings("exp4").pipeline.stages) == 2


def test_only_files_that_are_named_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (".", "configs"):
        for name in ("train", "data", "local"):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / f"{name}.toml").write_text("[optimizer]\nof = 'another project'\n")
    before = load_settings("smoke")
    monkeypatch.chdir(tmp_path)
    assert load_settings("smoke") == before
    assert refusal(site="local").startswith(str(tmp_path / "configs" / "local.toml"))


def test_snapshot_of_another_version_is_refused() -> None:
    plain = snapshot(load_settings("smoke"))
    plain["train"]["gpus"] = 2
    with pytest.raises(SettingsError, match=r"train.gpus"):
        restore(plain)


def test_longer_times_of_former_versions_are_read_as_a_year() -> None:
    plain = snapshot(load_settings("smoke"))
    plain["train"]["checkpoint_every_s"] = 1e9
    assert restore(plain).train.checkpoint_every_s == YEAR_S


def test_a_setting_added_later_changes_a_fingerprint_only_when_it_is_set() -> None:
    class Before(Section):
        epochs: int = 3

    class Inner(Section):
        rate: float = 0.5
        warm_up: int = added(0, ge=0)

    class After(Before):
        head: str = added("none", description="an example")
        inner: tuple[Inner, ...] = ()

    assert fingerprint(Inner()) == fingerprint({"rate": 0.5})
    assert snapshot(After(inner=(Inner(), Inner(warm_up=2)))) == {
        "epochs": 3, "inner": [{"rate": 0.5}, {"rate": 0.5, "warm_up": 2}],
    }  # fmt: skip
    assert fingerprint(After(head="image")) == fingerprint({"epochs": 3, "head": "image", "inner": []})
    assert After.model_validate_json(json.dumps(snapshot(After()))) == After()
    assert complete(After()) == {"epochs": 3, "head": "none", "inner": []}
