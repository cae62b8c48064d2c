"""The cluster files beside cluster.yaml: what Ray and Kubernetes would accept, and that they say the same things."""

from __future__ import annotations

import copy
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from ptxdist.cli import cli

ROOT = Path(__file__).parents[2]
ONPREM, RAYJOB = ROOT / "configs" / "cluster-onprem.yaml", ROOT / "configs" / "rayjob.yaml"


def strict(required: str = "", **properties: Any) -> dict[str, Any]:
    """Schema of an object that has no other keys."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
# apimachinery's resource.Quantity, as the CRD writes it.
QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]*)?([KMGTPE]i|[mkMGTPE])?$"}]}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
POD = strict(
    "spec",
    spec=strict(
        "containers",
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
        tolerations=listed(strict("", key=TEXT, operator={"enum": ["Exists", "Equal"]}, value=TEXT, effect=TEXT)),
        containers=listed(
            strict(
                "name image",
                name=TEXT,
                image=TEXT,
                resources=strict("", requests=QUANTITIES, limits=QUANTITIES),
                volumeMounts=listed(strict("name mountPath", name=TEXT, mountPath=TEXT)),
            )
        ),
        volumes=listed(
            strict(
                "name",
                name=TEXT,
                persistentVolumeClaim=strict("claimName", claimName=TEXT),
                emptyDir=strict("", medium=TEXT, sizeLimit=QUANTITY),
            )
        ),
    ),
)
# The part of KubeRay's CRD that the file uses (helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml, whose source is
# ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go), written by hand: the whole has 1.3 MB, most of it
# Kubernetes' own pod template, of which the keys used stand above. Stricter than the CRD: other keys are errors.
SCHEMA = strict(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=strict("name", name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=strict(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        runtimeEnvYAML=TEXT,
        submitterPodTemplate=POD,
        rayClusterSpec=strict(
            "headGroupSpec",
            rayVersion=TEXT,
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=strict(
                "", idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
            ),
            headGroupSpec=strict("rayStartParams template", rayStartParams=PARAMETERS, template=POD),
            workerGroupSpecs=listed(
                strict(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    numOfHosts=COUNT,
                    rayStartParams=PARAMETERS,
                    template=POD,
                )
            ),
        ),
    ),
)


@pytest.fixture
def onprem() -> dict[str, Any]:
    return yaml.safe_load(ONPREM.read_text())


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load(RAYJOB.read_text())


def test_ray_s_schema_and_preparation_accept_the_on_premises_file(onprem: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(onprem, schema)
    prepared = prepare_config(copy.deepcopy(onprem))
    validate_config(prepared)
    assert prepared["worker_setup_commands"] == onprem["setup_commands"]
    wrong = {**onprem, "setup_comands": onprem["setup_commands"]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_all_its_workers_are_used_and_the_head_computes_nothing(onprem: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(onprem))
    workers = prepared["available_node_types"]["local.cluster.node"]
    assert workers["min_workers"] == prepared["max_workers"] == len(onprem["provider"]["worker_ips"])
    head = " ".join(onprem["head_start_ray_commands"])
    assert "--num-gpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head


def test_both_launcher_files_install_the_same(onprem: dict[str, Any]) -> None:
    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert sorted(onprem["file_mounts"].values()) == sorted(aws["file_mounts"].values())
    for remote, local in onprem["file_mounts"].items():
        assert remote == f"~/ptxdist/{local}"
    assert onprem["setup_commands"][-1] in aws["setup_commands"]


def test_the_image_installs_the_same_for_a_user_who_is_not_root(onprem: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1].isalpha()]
    copied = [name for command, words in lines if command == "COPY" for name in words.split()[:-1]]
    assert sorted(copied) == sorted(set(onprem["file_mounts"].values()))
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == set(copied)
    (base,) = (words for command, words in lines if command == "FROM")
    assert SpecifierSet(project["requires-python"]).contains(base.removeprefix("python:").removesuffix("-slim"))
    (install,) = (words for command, words in lines if command == "RUN" and "pip install" in words)
    assert "--constraint constraints.txt" in install
    assert set(install.split("[")[1].split("]")[0].split(",")) <= project["optional-dependencies"].keys()
    assert [words for command, words in lines if command == "USER"] == ["ray"]


def test_the_part_of_kuberay_s_schema_accepts_the_job(rayjob: dict[str, Any]) -> None:
    jsonschema.validate(rayjob, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entrypont", "x"),
        ("spec.backoffLimit", "two"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", None),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "8 GB"),
    ],
)
def test_it_refuses_a_typing_error(rayjob: dict[str, Any], path: str, value: object) -> None:
    *way, last = path.split(".")
    place: Any = rayjob
    for step in way:
        place = place[int(step) if step.isdecimal() else step]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rayjob, SCHEMA)


def test_the_job_s_command_parses_and_its_parts_fit_each_other(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    program, name, *words = shlex.split(spec["entrypoint"])
    assert program == "ptxdist"
    parsed = cli.commands[name].make_context(name, words).params
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert parsed["workers"] == group["maxReplicas"]
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    pods = [spec["rayClusterSpec"]["headGroupSpec"]["template"], group["template"]]
    for pod in pods:
        mounts = {item["name"]: item["mountPath"] for item in pod["spec"]["containers"][0]["volumeMounts"]}
        assert set(mounts) == {item["name"] for item in pod["spec"]["volumes"]}
        assert "/dev/shm" in mounts.values()
        assert str(parsed["data"]).startswith(mounts["shared"])
        assert str(parsed["run"]).startswith(mounts["shared"])
    images = {pod["spec"]["containers"][0]["image"] for pod in [*pods, spec["submitterPodTemplate"]]}
    assert len(images) == 1, "the driver and its workers run the same ptxdist"
    assert pods[1]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("path", [ONPREM, RAYJOB, ROOT / "cluster.yaml"])
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text().lower()
    for word in ("auth_token:", "password", "aws_secret", "aws_access", "begin openssh"):
        assert word not in text
