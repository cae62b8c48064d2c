"""`ptxdist plan`: which pipeline its rules choose, what the file says, and that it trains."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from ptxdist.cache.survey import Spread, Survey
from ptxdist.errors import StoreError
from ptxdist.finding import load_finding
from ptxdist.resolve import load_settings
from ptxdist.run.advice import Machine, advise

ROOT = Path(__file__).parents[2]
LITE0 = "timm/tf_efficientnet_lite0"
CPU = Machine(2, 24.0, (), True, (LITE0,))
GPU = Machine(16, 128.0, (("NVIDIA H100", 79.2),), True, ("resnet34", LITE0))
# What `survey` finds in the 848 real cases, in three folds.
REAL = Survey(
    cases=848,
    positive=191,
    unlabelled=5,
    patients=695,
    positive_patients=130,
    grouped_by="patient map",
    folds=3,
    train=(564, 126),
    val=(284, 65),
    sizes_px=(128, 256, 512),
    mask_px=Spread(1225, 7605, 36540),
    mask_share=Spread(0.001168, 0.007253, 0.034847),
    brightness=Spread(90.7, 121.2, 169.1),
)
FULL = replace(REAL, cases=12_047, positive=2_669, folds=10, train=(10_842, 2_402), val=(1_205, 267))


LUNG, _ = load_finding("lung")
PHANTOMS = (256, 3, 16)
BOTH = [PHANTOMS, (256, 20, 16), (512, 6, 16)]


@pytest.mark.parametrize(
    ("data", "machine", "encoder", "stages"),
    [
        pytest.param(REAL, CPU, LITE0, BOTH, id="few cases on two cores"),
        pytest.param(REAL, replace(CPU, cores=1), LITE0, [(256, 20, 16)], id="one core"),
        pytest.param(replace(REAL, finding=LUNG), CPU, LITE0, [(256, 20, 16), (512, 6, 16)], id="no pneumothorax"),
        pytest.param(REAL, replace(CPU, encoders=("resnet34",)), "resnet34", BOTH, id="ResNet cached"),
        pytest.param(REAL, replace(CPU, encoders=()), "resnet18", BOTH, id="no weights"),
        pytest.param(
            REAL,
            replace(CPU, memory_gib=3.0),
            LITE0,
            [(256, 3, 8), (256, 20, 8), (512, 6, 8)],
            id="little memory",
        ),
        pytest.param(REAL, GPU, "resnet34", BOTH, id="few cases on a GPU"),
        pytest.param(REAL, replace(GPU, encoders=(LITE0,)), LITE0, BOTH),
        pytest.param(REAL, replace(GPU, encoders=()), "resnet34", BOTH),
        pytest.param(FULL, CPU, LITE0, [(256, 6, 16)], id="many cases on two cores"),
        pytest.param(FULL, GPU, "resnet34", [(256, 20, 16), (512, 6, 16)], id="many cases on a GPU"),
        pytest.param(replace(REAL, sizes_px=(128,)), GPU, "resnet34", [(128, 3, 16), (128, 20, 16)], id="only 128 px"),
        pytest.param(replace(REAL, sizes_px=(512, 1024)), CPU, LITE0, [(512, 14, 16)], id="only large sizes"),
    ],
)
def test_rules(data: Survey, machine: Machine, encoder: str, stages: list[tuple[int, int, int]]) -> None:
    advice = advise(data, machine)
    pipeline = advice.settings("plan")
    assert pipeline.model.encoder == encoder
    assert pipeline.model.encoder_weights == ("imagenet" if machine.encoders else "none")
    assert any("no ImageNet weights" in text for text in advice.warnings) == (not machine.encoders)
    assert [(s.size_px, s.epochs, s.batch_size) for s in pipeline.stages] == stages
    on_phantoms = [bool(stage.phantoms) for stage in pipeline.stages]
    assert on_phantoms == [epochs == 3 for _, epochs, _ in stages]
    assert all(stage.dice == "batch" for stage in pipeline.stages)
    assert all(stage.positive_share == (0.5, 0.4) for stage in pipeline.stages if not stage.phantoms)


def test_the_share_of_the_data_is_kept_where_positives_are_frequent() -> None:
    pipeline = advise(replace(REAL, train=(564, 300)), CPU).settings("plan")
    assert pipeline.stages[0].positive_share is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (replace(REAL, cases=0, positive=0), "no labelled case"),
        (replace(REAL, positive=0, mask_px=None, mask_share=None), "none of the 848 labelled cases has a mask"),
        (replace(REAL, patients=1, train=(0, 0), val=(848, 191)), "one side of the split"),
        (replace(REAL, train=(564, 0), val=(284, 191)), "held-out fold 0"),
    ],
)
def test_data_that_nothing_can_be_learnt_from(data: Survey, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        advise(data, CPU)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (replace(REAL, train=(564, 9)), "only 9 positive cases"),
        (replace(REAL, val=(284, 0)), "holds out no positive case"),
        (REAL, "holds out 65 positive cases"),
        (replace(REAL, grouped_by="nothing"), "patients are not known"),
        (replace(REAL, sizes_px=(128, 512)), "the cache has 128, 512 px"),
    ],
)
def test_what_the_user_should_know(data: Survey, message: str) -> None:
    advice = advise(data, CPU)
    assert any(message in text for text in advice.warnings)
    assert message in advice.toml().replace("\n# ", " ")


@pytest.mark.parametrize("machine", [CPU, GPU, replace(GPU, encoders=())])
def test_the_file_has_a_reason_on_each_line_and_is_the_pipeline(machine: Machine, tmp_path: Path) -> None:
    advice = advise(REAL, machine)
    text = advice.toml(["Measured here, stage 1: 13 images/s."])
    assert text == advise(REAL, machine).toml(["Measured here, stage 1: 13 images/s."])
    assert all("#" in line or line.startswith("[") or not line for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 120
    (tmp_path / "plan.toml").write_text(text)
    assert load_settings(str(tmp_path / "plan.toml")).pipeline == advice.settings("plan")
    keys = {decision.key: decision.value for decision in advice.decisions}
    assert tomllib.loads(text)["stages"][0]["epochs"] == keys["stages.1.epochs"]


def test_lungs_are_in_every_image_so_there_is_no_image_head_and_the_recipe_is_said_to_be_untried() -> None:
    plan = advise(replace(REAL, finding=LUNG, positive=848, train=(564, 564), val=(284, 284)), CPU)
    pipeline = plan.settings("lungs")
    assert not pipeline.model.image_head
    assert {stage.negative_weight for stage in pipeline.stages} == {1.0}
    assert "the recipe was measured with pneumothorax only, and not with lung" in plan.warnings
    assert "image head" not in plan.toml()


def test_small_is_the_plan_for_the_real_cases_on_two_cores() -> None:
    lines = (ROOT / "pipelines" / "small.toml").read_text().splitlines()
    assert [line for line in lines if not line.startswith("# Measured here")] == advise(REAL, CPU).toml().splitlines()
