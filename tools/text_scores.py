"""What a text encoder knows, counted: nearest words, and which attribute belongs to which thing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from muse.data import captions
from muse.data.art import FLUENT_3D_STYLE, PERMISSIVE_STYLES
from muse.models.t5 import T5Encoder
from muse.text.encode import encode_prompts
from muse.text.tokenizer import Tokenizer
from tools import text_binding
from tools.text_questions import Questions
from tools.text_teacher import Teacher


def _words(text: str) -> list[str]:
    return text.split()


ANIMALS = _words(
    'dog cat horse cow pig sheep goat chicken duck goose swan bear lion tiger elephant giraffe zebra monkey kangaroo '
    'koala deer moose wolf fox rabbit mouse rat squirrel beaver hedgehog bat owl eagle parrot penguin peacock turkey '
    'frog turtle snake lizard crocodile fish shark whale dolphin octopus crab butterfly bee'
)
THINGS = _words(
    'apple banana grape lemon bread cheese pizza cake egg soup coffee beer car truck bicycle motorcycle bus train '
    'airplane ship rocket house church castle bridge tree flower leaf mushroom sun moon star cloud rain snow fire '
    'mountain island river hat shirt shoe trousers ring clock phone computer television camera book pencil knife '
    'hammer key lamp bed chair sofa bottle box ball drum guitar trumpet heart hand foot eye doctor soldier farmer king'
)
PAIRS: dict[str, tuple[list[str], str]] = {  # word → the one of the list that a person would call nearest
    'animals': (
        ANIMALS,
        'puppy:dog hound:dog kitten:cat tomcat:cat foal:horse pony:horse calf:cow bull:cow piglet:pig hog:pig '
        'lamb:sheep ewe:sheep chick:chicken hen:chicken rooster:chicken duckling:duck gosling:goose panda:bear '
        'grizzly:bear leopard:tiger lioness:lion gorilla:monkey chimpanzee:monkey fawn:deer stag:deer bunny:rabbit '
        'hare:rabbit tadpole:frog toad:frog tortoise:turtle python:snake cobra:snake alligator:crocodile salmon:fish '
        'trout:fish squid:octopus lobster:crab moth:butterfly wasp:bee bumblebee:bee hawk:eagle falcon:eagle '
        'porpoise:dolphin iguana:lizard',
    ),
    'things': (
        THINGS,
        'automobile:car taxi:car lorry:truck bike:bicycle scooter:motorcycle locomotive:train jet:airplane boat:ship '
        'home:house cottage:house chapel:church fortress:castle oak:tree pine:tree rose:flower tulip:flower '
        'fungus:mushroom flame:fire peak:mountain stream:river cap:hat boot:shoe sneaker:shoe pants:trousers '
        'watch:clock telephone:phone laptop:computer novel:book dagger:knife couch:sofa stool:chair lantern:lamp '
        'carton:box violin:guitar bugle:trumpet physician:doctor monarch:king blizzard:snow espresso:coffee '
        'ale:beer toast:bread cheddar:cheese cupcake:cake',
    ),
}
COLOURS = 'red blue green yellow purple orange pink brown black white'.split()
SWAPPED = 200
JUDGED = tuple(word for word in ANIMALS + THINGS if captions.is_countable(word))  # never learned from in triples
STYLES = (*PERMISSIVE_STYLES.values(), FLUENT_3D_STYLE)
LENGTH = 48  # pieces a judged text is cut to

States = Callable[[list[str]], list[np.ndarray]]  # texts → states [words or pieces, D] of each


def nearest_words(states: States) -> dict[str, dict[str, float]]:
    """How often the expected word is the nearest, and among the nearest three, of each list."""
    report = {}
    for name, (candidates, pairs) in PAIRS.items():
        asked = [pair.split(':') for pair in pairs.split()]
        table = pooled(states, candidates)
        ranks = []
        for (_, answer), vector in zip(asked, pooled(states, [word for word, _ in asked]), strict=True):
            similar = table @ vector
            ranks.append(int((similar >= similar[candidates.index(answer)]).sum()) - 1)  # a tie is no win
        wrong = [
            f'{word}: {answer} is number {rank + 1}' for (word, answer), rank in zip(asked, ranks, strict=True) if rank
        ]
        report[name] = {
            'pairs': len(asked),
            'candidates': len(candidates),
            'top1': ranks.count(0),
            'top3': sum(rank < 3 for rank in ranks),
            'missed': wrong,
        }
    return report


def pooled(states: States, texts: list[str]) -> np.ndarray:
    """Unit mean of each text's states, `[B, D]`."""
    means = np.stack([x.mean(0) for x in states(texts)])
    return means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-9)


