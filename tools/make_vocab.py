"""Trains the demo's sentencepiece vocabulary on the corpus of `distill_text.py --stage=corpus`.

    python tools/make_vocab.py --corpus=corpus.xz --out=spiece.model

Unigram pieces with byte fallback and T5's special ids (pad 0, </s> 1, unknown 2); case is folded.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))

from muse.jobs.command_line import guarded, parse_only_flags
from tools import text_build, text_corpus

CORPUS = flags.DEFINE_string('corpus', None, 'Corpus file.', required=True)
OUT = flags.DEFINE_string('out', None, 'File to write.', required=True)
SIZE = flags.DEFINE_integer('size', 4096, 'Pieces, the 256 bytes and 3 special ones included.', lower_bound=600)


def main(_: list[str]) -> None:
    model = text_build.train_vocabulary(text_corpus.read(Path(CORPUS.value)), SIZE.value)
    partial = Path(f'{OUT.value}.partial')
    partial.write_bytes(model)
    partial.replace(OUT.value)
    print(f'{OUT.value}: {SIZE.value} pieces, {len(model)} bytes')


if __name__ == '__main__':
    app.run(guarded(main), flags_parser=parse_only_flags)
