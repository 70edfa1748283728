"""Does a drawn picture show what was asked? Search among all real pictures, and a check for copying.

The measure for held-out (label, style) pairs: a drawn picture's nearest real picture, by the cosine of
EfficientNet-Lite0 features (`muse.evals.features`), should have the asked label and the asked style. Muse itself
reports CLIP scores (§3, tables 1 and 2), which a net that never saw this art could not give here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from muse.errors import UserError

_SAME = 1e-5  # a cosine distance that rounding alone can make


@dataclass(frozen=True)
class Gallery:
    """Real pictures to search among: unit feature vectors, and what is known of each."""

    unit_ND: Float[np.ndarray, 'N D']
    labels: tuple[str, ...]
    styles: tuple[str, ...]
    seen_N: Bool[np.ndarray, ' N']  # whether the picture was trained on

    def __post_init__(self):
        if not len(self.unit_ND) == len(self.labels) == len(self.styles) == len(self.seen_N):
            raise UserError('a gallery needs a label, a style and a split for each of its pictures')
        if not self.seen_N.any():
            raise UserError('the gallery holds no training picture: give it all splits')


def unit(feature_ND: Float[np.ndarray, 'N D']) -> Float[np.ndarray, 'N D']:
    """Feature vectors scaled to length 1, float32, so that an inner product is the cosine."""
    feature_ND = np.asarray(feature_ND, np.float32)
    return feature_ND / np.maximum(np.linalg.norm(feature_ND, axis=1, keepdims=True), 1e-12)


def search(
    unit_QD: Float[np.ndarray, 'Q D'],
    gallery: Gallery,
    asked_Q: Sequence[tuple[str, str]],
    leave_out_Q: Int[np.ndarray, ' Q'] | None = None,
) -> dict[str, float]:
    """How often the nearest real pictures are of what was asked.

    Args:
        unit_QD: unit features of the queries.
        gallery: what to search.
        asked_Q: the (label, style) asked of each query.
        leave_out_Q: one gallery index a query that it must not find; None searches everything.

    Returns:
        Shares of the queries: 'label_top1' and 'label_top5' (the nearest, one of the 5 nearest, has the label),
        'style_top1' (the nearest has the style), 'pair_top1' (the nearest has both).
    """
    cosine_QN = unit_QD @ gallery.unit_ND.T
    if leave_out_Q is not None:
        cosine_QN[np.arange(len(cosine_QN)), leave_out_Q] = -np.inf
    nearest_Q5 = np.argsort(-cosine_QN, axis=1, kind='stable')[:, :5]
    labels, styles = np.array(gallery.labels), np.array(gallery.styles)
    label_Q1, style_Q1 = (np.array([pair[i] for pair in asked_Q])[:, None] for i in (0, 1))
    label_Q5, style_Q5 = labels[nearest_Q5] == label_Q1, styles[nearest_Q5] == style_Q1
    return {
        'label_top1': float(label_Q5[:, 0].mean()),
        'label_top5': float(label_Q5.any(axis=1).mean()),
        'style_top1': float(style_Q5[:, 0].mean()),
        'pair_top1': float((label_Q5 & style_Q5)[:, 0].mean()),
    }


def chance(gallery: Gallery, asked_Q: Sequence[tuple[str, str]]) -> dict[str, float]:
    """What `search` gives on average to queries that rank the gallery at random, worked out exactly."""
    size, labels, styles = len(gallery.labels), np.array(gallery.labels), np.array(gallery.styles)
    right_QN = np.stack([labels == label for label, _ in asked_Q])
    style_QN = np.stack([styles == style for _, style in asked_Q])
    miss_Q = np.ones(len(asked_Q))
    for drawn in range(min(5, size)):  # five draws without putting back
        miss_Q *= np.maximum(size - right_QN.sum(axis=1) - drawn, 0) / (size - drawn)
    return {
        'label_top1': float(right_QN.mean()),
        'label_top5': float(1 - miss_Q.mean()),
        'style_top1': float(style_QN.mean()),
        'pair_top1': float((right_QN & style_QN).mean()),
    }


def nearest_distance(
    unit_QD: Float[np.ndarray, 'Q D'], unit_ND: Float[np.ndarray, 'N D'], beyond: float = -1.0, chunk: int = 512
) -> Float[np.ndarray, ' Q']:
    """Cosine distance (1 − cosine, in [0, 2]) of each query to the nearest vector that is farther than `beyond`."""
    found = []
    for start in range(0, len(unit_QD), chunk):
        distance_QN = 1 - unit_QD[start : start + chunk] @ unit_ND.T
        found.append(np.where(distance_QN > beyond, distance_QN, np.inf).min(axis=1))
    return np.concatenate(found)


def copying(unit_QD: Float[np.ndarray, 'Q D'], gallery: Gallery) -> dict[str, float]:
    """How many queries lie nearer to a training picture than two different training pictures lie to each other.

    The yardstick is each training picture's distance to the nearest different one. A drawing that stands in the data
    under two labels is one picture: its twins, at distance 0 but for rounding, are passed over.

    Returns:
        'nearer_than_any' and 'nearer_than_1_percent': shares of the queries whose nearest training picture is closer
        than the smallest such distance ('smallest_real'), and than its 1st percentile ('percentile_1_real');
        'median': the queries' median distance to their nearest training picture; 'median_real': that between
        training pictures.
    """
    seen_MD = gallery.unit_ND[gallery.seen_N]
    real_M = nearest_distance(seen_MD, seen_MD, beyond=_SAME)
    query_Q = nearest_distance(unit_QD, seen_MD)
    smallest, percentile = float(real_M.min()), float(np.percentile(real_M, 1))
    return {
        'nearer_than_any': float((query_Q < smallest).mean()),
        'nearer_than_1_percent': float((query_Q < percentile).mean()),
        'smallest_real': smallest,
        'percentile_1_real': percentile,
        'median': float(np.median(query_Q)),
        'median_real': float(np.median(real_M)),
    }
