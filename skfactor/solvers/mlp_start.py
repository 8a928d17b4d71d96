"""Start of an autoencoder: random layers, or layers that compute the principal components."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np
from sklearn.utils.extmath import randomized_svd

__all__ = ["Layers", "pca_start", "principal_axes", "random_start"]

_EXACT_COLUMNS = 1024  # an eigendecomposition of this size takes less than a second
_BLOCK_ELEMENTS = 1 << 20
_LINEAR_REACH = 0.5  # of a saturating activation: tanh(0.5) is 8 % short of 0.5


class Layers(NamedTuple):
    """Weights (n_in, n_out) and biases (n_out,) of the layers of encoder and decoder, in order."""

    weights: list
    biases: list


def random_start(sizes, activation, rng):
    """Glorot's uniform weights and zero biases.

    Parameters
    ----------
    sizes : sequence of int
        Width of the input and of every layer.
    activation : {"identity", "logistic", "relu", "tanh"}
    rng : RandomState

    Returns
    -------
    layers : Layers

    References
    ----------
    .. [1] X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks",
       AISTATS 2010.
    """
    gain = 4.0 if activation == "logistic" else 1.0  # its slope at 0 is a quarter of that of tanh
    weights = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        bound = gain * np.sqrt(6.0 / (n_in + n_out))
        weights.append(rng.uniform(-bound, bound, (n_in, n_out)))
    return Layers(weights, [np.zeros(n) for n in sizes[1:]])


def principal_axes(X, n_axes, weights, rng):
    """The first principal axes of centred data, largest variance first.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Centred. From 1,025 columns on the axes are approximate (randomised).
    n_axes : int
        At most d.
    weights : ndarray of shape (n,) or None
        How many rows each row stands for.
    rng : RandomState

    Returns
    -------
    axes : ndarray of shape (d, n_axes), orthonormal columns

    Examples
    --------
    >>> principal_axes(np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]]), 1, None, None)
    array([[1.],
           [0.]])
    """
    n, d = X.shape
    if d > _EXACT_COLUMNS:
        rooted = X if weights is None else X * np.sqrt(weights)[:, None].astype(X.dtype)
        _, _, Vt = randomized_svd(rooted, min(n_axes, n), random_state=rng)
        axes = np.zeros((d, n_axes))
        axes[:, : len(Vt)] = Vt.T
        return axes
    gram = np.zeros((d, d))
    step = max(1, _BLOCK_ELEMENTS // d)
    for start in range(0, n, step):
        block = X[start : start + step].astype(np.float64)
        gram += block.T @ (block if weights is None else block * weights[start : start + step, None])
    axes = np.linalg.eigh(gram)[1][:, ::-1][:, :n_axes]
    return axes * np.where(axes.sum(axis=0) < 0, -1.0, 1.0)


def pca_start(layers, axes, reach, activation, n_encoder):
    r"""Layers that reconstruct the first principal components, made of `layers` by overwriting some of their units.

    A hidden layer carries a value z in one unit where the activation is linear near 0, and in the two units
    :math:`\max(z, 0)` and :math:`\max(-z, 0)` where it is "relu". As many components are carried as the narrowest
    layer has room for. The other units keep their random weights; nothing that is carried reads them, so that the
    start reconstructs what PCA does (to the curvature of tanh and logistic) and every unit can still learn.

    Parameters
    ----------
    layers : Layers
    axes : ndarray of shape (d, n_axes)
    reach : ndarray of shape (n_axes,)
        Largest absolute value of each component in the data.
    activation : {"identity", "logistic", "relu", "tanh"}
    n_encoder : int
        Number of layers of the encoder.

    Returns
    -------
    layers : Layers
    """
    per_value = 2 if activation == "relu" else 1
    hidden = [W.shape[1] for i, W in enumerate(layers.weights[:-1]) if i != n_encoder - 1]
    n_carried = min([axes.shape[1], layers.weights[n_encoder - 1].shape[1], *(n // per_value for n in hidden)])
    axes = axes[:, :n_carried]
    weights, biases = [W.copy() for W in layers.weights], [b.copy() for b in layers.biases]
    identity = np.eye(n_carried)
    spread, gather, offset = identity, identity, np.zeros(n_carried)
    if activation == "relu":
        spread = np.hstack([identity, -identity])
        gather = spread.T
    elif activation in ("logistic", "tanh"):
        squeeze = _LINEAR_REACH / np.maximum(reach[:n_carried], 1e-12)
        # tanh(u) is about u, logistic(u) about 1/2 + u/4
        slope, middle = (0.25, 0.5) if activation == "logistic" else (1.0, 0.0)
        spread, gather = np.diag(squeeze), np.diag(1.0 / (slope * squeeze))
        offset = -middle / (slope * squeeze)
    halves = ((0, n_encoder - 1, axes, identity), (n_encoder, len(weights) - 1, identity, axes.T))
    for first, last, enter, leave in halves:
        for i in range(first, last + 1):
            into = enter if i == first else gather
            out_of = leave if i == last else spread
            shift = np.zeros(n_carried) if i == first else offset
            core = into @ out_of
            n_in, n_out = core.shape
            weights[i][:, :n_out] = 0.0
            weights[i][:n_in, :n_out] = core
            biases[i][:n_out] = shift @ out_of
    return Layers(weights, biases)
