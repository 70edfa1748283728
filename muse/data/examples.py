"""What all sources of training examples share: the interface, and how a picture and a caption become an example."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muse.config import DataConfig
from muse.data import pictures
from muse.text.tokenizer import MAX_PROMPT_BYTES


class BadExample(ValueError):
    """A record that gives no example. The message is one line that names the record and says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f'{name}: {reason}')
        self.name, self.reason = name, reason


class Source(abc.ABC):
    """Records that examples are made of. All chance comes from `rng`, so an example is the same wherever it is made."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abc.abstractmethod
    def example(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        """{'img': uint8 [H, W, 3], 'caption': str}, or {'tok', 'txt', 'len'} from pre-tokenised records.

        Raises:
            BadExample: the record's picture or caption cannot be used.
        """

    def name(self, record: int) -> str:
        """What to call a record; the same for records of one picture, wherever the source lies."""
        return f'record {record}'

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(name, reason) of what was found unusable when the source was opened and is no record."""
        return iter(())


def make_example(
    picture: bytes | Path | np.ndarray, caption: str, name: str, data: DataConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """The example of a stored picture: fitted to `data.image_size`, perhaps mirrored, with its caption.

    Args:
        picture: a file's bytes or path, or decoded pixels [H, W, 1 or 3].
        caption: its text; blank is no text.
        name: what to call the record when it cannot be used.
        data: image_size, min_side, random_flip.
        rng: decides the flip.

    Raises:
        BadExample: the picture is unreadable, too large or too small, or the caption is over 1 MB.
    """
    if len(caption.encode('utf-8', 'surrogatepass')) > MAX_PROMPT_BYTES:
        raise BadExample(name, f'its caption is over {MAX_PROMPT_BYTES} bytes')
    try:
        if isinstance(picture, np.ndarray):
            array = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
            pictures.check_size(array.shape[1], array.shape[0], data.min_side)
            img_HWC = pictures.fit(Image.fromarray(array), data.image_size)
        else:
            img_HWC = pictures.read_picture(picture, data.image_size, data.min_side)
    except pictures.BadPicture as error:
        raise BadExample(name, str(error)) from None
    caption = caption.encode('utf-8', 'ignore').decode()  # JSON may hold halves of a character, which no file can
    if data.random_flip and rng.random() < 0.5:
        img_HWC = np.ascontiguousarray(img_HWC[:, ::-1])
    return {'img': img_HWC, 'caption': caption}
