"""cluster.yaml is a file that Ray's own schema accepts, and Ray's own preparation of it too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

PATH = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


@pytest.fixture
def schema() -> dict[str, Any]:
    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_ray_s_schema_accepts_it(content: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(content, schema)


@pytest.mark.parametrize("key", ["max_wrokers", "setup_comands"])
def test_ray_s_schema_refuses_a_typing_error(content: dict[str, Any], schema: dict[str, Any], key: str) -> None:
    content[key] = 1
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(content, schema)


def test_ray_s_own_validation_accepts_it(content: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(copy.deepcopy(content)))


def test_the_head_trains_nothing_and_gpu_workers_come_and_go(content: dict[str, Any]) -> None:
    types = content["available_node_types"]
    assert types[content["head_node_type"]]["resources"]["GPU"] == 0
    worker = types["gpu_worker"]
    assert (worker["resources"]["GPU"], worker["min_workers"]) == (1, 0)
    assert worker["max_workers"] <= content["max_workers"]


def test_the_dashboard_stays_on_loopback(content: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(content["head_start_ray_commands"])


def test_the_comment_leads_from_nothing_to_a_run() -> None:
    head = PATH.read_text().split("cluster_name")[0]
    for step in ("ray up cluster.yaml", "ray dashboard cluster.yaml", "ptxdist submit --address", "ray down"):
        assert step in head
