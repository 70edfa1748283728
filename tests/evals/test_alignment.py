"""Search among real pictures and the check for copying, on features whose answers are known, and the tool in small."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse.data.splits import SPLITS
from muse.data.sprites import load_sprites
from muse.errors import InputWarning, UserError
from muse.evals import alignment

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))

import eval_alignment  # noqa: E402


def gallery(number=40, styles=4, width=16):
    """Random unit vectors; label i // styles, style i % styles."""
    rng = np.random.default_rng(0)
    unit_ND = alignment.unit(rng.normal(size=(number, width)))
    labels = tuple(f'label {i // styles}' for i in range(number))
    return alignment.Gallery(
        unit_ND, labels, tuple(f'style {i % styles}' for i in range(number)), np.arange(number) < 30
    )


def asked(of, rows):
    return [(of.labels[i], of.styles[i]) for i in rows]


def test_search_finds_what_is_there():
    real = gallery()
    rows = np.arange(40)
    itself = alignment.search(real.unit_ND, real, asked(real, rows))
    assert itself == {'label_top1': 1.0, 'label_top5': 1.0, 'style_top1': 1.0, 'pair_top1': 1.0}
    without = alignment.search(real.unit_ND, real, asked(real, rows), rows)
    assert without['pair_top1'] == 0 and without['label_top1'] < 0.5  # each pair is there once: its own picture
    # The next row of the same label is found, in another style.
    neighbour = rows ^ 1
    found = alignment.search(real.unit_ND[neighbour], real, asked(real, rows))
    assert found == {'label_top1': 1.0, 'label_top5': 1.0, 'style_top1': 0.0, 'pair_top1': 0.0}


def test_search_counts_five():
    unit_ND = alignment.unit(np.array([[1, 0.1 * i] for i in range(7)]))
    real = alignment.Gallery(unit_ND, tuple('abcdefg'), ('s',) * 7, np.ones(7, bool))
    query_QD = np.array([[1.0, 0.0]] * 2, np.float32)
    found = alignment.search(query_QD, real, [('e', 's'), ('f', 's')])  # fifth and sixth nearest
    assert found['label_top5'] == 0.5 and found['label_top1'] == 0


def test_chance_is_what_random_queries_reach():
    real, rng = gallery(), np.random.default_rng(1)
    rows = rng.integers(40, size=4000)
    # Each query ranks a gallery of its own, so that the ranking is uniform.
    found = [
        alignment.search(rng.normal(size=(100, 16)).astype(np.float32), shuffled(real, rng), asked(real, part))
        for part in rows.reshape(40, 100)
    ]
    exact = alignment.chance(real, asked(real, rows))
    assert exact['label_top1'] == pytest.approx(4 / 40) and exact['style_top1'] == pytest.approx(10 / 40)
    for name, value in exact.items():
        assert np.mean([f[name] for f in found]) == pytest.approx(value, abs=0.03), name


def shuffled(real, rng):
    return alignment.Gallery(rng.permutation(real.unit_ND), real.labels, real.styles, real.seen_N)


def test_nearest_distance():
    unit_ND = alignment.unit(np.array([[1.0, 0], [1, 0], [0, 1], [-1, 0]]))
    np.testing.assert_allclose(alignment.nearest_distance(unit_ND, unit_ND, chunk=3), 0, atol=1e-6)
    np.testing.assert_allclose(alignment.nearest_distance(unit_ND, unit_ND, beyond=1e-5, chunk=3), 1, atol=1e-6)


def test_copying_counts_copies_of_training_pictures_only():
    real = gallery()
    noise = alignment.unit(np.random.default_rng(2).normal(size=(10, 16)))
    seen, unseen = real.unit_ND[:10], real.unit_ND[30:40]
    found = alignment.copying(np.concatenate([seen, unseen, noise, noise]), real)
    assert found['nearer_than_any'] == 0.25
    assert 0 < found['smallest_real'] <= found['percentile_1_real'] <= found['median_real']
    # A drawing that stands in the data twice does not shrink the yardstick to zero.
    twice = np.concatenate([real.unit_ND, real.unit_ND[:5]])
    twins = alignment.Gallery(twice, real.labels + ('x',) * 5, real.styles + ('y',) * 5, np.r_[real.seen_N, [True] * 5])
    assert alignment.copying(seen, twins)['smallest_real'] == pytest.approx(found['smallest_real'], abs=1e-6)
    assert alignment.copying(seen, twins)['nearer_than_any'] == 1


def test_gallery_is_checked():
    real = gallery()
    with pytest.raises(UserError, match='a label, a style and a split'):
        alignment.Gallery(real.unit_ND, real.labels[1:], real.styles, real.seen_N)
    with pytest.raises(UserError, match='no training picture'):
        alignment.Gallery(real.unit_ND, real.labels, real.styles, np.zeros(40, bool))


class BlockMeans:
    """Stands in for the feature net: mean colours of a picture's 4 × 4 blocks, and nothing to compile."""

    weights = {'head.kernel': np.ones(1)}

    def __call__(self, img_BHWC):
        img_BHWC = np.asarray(img_BHWC, np.float32)
        batch, side = img_BHWC.shape[0], img_BHWC.shape[1] // 4
        return (256 - img_BHWC.reshape(batch, 4, side, 4, side, 3).mean(axis=(2, 4))).reshape(batch, -1), None


@pytest.mark.filterwarnings('ignore::muse.errors.InputWarning')  # the tiny vocabulary knows few words
def test_the_tool_on_the_sample(tiny_model, tmp_path):
    settings = tiny_model.settings(seed=1, steps=2, guidance_scale=0.0)
    found, again = (
        eval_alignment.measure(tiny_model, net, settings, data='', number=9, out=tmp_path)
        for net in (BlockMeans(), Counting())
    )
    assert found == again and Counting.batches == 2 * 2  # what was drawn and what was remade, not the gallery
    assert found['gallery'] == 192 and found['pictures'] == 9
    assert found['ceiling_true']['pair_top1'] == 1.0 and found['true_without_itself']['pair_top1'] == 0.0
    assert found['copying_drawn']['nearer_than_any'] == 0.0  # random weights draw nothing known
    with Image.open(found['sheets'][0]) as sheet:
        width, height = sheet.size
    assert len(found['sheets']) == 1 and width > 10 * 16 and height > 2 * 16


class Counting(BlockMeans):
    batches = 0

    def __call__(self, img_BHWC):
        Counting.batches += 1
        return super().__call__(img_BHWC)


def test_another_gallery_is_measured_anew(tmp_path):
    splits = {name: load_sprites('', name, 16) for name in SPLITS}
    cache = tmp_path / 'gallery.npz'
    first = eval_alignment.make_gallery(BlockMeans(), splits, 16, cache)  # pyright: ignore[reportArgumentType]
    cache.write_bytes(b'broken')
    with pytest.warns(InputWarning, match='cannot be read'):
        again = eval_alignment.make_gallery(BlockMeans(), splits, 16, cache)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(first.unit_ND, again.unit_ND)
    larger = eval_alignment.make_gallery(BlockMeans(), splits, 32, cache)  # pyright: ignore[reportArgumentType]
    assert np.abs(larger.unit_ND - first.unit_ND).max() > 1e-3
    assert first.seen_N.sum() == 158 and len(first.labels) == 192
