"""Which pictures are seen in training: a decision by hash, so it never changes with order, machine or build.

A held-out label tests a wholly unseen subject. A held-out (label, style) pair tests composition: the subject is seen in
at least two other styles, and the style with other subjects, but never both together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

TRAIN, HELDOUT_LABELS, HELDOUT_PAIRS = 'train', 'heldout_labels', 'heldout_pairs'
HELDOUT = 'heldout'  # of a source without splits of its own
SPLITS = (TRAIN, HELDOUT_LABELS, HELDOUT_PAIRS)

_MIN_TRAIN_STYLES = 2


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the text of `parts` alone, equal on every machine."""
    digest = hashlib.sha256('\x1f'.join(parts).encode('utf-8', 'surrogatepass')).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64


def assign_splits(
    pairs: Iterable[tuple[str, str]], *, label_share: float = 0.03, pair_share: float = 0.04
) -> dict[tuple[str, str], str]:
    """Gives every (label, style) pair its split.

    Args:
        pairs: the (label, style) pairs that exist; repeats are allowed.
        label_share: share of labels held out in all their styles.
        pair_share: share of the other pairs held out, before those are taken back whose label would be left with
            fewer than two styles in training.

    Returns:
        (label, style) -> 'train', 'heldout_labels' or 'heldout_pairs'.
    """
    styles_by_label: dict[str, set[str]] = {}
    for label, style in pairs:
        styles_by_label.setdefault(label, set()).add(style)
    splits = {}
    for label, styles in styles_by_label.items():
        if unit_hash('label', label) < label_share:
            splits.update({(label, style): HELDOUT_LABELS for style in styles})
            continue
        in_train = len(styles)
        for style in sorted(styles, key=lambda style: unit_hash('pair', label, style)):
            held = unit_hash('pair', label, style) < pair_share and in_train > _MIN_TRAIN_STYLES
            in_train -= held
            splits[label, style] = HELDOUT_PAIRS if held else TRAIN
    return splits
