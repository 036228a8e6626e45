"""Gradient-boosted trees on mask bits, by scikit-learn: `boosting`.

For games with thresholds and exceptions, which a tree expresses in a few splits and a smooth kernel
needs many masks for. scikit-learn is imported when a member is trained.

Notation: M training masks, P players, E members.
"""

from __future__ import annotations

import numpy as np

from lpserve.surrogate.crossfit import CrossFitted, Members
from lpserve.types import BoolArray, FloatArray

_LEARNING_RATE, _MAX_LEAVES, _MIN_LEAF_MASKS = 0.3, 16, 3
_MAX_TREES, _PATIENCE = 100, 10


def train(
    masks_MP: BoolArray, member_targets: FloatArray, member_weights: FloatArray, seed: int
) -> Members:
    """Train all members, see `crossfit.Train`.

    A member stops early when 10 trees in a row did not lower the error on the masks it left out.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    members = []
    for target_M, weight_M in zip(member_targets, member_weights, strict=True):
        use_M = weight_M > 0
        trees = HistGradientBoostingRegressor(
            learning_rate=_LEARNING_RATE,
            max_iter=_MAX_TREES,
            max_leaf_nodes=_MAX_LEAVES,
            min_samples_leaf=_MIN_LEAF_MASKS,
            max_bins=2,
            random_state=seed,
            early_stopping=True,  # pyright: ignore[reportArgumentType]
            n_iter_no_change=_PATIENCE,
        )
        trees.fit(
            masks_MP[use_M],
            target_M[use_M],
            sample_weight=weight_M[use_M],
            X_val=masks_MP[~use_M],
            y_val=target_M[~use_M],
        )
        members.append(trees)

    def predict(queried_MP: BoolArray) -> FloatArray:
        return np.stack([trees.predict(queried_MP) for trees in members])

    return predict


def build(kind: str, seed: int, *, quick: bool) -> CrossFitted:
    """See `lpserve.surrogate.make_surrogate`. A quick fit is the same."""
    assert kind == "boosting"
    return CrossFitted(kind, train, seed)
