"""Recipes: YAML files and ``key.sub=value`` overrides to plain dataclasses, and back.

The dataclasses themselves belong to the modules that use them; this file knows only how to fill one. One that has
changed gives a static method ``upgrade(values) -> values`` that puts what earlier versions wrote under today's names.
Every mistake in a recipe is a `ConfigError` that names the place (file or command line), the key, the value, what was
expected and what to do.

Why no library does this: tried on the recipes and their tests, msgspec would take the place of 23 lines here (whether a
value is of its field's type) and be one more compiled package that loading an encoder needs; pydantic reads
``steps: true`` as 1 and passes over unknown keys unless the model's own dataclasses say otherwise; OmegaConf has lists
where these dataclasses have tuples. Places, presets, nearest names and the words of the errors would stay ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cat.files import replacing

T = TypeVar("T")

COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """A recipe or an override that cannot be used as it is written."""


class _Text(str):
    """A command-line value: read by the type of its field, so that ``run.name=007`` stays a name."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where each key was written, for messages."""

    file: str
    overridden: frozenset[str] = frozenset()

    def of(self, path: str) -> str:
        return COMMAND_LINE if path in self.overridden else self.file


# ---------------------------------------------------------------- reading


def load(
    cls: type[T],
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    presets: Mapping[type, Mapping[str, Any]] | None = None,
) -> T:
    """Fill dataclass ``cls`` from the YAML file ``path`` and ``key.sub=value`` texts (later ones win).

    A section whose type is in ``presets`` may name one: ``model: {preset: tiny, depth: 3}`` is the preset with one
    field changed. A preset given as an override starts its section afresh: what the file changed in the section no
    longer counts.

    Raises: `ConfigError`.
    """
    return from_mapping(cls, read_yaml(path), source=str(path), overrides=overrides, presets=presets)


def from_mapping(
    cls: type[T],
    mapping: Mapping[str, Any],
    *,
    source: str = "configuration",
    overrides: Sequence[str] = (),
    presets: Mapping[type, Mapping[str, Any]] | None = None,
) -> T:
    """Like `load`, from a mapping already read; ``source`` is its name in messages."""
    raw = with_overrides(mapping, overrides)
    where = _Source(source, frozenset(parse_override(text)[0] for text in overrides))
    return _build(cls, raw, "", where, presets or {}, _known_keys(cls, presets or {}))


def with_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe's mapping with the command line's ``key.sub=value`` in it, whose values are still texts."""
    raw: dict[str, Any] = _copy(mapping)
    parsed = [parse_override(text) for text in overrides]
    # Presets first, so that `model.depth=3 model.preset=small` does not depend on the order.
    for path, value in sorted(parsed, key=lambda item: item[0].rpartition(".")[2] != "preset"):
        _put(raw, path, value)
    return raw


def parse_override(text: str) -> tuple[str, str]:
    """``"optim.lr=1e-3"`` to ``("optim.lr", "1e-3")``."""
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", path):
        raise ConfigError(
            f"{COMMAND_LINE}: {text!r} is not an override; expected key.sub=value, for example optim.lr=1e-3"
        )
    return path, _Text(value)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    yaml = _yaml()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the recipe ({error.strerror}); expected a YAML file such as recipes/tiny.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); expected YAML in UTF-8"
        ) from None
    try:
        mapping = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"{path}: holds {_describe(mapping)}; expected sections such as 'model:' and 'optim:' with 'key: value' "
            "below"
        )
    return mapping


def _put(raw: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    node = raw
    for depth, section in enumerate(sections):
        if leaf == "preset" and depth == len(sections) - 1:
            node[section] = {}
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(
                f"{COMMAND_LINE}: {path}={value}: {'.'.join(sections[: depth + 1])!r} is a value, not a section"
            )
    node[leaf] = value


# ---------------------------------------------------------------- filling a dataclass


def _build(
    cls: type, raw: Any, path: str, where: _Source, presets: Mapping[type, Mapping[str, Any]], known: Sequence[str]
) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{where.of(path)}: {path or 'the recipe'} is {_describe(raw)}; expected a section with the keys "
            f"{', '.join(_names(cls))}"
        )
    values = dict(raw)
    if hasattr(cls, "upgrade"):
        values = cls.upgrade(values)
    preset = _preset(cls, values, path, where, presets)
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in _names(cls):
            raise _unknown_key(_join(path, str(name)), where, known)
    filled: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key = _join(path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            raw_section = values.get(field.name)
            filled[field.name] = _build(
                hints[field.name], {} if raw_section is None else raw_section, key, where, presets, known
            )
        elif (member := _member(hints[field.name])) is not None:
            raw_section = values.get(field.name)
            filled[field.name] = _build_named(
                member, {} if raw_section is None else raw_section, key, where, presets, known
            )
        elif field.name in values:
            filled[field.name] = _convert(values[field.name], hints[field.name], key, where)
        elif preset is None and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{where.file}: {key} is missing; expected {_expected(hints[field.name])}: write it there or add "
                f"{key}=VALUE to the command"
            )
    try:
        return cls(**filled) if preset is None else dataclasses.replace(preset, **filled)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # the last two: of numbers nobody means
        if isinstance(error, ConfigError):
            raise
        mixed = any(k.startswith(f"{path}.") for k in where.overridden)
        origin = f"{where.file} with the command line's changes" if mixed else where.file
        raise ConfigError(f"{origin}: {path or cls.__name__}: {error}") from error


def _member(hint: Any) -> type | None:
    """C of a field of type ``Mapping[str, C]``: a section of sections, whose names are the recipe's own."""
    members = typing.get_args(hint) if typing.get_origin(hint) is Mapping else ()
    return typing.cast(type, members[1]) if members and dataclasses.is_dataclass(members[1]) else None


