"""A group of settings: frozen, strict, written as JSON without what was added later and is at its default."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

_ADDED = "added after 0.1.0"
_ALL = "all settings"


def added(default: Any, **more: Any) -> Any:
    """A setting that was added after version 0.1.0; arguments as for pydantic's Field.

    At its default it is left out of snapshots and fingerprints. So stages that were finished before a setting existed
    keep their fingerprints, and its default must never change.
    """
    return Field(default, json_schema_extra={_ADDED: True}, **more)


class Section(BaseModel):
    """A frozen, strict group of settings: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_added_defaults(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if info.context != _ALL:
            for name, field in type(self).model_fields.items():
                is_added = isinstance(field.json_schema_extra, dict) and _ADDED in field.json_schema_extra
                if is_added and getattr(self, name) == field.default:
                    content.pop(name, None)
        return content


def snapshot(section: Section) -> dict[str, Any]:
    """The section as plain JSON values, without added settings at their default; `restore(snapshot(s)) == s`."""
    return section.model_dump(mode="json")


def complete(section: Section) -> dict[str, Any]:
    """All settings of the section as plain JSON values, for people to read."""
    return section.model_dump(mode="json", context=_ALL)
