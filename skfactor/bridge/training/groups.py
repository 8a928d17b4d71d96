"""Group-sparse penalty: whole rows and columns of weights vanish, so that units and filters can be removed."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import torch

__all__ = ["group_log_penalty"]


def group_log_penalty(weight: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    r"""Differentiable penalty that drives whole output units and whole input channels of a weight to zero.

    .. math:: \sum_{g} \log_2\Bigl(1 + \sum_{i \in g} |w_i| / s\Bigr)

    over the groups of the first axis (filters, output units) and those of the second (input channels, units before).
    It is concave in the size of a group: large groups pay little for one weight more, small ones pay most.

    Parameters
    ----------
    weight : Tensor of shape (n_out, n_in, ...)
        At least two dimensions.
    scale : Tensor or float, default=1.0
        The unit :math:`s` of the weights: a quantisation step, or a typical magnitude.

    Returns
    -------
    penalty : Tensor, scalar

    Examples
    --------
    >>> import torch
    >>> float(group_log_penalty(torch.tensor([[3.0, 0.0], [0.0, 0.0]])))
    4.0
    """
    if weight.dim() < 2:
        raise ValueError(f"a group penalty needs rows and columns: at least 2 dimensions, got {weight.dim()}")
    size = (weight / scale).abs()
    inner = tuple(range(2, weight.dim()))
    rows, columns = size.sum((1, *inner)), size.sum((0, *inner))
    return torch.log2(1.0 + rows).sum() + torch.log2(1.0 + columns).sum()
