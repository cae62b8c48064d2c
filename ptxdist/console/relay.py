"""A training's events inside the lines of a job's log, so that who follows the job on a terminal sees the live table.

    stage 1 epoch 2/5: train loss 0.71, …<US>{"stage": 1, "epoch": 2, …}

Text for people, a unit separator, the event as JSON; a further line of the same event has nothing behind it. Who knows
nothing of this reads the text. Owns: this format. Refuses: nothing. Called by: `training` in a job, `joblog` for it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ptxdist.records import EpochMetrics, Record, StageHistory, StageResult

RELAY = "PTXDIST_RELAY"  # set in the environment of jobs that are followed on a terminal
MARK = "\x1f"
_RECORDS = {record.__name__: record for record in (EpochMetrics, StageHistory, StageResult)}


def relays() -> bool:
    """Whether this process runs in such a job."""
    return bool(os.environ.get(RELAY))


def encode(event: Any) -> str:
    """One event of a training, or a plain value, as JSON in one line."""
    if isinstance(event, Record):
        return json.dumps({"record": type(event).__name__, **event.model_dump(mode="json")})
    return json.dumps(event)


def decode(text: str) -> Any:
    """The event of `encode`; steps are lists."""
    content = json.loads(text)
    if isinstance(content, dict) and "record" in content:
        return _RECORDS[content.pop("record")].model_validate_json(json.dumps(content))
    return content
