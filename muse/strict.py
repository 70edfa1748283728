"""Reads nested dicts into dataclasses: an unknown key, a missing one and a wrong type are refused by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from muse.errors import UserError, nearest

ConfigT = TypeVar('ConfigT')


def read(cls: type[ConfigT], values: Mapping[str, Any], path: str = '') -> ConfigT:
    """Builds the dataclass `cls` from a nested mapping.

    Args:
        cls: a dataclass, whose fields are numbers, texts, `Literal`s, tuples and dataclasses, or None.
        values: nested mapping (an `ml_collections.ConfigDict` or parsed JSON); missing keys take the default.
        path: dotted prefix used in messages.

    Raises:
        UserError: an unknown key (names the nearest), a missing one, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            raise UserError(f"config key '{path}{name}' does not exist{nearest(name, fields)}")
    kwargs = {}
    for name, spec in fields.items():
        if name in values:
            kwargs[name] = _convert(hints[name], values[name], f'{path}{name}')
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"config key '{path}{name}' is missing: add it to the config")
    return cls(**kwargs)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, 'items'):
            raise UserError(f"config key '{path}' must be a group of keys, not {value!r}")
        return read(hint, value, f'{path}.')  # pyright: ignore[reportArgumentType]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"config key '{path}' is {value!r}{nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"config key '{path}' must be a list of {args[0].__name__}, not {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"config key '{path}' must hold {len(args)} values, not {len(value)}")
        return tuple(_convert(args[0], v, f'{path}[{i}]') for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"config key '{path}' must be {hint.__name__}, not {value!r}")
    return value
