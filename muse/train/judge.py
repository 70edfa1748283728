"""Drawn pictures judged while training goes on, by the features of a pretrained net (`muse.evals.features`).

Muse reports FID and CLIP scores (§3); here it is the Fréchet distance of EfficientNet-Lite0 features, and how often a
drawn picture is nearer to the true picture of its own text than to those of other texts. Few pictures make a Fréchet
distance too large: compare these numbers within a run, and use tools/eval_alignment.py for a release.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Array, Key

from muse.config import TrainConfig
from muse.errors import UserError
from muse.evals.alignment import unit
from muse.evals.features import load_features
from muse.evals.reconstruction import frechet_distance
from muse.train.task import Batch, State, Task


def check_judge(train: TrainConfig) -> None:
    """Raises UserError when pictures are to be judged and the feature net is missing, or fewer than 2 are drawn."""
    if train.eval_features:
        load_features(train.eval_features)
        if train.eval_pictures < 2:
            raise UserError(f'train.eval_pictures is {train.eval_pictures}: give at least 2')


class Judge:
    """Draws for held-out rows and compares with the true pictures, whose features are kept."""

    def __init__(self, train: TrainConfig):
        self._net, self._most = load_features(train.eval_features), train.eval_pictures
        self._true_ND: np.ndarray | None = None

    def __call__(self, task: Task, state: State, batches: Iterable[Batch], key: Key[Array, '']) -> dict[str, float]:
        """Judges the first pictures of prepared held-out batches.

        Returns:
            'frechet_lite0': Fréchet distance of the drawn pictures to the true ones; 'own_nearest': share of the drawn
            pictures whose nearest true picture is that of their own text (by chance one over their number). The true
            pictures of a transformer are those that its tokenizer makes of the true tokens.
        """
        assert task.pictures is not None
        made, true, number = [], [], 0
        for i, batch in enumerate(batches):
            count = min(self._most - number, len(batch['img'] if 'img' in batch else batch['tok']))
            pair = task.pictures(state, batch, jax.random.fold_in(key, i), count)
            made.append(self._features(pair[0]))
            if self._true_ND is None:
                true.append(self._features(pair[1]))
            number += count
            if number >= self._most:
                break
        if self._true_ND is None:
            self._true_ND = np.concatenate(true)
        made_ND = np.concatenate(made)
        nearest_N = np.argmax(unit(made_ND) @ unit(self._true_ND).T, axis=1)
        return {
            'frechet_lite0': frechet_distance(made_ND, self._true_ND),
            'own_nearest': float(np.mean(nearest_N == np.arange(len(nearest_N)))),
        }

    def _features(self, img_BHWC: Array) -> np.ndarray:
        return np.asarray(self._net(jax.device_put(np.asarray(img_BHWC), jax.local_devices()[0]))[0])
