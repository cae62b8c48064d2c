"""Random requests to the viewer's server, made from an OpenAPI description that only the tests have.

schemathesis makes them, and checks status, content type, security headers and sentences against `viewer_api.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, GenerationMode
from schemathesis.specs.openapi import checks
from serving import make_predictor, serving

from ptxdist.phantoms.dataset import draw_file
from ptxdist.predict.gate import Limits
from ptxdist.predict.server import TYPES
from ptxdist.predict.viewer import EXAMPLE_SEED
from ptxdist.records import OperatingPoint

API = schemathesis.openapi.from_path(Path(__file__).with_name("viewer_api.yaml"))
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@cache
def sound_files() -> tuple[bytes, ...]:
    return (
        draw_file(EXAMPLE_SEED),
        cv2.imencode(".png", np.arange(64 * 48, dtype=np.uint8).reshape(64, 48))[1].tobytes(),
    )


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A radiograph: whole, with bytes changed in its head, cut off; or any bytes."""
    content = bytearray(draw(st.sampled_from(sound_files())))
    way = draw(st.sampled_from(("whole", "changed", "cut", "any")))
    if way == "changed":
        for place, value in draw(
            st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=3)
        ):
            content[place % len(content)] = value
    return (
        draw(st.binary())
        if way == "any"
        else bytes(content[: draw(st.integers(0, len(content)))] if way == "cut" else content)
    )


for kind in TYPES:
    schemathesis.openapi.media_type(kind, files())


@pytest.fixture(scope="module")
def quick() -> Iterator[tuple[str, list[str]]]:
    """A server that waits for nothing long, and the defects that it reports."""
    limits = Limits(a_minute=10**6, head_s=0.5, patience_s=0.5)
    with serving(make_predictor(OperatingPoint(top=0.5, min_area_px=0, bottom=0.5)), limits) as found:
        yield found


@pytest.mark.parametrize("operation", [found.ok() for found in API.get_all_operations()], ids=lambda found: found.label)
@settings(max_examples=15)
@given(data=st.data())
def test_any_request_gets_an_answer_that_is_documented(
    operation: APIOperation, quick: tuple[str, list[str]], data: st.DataObject
) -> None:
    url, defects = quick
    case = data.draw(operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE))
    if data.draw(st.booleans()):
        case.headers = {}
    response = case.call(base_url=url.rstrip("/"))
    case.validate_response(response, checks=CHECKS)
    assert defects == []
