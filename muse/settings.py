"""Checked knobs of drawing and editing: what a user may ask for, as it is written beside the pictures."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from muse.config import DecodeConfig, FreeEditConfig
from muse.errors import UserError, nearest, warn
from muse.text.tokenizer import clean

MAX_SEED = 2**32 - 1
MAX_STEPS = 10_000
MAX_INT = 2**31 - 1  # of the programs' int32
CONTEXT = 2.0  # size of an edit's window over that of its hole, unless another is asked for
SuperresDecoding = DecodeConfig | Literal[False] | None  # None: the release's own; False: the base alone draws
ConfigT = typing.TypeVar('ConfigT', DecodeConfig, FreeEditConfig)


@dataclass(frozen=True, kw_only=True)
class Settings(DecodeConfig):
    """What the pictures of one run share: the decoding of the base, and the rest. Made by `Muse.settings`."""

    seed: int
    negative_prompt: str
    size: tuple[int, int]  # width and height in pixels
    superres: DecodeConfig | None  # decoding of the super-res; None: the base alone draws


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture to draw. What is None is as in the settings.

    The noise is made of seed and index: the pictures of one prompt differ in the index, or in the seed.
    """

    prompt: str
    index: int = 0
    seed: int | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    low: np.ndarray | None = None  # known low-res tokens [rows, columns], −1 where unknown; None: nothing is known
    high: np.ndarray | None = None  # known high-res tokens, likewise


def decoding(config: DecodeConfig, tokens: int, name: str = '') -> DecodeConfig:
    """A checked `config`: at most as many steps as there are tokens.

    Args:
        config: values of a user or a release.
        tokens: of the picture.
        name: what stands before a knob's name in messages.

    Raises:
        UserError: a value out of range.
    """
    if not isinstance(config, DecodeConfig):
        raise UserError(
            f'{name.rstrip(".") or "decoding"} is a {type(config).__name__}; give a muse.config.DecodeConfig'
        )
    steps = count(f'{name}steps', config.steps, 1, MAX_STEPS)
    if steps > tokens:
        warn(f'{name}steps is {steps}, more than the {tokens} tokens of a picture: {tokens} steps are taken')
    for knob in ('guidance_schedule', 'order', 'schedule'):
        choice(f'{name}{knob}', getattr(config, knob), DecodeConfig, knob)
    interval = config.guidance_interval
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise UserError(f'{name}guidance_interval is {interval!r}; give (start, end), from 0 to 1')
    start, end = (number(f'{name}guidance_interval', value, high=1) for value in interval)
    if start > end:
        raise UserError(f'{name}guidance_interval is {config.guidance_interval}; its start must not lie behind its end')
    last = config.final_temperature
    return dataclasses.replace(
        config,
        steps=min(steps, tokens),
        guidance_scale=number(f'{name}guidance_scale', config.guidance_scale),
        guidance_interval=(start, end),
        temperature=number(f'{name}temperature', config.temperature),
        final_temperature=None if last is None else number(f'{name}final_temperature', last),
        choice_temperature=number(f'{name}choice_temperature', config.choice_temperature),
        top_k=count(f'{name}top_k', config.top_k, 0, MAX_INT),
        top_p=share(f'{name}top_p', config.top_p),
    )


def free_edit(config: FreeEditConfig) -> FreeEditConfig:
    """A checked `config`; raises UserError for a value out of range."""
    if not isinstance(config, FreeEditConfig):
        raise UserError(f'free is a {type(config).__name__}; give a muse.config.FreeEditConfig')
    return FreeEditConfig(
        iterations=count('iterations', config.iterations, 1, MAX_STEPS),
        share=share('share', config.share),
        guidance_scale=number('guidance_scale', config.guidance_scale),
        temperature=number('temperature', config.temperature),
        top_k=count('top_k', config.top_k, 0, MAX_INT),
        top_p=share('top_p', config.top_p),
    )


def override(config: ConfigT, **given: Any) -> ConfigT:
    """`config` with those of the given values that are not None."""
    if not dataclasses.is_dataclass(config):
        raise UserError(f'decoding is a {type(config).__name__}; give a muse.config.DecodeConfig')
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def row(given: Row) -> Row:
    """A checked row; raises UserError for a value out of range."""
    if not isinstance(given, Row):
        raise UserError(f'a row is a {type(given).__name__}; give a muse.pipeline.Row')
    if given.negative_prompt is not None:
        text('negative_prompt', given.negative_prompt)
    return dataclasses.replace(
        given,
        prompt=text('prompt', given.prompt),
        index=count('index', given.index, 0, MAX_INT),
        seed=None if given.seed is None else count('seed', given.seed, 0, MAX_SEED),
        guidance_scale=None if given.guidance_scale is None else number('guidance_scale', given.guidance_scale),
        temperature=None if given.temperature is None else number('temperature', given.temperature),
    )


def prompts(given: str | Sequence[str]) -> list[str]:
    """The prompts as a list; warns of blank ones, which draw without text."""
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise UserError(f'prompts are a {type(given).__name__}; give a text or a list of texts')
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise UserError('no prompt was given: give at least one text')
    for prompt in texts:
        text('prompt', prompt)
    if blank := sum(not clean(prompt) for prompt in texts):
        warn(f'empty prompts: {blank} of {len(texts)}; drawn without text')
    return texts


def text(name: str, value: Any) -> str:
    """A text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f'{name} {value!r} is a {type(value).__name__}; give a text')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f'{name} {value[:40]!r} holds bytes that are no UTF-8: save or type it as UTF-8') from None
    return value


def count(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer from `low` to `high`."""
    wanted = f'an integer from {low} to {high}' if high is not None else f'an integer of at least {low}'
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low or value > (high or value):
        raise UserError(f'{name} is {repr(value)[:40]}; give {wanted}')
    return int(value)


def number(name: str, value: Any, high: float = 1e6) -> float:
    """A number from 0 to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= high:
        raise UserError(f'{name} is {repr(value)[:40]}; give a number from 0 to {high:,.10g}')
    return float(value)


def share(name: str, value: Any) -> float:
    """A number above 0, at most 1."""
    if number(name, value, high=1) == 0:
        raise UserError(f'{name} is {value!r}; give a number above 0, at most 1')
    return float(value)


def context(value: Any) -> float:
    """How much larger than its hole an edit's window is: at least 1, or parts of the hole would stay as they are."""
    if number('context', value) < 1:
        raise UserError(f'context is {value!r}; give a number of at least 1')
    return float(value)


def choice(name: str, value: Any, config: type, field: str) -> None:
    """Checks a value of a `Literal` field."""
    choices = get_args(typing.get_type_hints(config)[field])
    if value not in choices:
        raise UserError(f'{name} is {value!r}{nearest(str(value), choices)}')


def size(value: Any) -> tuple[int, int]:
    """Width and height of a picture in pixels."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f'size is {value!r}; give (width, height) in pixels')
    return count('width', value[0], 1), count('height', value[1], 1)


def fields(config: DecodeConfig) -> dict[str, Any]:
    """The fields of a config by name, without turning nested ones into dicts."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DecodeConfig)}