def synonyms(states: States, questions: Questions) -> dict[str, float]:
    """How often a word's synonym is the nearest, and among the nearest ten, of itself and 1000 other nouns."""
    others_ND = pooled(states, questions.distractors)
    words_BD, answers_BD = (pooled(states, [pair[i] for pair in questions.pairs]) for i in (0, 1))
    right_B = (words_BD * answers_BD).sum(-1)
    rank_B = (words_BD @ others_ND.T >= right_B[:, None]).sum(-1)  # a tie is no win
    return {
        'pairs': len(questions.pairs),
        'distractors': len(questions.distractors),
        'top1': float((rank_B < 1).mean()),
        'top10': float((rank_B < 10).mean()),
    }


def paraphrases(states: States, questions: Questions) -> dict[str, float]:
    """How often a paraphrase ('a young dog') is nearer to its word ('puppy') than to another one ('jackal')."""
    text_BD, word_BD, other_BD = (pooled(states, [triple[i] for triple in questions.triples]) for i in range(3))
    word_B, other_B = (text_BD * word_BD).sum(-1), (text_BD * other_BD).sum(-1)
    small = pooled(states, ['a small dog', 'puppy', 'cat'])
    return {
        'triples': len(word_B),
        'right': float((word_B > other_B).mean()),
        'a_small_dog_puppy': float(small[0] @ small[1]),
        'a_small_dog_cat': float(small[0] @ small[2]),
    }


def bindings(states: States, change: text_binding.Change, seed: int = 0) -> dict[str, float]:
    """Over 200 scenes of two things: does a change of meaning move their nouns' states more than other words do?

    'attributes' trade places between the things, or the 'things' trade places; see tools/text_binding.py.
    """
    rng = random.Random(seed)
    triples = [
        text_binding.triple(rng, list(JUDGED), list(STYLES), change=change, judging=True) for _ in range(SWAPPED)
    ]
    texts = [text for triple in triples for text in triple]
    things = [
        np.stack([x[list(words)].mean(0) for words in text.words])
        for text, x in zip(texts, states([text.text for text in texts]), strict=True)
    ]
    rewordings = [_distance(x, y) for x, y in zip(things[::3], things[1::3], strict=True)]
    changes = [_distance(x, z) for x, z in zip(things[::3], things[2::3], strict=True)]
    return {
        'scenes': SWAPPED,
        'change_larger_than_rewording': float(np.mean([c > r for c, r in zip(changes, rewordings, strict=True)])),
        'change_distance': float(np.mean(changes)),
        'rewording_distance': float(np.mean(rewordings)),
    }


