"""The actor through which workers report to the driver. A module of its own, so that its process starts fast.

It loads neither torch nor the rest of ptxdist.
"""

from __future__ import annotations

from typing import Any


class Inbox:
    """Where workers put encoded events for the driver; a Ray actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        """Add one event, or an empty one: a sign of life."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all events, oldest first."""
        events, self._events = self._events, []
        return events
