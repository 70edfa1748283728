"""Draws pictures from prompts: python sample.py --prompt='a red apple, noto style' --out=out/

A job of many prompts is a file (--prompts_file): one a line in a .txt, or rows of a .csv or .jsonl with a prompt and,
if wanted, id, seed, negative_prompt, guidance_scale, temperature and size (256x384) of its own. Each picture is a PNG
with its prompt, seed, model and settings in the PNG text, and as a .json beside it; manifest.jsonl lists all of them.
Running the same command again goes on where it was stopped. Rows that cannot be used are left out, listed in
rejects.jsonl, and end in exit code 1; other wrong input stops with one line and exit code 2 before anything is drawn.

    python sample.py --aot=v5e:2x2

draws nothing: it compiles the program for a TPU that need not be there and says what it would take (docs/scaling.md).
"""

from __future__ import annotations

import sys

from absl import app, flags

import muse
from muse.errors import UserError, warn
from muse.jobs import command_line, rows
from muse.jobs.command_line import guarded, parse
from muse.jobs.sampling import Knobs, SampleJob, read_prompts, sample

FLAGS = flags.FLAGS
flags.DEFINE_multi_string('prompt', [], 'What to draw; give it several times for several prompts.')
flags.DEFINE_string('prompts_file', None, 'More prompts: .txt (one a line), .csv or .jsonl (columns: see above).')
flags.DEFINE_integer('num_images', 1, 'Pictures a prompt.')
flags.DEFINE_integer('batch_size', 8, 'Pictures at a time on an accelerator, over all devices of the host.')
flags.DEFINE_string('size', None, "Width x height in pixels, e.g. 256x384; default: the model's.")
flags.DEFINE_bool('grid', False, 'Also write grid.png with all the pictures.')
flags.DEFINE_bool('gif', False, 'Also write a GIF beside each picture: the tokens as they are filled in.')
flags.DEFINE_bool('save_tokens', False, 'Also write the token ids beside each picture (.npz).')
flags.DEFINE_string('aot', None, 'Only compile for a TPU of one host, e.g. v5e:2x2, and report on it.')
flags.DEFINE_list('aot_configs', [], 'With --aot, instead of --model: the files of configs/ that train its nets.')
command_line.define_output('out')
command_line.define_knobs()
flags.adopt_module_key_flags(command_line)  # so that --help shows them too


def main(argv: list[str]) -> int:
    """Draws what the flags say; the exit code."""
    command_line.no_arguments(argv, lambda argument: f"--prompt='{argument}'")
    if FLAGS.aot is not None:
        from muse.aot.sampling import check_flags

        if FLAGS.precision is not None:
            warn('not read by --aot: --precision')
        return check_flags(FLAGS.aot, FLAGS.aot_configs, FLAGS.model, size=_size(), batch_size=FLAGS.batch_size)
    if FLAGS.aot_configs:
        raise UserError('--aot_configs goes with --aot, e.g. --aot=v5e:2x2: pictures are drawn from --model')
    given = read_prompts(FLAGS.prompt, FLAGS.prompts_file)
    process, processes = command_line.processes()
    model = muse.load(FLAGS.model, precision=FLAGS.precision)
    knobs = Knobs(
        decoding=command_line.decoding(model.release.decode),
        superres=command_line.superres(model.release.superres_decode),
        seed=FLAGS.seed,
        negative_prompt=FLAGS.negative_prompt,
        size=_size(),
    )
    job = SampleJob(
        out=FLAGS.out,
        rows_file=FLAGS.prompts_file,
        num_images=FLAGS.num_images,
        batch_size=FLAGS.batch_size,
        form=FLAGS.format,
        shard_size=FLAGS.shard_size,
        grid=FLAGS.grid,
        gif=FLAGS.gif,
        save_tokens=FLAGS.save_tokens,
        overwrite=FLAGS.overwrite,
    )
    report = sample(model, job, knobs, given, process, processes)
    print(report.line(FLAGS.out))
    return 1 if report.rejects else 0


def _size() -> tuple[int, int] | None:
    return None if FLAGS.size is None else rows.size(FLAGS.size)


if __name__ == '__main__':
    app.run(guarded(main), argv=sys.argv, flags_parser=parse)
