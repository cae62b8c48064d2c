"""cluster.yaml is a file that Ray's own schema accepts, and Ray's own preparation of it too."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


@pytest.fixture
def schema() -> dict[str, Any]:
    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_ray_s_schema_accepts_it(content: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(content, schema)


def misspell_a_key(content: dict[str, Any]) -> None:
    content["max_wrokers"] = content.pop("max_workers")


def misspell_the_commands(content: dict[str, Any]) -> None:
    content["setup_comands"] = content.pop("setup_commands")


def misspell_the_resources(content: dict[str, Any]) -> None:
    worker = content["available_node_types"]["gpu_worker"]
    worker["resorces"] = worker.pop("resources")


def write_a_number_as_text(content: dict[str, Any]) -> None:
    content["max_workers"] = "eight"


@pytest.mark.parametrize(
    "spoil", [misspell_a_key, misspell_the_commands, misspell_the_resources, write_a_number_as_text]
)
def test_ray_s_schema_refuses_a_typing_error(
    content: dict[str, Any], schema: dict[str, Any], spoil: Callable[[dict[str, Any]], None]
) -> None:
    spoil(content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_ray_prepares_and_validates_it_as_ray_up_does(content: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    assert "availability_zone" not in prepared["provider"], "Ray's default zones are those of another region"
    commands = prepared["worker_setup_commands"]
    assert commands == content["setup_commands"] == prepared["head_setup_commands"][: len(commands)]


def test_ray_refuses_a_head_node_type_that_is_not_there(content: dict[str, Any]) -> None:
    content["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(content))


def test_the_head_has_no_gpu_and_spot_workers_come_and_go(content: dict[str, Any]) -> None:
    types = content["available_node_types"]
    assert types[content["head_node_type"]]["resources"]["GPU"] == 0
    worker = types["gpu_worker"]
    assert (worker["resources"]["GPU"], worker["min_workers"]) == (1, 0)
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < worker["max_workers"] <= content["max_workers"]


def test_every_node_names_its_image(content: dict[str, Any]) -> None:
    # Ray's own default is an Ubuntu 18.04, whose Python cannot run ptxdist.
    images = {node["node_config"]["ImageId"] for node in content["available_node_types"].values()}
    assert len(images) == 1


def test_what_is_copied_is_all_it_takes_to_install_and_no_data(content: dict[str, Any]) -> None:
    root = PATH.parent
    copied = set(content["file_mounts"].values())
    for remote, local in content["file_mounts"].items():
        assert remote == f"/home/ubuntu/ptxdist/{local}"
        assert (root / local).exists()
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == needed | set(wheel["packages"]) | set(wheel["force-include"])


def test_the_dashboard_stays_on_loopback(content: dict[str, Any]) -> None:
    commands = " ".join(content["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "--head" in commands


def test_the_comment_leads_from_nothing_to_a_run() -> None:
    head = PATH.read_text().split("cluster_name")[0]
    steps = ("ray up cluster.yaml", "ray dashboard cluster.yaml", "ptxdist submit --address http://127.0.0.1:8265 -- ",
             "train --workers 8 --pipeline exp4", "ray down cluster.yaml")  # fmt: skip
    places = [head.index(step) for step in steps]
    assert places == sorted(places)
