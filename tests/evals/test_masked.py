"""The masked loss under three texts: against a straightforward loop, and the tool in small."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import DataConfig
from muse.data.sources import open_source
from muse.errors import UserError
from muse.evals import masked
from muse.masking import mask_ratio, masked_ce, random_mask
from muse.release.format import graphdef_and_template, load_part

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))

import eval_base  # noqa: E402


def test_wrong_rows_change_every_caption():
    captions = ['a', 'b', 'a', 'c', 'd', 'a', 'e']
    wrong_N = masked.wrong_rows(captions, 3)
    assert sorted(wrong_N) == list(range(7))
    assert all(captions[i] != captions[j] for i, j in enumerate(wrong_N))
    for useless in (['a'], ['a', 'a', 'a', 'b']):
        with pytest.raises(UserError, match='no shuffle changes each'):
            masked.wrong_rows(useless, 0)


def test_losses_are_those_of_one_picture_at_a_time(release_folder):
    base = load_part(release_folder, 'base')
    graphdef = graphdef_and_template('base', base.config)[0]
    rng = np.random.default_rng(0)
    tok_NT = rng.integers(0, 64, (5, 16)).astype(np.int32)
    txt_NSD = rng.normal(size=(5, 24, 32)).astype(np.float32)
    len_N, wrong_N = np.array([3, 4, 5, 6, 7], np.int32), np.array([1, 2, 3, 4, 0])
    found = masked.masked_losses(graphdef, base.params, tok_NT, txt_NSD, len_N, wrong_N, seed=7, masks=2, batch_size=3)
    expected = {name: np.zeros(5) for name in found}
    net = nnx.merge(graphdef, base.params)
    for k in range(2):
        ratio_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(7), k))
        mask_NT = random_mask(mask_key, mask_ratio(ratio_key, 5), 16)
        canvas_NT = np.where(mask_NT, 64, tok_NT)
        for name, txt, length in (
            ('right', txt_NSD, len_N),
            ('shuffled', txt_NSD[wrong_N], len_N[wrong_N]),
            ('no_text', txt_NSD, 0 * len_N),
        ):
            expected[name] += (
                np.asarray(masked_ce(net(*map(jnp.asarray, (canvas_NT, txt, length))), jnp.asarray(tok_NT), mask_NT))
                / 2
            )
    for name, value_N in expected.items():
        np.testing.assert_allclose(found[name], value_N, rtol=1e-4)
    assert np.abs(found['right'] - found['shuffled']).min() > 1e-3


def test_summary():
    losses = {'right': np.array([1.0, 2, 3, 4]), 'shuffled': np.array([2.0, 3, 4, 3]), 'no_text': np.full(4, 2.5)}
    found = masked.summary(losses, np.array([[0, 0], [1, 1], [2, 2], [3, 3]]))
    assert (found['loss'], found['loss_shuffled'], found['loss_no_text']) == (2.5, 3.0, 2.5)
    assert (found['gain'], found['caption_wins'], found['caption_beats_none']) == (0.5, 0.75, 0.5)
    assert found['gain_error'] == pytest.approx(1 / 2) and found['unigram'] == pytest.approx(np.log(4))


@pytest.mark.filterwarnings('ignore::muse.errors.InputWarning')  # the tiny vocabulary knows few words
def test_the_tool_on_the_sample(tiny_model, release_folder):
    data = DataConfig(kind='scenes', split='heldout_pairs', image_size=16)
    base = load_part(release_folder, 'base')
    found = eval_base.measure(tiny_model, base, data, number=50, seed=0, masks=1, batch_size=8)
    assert found['pictures'] == 26
    assert found['unigram'] <= np.log(64) < found['loss']  # random weights are worse than the counts
    assert 0 <= found['caption_wins'] <= 1 and found['gain_error'] > 0
    few = eval_base.examples(tiny_model, open_source(data), 3, 0)
    assert few[0].shape == (3, 16) and few[1].shape == (3, 24, 32)
    tokens, captions = few[0], few[3]
    assert len(set(captions)) == 3 and all(caption.endswith(' style') for caption in captions)
    assert tokens.max() < 64
