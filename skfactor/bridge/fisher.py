"""How much every single weight counts: the diagonal of the Fisher information, from unlabelled inputs."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from skfactor.bridge.calibrate import Moments, evaluation, first_tensor, model_batches, prediction_probe
from skfactor.bridge.layers import entries_of_module
from skfactor.codec.tensor import Layout

__all__ = ["fisher_diagonal"]

#: Gradients of single examples held at a time, in numbers.
_HELD = 1 << 25


def fisher_diagonal(model: nn.Module, inputs: Any, *, temperature: float = 1.0, random_state: int = 0) -> Moments:
    """Fisher diagonal of all weights of two or more dimensions, as the `importance` that estimators take.

    To second order, a change e of the weights changes the network's own prediction p = softmax(z / T) by
    KL = ½ eᵀ F e with F = E Σ (∂z)ᵀ H (∂z), H = (diag(p) − p pᵀ) / T², the mean over the inputs; no labels. Returned is
    diag(F), from E (∂(vᵀz)/∂w)² with v random and E[v vᵀ] = H, one gradient for every single input. It is meant for
    codes that weigh bits against errors: `compress(model, KMeansWeightSharer(64, entropy_weight=...),
    calibration=fisher_diagonal(model, images))`.

    Parameters
    ----------
    model : Module
        Not changed. Runs in eval mode; its output, or the first element or value of it, are logits with the classes on
        the last axis. Code that `torch.func.vmap` cannot run, one example at a time, is refused.
    inputs : tensor, tuple, dict, list or loader
        As calibration in `skfactor.compress`; tensors of one pass hold one example per row.
    temperature : float, default=1.0
        T; above 1 unlikely classes count more, which few confident examples need.
    random_state : int, default=0
        Seed of the signs of v.

    Returns
    -------
    moments : Moments
        With `importances` only, of shape (n_rows, n_columns) by tensor name, scaled to a mean of 1; a tensor on which
        the outputs do not depend is in `missing`.

    Raises
    ------
    ValueError
        If the network cannot be run one example at a time.

    References
    ----------
    J. Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020.

    Examples
    --------
    >>> import torch, skfactor
    >>> from skfactor.bridge import fisher_diagonal
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> importance = fisher_diagonal(net, torch.randn(32, 8))
    >>> importance.importances["0.weight"].shape
    (4, 8)
    >>> sharer = skfactor.KMeansWeightSharer(4, entropy_weight=0.01)
    >>> result = skfactor.compress(net, sharer, calibration=importance)
    """
    network = entries_of_module(model)
    layouts = {entry.name: entry.layout or Layout.rows_first(entry.shape) for entry in network.entries
               if len(entry.shape) > 1 and network.tensors[entry.name].is_floating_point()}
    by_id = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    names = {name: by_id[id(network.tensors[name])] for name in layouts if id(network.tensors[name]) in by_id}
    weights = {own: dict(model.named_parameters())[own].detach() for own in names.values()}
    squares = {own: torch.zeros(w.shape, dtype=torch.float64, device=w.device) for own, w in weights.items()}
    generator = torch.Generator().manual_seed(random_state)
    n_examples = 0
    with evaluation(model):
        for args, kwargs in model_batches(model, inputs):
            v = prediction_probe(first_tensor(model(*args, **kwargs)), temperature, generator)
            _add_squares(model, weights, args, kwargs, v, squares)
            n_examples += len(v)
    moments = Moments()
    for name, own in names.items():
        F = layouts[name].to_matrix((squares[own] / n_examples).cpu().numpy())
        if F.mean() > 0 and np.isfinite(F).all():
            moments.importances[name] = F / F.mean()
        else:
            moments.missing[name] = "the outputs do not depend on it"
    return moments


def _add_squares(model: nn.Module, weights: Mapping[str, torch.Tensor], args: tuple, kwargs: dict, v: torch.Tensor,
                 squares: dict[str, torch.Tensor]) -> None:
    """Add the squared gradients of vᵀz of every example of one batch."""
    def output(weights, v, args, kwargs):
        args, kwargs = ([a[None] for a in args], {k: a[None] for k, a in kwargs.items()})
        return (first_tensor(functional_call(model, dict(weights), tuple(args), kwargs)) * v[None]).sum()

    chunk = max(1, _HELD // max(1, sum(w.numel() for w in weights.values())))
    try:
        for i in range(0, len(v), chunk):
            here = slice(i, i + chunk)
            found = vmap(grad(output), in_dims=(None, 0, 0, 0), randomness="error")(
                dict(weights), v[here], tuple(a[here] for a in args), {k: a[here] for k, a in kwargs.items()})
            for own, gradient in found.items():
                squares[own] += gradient.double().square().sum(0)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the network cannot be run one example at a time for its Fisher diagonal: {line}") from error
