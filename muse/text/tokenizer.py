"""Vocabulary: prompt → ids, ended by </s>, zero padded to a fixed length (§2.1).

A text goes to the vocabulary as it was written: what becomes of compatibility forms, case, blanks and control
characters is the vocabulary's own rule, so that ids are those that the text encoder was trained on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int

from muse.errors import UserError, warn
from muse.text.unigram import from_tokenizer_json

MAX_PROMPT_BYTES = 1_000_000
PAD_ID = 0
WORD_START = '▁'  # what sentencepiece puts before the first piece of a word


@dataclass(frozen=True)
class Encoded:
    """Ids of one text, </s> included (none at all for a blank text), and what of the text was cut off."""

    ids: list[int]
    lost: str


class Tokenizer:
    """A sentencepiece model with T5's special ids: pad 0, and an end of sentence."""

    def __init__(self, model: str | Path | bytes):
        """Reads a `spiece.model` or a `tokenizer.json` from a path, or takes the bytes of one.

        Raises:
            UserError: the file is missing, is neither, or has no </s> or another pad id than 0.
        """
        name = 'vocabulary' if isinstance(model, bytes) else f"vocabulary '{model}'"
        if not isinstance(model, bytes):
            try:
                model = Path(model).read_bytes()
            except OSError as error:
                raise UserError(f'{name} cannot be read ({error.strerror}): give a spiece.model file') from None
        if model[:1] == b'{':
            model = from_tokenizer_json(model, name)
        self.model = model  # as a spiece.model, whatever it was read from
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f'{name} is not a sentencepiece model: it is truncated or another kind of file') from None
        self.eos_id = self._pieces.eos_id()
        if self.eos_id < 0 or self._pieces.pad_id() != PAD_ID:
            raise UserError(f'{name} lacks </s> or its pad id is not {PAD_ID}: use a vocabulary with T5’s special ids')

    @property
    def vocab_size(self) -> int:
        """Ids run over 0..vocab_size-1."""
        return self._pieces.GetPieceSize()

    def encode(self, text: str, max_length: int) -> Encoded:
        """Ids of `text`, at most `max_length` with </s>. Warns of unknown characters and of a cut.

        Raises:
            UserError: `text` is over 1 MB.
        """
        encoded, unknown = self._encode(text, max_length)
        _warn(unknown, [encoded.lost] if encoded.lost else [], max_length)
        return encoded

    def batch(self, texts: Sequence[str], length: int) -> tuple[Int[np.ndarray, 'B S'], Int[np.ndarray, ' B']]:
        """Ids of several texts, zero padded to `length`, and how many are real. Warns once for the whole batch.

        Raises:
            UserError: a text is over 1 MB.
        """
        ids_BS, len_B = np.full((len(texts), length), PAD_ID, np.int32), np.zeros(len(texts), np.int32)
        unknown, lost = {}, []
        for row, text in enumerate(texts):
            encoded, characters = self._encode(text, length)
            ids_BS[row, : len(encoded.ids)] = encoded.ids
            len_B[row] = len(encoded.ids)
            unknown |= characters
            lost += [encoded.lost] if encoded.lost else []
        _warn(unknown, lost, length)
        return ids_BS, len_B

    def lost(self, text: str, max_length: int) -> str:
        """What `encode` cuts off, '' where all of the text fits. Raises UserError as `encode`, and warns of nothing."""
        return self._encode(text, max_length)[0].lost

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, up to the first </s> or pad."""
        kept = []
        for token in ids:
            if token in (self.eos_id, PAD_ID):
                break
            kept.append(int(token))
        return self._pieces.Decode(kept)

    def word_ids(self, text: str) -> list[tuple[int, int]]:
        """(id, index of its word) of each piece, without </s>. In a text without odd characters words are
        `text.split()`.
        """
        ids = self._pieces.EncodeAsIds(_encodable(text))
        starts = np.cumsum([self._pieces.IdToPiece(token).startswith(WORD_START) for token in ids])
        return [(token, max(0, int(word) - 1)) for token, word in zip(ids, starts, strict=True)]

    def _encode(self, text: str, max_length: int) -> tuple[Encoded, dict[str, None]]:
        size = len(text.encode('utf-8', 'surrogatepass'))
        if size > MAX_PROMPT_BYTES:
            raise UserError(f'a prompt of {size} bytes is over the limit of {MAX_PROMPT_BYTES}: shorten it')
        words = clean(text).split()
        pieces = self.word_ids(text) if words else []
        if not pieces:
            return Encoded([], ''), {}
        kept, cut = [token for token, _ in pieces[: max_length - 1]], pieces[max_length - 1 :]
        # Where the vocabulary sees more words than `clean` does (a zero-width blank), the last is named at least.
        lost = ' '.join(words[min(cut[0][1], len(words) - 1) :]) if cut else ''
        return Encoded([*kept, self.eos_id], lost), dict.fromkeys(self._unknown(kept, text))

    def _unknown(self, ids: list[int], text: str) -> str:
        """Characters of the text that are no pieces: those spelled in bytes, or all of the unknown."""
        spelled = bytes(int(self._pieces.IdToPiece(token)[1:-1], 16) for token in ids if self._pieces.IsByte(token))
        unknown = spelled.decode('utf-8', 'ignore')
        if self._pieces.unk_id() in ids:
            pieces = self._pieces.EncodeAsPieces(_encodable(text))
            unknown += ''.join(p for p in pieces if self._pieces.PieceToId(p) == self._pieces.unk_id())
        return unknown.replace(WORD_START, '')


def _encodable(text: str) -> str:
    """The text without lone surrogates, which no encoding has a place for."""
    return text.encode('utf-8', 'ignore').decode('utf-8')


def clean(text: str) -> str:
    """One line in compatibility form, without control, formatting, surrogate or unassigned characters.

    What is left is what a person can see: a text of which nothing is left is no text.
    """
    text = ''.join(' ' if unicodedata.category(c) == 'Cc' else c for c in unicodedata.normalize('NFKC', text))
    return ' '.join(''.join(c for c in text if unicodedata.category(c)[0] != 'C').split())


def beginning(text: str) -> str:
    """The first few words of a text, for a message."""
    words = text.split()
    shown = ' '.join(words[:5])
    return shown[:80] + (' …' if len(words) > 5 or len(shown) > 80 else '')


def _warn(unknown: dict[str, None], lost: list[str], length: int) -> None:
    if unknown:
        shown = ' '.join(c if c.isprintable() else f'U+{ord(c):04X}' for c in list(unknown)[:10])
        shown += ' …' if len(unknown) > 10 else ''
        warn(f'not in the vocabulary, read byte by byte or as unknown: {shown}')
    if lost:
        others = f' (and {len(lost) - 1} other prompts were cut)' if len(lost) > 1 else ''
        warn(f"prompt is longer than {length - 1} tokens: lost from '{beginning(lost[0])}' on{others}")
