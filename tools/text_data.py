"""What the distillation trains on, as arrays on the device: the corpus, its lessons, triples and meanings."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from muse.errors import UserError
from muse.text.tokenizer import Tokenizer
from tools.text_binding import PLACES, Triple
from tools.text_teacher import Lessons

MAX_WORDS = 24
HELD_OUT = 100  # one text in so many is never trained on
SHORT = 12  # texts of at most so many pieces make up batches of their own: words are met often without paying for pads
DEFINITION = 28  # pieces a definition is cut to where it is held against its word
# Share of each kind in a batch of its length.
KIND_SHARES = {'caption': 0.3, 'gloss': 0.2, 'definition': 0.15, 'word': 0.25, 'thing': 0.2, 'label': 0.1}


class Meanings(NamedTuple):
    """Definitions and words they are of."""

    text_KS: Int[Array, 'K S']
    text_len_K: Int[Array, ' K']
    word_KS: Int[Array, 'K S']
    word_len_K: Int[Array, ' K']


class Triples(NamedTuple):
    """Captions in threes (`tools/text_binding.py`)."""

    ids_M3S: Int[Array, 'M 3 S']
    len_M3: Int[Array, 'M 3']
    member_M32S: Float[Array, 'M 3 2 S']  # weights of the pieces that name each of the two things, adding up to 1
    attribute_M32: Int[Array, 'M 3 2']  # -1: none
    place_M32: Int[Array, 'M 3 2']


class Group(NamedTuple):
    """Texts of one length that are trained on, those of a kind together."""

    rows_K: Int[Array, ' K']
    kinds: Int[Array, 'kinds 2']  # first place in `rows_K` and number of each kind
    shares: Float[Array, ' kinds']


class Data(NamedTuple):
    """The corpus and its lessons."""

    ids_NS: Int[Array, 'N S']
    word_NS: Int[Array, 'N S']  # word of each piece; -1 for </s> and pads
    len_N: Int[Array, ' N']
    offset_N: Int[Array, ' N']  # first row of the text in `words`
    covered_N: Int[Array, ' N']  # words the teacher saw
    pooled_NE: Float[Array, 'N E']
    words_WE: Float[Array, 'W E']
    mean_E: Float[Array, ' E']  # of the teacher's word states
    std_E: Float[Array, ' E']
    short: Group
    long: Group
    triples: Triples
    meanings: Meanings


def prepare(
    corpus: list[tuple[str, str]],
    tokenizer: Tokenizer,
    lessons: Lessons,
    length: int,
    triples: list[Triple],
    meanings: list[tuple[str, str]],
) -> Data:
    """Tokenises everything and moves it to the device.

    Args:
        corpus: (kind, text), in the order of the lessons.
        tokenizer: the student's.
        lessons: what the teacher says of the corpus.
        length: pieces a text is cut to, </s> included.
        triples: captions in threes; none may be longer.
        meanings: (word, definition).
    """
    ids_NS, word_NS, len_N = _pieces([text for _, text in corpus], tokenizer, length)
    sample = np.asarray(lessons.words[:: max(1, len(lessons.words) // 50_000)], np.float32)
    kinds, is_short_N = [kind for kind, _ in corpus], len_N <= SHORT
    text_KS, _, text_len_K = _pieces([text for _, text in meanings], tokenizer, DEFINITION)
    named_KS, _, named_len_K = _pieces([word for word, _ in meanings], tokenizer, SHORT)
    return Data(
        ids_NS=jnp.asarray(ids_NS),
        word_NS=jnp.asarray(word_NS),
        len_N=jnp.asarray(len_N),
        offset_N=jnp.asarray(lessons.offsets[:-1].astype(np.int32)),
        covered_N=jnp.asarray(np.diff(lessons.offsets).astype(np.int32)),
        pooled_NE=jnp.asarray(lessons.pooled),
        words_WE=jnp.asarray(lessons.words),
        mean_E=jnp.asarray(sample.mean(0)),
        std_E=jnp.asarray(sample.std(0) + 1e-3),
        short=_group(kinds, is_short_N),
        long=_group(kinds, ~is_short_N),
        triples=_triples(triples, tokenizer, length),
        meanings=Meanings(*(jnp.asarray(x) for x in (text_KS, text_len_K, named_KS, named_len_K))),
    )


def _pieces(texts: list[str], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids ended by </s> and zero padded, the word of each piece (-1: </s> and pads), and how many ids are real."""
    ids_NS, word_NS = np.zeros((len(texts), length), np.int32), np.full((len(texts), length), -1, np.int32)
    len_N = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        pieces = tokenizer.word_ids(text)[: length - 1]
        len_N[row] = len(pieces) + 1
        ids_NS[row, : len_N[row]] = [token for token, _ in pieces] + [tokenizer.eos_id]
        word_NS[row, : len(pieces)] = [word for _, word in pieces]
    return ids_NS, word_NS, len_N


def _group(kinds: list[str], wanted_N: np.ndarray) -> Group:
    """The wanted rows that are not held out, by kind."""
    rows = np.flatnonzero(wanted_N & (np.arange(len(kinds)) % HELD_OUT != 0))
    if not len(rows):
        raise UserError(f'the corpus lacks texts of at most {SHORT} pieces, or longer ones: raise --limit')
    by_kind: dict[str, list[int]] = {}
    for row in rows.tolist():
        by_kind.setdefault(kinds[row], []).append(row)
    counts = np.array([len(found) for found in by_kind.values()])
    shares = np.array([KIND_SHARES[kind] for kind in by_kind], np.float32)
    return Group(
        rows_K=jnp.asarray(np.concatenate(list(by_kind.values())).astype(np.int32)),
        kinds=jnp.asarray(np.stack([np.cumsum(counts) - counts, counts], 1).astype(np.int32)),
        shares=jnp.asarray(shares / shares.sum()),
    )


def _triples(triples: list[Triple], tokenizer: Tokenizer, length: int) -> Triples:
    shape = (len(triples), 3)
    ids_M3S, len_M3 = np.zeros((*shape, length), np.int32), np.zeros(shape, np.int32)
    member_M32S = np.zeros((*shape, 2, length), np.float32)
    attribute_M32, place_M32 = np.zeros((*shape, 2), np.int32), np.zeros((*shape, 2), np.int32)
    names = sorted({name for triple in triples for text in triple for name in text.attributes} - {''})
    numbers = {name: number for number, name in enumerate(names)} | {'': -1}
    for place in np.ndindex(shape):
        text = triples[place[0]][place[1]]
        pieces = tokenizer.word_ids(text.text)
        ids, words = [token for token, _ in pieces] + [tokenizer.eos_id], np.array([word for _, word in pieces])
        if len(ids) > length:
            raise UserError(f"'{text.text}' has {len(ids)} pieces: raise --length, now {length}")
        ids_M3S[place][: len(ids)], len_M3[place] = ids, len(ids)
        for thing in (0, 1):
            named = np.isin(words, text.words[thing])
            member_M32S[place][thing, : len(words)] = named / named.sum()
            attribute_M32[place][thing] = numbers[text.attributes[thing]]
            place_M32[place][thing] = PLACES.index(text.places[thing])
    arrays = (ids_M3S, len_M3, member_M32S, attribute_M32, place_M32)
    return Triples(*(jnp.asarray(array) for array in arrays))
