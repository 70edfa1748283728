"""Does the model draw what is asked? For held-out (label, style) pairs, what is the drawn picture's nearest real one?

    python tools/eval_alignment.py --data=EMOJI_FOLDER --features=FOLDER --out=DIR \\
        [--model=RELEASE_FOLDER] [--num=200] [--steps=24] [--guidance_scale=3] [--seed=0]

--features is the feature net's folder (from tools/fetch_features.py). Writes sheets of drawn pictures beside the true
held-out ones to DIR and prints one JSON line: `muse.evals.alignment.search` of the drawn pictures, chance, and three
ceilings (the true picture, which finds itself; its reconstruction by the tokenizer; the true picture when it may not
find itself), and `copying` of the drawn and of the true pictures. The gallery is every real picture of every split; its
features are kept in DIR.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import muse
from muse.data import scenes
from muse.data.splits import HELDOUT_PAIRS, SPLITS, TRAIN
from muse.data.sprites import Sprites, load_sprites
from muse.errors import UserError, warn
from muse.evals import alignment, features, grids
from muse.jobs.command_line import guarded, parse_only_flags
from muse.jobs.stores import open_folder
from muse.pipeline import Settings

FLAGS = flags.FLAGS
BATCH = 8
PAIRS_A_ROW, PAIRS_A_SHEET = 5, 40


def measured(net: features.FeatureNet, pictures: Iterator[np.ndarray]) -> np.ndarray:
    """Unit features `[N, 1280]` of single pictures, in batches of one size."""
    found, batch = [], []

    def flush() -> None:
        filled = np.stack(batch + batch[-1:] * (BATCH - len(batch)))
        found.append(np.asarray(net(jnp.asarray(filled))[0])[: len(batch)])
        batch.clear()

    for img_HWC in pictures:
        batch.append(img_HWC)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    return alignment.unit(np.concatenate(found))


def plain_pictures(sprites: Sprites, size: int) -> Iterator[np.ndarray]:
    """Every sprite alone on white."""
    return (scenes.plain(sprites, index, size)[0] for index in range(len(sprites)))


def make_gallery(net: features.FeatureNet, splits: dict[str, Sprites], size: int, cache: Path) -> alignment.Gallery:
    """All real pictures, split by split. Features are read from `cache` when it holds the same pictures and net."""
    words = [word for sprites in splits.values() for word in sprites.words]
    about = json.dumps([size, float(jnp.sum(net.weights['head.kernel'])), *(word.key for word in words)])
    kept = _read_cache(cache, about)
    if kept is None:
        print(f'measuring {len(words)} real pictures; kept in {cache}', file=sys.stderr)
        kept = np.concatenate([measured(net, plain_pictures(sprites, size)) for sprites in splits.values()])
        np.savez(cache, unit_ND=kept, about=about)
    seen_N = np.concatenate([np.full(len(sprites), name == TRAIN) for name, sprites in splits.items()])
    return alignment.Gallery(kept, tuple(w.label for w in words), tuple(w.style for w in words), seen_N)


def _read_cache(cache: Path, about: str) -> np.ndarray | None:
    if not cache.is_file():
        return None
    try:
        with np.load(cache) as kept:
            return kept['unit_ND'] if str(kept['about']) == about else None
    except (OSError, ValueError, KeyError, EOFError):
        warn(f'{cache} cannot be read: measuring again')
        return None


def draw(model: muse.Muse, captions: list[str], settings: Settings) -> list[np.ndarray]:
    """One picture a caption, uint8 `[H, W, 3]`."""
    found = []
    for picture in model.stream(captions, settings):
        found.append(np.asarray(picture))
        print(f'\rdrawn {len(found)} of {len(captions)}', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def write_sheets(out: Path, drawn: list[np.ndarray], true: list[np.ndarray], captions: list[str]) -> list[str]:
    """Sheets of (drawn, true) pairs under their captions; returns their paths."""
    paths = []
    for start in range(0, len(drawn), PAIRS_A_SHEET):
        rows = range(start, min(start + PAIRS_A_SHEET, len(drawn)))
        pictures = np.stack([picture for i in rows for picture in (drawn[i], true[i])])
        texts = [text for i in rows for text in (captions[i], '(held-out picture)')]
        paths.append(str(out / f'alignment_{len(paths)}.png'))
        grids.grid(pictures, columns=2 * PAIRS_A_ROW, captions=texts).save(paths[-1])
    return paths


def measure(
    model: muse.Muse, net: features.FeatureNet, settings: Settings, *, data: str, number: int, out: Path
) -> dict:
    """Everything that is printed. The settings' seed also chooses the pairs."""
    size = model.size[0]
    splits = {name: load_sprites(data, name, size) for name in SPLITS}
    gallery = make_gallery(net, splits, size, out / 'gallery_features.npz')
    sprites = splits[HELDOUT_PAIRS]
    chosen = np.random.default_rng(settings.seed).permutation(len(sprites))[:number]
    asked = [(sprites.words[i].label, sprites.words[i].style) for i in chosen]
    true, captions = map(list, zip(*(scenes.plain(sprites, int(i), size) for i in chosen), strict=True))
    own_Q = sum(len(splits[name]) for name in SPLITS[: SPLITS.index(HELDOUT_PAIRS)]) + chosen
    drawn = draw(model, captions, settings)
    remade = (np.asarray(model.decode(model.encode(Image.fromarray(img_HWC)))) for img_HWC in true)
    drawn_QD, true_QD = measured(net, iter(drawn)), gallery.unit_ND[own_Q]
    return {
        'drawn': alignment.search(drawn_QD, gallery, asked),
        'chance': alignment.chance(gallery, asked),
        'ceiling_true': alignment.search(true_QD, gallery, asked),
        'ceiling_reconstructed': alignment.search(measured(net, remade), gallery, asked),
        'true_without_itself': alignment.search(true_QD, gallery, asked, own_Q),
        'copying_drawn': alignment.copying(drawn_QD, gallery),
        'copying_true': alignment.copying(true_QD, gallery),
        'pictures': len(drawn),
        'gallery': len(gallery.labels),
        'model': model.release.name,
        'steps': settings.steps,
        'guidance_scale': settings.guidance_scale,
        'seed': settings.seed,
        'sheets': write_sheets(out, drawn, true, captions),
    }


def main(_: list[str]) -> None:
    if FLAGS.num < 1:
        raise UserError(f'--num={FLAGS.num}: give 1 or more')
    out = open_folder(FLAGS.out)
    model, net = muse.load(FLAGS.model or None), features.load_features(FLAGS.features)
    settings = model.settings(FLAGS.seed, FLAGS.steps, FLAGS.guidance_scale, FLAGS.temperature)
    print(json.dumps(measure(model, net, settings, data=FLAGS.data, number=FLAGS.num, out=out)))


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'release folder; the shipped one when empty')
    flags.DEFINE_string('data', '', 'folder of the emoji data; the sample in the package when empty')
    flags.DEFINE_string('features', None, 'folder of the feature net', required=True)
    flags.DEFINE_integer('num', 200, 'held-out pairs to draw, at most')
    flags.DEFINE_integer('seed', 0, 'choice of the pairs, and the drawing')
    flags.DEFINE_integer('steps', None, "decoding steps; the release's own number when not given")
    flags.DEFINE_float('guidance_scale', None, "guidance; the release's own when not given")
    flags.DEFINE_float('temperature', None, "of the token sampling; the release's own when not given")
    flags.DEFINE_string('out', None, 'folder for the sheets and the gallery features', required=True)
    app.run(guarded(main), flags_parser=parse_only_flags)