def _build_named(
    cls: type, raw: Any, path: str, where: _Source, presets: Mapping[type, Mapping[str, Any]], known: Sequence[str]
) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{where.of(path)}: {path} is {_describe(raw)}; expected a name, and below it the keys "
            f"{', '.join(_names(cls))}"
        )
    built = {}
    for name, section in raw.items():
        key = _join(path, str(name))
        if not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError(f"{where.of(key)}: {key}: {name!r} is not a name; expected letters, digits and _")
        keys = [*known, *_known_keys(cls, presets, key)]
        built[name] = _build(cls, {} if section is None else section, key, where, presets, keys)
    return built


def _preset(
    cls: type, values: dict[str, Any], path: str, where: _Source, presets: Mapping[type, Mapping[str, Any]]
) -> Any:
    if cls not in presets or "preset" not in values:
        return None
    name = values.pop("preset")
    if not isinstance(name, str) or name not in presets[cls]:
        nearest = difflib.get_close_matches(str(name), presets[cls], n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        key = _join(path, "preset")
        raise ConfigError(
            f"{where.of(key)}: {key} = {name!r} is not a preset; expected one of {', '.join(presets[cls])}{hint}"
        )
    return presets[cls][str(name)]


def _convert(value: Any, hint: Any, path: str, where: _Source) -> Any:
    """``value`` as the type of its field, or a `ConfigError`."""
    parsed = _read_text(value, hint, path) if isinstance(value, _Text) else value
    fits, result = _fit(parsed, hint)
    if fits:
        return result
    shown = str(value) if isinstance(value, _Text) else _describe(parsed)
    remedy = " (quote the value to make it a text)" if hint is str and isinstance(parsed, int | float) else ""
    raise ConfigError(f"{where.of(path)}: {path} is {shown}; expected {_expected(hint)}{remedy}")


def _read_text(text: _Text, hint: Any, path: str) -> Any:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if types.NoneType in members and text in ("null", "none", "None", "~", ""):
        return None
    if str in members or (typing.get_origin(hint) is Literal and text in typing.get_args(hint)):
        return str(text)
    is_tuple = any(typing.get_origin(member) is tuple for member in members)
    source = f"[{text}]" if is_tuple and not text.startswith("[") else str(text)
    yaml = _yaml()
    try:
        return yaml.load(source, Loader=_loader())
    except yaml.YAMLError:
        raise ConfigError(f"{COMMAND_LINE}: {path}={text} cannot be read; expected {_expected(hint)}") from None


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """(whether ``value`` is of type ``hint``, the value as that type). Whole floats are integers: 4e5 steps is fine."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitting = [result for member in args for fits, result in [_fit(value, member)] if fits]
        return (True, fitting[0]) if fitting else (False, None)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args), value
    if origin is tuple:
        return _fit_tuple(value, args)
    if hint is types.NoneType:
        return value is None, None
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number, float(value) if number else None
    if hint is int:
        whole = (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
        return whole, int(value) if whole else None
    if hint is Path:
        return isinstance(value, str | Path), Path(value) if isinstance(value, str | Path) else None
    return isinstance(value, hint), value


def _fit_tuple(value: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        return False, None
    items = [_fit(item, kind) for item, kind in zip(value, kinds, strict=True)]
    return all(fits for fits, _ in items), tuple(result for _, result in items)


def _unknown_key(path: str, where: _Source, known: Sequence[str]) -> ConfigError:
    section = path.rpartition(".")[0]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    message = f"{where.of(path)}: unknown key {path!r}; the nearest known one is {_nearest(path, siblings, known)!r}"
    if siblings and section:
        message += f" (keys of {section!r}: {', '.join(key.rpartition('.')[2] for key in siblings)})"
    return ConfigError(message)


def _nearest(path: str, siblings: Sequence[str], known: Sequence[str]) -> str:
    leaf = path.rpartition(".")[2]

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, leaf, key.rpartition(".")[2]).ratio()

    # The right section first; then the right name in a wrong section (`run.steps` for `optim.steps`).
    for keys in (siblings, known):
        best = max(keys, key=likeness, default=None)
        if best is not None and likeness(best) >= 0.6:
            return best
    return max(known, key=lambda key: difflib.SequenceMatcher(None, path, key).ratio())


def _known_keys(cls: type, presets: Mapping[type, Mapping[str, Any]], path: str = "") -> list[str]:
    """Every dotted key of ``cls``; sections themselves only at the top."""
    hints = typing.get_type_hints(cls)
    keys = [_join(path, "preset")] if cls in presets else []
    for name in _names(cls):
        key = _join(path, name)
        if dataclasses.is_dataclass(hints[name]):
            keys += [key, *_known_keys(typing.cast(type, hints[name]), presets, key)]
        else:
            keys.append(key)
    return keys


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _describe(value: Any) -> str:
    kind = {
        dict: "a section",
        list: "a list",
        str: "a text",
        _Text: "a text",
        bool: "a truth value",
        int: "an integer",
        float: "a number",
    }
    return "empty" if value is None else f"{value!r} ({kind.get(type(value), type(value).__name__)})"


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(member) for member in args)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is tuple:
        length = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {length}{_expected(args[0]).split(' ', 1)[1]}s, for example [1, 2]"
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        Path: "a path",
        types.NoneType: "null",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))


# ---------------------------------------------------------------- writing and comparing


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as nested mappings of YAML and JSON types: tuples become lists, paths become texts."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def write_yaml(config: Any, path: str | os.PathLike[str]) -> None:
    """Write a dataclass, every field of it, as a recipe; the file appears whole or not at all."""
    text = _yaml().safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flatten(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, keyed by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, _join(path, key))
        else:
            flat[_join(path, key)] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; a key that one side lacks counts as None there."""
    old_flat, new_flat = flatten(old), flatten(new)
    keys = [*old_flat, *(key for key in new_flat if key not in old_flat)]
    return {key: (old_flat.get(key), new_flat.get(key)) for key in keys if old_flat.get(key) != new_flat.get(key)}


# ---------------------------------------------------------------- YAML


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError("reading recipes needs PyYAML: pip install 'cat-kernels[train]'") from None
    return yaml


def _loader() -> Any:
    """SafeLoader that reads 5e-4 as a number (YAML 1.1 wants 5.0e-4) and refuses a key written twice."""
    yaml = _yaml()
    base: Any = yaml.SafeLoader

    class Loader(base):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is written twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader
