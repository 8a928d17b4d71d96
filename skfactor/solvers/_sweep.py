"""The inner loop of dictionary learning: sweeps over the codes of unit-norm atoms, without temporaries."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

__all__ = ["sweep_codes"]

# Atoms of one block: its cross term is one matrix product; inside it only the changes are followed.
_BLOCK = 16
# Samples of one strip: the strip of the codes stays in the second-level cache.
_STRIP_NUMBERS = 1 << 18


def sweep_codes(codes_t, cross_t, gram, alpha, n_sweeps, *, positive=False):
    """Lower ``1/2 |x - u V|^2 + alpha |u|_1`` of every sample by exact minimisation over one code at a time.

    Parameters
    ----------
    codes_t : ndarray of shape (K, n)
        C-contiguous; overwritten.
    cross_t : ndarray of shape (K, n)
        ``V X'``.
    gram : ndarray of shape (K, K)
        ``V V'`` with a diagonal of ones.
    alpha : float
    n_sweeps : int
    positive : bool, default=False
    """
    K, n = codes_t.shape
    step = max(256, _STRIP_NUMBERS // K)
    for start in range(0, n, step):
        strip = slice(start, min(start + step, n))
        _sweep_strip(codes_t[:, strip], cross_t[:, strip], gram, codes_t.dtype.type(alpha), n_sweeps, positive)


def _sweep_strip(codes, cross, gram, alpha, n_sweeps, positive):
    K, n = codes.shape
    change = np.empty((_BLOCK, n), codes.dtype)
    rest = np.empty((_BLOCK, n), codes.dtype)
    part = np.empty(n, codes.dtype)
    for _ in range(n_sweeps):
        for start in range(0, K, _BLOCK):
            stop = min(start + _BLOCK, K)
            block = rest[: stop - start]
            np.matmul(gram[start:stop], codes, out=block)
            np.subtract(cross[start:stop], block, out=block)
            block += codes[start:stop]  # now each row is what its code would be at no price
            for k in range(start, stop):
                j = k - start
                c = block[j]
                if j:
                    np.matmul(gram[k, start:k], change[:j], out=part)
                    c -= part
                if positive:
                    c -= alpha
                    np.maximum(c, 0, out=c)
                else:  # c - clip(c, -alpha, alpha)
                    np.maximum(c, -alpha, out=part)
                    np.minimum(part, alpha, out=part)
                    c -= part
                np.subtract(c, codes[k], out=change[j])
                codes[k] = c
