"""Plain settings to frozen dataclasses and back: strict, and exact both ways.

`build(TrainConfig, {"batch_size": 8, ...}, "config.train")` makes a dataclass from an
`ml_collections.ConfigDict` or from what `json.load` returns; `to_dict` is its inverse.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

import ml_collections

from unclip_jax.errors import UserError, did_you_mean, wrong

T = TypeVar("T")


def build(cls: type[T], mapping: Mapping[str, Any], path: str = "config") -> T:
    """Make the dataclass `cls` from plain settings.

    A field may be a bool, int, float, str, `None` or `Literal`, or a union of these. It may be a
    tuple, given as a list or tuple; a dict with strings as keys; or another dataclass, given as a
    mapping; of several, the one that has its names. A whole number is taken as a float. A float is
    not taken as an int, and a bool is neither.

    Args:
        cls: a dataclass type.
        mapping: a ConfigDict or dict; only fields with a default may lack.
        path: where the mapping stands, for messages: `config.train`.

    Raises:
        UserError: an unknown or missing field, or a value of the wrong type; it has the whole path.
    """
    if not _is_mapping(mapping):
        raise wrong(path, mapping, f"the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in _items(mapping, path):
        if name not in fields:
            raise UserError(f"{path}.{name}: no such field; {_suggestion(name, list(fields))}")
        values[name] = _convert(hints[name], value, f"{path}.{name}")
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in values and not optional:
            raise UserError(f"{path}.{name}: missing; give it {_describe(hints[name])}")
    return cls(**values)


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain, JSON-able dict of a dataclass, from which `build` makes an equal one."""
    return {
        field.name: _plain(getattr(settings, field.name), field.name)
        for field in dataclasses.fields(settings)
        if field.init
    }


def _plain(value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"field {name}: {value!r} is not plain data")


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `hint` wants it, or UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise wrong(path, value, _describe(hint))
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if hint is dict or origin is dict:
        if not _is_mapping(value):
            raise wrong(path, value, _describe(hint))
        item = arguments[1] if arguments else Any
        return {key: _convert(item, entry, f"{path}.{key}") for key, entry in _items(value, path)}
    return _convert_scalar(hint, value, path)


def _convert_union(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in choices:
        return None
    rest = [choice for choice in choices if choice is not type(None)]
    if len(rest) == 1:
        return _convert(rest[0], value, path)
    if _is_mapping(value) and all(dataclasses.is_dataclass(choice) for choice in rest):
        return build(min(rest, key=lambda choice: _unknown(choice, value)), value, path)
    # An exact type first: 3 stays an int where both int and float are allowed.
    for choice in sorted(rest, key=lambda choice: type(value) is not choice):
        try:
            return _convert(choice, value, path)
        except UserError:
            continue
    raise wrong(path, value, " or ".join(_describe(choice) for choice in choices))


def _unknown(cls: type, mapping: Any) -> int:
    """How many names of a mapping are no fields of a dataclass."""
    return len(set(mapping) - {field.name for field in dataclasses.fields(cls)})


def _convert_tuple(items: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise wrong(path, value, "a list")
    if not items:
        items = (Any,) * len(value)
    elif items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise wrong(path, value, f"a list of {len(items)}")
    pairs = enumerate(zip(items, value, strict=True))
    return tuple(_convert(item, entry, f"{path}[{i}]") for i, (item, entry) in pairs)


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    is_bool = isinstance(value, bool)
    if hint is bool and is_bool:
        return value
    if hint is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not is_bool:
        if not math.isfinite(value):
            raise wrong(path, value, "a finite number")
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is type(None) and value is None:
        return None
    if hint not in _NAMES:
        raise TypeError(f"{path}: fields of type {hint} cannot be built from plain settings")
    raise wrong(path, value, _describe(hint))


_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "None",
}


def _describe(hint: Any) -> str:
    """What a value of this type is, in words."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    if dataclasses.is_dataclass(hint):
        return f"the fields of {hint.__name__}"
    return _NAMES.get(hint, str(hint))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, (Mapping, ml_collections.ConfigDict))


def _items(mapping: Any, path: str) -> list[tuple[str, Any]]:
    """The entries of a dict or ConfigDict; a ConfigDict's required placeholder is an error."""
    items = []
    for name in mapping:
        if not isinstance(name, str):
            raise UserError(f"{path}: the field name {name!r} is not a string; write it as one")
        try:
            items.append((name, mapping[name]))
        except ml_collections.config_dict.RequiredValueError:
            raise UserError(f"{path}.{name}: required, but not set; give it a value") from None
    return items


def _suggestion(name: str, known: list[str]) -> str:
    others = f"expected one of {', '.join(known)}" if known else "it has no fields"
    return did_you_mean(name, known) or others
