"""A `tokenizer.json` with a Unigram model as the sentencepiece model that it was made from.

Hugging Face's file holds what T5's sentencepiece model holds: pieces with their scores, and the table that normalises
characters. Written back as a sentencepiece model it is read by the one library that reads `spiece.model`. What only
the file's other library does is left out: a special token that is spelled in a text (`</s>`, `<extra_id_0>`) is plain
characters here, as it is to sentencepiece and T5X.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from typing import Any

from muse.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # sentencepiece's types of pieces
_UNIGRAM = 1
# Steps of normalising that sentencepiece does by itself: it strips blanks and takes a run of them as one.
_IMPLIED = ('Strip', 'Replace')


def from_tokenizer_json(content: bytes, name: str) -> bytes:
    """The serialized sentencepiece model.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        UserError: no tokenizer.json, or one with a model or a normalisation that is not T5's kind.
    """
    try:
        found = json.loads(content)
        model = found['model']
        if model['type'] != 'Unigram':
            raise UserError(f'{name} has a {model["type"]} model: only Unigram, as T5 has, is read')
        special = {token['id'] for token in found.get('added_tokens') or () if token.get('special')}
        table = _table(found.get('normalizer'), name)
        _check_words(found.get('pre_tokenizer'), name)
        pieces = [
            _piece(str(piece), float(score), _type(number, str(piece), model, special))
            for number, (piece, score) in enumerate(model['vocab'])
        ]
        trainer = _number(3, _UNIGRAM) + _number(4, len(pieces)) + _number(35, int(bool(model.get('byte_fallback'))))
        trainer += b''.join(_bytes(field, text) for field, text in ((45, b'<unk>'), (47, b'</s>'), (48, b'<pad>')))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{name} is truncated or no tokenizer.json ({type(error).__name__}): copy it again') from None
    return b''.join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, _bytes(2, table))


def _type(number: int, piece: str, model: dict[str, Any], special: set[int]) -> int:
    if number == model['unk_id']:
        return _UNKNOWN
    if number in special or piece in ('<pad>', '</s>'):
        return _CONTROL
    is_byte = model.get('byte_fallback') and len(piece) == 6 and piece.startswith('<0x')
    return _BYTE if is_byte else _NORMAL


def _table(normalizer: dict[str, Any] | None, name: str) -> bytes:
    """The table of characters, which T5's files hold alone or as the first of a sequence; empty where there is none."""
    if normalizer is None:
        return b''
    if normalizer['type'] == 'Sequence':
        steps = [step for step in normalizer['normalizers'] if step['type'] not in _IMPLIED]
        if len(steps) > 1:
            raise UserError(f'{name} normalises in {len(steps)} ways: only one table of characters is read')
        return _table(steps[0], name) if steps else b''
    if normalizer['type'] != 'Precompiled':
        raise UserError(f'{name} normalises by {normalizer["type"]}: only a table of characters, as T5 has, is read')
    try:
        return base64.b64decode(normalizer['precompiled_charsmap'] or '', validate=True)
    except binascii.Error:
        raise UserError(f'{name} has a damaged table of characters: copy it again') from None


def _check_words(pre_tokenizer: dict[str, Any] | None, name: str) -> None:
    steps = (pre_tokenizer or {}).get('pretokenizers') or [pre_tokenizer or {'type': 'none'}]
    kinds = [step['type'] for step in steps]
    if kinds not in (['Metaspace'], ['WhitespaceSplit', 'Metaspace']):
        raise UserError(f'{name} splits words by {", ".join(kinds)}: only Metaspace, as T5 does, is read')


# Protocol buffers' wire format: a key of field number and kind, then the value.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _piece(text: str, score: float, kind: int) -> bytes:
    return _bytes(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack('<f', score) + _number(3, kind)
