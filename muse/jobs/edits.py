"""The plan of edit.py: rows that each name a picture and one edit of it (§3.3)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

import muse
from muse import settings as knobs
from muse.config import FreeEditConfig
from muse.data.pictures import open_picture
from muse.editing import holes, regions, whole
from muse.errors import UserError
from muse.jobs import rows
from muse.jobs.plan import Item, Names, file_id, slug
from muse.jobs.run import identity
from muse.jobs.sampling import Knobs
from muse.pipeline import Muse

Kind = Literal['mask', 'box', 'outpaint', 'free', 'variation', 'upscale']
KINDS = get_args(Kind)  # of which a row has exactly one
OWN = ('seed', 'steps', 'guidance_scale', 'temperature', 'negative_prompt')  # knobs that a row may set
_FEW = ('seed', 'negative_prompt', 'superres')  # the settings that a free edit and an upscale read
COLUMNS = ('image', *KINDS, 'prompt', 'id', *OWN)
_TRUE, _FALSE = ('true', 'yes', '1'), ('false', 'no', '0')


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One row. `how` is what its kind needs: a path, a box, sides in pixels, a strength, or True."""

    place: int
    line: int  # in its file; 0: it stood on the command line
    image: Path
    kind: Kind
    how: Any
    prompt: str
    id: str
    own: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EditKnobs:
    """How to edit, where a row does not say otherwise."""

    drawing: Knobs
    context: float
    free: FreeEditConfig
    given: Mapping[str, Any]  # guidance_scale and temperature as asked for, which win over those of `free`

    def drawn(self, edit: Edit) -> dict[str, Any]:
        """Arguments of the edits that fill masked tokens."""
        arguments = {'seed': self.drawing.seed, 'negative_prompt': self.drawing.negative_prompt}
        return {**arguments, 'decoding': self.drawing.decoding, 'superres': self.drawing.superres, **edit.own}

    def few(self, edit: Edit) -> dict[str, Any]:
        """Those of them that a free edit and an upscale take."""
        arguments = self.drawn(edit)
        return {name: arguments[name] for name in _FEW}

    def free_config(self, edit: Edit) -> FreeEditConfig:
        """The settings of a mask-free edit."""
        own = {name: edit.own.get(name, self.given.get(name)) for name in ('guidance_scale', 'temperature')}
        return knobs.free_edit(knobs.override(self.free, **own, iterations=edit.own.get('steps')))


def read_edit(place: int, line: int, values: Mapping[str, Any], folder: Path) -> Edit:
    """A row out of the columns of a file; paths start at `folder`. Raises UserError for what is no edit."""
    if 'image' not in values:
        raise UserError('no image is named: give the path of a picture')
    kinds = [kind for kind in KINDS if kind in values and not _is_off(kind, values[kind])]
    if len(kinds) != 1:
        many = f'several edits are named ({", ".join(kinds)})' if kinds else 'no edit is named'
        raise UserError(f'{many}: give one of {", ".join(KINDS)}')
    [kind] = kinds
    if 'prompt' not in values and kind not in ('variation', 'upscale'):
        raise UserError('no prompt is given: say what the new picture shows')
    for name in ('steps', 'guidance_scale', 'temperature') if kind == 'upscale' else ():
        if name in values:
            raise UserError(f'an upscale reads no {name}: leave it out')
    readers = {'seed': rows.integer, 'steps': rows.integer, 'negative_prompt': knobs.text}
    return Edit(
        place=place,
        line=line,
        image=folder / knobs.text('image', values['image']),
        kind=kind,  # pyright: ignore[reportArgumentType]
        how=_how(kind, values[kind], folder),
        prompt=rows.prompt_text('prompt', values.get('prompt', '')),
        id=file_id(values['id']) if 'id' in values else '',
        own={name: readers.get(name, rows.real)(name, values[name]) for name in OWN if name in values},
    )


def _is_off(kind: str, value: Any) -> bool:
    """Whether a switch is set to off."""
    return kind in ('free', 'upscale') and str(value).lower() in _FALSE


def _how(kind: str, value: Any, folder: Path) -> Any:
    match kind:
        case 'mask':
            return folder / knobs.text('mask', value)
        case 'box':
            return rows.whole_numbers('box', value, 4, 'x0,y0,x1,y1 in pixels')
        case 'outpaint':
            return _sides(value)
        case 'variation':
            return knobs.number('variation', rows.real('variation', value), high=1)
        case _:
            if str(value).lower() not in _TRUE:
                raise UserError(f'{kind} is {value!r}; give true, or leave it out')
            return True