def word_order(states: States, seed: int = 0) -> dict[str, float]:
    """Does a swap of attributes change the states more than a rewording does?

    Each of 200 captions 'a C1 N1 left of a C2 N2' is held against the one with its colours swapped and against one
    that says the same in other words. Texts are compared by their states of the two things, noun by noun, so that no
    other word's state counts.
    """
    rng = random.Random(seed)
    larger, swaps, rewordings = 0, [], []
    for _ in range(SWAPPED):
        first, second = rng.sample(ANIMALS + THINGS, 2)
        one, two = rng.sample(COLOURS, 2)
        x, swapped, reworded = states(
            [
                f'a {one} {first} left of a {two} {second}',
                f'a {two} {first} left of a {one} {second}',
                f'the {one} {first} to the left of the {two} {second}',
            ]
        )
        # Words: a C1 N1 left of a C2 N2 | the C1 N1 to the left of the C2 N2.
        swaps.append(_distance(x[[2, 7]], swapped[[2, 7]]))
        rewordings.append(_distance(x[[2, 7]], reworded[[2, 9]]))
        larger += swaps[-1] > rewordings[-1]
    sides = states(['red ball left of blue box', 'blue ball left of red box'])
    return {
        'pairs': SWAPPED,
        'swap_larger_than_rewording': larger / SWAPPED,
        'swap_distance': float(np.mean(swaps)),
        'rewording_distance': float(np.mean(rewordings)),
        'ball_and_box_distance': _distance(sides[0][[1, 5]], sides[1][[1, 5]]),
        'pooled_distance': float(1 - np.prod(pooled(lambda _: sides, ['', '']), axis=0).sum()),
    }


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean cosine distance of rows."""
    dot = (x * y).sum(-1) / np.maximum(np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1), 1e-9)
    return float(1 - dot.mean())


def scores(states: States, questions: Questions) -> dict[str, object]:
    """All counts of one encoder."""
    return {
        'synonyms': synonyms(states, questions),
        'paraphrases': paraphrases(states, questions),
        'nearest': nearest_words(states),
        'word_order': word_order(states),
        'bindings': {change: bindings(states, change) for change in ('attributes', 'things')},
    }


def student_states(encoder: T5Encoder, tokenizer: Tokenizer) -> States:
    """States averaged over each word, from a `T5Encoder`."""

    def states(texts: list[str]) -> list[np.ndarray]:
        txt_BSD, _ = encode_prompts(encoder, tokenizer, texts, LENGTH)
        rows = []
        for text, x_SD in zip(texts, np.asarray(txt_BSD, np.float32), strict=True):
            words = np.array([word for _, word in tokenizer.word_ids(text)])
            rows.append(np.stack([x_SD[: len(words)][words == w].mean(0) for w in range(words[-1] + 1)]))
        return rows

    return states


def embedding_states(encoder: T5Encoder, tokenizer: Tokenizer) -> States:
    """A bag of words: the encoder's own input vectors averaged over each word, before any layer."""
    table_VD = np.asarray(encoder.token_embedder.embedding[...], np.float32)

    def states(texts: list[str]) -> list[np.ndarray]:
        rows = []
        for text in texts:
            ids, words = np.array(tokenizer.word_ids(text)).T
            rows.append(np.stack([table_VD[ids[words == w]].mean(0) for w in range(words[-1] + 1)]))
        return rows

    return states


def teacher_states(folder: Path) -> States:
    """States averaged over each word, from the teacher."""
    teacher = Teacher(folder)

    def states(texts: list[str]) -> list[np.ndarray]:
        rows = []
        for start in range(0, len(texts), 256):
            chunk = texts[start : start + 256]
            words = teacher.states(teacher.tokenize(chunk))[1].cpu().numpy()
            rows += [x[: len(text.split())] for text, x in zip(chunk, words, strict=True)]
        return rows

    return states


def ngram_states(texts: list[str], width: int = 4096) -> list[np.ndarray]:
    """The floor: each word as counts of its character 1- to 4-grams, hashed; it knows no meaning and no order."""

    def vector(word: str) -> np.ndarray:
        padded, x = f'<{word}>', np.zeros(width)
        grams = Counter(padded[i : i + n] for n in range(1, 5) for i in range(len(padded) - n + 1))
        for gram, count in grams.items():
            x[int.from_bytes(gram.encode(), 'little') % 4093] += count
        return x

    return [np.stack([vector(word) for word in text.split()]) for text in texts]
