"""What sample.py and edit.py have in common on the command line: the knobs of decoding, and errors as one line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jax
from absl import flags, logging

from muse.config import DecodeConfig
from muse.errors import UserError, main_guard
from muse.jobs import rows
from muse.nn.quantized import Precision
from muse.settings import SuperresDecoding, override

FLAGS = flags.FLAGS
_CHOICES = {name: get_args(get_type_hints(DecodeConfig)[name]) for name in ('order', 'schedule', 'guidance_schedule')}


def define_output(out: str) -> None:
    """The flags of where pictures go: by default to the folder `out`."""
    flags.DEFINE_string('out', out, 'Folder for the pictures; made when missing.')
    flags.DEFINE_enum('format', 'folder', ['folder', 'webdataset'], 'Files, or tars for WebDataset.')
    flags.DEFINE_integer('shard_size', 1000, 'Pictures a tar of --format=webdataset; skipped or made as a whole.')
    flags.DEFINE_bool('overwrite', False, 'Draw again what is there already; shards that a larger job left beyond go.')


def define_knobs() -> None:
    """The flags of how to draw."""
    flags.DEFINE_string('model', None, 'Release folder; default: the model that comes with the package.')
    flags.DEFINE_enum('precision', None, get_args(Precision), "Numbers of the layers' products: half of their memory.")
    flags.DEFINE_integer('seed', 0, 'The same seed gives the same pictures.')
    flags.DEFINE_integer('steps', None, "Decoding steps; what is not given of these knobs is the model's own.")
    flags.DEFINE_float('guidance_scale', None, 'How closely to follow the prompt; 0: no guidance.')
    flags.DEFINE_enum('guidance_schedule', None, _CHOICES['guidance_schedule'], 'How guidance sets in over the steps.')
    flags.DEFINE_string('guidance_interval', None, 'Guidance acts only from here to there, e.g. 0.2,0.8 of the way.')
    flags.DEFINE_string('negative_prompt', None, 'What to stay away from.')
    flags.DEFINE_float('temperature', None, 'Of the token sampling; 0 takes the most likely token.')
    flags.DEFINE_float('final_temperature', None, 'At the last step, in a line from --temperature.')
    flags.DEFINE_float('choice_temperature', None, 'Noise on the confidence by which tokens are kept.')
    flags.DEFINE_integer('top_k', None, 'Draw among so many of the most likely codes; 0: among all.')
    flags.DEFINE_float('top_p', None, 'Draw among the fewest codes that hold this share of the probability.')
    flags.DEFINE_enum('order', None, _CHOICES['order'], 'Which drawn tokens are kept first.')
    flags.DEFINE_enum('schedule', None, _CHOICES['schedule'], 'Share still masked over the steps.')
    flags.DEFINE_bool('superres', True, '--nosuperres: the base alone draws.')
    flags.DEFINE_integer('superres_steps', None, 'Decoding steps of the super-res.')
    flags.DEFINE_float('superres_guidance_scale', None, 'Guidance scale of the super-res.')
    flags.DEFINE_bool('distributed', False, 'Join the other hosts of this job (jax.distributed): each draws its share.')


def decoding(default: DecodeConfig) -> DecodeConfig:
    """The base's decoding: the release's, `default`, with the flags that are given."""
    names = [field.name for field in dataclasses.fields(DecodeConfig) if field.name != 'guidance_interval']
    interval = FLAGS.guidance_interval
    if interval is not None:
        parts = interval.split(',')
        if len(parts) != 2:
            raise UserError(f"--guidance_interval='{interval}': write it as 0.2,0.8")
        interval = tuple(rows.real('guidance_interval', part) for part in parts)
    return override(default, **{name: FLAGS[name].value for name in names}, guidance_interval=interval)


def superres(default: DecodeConfig | None) -> SuperresDecoding:
    """The super-res' decoding: likewise (None: the release holds none); False where it is not wanted."""
    given = {'steps': FLAGS.superres_steps, 'guidance_scale': FLAGS.superres_guidance_scale}
    if not FLAGS.superres:
        return False
    if all(value is None for value in given.values()):
        return None
    return override(default or DecodeConfig(), **given)


def processes() -> tuple[int, int]:
    """Which of how many processes this is; joins the others first if asked to. Call it before anything else of JAX."""
    if FLAGS.distributed:
        from muse.train.hosts import join

        join()
    return jax.process_index(), jax.process_count()


def guarded(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], None]:
    """A script's `main`, which may return an exit code, for `app.run`: a `UserError` is one line and exit code 2."""

    def script(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # JAX reports each kind of device that is not there
        with main_guard():
            if code := main(argv):
                sys.exit(code)

    return script


def parse(argv: list[str]) -> list[str]:
    """absl's parser with its errors as one line and exit code 2."""
    with main_guard():
        try:
            return FLAGS(argv)
        except flags.Error as error:
            raise UserError(' '.join(str(error).split())) from None


def parse_only_flags(argv: list[str]) -> list[str]:
    """`parse` for the commands of tools/ that take nothing but flags: anything else is refused too."""
    rest = parse(argv)
    with main_guard():
        no_arguments(rest, lambda argument: f'--NAME={argument} (--help lists the names)')
    return rest


def no_arguments(argv: list[str], example: Callable[[str], Any]) -> None:
    """Raises UserError for an argument that stands behind no flag."""
    if len(argv) > 1:
        raise UserError(f"argument '{argv[1]}' is not behind a flag: write {example(argv[1])}")
