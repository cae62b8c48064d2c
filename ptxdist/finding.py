"""What the masks of a cache show, and what its models segment: pneumothorax, unless the user names another finding.

Owns: `findings.toml`, its words, codes and limits.

Caches, runs and bundles name their finding only if it is another one, so those of older versions are of pneumothorax.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptxdist.errors import SettingsError, system_says

DEFAULT = "pneumothorax"
_FILE = Path(__file__).with_name("findings.toml")

# DICOM allows 64 characters, and some texts have "segmentation" or "a" beside the name.
_NAME = re.compile(r"[^\x00-\x1f\\]+")
_CODE = re.compile(r"[0-9]{6,16}")
_MOST_NAME, _MOST_MEANING = 40, 64


# Dataclasses, since every `preprocess` loads them: pydantic takes longer to import than a rerun to list its files. It
# checks them in records and in the files of users.
@dataclass(frozen=True)
class FindingType:
    """A finding: its `name` ("lung"), `one` of it in a sentence ("a lung"), and its SNOMED CT codes with meanings.

    Two are the same finding if their `code` is. ValueError for a name or code that cannot be one.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic's name

    name: str
    one: str
    code: tuple[str, str]
    category: tuple[str, str] = ("49755003", "Morphologically Abnormal Structure")

    def __post_init__(self) -> None:
        for text in (self.name, self.one):
            if len(text) > _MOST_NAME or not text.strip() or not _NAME.fullmatch(text):
                raise ValueError(f"a name has 1 to {_MOST_NAME} printable characters")
        for code, meaning in (self.code, self.category):
            if not _CODE.fullmatch(code) or not 1 <= len(meaning) <= _MOST_MEANING:
                raise ValueError(f"a code has 6 to 16 digits, and its meaning 1 to {_MOST_MEANING} characters")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> FindingType:
        """A finding from its values in JSON or TOML; ValueError or TypeError when it is none."""
        found: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**found)

    @property
    def title(self) -> str:
        """The name at the start of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    def is_other(self, than: FindingType) -> bool:
        """Whether the two are different findings."""
        return self.code[0] != than.code[0]


@dataclass(frozen=True)
class Limits:
    """What is plausible of the masks of a finding, as `findings.toml` explains; the defaults hold for nearly any."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic's name

    median_area: float = 0.00002
    large_area: float = 0.5
    inverted_above: float = 0.5
    constant_dice: float = 1.0
    mirror_lead: float = 0.4
    upper: tuple[float, float] | None = None
    parts: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= 4:
            raise ValueError("parts is 1 to 4")


def load_finding(name: str) -> tuple[FindingType, Limits]:
    """A finding of `findings.toml` by its name, or the only one of another file of this kind.

    SettingsError when there is no such name, or the file cannot be read or does not describe one finding.
    """
    if name.endswith(".toml"):
        found = _read(Path(name))
        if len(found) != 1:
            raise SettingsError(f"{name} describes {len(found)} findings; a cache has one")
        return next(iter(found.values()))
    if not known_name(name):
        raise SettingsError(f"unknown finding {name!r}; known are {', '.join(_KNOWN)}; or give a FILE.toml")
    return _KNOWN[known_name(name)]


def known_name(name: str) -> str:
    """The name in `findings.toml` that this is, also in capitals or with hyphens; "" when there is none."""
    wanted = re.sub(r"[-_\s]+", " ", name).strip().lower()
    return wanted if wanted in _KNOWN else ""


def _read(path: Path) -> dict[str, tuple[FindingType, Limits]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {system_says(error)}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    return {name: _finding(path, name, table) for name, table in content.items()}


def _finding(path: Path, name: str, table: Any) -> tuple[FindingType, Limits]:
    if not isinstance(table, dict):
        raise SettingsError(f"{path}: {name} stands outside a table, such as [{DEFAULT}]")
    words, masks = {"name": name, **table}, table.get("masks", {})
    words.pop("masks", None)
    if path == _FILE:
        upper = {"upper": tuple(masks["upper"])} if "upper" in masks else {}
        return FindingType.of(words), Limits(**{**masks, **upper})
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(FindingType).validate_python(words), TypeAdapter(Limits).validate_python(masks)
    except ValidationError as error:
        kind, first = error.title, error.errors()[0]
        place = ".".join(map(str, (name, *(["masks"] if kind == "Limits" else []), *first["loc"])))
        raise SettingsError(f"{path}: {place}: {first['msg']}; docs/cache.md shows such a file") from error


_KNOWN = _read(_FILE)
PNEUMOTHORAX, PNEUMOTHORAX_LIMITS = _KNOWN[DEFAULT]


def unless_pneumothorax() -> Any:
    """A field of a record: pneumothorax by default, and then left out of JSON."""
    from pydantic import Field

    return Field(PNEUMOTHORAX, exclude_if=lambda value: value == PNEUMOTHORAX)
