"""The masked loss (§2.3) on held-out pictures under the right caption, a wrong one and none: does the text help?

As the held-out loss of training, but over a fixed set of pictures, each under several masks of §2.6's law. Every mask
is filled in three times, so the three losses differ by the text alone. No label smoothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from muse.errors import UserError
from muse.masking import mask_ratio, masked_ce, random_mask
from muse.models.transformer import Transformer


def wrong_rows(captions: list[str], seed: int) -> Int[np.ndarray, ' N']:
    """For each row another row, whose different caption is the wrong one; each row serves once, in a random order.

    Raises:
        UserError: more than half of the captions are the same text, so that not each can change.
    """
    place = {text: i for i, text in enumerate(np.random.default_rng(seed).permutation(sorted(set(captions))))}
    order = np.array(sorted(range(len(captions)), key=lambda row: place[captions[row]]))
    most = max(captions.count(text) for text in place)
    if 2 * most > len(captions):
        raise UserError(f'{most} of {len(captions)} captions are the same, so no shuffle changes each: take more')
    wrong_N = np.empty(len(captions), np.int64)
    wrong_N[order] = np.roll(order, -most)  # equal captions lie together, and no group is longer than the shift
    return wrong_N


def masked_losses(
    graphdef: Any,
    params: nnx.State,
    tok_NT: Int[np.ndarray, 'N T'],
    txt_NSD: Float[np.ndarray, 'N S D'],
    len_N: Int[np.ndarray, ' N'],
    wrong_N: Int[np.ndarray, ' N'],
    *,
    seed: int,
    masks: int,
    batch_size: int,
) -> dict[str, Float[np.ndarray, ' N']]:
    """Nats per masked token of each picture, the mean over `masks` masks.

    Args:
        graphdef: a `Transformer`'s.
        params: its weights.
        tok_NT: true token ids.
        txt_NSD: text states of the right captions.
        len_N: their lengths.
        wrong_N: the row whose caption is a picture's wrong one.
        seed: of the masks; picture i's k-th mask depends on (seed, k, i) alone.
        masks: masks a picture.
        batch_size: pictures at a time.

    Returns:
        'right', 'shuffled' and 'no_text'.
    """
    right, shuffled = (txt_NSD, len_N), (txt_NSD[wrong_N], len_N[wrong_N])
    texts = {'right': right, 'shuffled': shuffled, 'no_text': (txt_NSD, np.zeros_like(len_N))}
    found = {name: np.zeros(len(tok_NT)) for name in texts}
    for k in range(masks):
        ratio_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), k))
        mask_NT = np.asarray(random_mask(mask_key, mask_ratio(ratio_key, len(tok_NT)), tok_NT.shape[1]))
        for start in range(0, len(tok_NT), batch_size):
            row_B = np.minimum(np.arange(start, start + batch_size), len(tok_NT) - 1)  # the last batch is filled up
            real = min(batch_size, len(tok_NT) - start)
            for name, (txt, length) in texts.items():
                nats_B = _nats(graphdef, params, tok_NT[row_B], mask_NT[row_B], txt[row_B], length[row_B])
                found[name][row_B[:real]] += np.asarray(nats_B)[:real] / masks
    return found


def summary(losses: dict[str, Float[np.ndarray, ' N']], tok_NT: Int[np.ndarray, 'N T']) -> dict[str, float]:
    """Means over the pictures, the captions' wins, and the entropy of the pictures' own token counts as the floor.

    Returns:
        'loss', 'loss_shuffled', 'loss_no_text' (nats per masked token); 'gain' (shuffled − right) with its standard
        error over pictures, 'gain_error'; 'caption_wins' (the right caption beats the shuffled one) and
        'caption_beats_none': shares of the pictures, 0.5 by chance; 'unigram': nats of a guess that knows only how
        often each token comes in these very pictures.
    """
    right_N, shuffled_N, none_N = losses['right'], losses['shuffled'], losses['no_text']
    gain_N = shuffled_N - right_N
    share = np.unique(tok_NT, return_counts=True)[1] / tok_NT.size
    return {
        'loss': float(right_N.mean()),
        'loss_shuffled': float(shuffled_N.mean()),
        'loss_no_text': float(none_N.mean()),
        'gain': float(gain_N.mean()),
        'gain_error': float(gain_N.std(ddof=1) / np.sqrt(len(gain_N))),
        'caption_wins': float((gain_N > 0).mean()),
        'caption_beats_none': float((none_N > right_N).mean()),
        'unigram': float(-(share * np.log(share)).sum()),
    }


@partial(jax.jit, static_argnums=0)
def _nats(
    graphdef: Any,
    params: nnx.State,
    tok_BT: Int[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    txt_BSD: Float[Array, 'B S D'],
    len_B: Int[Array, ' B'],
) -> Float[Array, ' B']:
    model: Transformer = nnx.merge(graphdef, params)
    return masked_ce(model(jnp.where(mask_BT, model.mask_id, tok_BT), txt_BSD, len_B), tok_BT, mask_BT)
