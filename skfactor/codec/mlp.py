"""The decoder of an autoencoder: a stack of dense layers, evaluated in numpy."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import expit

from skfactor.codec.decoders import Decoder, register_decoder
from skfactor.codec.linear import check_float_arrays
from skfactor.codec.matmul import matmul

__all__ = ["ACTIVATIONS", "MLPDecoder", "dense_layers"]

ACTIVATIONS = ("identity", "logistic", "relu", "tanh")

_BLOCK_ELEMENTS = 1 << 20


def _activate(h: np.ndarray, activation: str) -> None:
    """Apply an activation in place."""
    if activation == "relu":
        np.maximum(h, 0.0, out=h)
    elif activation == "tanh":
        np.tanh(h, out=h)
    elif activation == "logistic":
        expit(h, out=h)


def block_rows(weights: Sequence[np.ndarray]) -> int:
    """Rows that go through the layers at a time: the widest layer then holds about a million values."""
    return max(1, _BLOCK_ELEMENTS // max(max(W.shape) for W in weights))


def dense_layers(h: np.ndarray, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray],
                 activation: str) -> np.ndarray:
    """Rows `h` after all layers, in float64; every layer but the last one ends with the activation.

    Parameters
    ----------
    h : ndarray of shape (n, a)
    weights : sequence of ndarray of shape (a, b), (b, c), ...
    biases : sequence of ndarray of shape (b,), (c,), ...
    activation : {"identity", "logistic", "relu", "tanh"}

    Returns
    -------
    h : ndarray of shape (n, c)

    Examples
    --------
    >>> dense_layers(np.array([[1.0, -1.0]]), [np.eye(2), np.ones((2, 1))], [np.zeros(2), np.ones(1)], "relu")
    array([[2.]])
    """
    last = len(weights) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        for i, (W, b) in enumerate(zip(weights, biases)):
            h = matmul(h, W, np.float64)
            h += b
            if i < last:
                _activate(h, activation)
    return h


@register_decoder
@dataclass(frozen=True, eq=False)
class MLPDecoder(Decoder):
    r"""A multi-layer perceptron: :math:`\hat x = \mu + \sigma f(z)` for every row `z` of codes.

    Parameters
    ----------
    weights : tuple of ndarray of shape (n_in, n_out)
        Of the layers of :math:`f`, in order. Stored in the dtype they have here.
    biases : tuple of ndarray of shape (n_out,)
    mean : ndarray of shape (vector_size,)
        :math:`\mu`, added to the output of the last layer.
    scale : float
        :math:`\sigma`, multiplies that output.
    activation : {"identity", "logistic", "relu", "tanh"}
        After every layer but the last one.
    dtype : {"float32", "float64"}
        Dtype of the decoded matrix.

    Notes
    -----
    Codes of shape (n_rows, q * n_in) of the first layer decode to (n_rows, q * vector_size): a row is q sub-vectors,
    each with codes of its own.
    """

    name: ClassVar[str] = "mlp"

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    mean: np.ndarray
    scale: float = 1.0
    activation: str = "relu"
    dtype: str = "float32"

    def __post_init__(self):
        if not (isinstance(self.weights, tuple) and isinstance(self.biases, tuple) and self.weights
                and len(self.weights) == len(self.biases)):
            raise ValueError("weights and biases must be tuples of arrays, as many of the one as of the other")
        layers = {f"{name}[{i}]": a for name in ("weights", "biases") for i, a in enumerate(getattr(self, name))}
        check_float_arrays(self.dtype, mean=self.mean, **layers)
        widths = []
        for W, b in zip(self.weights, self.biases):
            if W.ndim != 2 or b.shape != W.shape[1:] or widths[-1:] not in ([], [W.shape[0]]):
                raise ValueError(f"layers must fit together, got weights {[w.shape for w in self.weights]} and biases "
                                 f"{[b.shape for b in self.biases]}")
            widths.append(W.shape[1])
        if self.mean.shape != (widths[-1],):
            raise ValueError(f"mean must have shape ({widths[-1]},), got {self.mean.shape}")
        if not isinstance(self.scale, int | float) or isinstance(self.scale, bool):
            raise ValueError(f"scale must be a number, got {self.scale!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def decode(self, codes):
        codes = np.asarray(codes)
        shape = self.decoded_shape(codes.shape)
        rows = codes.reshape(-1, len(self.weights[0]))
        out = np.empty((len(rows), len(self.mean)), dtype=self.dtype)
        step = block_rows(self.weights)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), step):
                block = dense_layers(rows[start : start + step], self.weights, self.biases, self.activation)
                block *= self.scale
                block += self.mean
                out[start : start + step] = block
        return out.reshape(shape)

    def decoded_shape(self, codes_shape):
        n_rows, n_codes = codes_shape
        n_in = len(self.weights[0])
        if n_codes % n_in:
            raise ValueError(f"codes must have a multiple of {n_in} columns, got {n_codes}")
        return n_rows, n_codes // n_in * len(self.mean)

    def workspace(self, codes_shape):
        n_rows, n_codes = codes_shape
        rows = min(n_rows * n_codes // len(self.weights[0]), block_rows(self.weights))
        return max(max(rows * max(W.shape), W.size) for W in self.weights)
