"""Turns settings files, `--set` and named options into Settings.

Owns: the order defaults < site < pipeline < `--set` < named options; how files of `configs/` and `pipelines/` are
found. Refuses: unknown keys (with the nearest valid name). No file inherits from another one.

Only the two files that `--site` and `--pipeline` name are read. `every_setting` lists what can be set.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ptxdist.config import PACKAGE, PipelineSettings, Settings, StageSettings, explain, leaves, nearest, section_of
from ptxdist.errors import SettingsError, short, system_says
from ptxdist.section import Section

_SHORT_NAMES = {"lr": "learning_rate", "batch": "batch_size", "bs": "batch_size", "wd": "weight_decay"}
_SHORT_NAMES |= {"size": "size_px", "image_size": "size_px", "weights": "encoder_weights", "backbone": "encoder"}


@dataclass(frozen=True)
class SettingWords:
    """A setting for people: its key as `--set` takes it, its type, its default ("" if it has none), and its meaning."""

    key: str
    type: str
    default: str
    meaning: str


def find(kind: Literal["configs", "pipelines"], name: str) -> Path:
    """Path of a settings file: `name` itself if it is a path, else `<name>.toml` in ./kind, else in ptxdist's folder.

    Raises SettingsError with the names of the existing files when none matches.
    """
    given = Path(name)
    if given.suffix == ".toml" or len(given.parts) > 1:
        if given.is_file():
            return given
        raise SettingsError(f"no settings file {name}: give a name such as 'exp4' or the path of a .toml file")
    folders = settings_folders(kind)
    for folder in folders:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.toml")})
    raise SettingsError(f"no {kind[:-1]} '{name}'{nearest(name, known)}; there are: {', '.join(known) or 'none'}")


def settings_folders(kind: str) -> list[Path]:
    """Existing folders `configs` or `pipelines`, in the order in which a name is looked up."""
    # In a checkout the folders are beside the package, in an installed wheel inside it. Inside comes first, since
    # another package may have a folder of that name beside an installed one.
    candidates = [Path.cwd() / kind, PACKAGE / kind, PACKAGE.parent / kind]
    return [folder for folder in candidates if folder.is_dir()]


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a TOML file; SettingsError naming file and place if it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {system_says(error)}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read as TOML: {error}") from error


def load_settings(
    pipeline: str,
    *,
    site: str | None = None,
    assignments: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolve the settings of a run.

    `pipeline` and `site` are names or paths of TOML files; without `site` the defaults of `config` apply. `assignments`
    are texts `a.b=value` as given with `--set` (value in TOML syntax, bare words are text; stages are numbered from 1,
    `stages.*` means all of them); `options` maps dotted keys to the values of named options (None: not given). Later
    sources win. Raises SettingsError with the source, the key and the nearest valid name.
    """
    merged: dict[str, Any] = {}
    sources: list[tuple[str, str]] = []  # pattern of a dotted key, and where its value comes from; the last one counts
    if site:
        path = find("configs", site)
        _add_file(merged, sources, path, read_toml(path))
    path = find("pipelines", pipeline)
    _add_file(merged, sources, path, {"pipeline": {"name": path.stem, **read_toml(path)}})
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise SettingsError(f"--set {short(assignment, 200)}: expected key=value, such as seed=1")
        key = _full_key(key.strip())
        _assign(merged, key, _parse_value(value.strip()), f"--set {short(assignment, 200)}")
        sources.append((key, f"--set {short(assignment, 200)}"))
    for key, value in (options or {}).items():
        if value is not None:
            _assign(merged, _full_key(key), value, f"option for {key}")
            sources.append((_full_key(key), f"option for {key}"))
    try:
        return Settings.model_validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        raise SettingsError(explain(error, sources, str(path))) from error


def every_setting() -> list[SettingWords]:
    """All settings, in the order of the models in `config`; those of a stage as `stages.*.NAME`."""
    schema = Settings.model_json_schema()
    return list(_settings_in(schema["properties"], schema["$defs"], ""))


