"""Counts what a text encoder knows: nearest words, and whether it sees which attribute belongs to which thing.

    python tools/eval_text.py --model=FOLDER --questions=FILE [--teacher=FOLDER] [--corpus=FILE]

Prints JSON: for the encoder ('student'), for its teacher when given, and for two bags of words as the floor: the mean
of the encoder's own input vectors, and counts of character n-grams. Words are held against each other by the cosine
of mean states. The counts are described in tools/text_scores.py; the questions are made with the corpus by
`distill_text.py --stage=corpus`. With --corpus it also says how many of the questions that corpus gives away.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import app, flags
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from muse.jobs.command_line import guarded, parse_only_flags
from muse.models.t5 import T5Encoder
from muse.release.format import load_part
from muse.text.tokenizer import Tokenizer
from tools import text_corpus, text_questions
from tools.text_scores import embedding_states, ngram_states, scores, student_states, teacher_states

MODEL = flags.DEFINE_string('model', None, 'Release folder holding the text encoder and spiece.model.', required=True)
QUESTIONS = flags.DEFINE_string('questions', None, 'Held-out synonyms and paraphrases.', required=True)
CORPUS = flags.DEFINE_string('corpus', None, 'Corpus to look for the answers in.')
TEACHER = flags.DEFINE_string('teacher', None, 'Folder of the teacher, to count it too.')


def main(_: list[str]) -> None:
    part = load_part(MODEL.value, 'text_encoder')
    encoder = T5Encoder(part.config, rngs=nnx.Rngs(params=0))
    nnx.update(encoder, part.params)
    tokenizer = Tokenizer(Path(MODEL.value) / 'spiece.model')
    questions = text_questions.read(Path(QUESTIONS.value))
    report = {}
    if CORPUS.value:
        given_away = sum(questions.forbids(text) for _, text in text_corpus.read(Path(CORPUS.value)))
        report['texts_that_hold_an_answer'] = given_away
    encoders = {
        'student': lambda: student_states(encoder, tokenizer),
        'bag_of_embeddings': lambda: embedding_states(encoder, tokenizer),
        'bag_of_ngrams': lambda: ngram_states,
    }
    if teacher := TEACHER.value:
        encoders['teacher'] = lambda: teacher_states(Path(teacher))
    report |= {name: scores(make(), questions) for name, make in encoders.items()}
    print(json.dumps(report, indent=2))


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_only_flags)
