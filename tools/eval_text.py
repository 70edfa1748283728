"""Counts what a text encoder knows: nearest words, and whether it sees which attribute belongs to which thing.

    python tools/eval_text.py --model=FOLDER [--teacher=FOLDER]

Prints JSON: for the encoder, the teacher when given, and character n-grams as the floor. Nearest words are counted
by the cosine of mean states; of N candidates chance is 1/N. The counts are described in tools/text_scores.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import app, flags
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from muse.errors import main_guard
from muse.models.t5 import T5Encoder
from muse.release.format import load_part
from muse.text.tokenizer import Tokenizer
from tools.text_scores import ngram_states, scores, student_states, teacher_states

MODEL = flags.DEFINE_string('model', None, 'Release folder holding the text encoder and spiece.model.', required=True)
TEACHER = flags.DEFINE_string('teacher', None, 'Folder of the teacher, to count it too.')


def main(argv: list[str]) -> None:
    del argv
    with main_guard():
        part = load_part(MODEL.value, 'text_encoder')
        encoder = T5Encoder(part.config, rngs=nnx.Rngs(params=0))
        nnx.update(encoder, part.params)
        tokenizer = Tokenizer(Path(MODEL.value) / 'spiece.model')
        report = {'student': scores(student_states(encoder, tokenizer)), 'ngrams': scores(ngram_states)}
        if TEACHER.value:
            report['teacher'] = scores(teacher_states(Path(TEACHER.value)))
        print(json.dumps(report, indent=2))


if __name__ == '__main__':
    app.run(main)
