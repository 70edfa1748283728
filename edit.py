"""Edits a picture: python edit.py --image=apple.png --mask=mask.png --prompt='a green apple, noto style' --out=edited/

    --mask=FILE               paint anew where the mask is white (128 or more); what is black stays, bit for bit
    --box=x0,y0,x1,y1         the same for a box of pixels
    --outpaint=left=128,right=64   grow the picture (left, top, right, bottom)
    --free                    change the whole picture towards the prompt, without a mask
    --variation=0.5           another picture like this one; 0 is the same, 1 a new one
    --upscale                 twice as large, by the super-res of a release that holds one

Many edits are rows of a .csv or .jsonl file (--jobs) with an image, one of mask, box, outpaint, free, variation and
upscale, a prompt and, if wanted, id, seed, steps, guidance_scale, temperature and negative_prompt; their paths start at
the file's folder. Output, restarts, rejected rows and exit codes are as those of sample.py.
"""

from __future__ import annotations

import dataclasses
import sys

from absl import app, flags

import muse
from muse.config import DecodeConfig, FreeEditConfig
from muse.errors import UserError, warn
from muse.jobs import command_line
from muse.jobs.command_line import guarded, parse
from muse.jobs.editing import EditJob, edit_all, read_edits
from muse.jobs.edits import KINDS, EditKnobs
from muse.jobs.sampling import Knobs
from muse.settings import CONTEXT, override

FLAGS = flags.FLAGS
DECODING = tuple(field.name for field in dataclasses.fields(DecodeConfig))
flags.DEFINE_string('image', None, 'The picture to edit.')
flags.DEFINE_string('prompt', None, 'What the edited picture shows, or the part of it around the mask.')
flags.DEFINE_string('mask', None, "White where the picture is painted anew; of the picture's size.")
flags.DEFINE_string('box', None, 'Instead of a mask: x0,y0,x1,y1 in pixels, x1 and y1 not included.')
flags.DEFINE_string('outpaint', None, 'New pixels a side: left=128,top=0,right=64,bottom=0.')
flags.DEFINE_bool('free', False, 'Without a mask: a share of the tokens is drawn anew again and again.')
flags.DEFINE_float('variation', None, 'Share of the tokens that is drawn anew, 0 to 1.')
flags.DEFINE_bool('upscale', False, 'Draw the picture anew by the super-res.')
flags.DEFINE_string('jobs', None, 'Many edits: .csv or .jsonl (columns: see above).')
flags.DEFINE_float('context', CONTEXT, 'Size of the window that is painted, over that of the mask.')
flags.DEFINE_integer('iterations', None, 'Of --free; fewer change less.')
flags.DEFINE_float('share', None, 'Of the tokens, drawn in one iteration of --free.')
flags.DEFINE_list('frames', [], 'Iterations of --free that the strip shows, e.g. 25,50,75.')
flags.DEFINE_bool('strip', False, 'Also write before and after side by side.')
command_line.define_output('edited')
command_line.define_knobs()
flags.adopt_module_key_flags(command_line)  # so that --help shows them too


def row_of_flags() -> dict:
    """The one edit that stands on the command line, as a row of a file would say it."""
    values = {name: FLAGS[name].value for name in ('image', 'prompt', *KINDS)}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def frames() -> list[int]:
    """The iterations to show."""
    try:
        shown = [int(frame) for frame in FLAGS.frames]
    except ValueError:
        raise UserError(f'--frames={",".join(FLAGS.frames)}: write iterations as 25,50,75') from None
    if shown and not FLAGS.strip:
        raise UserError('--frames says what a strip shows: add --strip, or leave it out')
    return shown


def warn_of_idle(kind: str) -> None:
    """Names flags that are given and do nothing in this kind of edit."""
    own = {'iterations', 'share', 'frames'}
    idle = {
        'free': {*DECODING, 'context'} - {'guidance_scale', 'temperature', 'top_k', 'top_p'},
        'upscale': {*DECODING, 'context', *own},
        'outpaint': {'context', *own},
        'variation': {'context', *own},
    }.get(kind, own)
    if given := sorted(f'--{name}' for name in idle if FLAGS[name].present):
        instead = '; --iterations sets how often' if kind == 'free' and '--steps' in given else ''
        warn(f'not read by --{kind}: {", ".join(given)}{instead}')


def main(argv: list[str]) -> int:
    """Edits as the flags say; the exit code."""
    command_line.no_arguments(argv, lambda argument: f"--image='{argument}'")
    given, shown = read_edits(row_of_flags(), FLAGS.jobs), frames()
    if FLAGS.jobs is None:
        warn_of_idle(given.rows[0].kind)
    process, processes = command_line.processes()
    model = muse.load(FLAGS.model, precision=FLAGS.precision)
    knobs = EditKnobs(
        drawing=Knobs(
            decoding=command_line.decoding(model.release.decode),
            superres=command_line.superres(model.release.superres_decode),
            seed=FLAGS.seed,
            negative_prompt=FLAGS.negative_prompt,
            size=None,
        ),
        context=FLAGS.context,
        free=override(
            FreeEditConfig(), iterations=FLAGS.iterations, share=FLAGS.share, top_k=FLAGS.top_k, top_p=FLAGS.top_p
        ),
        given={'guidance_scale': FLAGS.guidance_scale, 'temperature': FLAGS.temperature},
    )
    job = EditJob(
        out=FLAGS.out,
        rows_file=FLAGS.jobs,
        form=FLAGS.format,
        shard_size=FLAGS.shard_size,
        strip=FLAGS.strip,
        frames=shown,
        overwrite=FLAGS.overwrite,
    )
    report = edit_all(model, job, knobs, given, process, processes)
    print(report.line(FLAGS.out))
    return 1 if report.rejects else 0


if __name__ == '__main__':
    app.run(guarded(main), argv=sys.argv, flags_parser=parse)