def _settings_in(properties: Mapping[str, Any], models: Mapping[str, Any], prefix: str) -> Iterator[SettingWords]:
    for name, content in properties.items():
        inner = content.get("$ref") or content.get("items", {}).get("$ref")
        if inner:
            place = "" if name == "pipeline" else f"{prefix}{name}.{'*.' if 'items' in content else ''}"
            yield from _settings_in(models[inner.rpartition("/")[2]]["properties"], models, place)
        else:
            default = "" if content.get("default") is None else json.dumps(content["default"])
            yield SettingWords(f"{prefix}{name}", _type_in_words(content), default, content["description"])


def _type_in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_in_words(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema["type"] == "array":
        return f"{schema['minItems']} values" if "minItems" in schema else "list"
    if schema["type"] in ("integer", "number"):
        signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
        signs["multipleOf"] = "in steps of"
        limits = [f" {sign} {schema[key]:,}" for key, sign in signs.items() if key in schema]
        return ("whole number" if schema["type"] == "integer" else "number") + "".join(limits)
    return {"boolean": "true | false", "string": "text"}[schema["type"]]


def set_in_words(name: str, value: str) -> str:
    """How `--set` gives a value to the settings of this name, or of a usual short one; "" if there are none."""
    name = _SHORT_NAMES.get(name, name)
    keys = [item.key for item in every_setting() if item.key.rpartition(".")[2] == name]
    return ", or ".join(
        f"`--set '{key}={value}'` for all stages, `--set {key.replace('*', '1')}={value}` for the first"
        if "*" in key
        else f"`--set {key}={value}`"
        for key in keys
    )


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _add_file(merged: dict[str, Any], sources: list[tuple[str, str]], path: Path, content: dict[str, Any]) -> None:
    _merge(merged, content)
    sources += [(key, str(path)) for key, _ in leaves(content)]


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _full_key(key: str) -> str:
    """`stages.1.epochs` is short for `pipeline.stages.1.epochs`."""
    return f"pipeline.{key}" if key.split(".")[0] in PipelineSettings.model_fields else key


def _assign(target: dict[str, Any], key: str, value: Any, where: str) -> None:
    parts = key.split(".")
    nodes: list[Any] = [target]
    model: Any = Settings
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if model is StageSettings and isinstance(nodes[0], list):
            nodes = _stages(nodes[0], part, where)
            if last:
                raise SettingsError(f"{where}: name a setting of the stage, such as stages.{part}.epochs")
            continue
        if not (isinstance(model, type) and issubclass(model, Section)):
            raise SettingsError(f"{where}: '{'.'.join(parts[:depth])}' is a value and has no settings inside")
        if part not in model.model_fields:
            raise _unknown(where, part, str(value), model, top=last and not depth)
        model = section_of(model, part)
        if last:
            if isinstance(model, type) and issubclass(model, Section):
                raise SettingsError(f"{where}: '{key}' is a group; set one of: {', '.join(model.model_fields)}")
            for node in nodes:
                node[part] = value
        else:
            nodes = [node.setdefault(part, {}) for node in nodes]


def _unknown(where: str, part: str, value: str, model: type[Section], *, top: bool) -> SettingsError:
    """The error for a name that a group of settings does not have; `top`: it is the whole key."""
    if top and (ways := set_in_words(part, value)):
        return SettingsError(f"{where}: no setting '{part}'; use {ways}")
    names = [*model.model_fields, *({item.key for item in every_setting()} if top else ())]
    other = _SHORT_NAMES.get(part)
    near = f" (did you mean '{other}'?)" if other in names else nearest(part, names)
    return SettingsError(f"{where}: unknown setting '{short(part, 100)}'{short(near)}; `ptxdist settings` lists all")


def _stages(stages: list[dict[str, Any]], part: str, where: str) -> list[Any]:
    if part == "*":
        return list(stages)
    if not part.isdecimal() or not 1 <= int(part) <= len(stages):
        raise SettingsError(f"{where}: no stage '{part}'; the pipeline has stages 1 to {len(stages)} (or *)")
    return [stages[int(part) - 1]]