def _sides(value: Any) -> dict[str, int]:
    """Pixels a side out of 'left=128,right=64' or a mapping."""
    if isinstance(value, str) and '=' in value:
        pairs = [part.partition('=') for part in value.split(',')]
        value = {name.strip(): pixels for name, _, pixels in pairs}
        if len(value) < len(pairs):
            raise UserError('outpaint names a side twice: write it as left=128,right=64')
    if not isinstance(value, dict) or not value or set(value) - set(holes.SIDES):
        raise UserError(f'outpaint is {value!r}; write it as left=128,right=64 (sides: {", ".join(holes.SIDES)})')
    return {name: knobs.count(name, rows.integer(name, pixels), 0) for name, pixels in value.items()}


class Editing:
    """The plan: `Item.task` is the `Edit`. Every picture and mask is read once while it is made."""

    def __init__(self, items: Sequence[Item], unit: int):
        """`unit`: edits that are skipped or done together."""
        self._items, self._unit = items, unit

    def __len__(self) -> int:
        return -(-len(self._items) // self._unit)

    def items(self, unit: int) -> list[Item]:
        """The edits of a unit."""
        return list(self._items[unit * self._unit : (unit + 1) * self._unit])

    @property
    def pictures(self) -> int:
        """How many in all."""
        return len(self._items)


def make_item(model: Muse, edit: Edit, shared: EditKnobs, names: Names) -> Item:
    """Checks a row against its picture; raises UserError for what cannot be edited so."""
    size = np.asarray(open_picture(edit.image)).shape[1::-1]
    about: dict[str, Any] = {'edit': edit.kind, 'prompt': edit.prompt, **({'id': edit.id} if edit.id else {})}
    about |= {'image': str(edit.image), 'image_sha256': _sha256(edit.image)}
    about |= {'how': str(edit.how) if edit.kind == 'mask' else edit.how}
    about |= _checked(model, edit, shared, size)
    about |= {**identity(model), 'muse_version': muse.__version__}
    stem = edit.id or f'{edit.place:04d}_{slug(edit.prompt or edit.image.stem)}'
    names.take([stem], edit.place)
    return Item(stem, about, edit)


def _checked(model: Muse, edit: Edit, shared: EditKnobs, size: tuple[int, int]) -> dict[str, Any]:
    """What is written of the settings that this kind of edit reads, all checked."""
    if edit.kind in ('free', 'upscale'):
        settings = dataclasses.asdict(model.settings(**shared.few(edit)))
        settings = {name: settings[name] for name in _FEW}
    else:
        settings = dataclasses.asdict(model.settings(**shared.drawn(edit)))
    match edit.kind:
        case 'mask':
            regions.open_mask(edit.how, size)
            return {**settings, 'context': knobs.context(shared.context), 'mask_sha256': _sha256(edit.how)}
        case 'box':
            _check_box(edit.how, size)
            return {**settings, 'context': knobs.context(shared.context)}
        case 'outpaint':
            holes.outpainted(size, [edit.how.get(side, 0) for side in holes.SIDES])
        case 'free':
            return {**settings, 'free': dataclasses.asdict(shared.free_config(edit))}
        case 'upscale':
            model.need_superres()
            whole.upscaled(model, size)
    return settings


def _check_box(box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    if not (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
        raise UserError(f'box is {",".join(map(str, box))}; give x0 < x1 and y0 < y1 within {size[0]}×{size[1]} pixels')


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the path") from None


def hole(edit: Edit, size: tuple[int, int]) -> np.ndarray:
    """Where a mask or a box is painted anew, bool [height, width]."""
    if edit.kind == 'mask':
        return regions.open_mask(edit.how, size)
    hole_HW = np.zeros(size[::-1], bool)
    left, top, right, bottom = edit.how
    hole_HW[top:bottom, left:right] = True
    return hole_HW


def before(edit: Edit, img_HWC: np.ndarray) -> list[Image.Image]:
    """What a strip shows left of the result: the picture, and grey what is to be painted."""
    picture, size = Image.fromarray(img_HWC), (img_HWC.shape[1], img_HWC.shape[0])
    if edit.kind in ('mask', 'box'):
        veiled_HWC = np.where(hole(edit, size)[..., None], np.uint8(128), img_HWC)
        return [picture, Image.fromarray(veiled_HWC)]
    if edit.kind == 'outpaint':
        sides = [edit.how.get(side, 0) for side in holes.SIDES]
        larger = Image.new('RGB', holes.outpainted(size, sides), (128, 128, 128))
        larger.paste(picture, (sides[0], sides[1]))
        return [larger]
    return [picture]
