"""Fidelity against alignment over the knobs of drawing (the paper's Fig. 8), for held-out (label, style) pairs.

    python tools/sampling_curves.py --data=EMOJI_FOLDER --features=FOLDER --out=DIR [--num=200] [--batch_size=64]
    python tools/sampling_curves.py --data=EMOJI_FOLDER --features=FOLDER --out=DIR --vary=guidance_scale --num=50

For each value of a knob, all others as the release has them, one picture is drawn for each of the same pairs. Printed
as one JSON line a value and kept in DIR/curves.jsonl, where a restarted run finds what is done:

* alignment: how often the nearest real picture has the asked label (`muse.evals.alignment.search`);
* fidelity: the Fréchet distance of unit EfficientNet-Lite0 features to those of the true pictures of these pairs, times
  1000. It depends on the number of pictures: compare within one run. 'remade' is that of the true pictures through the
  tokenizer and back, which no drawing of this release is expected to beat.

Writes DIR/curves.md, the tables of docs/sampling.md, and DIR/sampling_curve.png, label top-5 over the Fréchet distance,
one point a guidance scale. --features and the
gallery's features in DIR are those of tools/eval_alignment.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import muse
from muse.data import scenes
from muse.data.splits import HELDOUT_PAIRS, SPLITS
from muse.data.sprites import load_sprites
from muse.errors import UserError
from muse.evals import alignment, features
from muse.evals.reconstruction import frechet_distance
from muse.jobs.command_line import guarded, parse_only_flags
from muse.jobs.stores import open_folder
from muse.pipeline import Row
from tools.eval_alignment import make_gallery, measured

FLAGS = flags.FLAGS
VALUES: dict[str, tuple[Any, ...]] = {
    'guidance_scale': (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0),
    'temperature': (0.0, 0.25, 0.5, 0.75, 1.0, 1.25),
    'order': ('confidence', 'halton', 'random'),
    'steps': (1, 2, 4, 8, 16, 32, 64),
}
_SIDE, _MARGIN = 480, 60  # of the chart, pixels


class Bench:
    """The pairs that are asked for, and what to hold drawings of them against."""

    def __init__(self, model: muse.Muse, net: features.FeatureNet, *, data: str, number: int, seed: int, out: Path):
        size = model.size[0]
        splits = {name: load_sprites(data, name, size) for name in SPLITS}
        self.model, self.net, self._seed = model, net, seed
        self.gallery = make_gallery(net, splits, size, out / 'gallery_features.npz')
        sprites = splits[HELDOUT_PAIRS]
        chosen = np.random.default_rng(seed).permutation(len(sprites))[:number]
        self.asked = [(sprites.words[i].label, sprites.words[i].style) for i in chosen]
        true, self.captions = map(list, zip(*(scenes.plain(sprites, int(i), size) for i in chosen), strict=True))
        own = sum(len(splits[name]) for name in SPLITS[: SPLITS.index(HELDOUT_PAIRS)]) + chosen
        self.true_QD = self.gallery.unit_ND[own]
        self._true = true

    def score(self, unit_QD: np.ndarray) -> dict[str, float]:
        """Alignment and fidelity of drawings of the pairs, by their features."""
        found = alignment.search(unit_QD, self.gallery, self.asked)
        return found | {'frechet_1000': 1000 * frechet_distance(unit_QD, self.true_QD)}

    def remade(self) -> dict[str, float]:
        """The score of the true pictures through the tokenizer and back."""
        back = (np.asarray(self.model.decode(self.model.encode(Image.fromarray(img_HWC)))) for img_HWC in self._true)
        return self.score(measured(self.net, back))

    def point(self, knob: str, value: Any, batch_size: int) -> dict[str, float]:
        """The score of one picture a pair, with one knob at a value."""
        config = dataclasses.replace(self.model.release.decode, **{knob: value})
        rows = [Row(prompt=caption, index=i) for i, caption in enumerate(self.captions)]
        drawn = self.model.draw(rows, self.model.settings(self._seed, decoding=config), batch_size=batch_size)
        shown = tqdm(drawn, total=len(rows), desc=f'{knob} {value}', disable=None)
        return self.score(measured(self.net, (np.asarray(each.image) for each in shown)))


def measure(bench: Bench, knobs: list[str], out: Path, batch_size: int) -> list[dict[str, Any]]:
    """Every point of the knobs; those in DIR/curves.jsonl are not drawn again."""
    path = out / 'curves.jsonl'
    about = {'model': bench.model.release.name, 'pictures': len(bench.captions), 'seed': FLAGS.seed}
    lines = path.read_text().splitlines() if path.exists() else []
    found = [point for line in lines if about.items() <= (point := json.loads(line)).items()]
    wanted = [('remade', None), *((knob, value) for knob in knobs for value in VALUES[knob])]
    released = dataclasses.asdict(bench.model.release.decode)
    for knob, value in wanted:
        if any((point['knob'], point['value']) == (knob, value) for point in found):
            continue
        # The value that the release has is one point of every knob: drawn once.
        same = [p for p in found if released.get(knob, ()) == value and released.get(p['knob'], ()) == p['value']]
        if same:
            point = same[0] | {'knob': knob, 'value': value}
        else:
            start = time.perf_counter()
            scores = bench.remade() if knob == 'remade' else bench.point(knob, value, batch_size)
            seconds = round(time.perf_counter() - start, 1)
            on = jax.devices()[0].device_kind
            point = {'knob': knob, 'value': value, **scores, **about, 'seconds': seconds, 'on': on}
        found.append(point)
        with open(path, 'a') as stream:
            stream.write(json.dumps(point) + '\n')
        print(json.dumps(point), flush=True)
    return found


def tables(points: list[dict[str, Any]]) -> str:
    """Markdown, a table a knob."""
    blocks = []
    for knob in dict.fromkeys(point['knob'] for point in points):
        lines = [
            f'| {knob} | label, top 1 | label, top 5 | style, top 1 | Fréchet distance × 1000 |',
            '|---|---|---|---|---|',
        ]
        for point in (point for point in points if point['knob'] == knob):
            shares = ' | '.join(f'{100 * point[name]:.1f} %' for name in ('label_top1', 'label_top5', 'style_top1'))
            lines.append(
                f'| {"" if point["value"] is None else point["value"]} | {shares} | {point["frechet_1000"]:.1f} |'
            )
        blocks.append('\n'.join(lines) + '\n')
    return '\n'.join(blocks)


def chart(points: list[dict[str, Any]]) -> Image.Image:
    """Label top-5 (up) over the Fréchet distance (to the right), in the order of the guidance scale."""
    shown = sorted((p for p in points if p['knob'] == 'guidance_scale'), key=lambda point: point['value'])
    x_N = np.array([point['frechet_1000'] for point in shown])
    y_N = np.array([100 * point['label_top5'] for point in shown])
    (left, right), (low, high) = (
        (v.min() - 0.08 * np.ptp(v) - 1e-6, v.max() + 0.08 * np.ptp(v) + 1e-6) for v in (x_N, y_N)
    )
    span = _SIDE - 2 * _MARGIN
    at = [
        (_MARGIN + (x - left) / (right - left) * span, _SIDE - _MARGIN - (y - low) / (high - low) * span)
        for x, y in zip(x_N, y_N, strict=True)
    ]
    image = Image.new('RGB', (_SIDE, _SIDE), 'white')
    ink, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    ink.rectangle((_MARGIN, _MARGIN, _SIDE - _MARGIN, _SIDE - _MARGIN), outline=(160, 160, 160))
    ink.line(at, fill=(30, 90, 200), width=2)
    for (x, y), point in zip(at, shown, strict=True):
        ink.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(30, 90, 200))
        ink.text((x + 7, y - 18), f'{point["value"]:g}', fill='black', font=font)
    for share in (0, 0.5, 1):
        x, y = _MARGIN + share * span, _SIDE - _MARGIN - share * span
        ink.text((x - 14, _SIDE - _MARGIN + 6), f'{left + share * (right - left):.0f}', fill='black', font=font)
        ink.text((8, y - 8), f'{low + share * (high - low):.1f} %', fill='black', font=font)
    ink.text((_MARGIN, 14), 'label among the 5 nearest real pictures, by guidance scale', fill='black', font=font)
    ink.text((_MARGIN, _SIDE - 26), 'Frechet distance to the true pictures, times 1000', fill='black', font=font)
    return image


def main(_: list[str]) -> None:
    if FLAGS.num < 2:
        raise UserError(f'--num={FLAGS.num}: give 2 or more')
    out = open_folder(FLAGS.out)
    model, net = muse.load(FLAGS.model), features.load_features(FLAGS.features)
    bench = Bench(model, net, data=FLAGS.data, number=FLAGS.num, seed=FLAGS.seed, out=out)
    points = measure(bench, FLAGS.vary or list(VALUES), out, FLAGS.batch_size)
    (out / 'curves.md').write_text(tables(points), encoding='utf-8')
    if any(point['knob'] == 'guidance_scale' for point in points):
        chart(points).save(out / 'sampling_curve.png', optimize=True)


if __name__ == '__main__':
    flags.DEFINE_string('model', None, 'release folder; the shipped one when not given')
    flags.DEFINE_string('data', '', 'folder of the emoji data; the sample in the package when empty')
    flags.DEFINE_string('features', None, 'folder of the feature net', required=True)
    flags.DEFINE_string('out', None, 'folder for the points, the chart and the gallery features', required=True)
    flags.DEFINE_integer('num', 200, 'held-out pairs, at most')
    flags.DEFINE_integer('batch_size', 64, 'pictures at a time on an accelerator')
    flags.DEFINE_integer('seed', 0, 'choice of the pairs, and the drawing')
    flags.DEFINE_multi_enum('vary', [], list(VALUES), 'only these knobs')
    app.run(guarded(main), flags_parser=parse_only_flags)
