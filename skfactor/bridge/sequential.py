"""Compress layer after layer, each for the inputs that the layers before it, already compressed, really give it.

With inputs u of the original network and û of the compressed one, the best weight for the next layer is not W: it is
the W' that minimises E‖W u − W' û − t‖² over W' and a shift t,

    W' = W + W (C − G) (G + δI)⁻¹,   G = cov(û, û),   C = cov(u, û),   t = W E[u] − Ŵ E[û].

W' is what the estimator gets, with G as `input_gram`; t goes into the layer's bias or that of the batch normalisation
after it. Errors are so corrected downstream instead of piling up. (The idea of GPTQ, Frantar et al. 2022,
arXiv:2210.17323, with the shift of Nagel et al. 2019, arXiv:1906.04721.)
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from skfactor.bridge.batchnorm import normalisation_after
from skfactor.bridge.calibrate import Moments, evaluation, hooked, kind_of_inputs, thinned
from skfactor.bridge.fitting import Fitted, Job, fit_jobs, relative_error, squared_norm
from skfactor.bridge.layers import LayerSpec, Network, entries_of_module
from skfactor.bridge.rules import Plan
from skfactor.bridge.tensors import from_bits, to_bits
from skfactor.codec.dtypes import from_float, to_float
from skfactor.codec.tensor import Layout

__all__ = ["JointMoments", "Runs", "add_shift", "apply_to_means", "best_target", "bias_carrier", "calls_of_layers",
           "covariance", "fit_in_order", "joint_moments"]

_Owners = list[tuple[nn.Module, LayerSpec]]


@dataclass(frozen=True)
class JointMoments:
    """Of the inputs u of the original layer and û of the compressed network's, by group: (g, d) and (g, d, d)."""

    mean: np.ndarray
    mean_hat: np.ndarray
    gram_hat: np.ndarray
    cross: np.ndarray


def fit_in_order(model: nn.Module, network: Network, plan: Plan, batches: list[tuple[tuple, dict]], moments: Moments,
                 *, damping: float = 0.003, max_vectors: int | None = None,
                 progress: bool = True) -> dict[str, Fitted]:
    """Fit the layers in the order in which they run, and write each into `model` before the next.

    Parameters
    ----------
    model : Module
        Changed in place: weights, and the biases that take up the shift of the mean.
    network : Network
        Of `model`.
    plan : Plan
    batches : list of (args, kwargs)
        Forward passes; they run twice for every layer, as far as that layer.
    moments : Moments
        What is known of tensors that have no input vectors of their own (embeddings). Layers that the batches do not
        reach are added to its `missing`, and fitted without.
    damping : float, default=0.003
        δ as a share of the mean of the diagonal of G.
    max_vectors : int, default=None
        As in `Calibration`.
    progress : bool, default=True

    Returns
    -------
    fitted : dict of str to Fitted
    """
    reference = copy.deepcopy(model)
    twins = entries_of_module(reference).owners
    owners = {name: network.owners[name] for name in plan.taken if network.owners[name]}
    n_calls = calls_of_layers(model, owners, batches[0])
    order = list(n_calls)
    norms = normalisation_after(model, [m for layers in owners.values() for m, _ in layers], *batches[0])
    entries = {e.name: e for e in network.entries if e.name in plan.taken}
    # embeddings come before what reads them; biases last, when they have taken up all shifts
    names = list(dict.fromkeys([*moments.importances, *order, *entries]))
    fitted = {}
    for name in tqdm(names, disable=None if progress else True, unit="tensor", desc="compress"):
        entry, weight = entries[name], network.tensors[name]
        layout = entry.layout or Layout.rows_first(entry.shape)
        W = layout.to_matrix(to_float(to_bits(weight), entry.dtype))
        joint = None
        if name in n_calls:
            runs = Runs(model, owners[name], n_calls[name]), Runs(reference, twins[name], n_calls[name])
            joint = joint_moments(*runs, batches, max_vectors)
        if joint is None:
            side, target = moments.side(name), W
            if not side and weight.dim() > 1:
                moments.missing.setdefault(name, "not reached by the calibration inputs")
        else:
            carrier = bias_carrier(owners[name], norms)
            target, gram = best_target(W.astype(np.float64), joint, carrier is not None, damping)
            side = {"input_gram": gram[0] if len(gram) == 1 else gram}
        bits = from_float(layout.to_tensor(target, entry.shape), entry.dtype)
        (done,) = fit_jobs([Job(entry, plan.taken[name], lambda bits=bits: bits, side)], progress=False)
        W_hat = layout.to_matrix(to_float(done.tensor.to_array(), entry.dtype))
        fitted[name] = replace(done, record=replace(done.record, relative_error=relative_error(W, W_hat),
                                                              squared_norm=squared_norm(W)))
        with torch.no_grad():
            weight.copy_(from_bits(done.tensor.to_array(), entry.dtype))
            if joint is not None and carrier is not None:
                add_shift(carrier, apply_to_means(W, joint.mean) - apply_to_means(W_hat, joint.mean_hat))
    return fitted


def calls_of_layers(model: nn.Module, owners: dict[str, _Owners], batch: tuple[tuple, dict]) -> dict[str, int]:
    """How often the layers of a weight run; for names with input vectors, in the order in which they first run."""
    calls: dict[nn.Module, int] = {}
    modules = {m for layers in owners.values() for m, _ in layers}

    def count(module, args, kwargs):
        calls[module] = calls.get(module, 0) + 1

    with hooked((m, count, "before") for m in modules):
        _run(model, batch)
    place = {module: i for i, module in enumerate(calls)}
    first = {name: min((place[m] for m, _ in layers if m in place), default=None) for name, layers in owners.items()}
    usable = [n for n, layers in owners.items() if first[n] is not None and kind_of_inputs(layers).is_vectors]
    return {n: sum(calls.get(m, 0) for m, _ in owners[n]) for n in sorted(usable, key=lambda n: first[n])}


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Runs:
    """The layers of one weight in a network, and how often they run in a forward pass."""

    model: nn.Module
    owners: _Owners
    n_calls: int

    @property
    def vectors(self):
        return kind_of_inputs(self.owners).vectors

    def calls(self, batch: tuple[tuple, dict]) -> list[tuple]:
        """(module, args, kwargs, parameter) of every call of the layers; the pass ends at the last."""
        calls: list[tuple] = []
        parameters = {module: spec.parameter for module, spec in self.owners}

        def remember(module, args, kwargs):
            calls.append((module, args, kwargs, parameters[module]))
            if len(calls) == self.n_calls:
                raise _Enough

        with hooked((module, remember, "before") for module, _ in self.owners), suppress(_Enough):
            _run(self.model, batch)
        return calls


def joint_moments(compressed: Runs, original: Runs, batches: Iterable[tuple[tuple, dict]],
                  max_vectors: int | None) -> JointMoments:
    """Moments over batches, each run through both networks as far as the layers."""
    calls = (pair for batch in batches for pair in zip(original.calls(batch), compressed.calls(batch), strict=True))
    sums: list[torch.Tensor] = []
    count = 0
    for call, call_hat in calls:
        for u, v in _aligned(original.vectors(*call), compressed.vectors(*call_hat)):
            u, v = thinned((u, v), max_vectors, seed=count)
            u, v = (x if x.dtype == torch.float64 else x.float() for x in (u, v))
            new = [u.sum(1), v.sum(1), v.transpose(1, 2) @ v, u.transpose(1, 2) @ v]
            sums = [s + x.double() for s, x in zip(sums, new, strict=True)] if sums else [x.double() for x in new]
            count += u.shape[1]
    return JointMoments(*((s / count).cpu().numpy() for s in sums))


def _aligned(first: Iterator[torch.Tensor], second: Iterator[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same vectors of two layers in pieces (g, n, d) of one n; wide inputs come in shorter pieces."""
    u = v = None
    while True:
        u, v = (next(source, None) if x is None else x for x, source in ((u, first), (v, second)))
        if u is None or v is None:
            if u is not v:
                raise ValueError("two layers with different numbers of input vectors")
            return
        n = min(u.shape[1], v.shape[1])
        yield u[:, :n], v[:, :n]
        u, v = (x[:, n:] if x.shape[1] > n else None for x in (u, v))


def _run(model: nn.Module, batch: tuple[tuple, dict]) -> None:
    args, kwargs = batch
    with evaluation(model):
        model(*args, **kwargs)


def best_target(W: np.ndarray, joint: JointMoments, centred: bool, damping: float,
                start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """W' and G of the module's docstring, block of rows by block of rows; not centred where no bias takes the shift.

    Where û has other elements than u, W' is for û, and the damping draws it to `start` instead of W.
    """
    G, C = joint.gram_hat, joint.cross.copy()
    if centred:
        G = covariance(G, joint.mean_hat)
        C -= joint.mean[:, :, None] * joint.mean_hat[:, None, :]
        C[np.broadcast_to(~G.any(axis=-1)[:, None, :], C.shape) if start is not None else ~G.any(axis=-1)] = 0.0
    blocks = []
    starts = np.split(W if start is None else start, len(G))
    for w, w0, g, c in zip(np.split(W, len(G)), starts, G, C, strict=True):
        ridge = damping * np.trace(g) / len(g)
        right = (c - g).T @ w.T if start is None else c.T @ w.T - g @ w0.T
        change = np.linalg.solve(g + ridge * np.eye(len(g)), right).T if ridge > 0 else 0.0
        blocks.append(w0 + change)
    return np.concatenate(blocks), G


def covariance(gram: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """E[u uᵀ] − E[u] E[u]ᵀ (..., d, d); inputs whose variance is lost in the rounding of the moments have none."""
    cov = gram - mean[..., :, None] * mean[..., None, :]
    lost = np.diagonal(cov, axis1=-2, axis2=-1) <= 0
    cov[lost[..., :, None] | lost[..., None, :]] = 0.0
    return cov


def apply_to_means(W: np.ndarray, means: np.ndarray) -> np.ndarray:
    """W E[u] for (g, d) means of the inputs of g blocks of rows."""
    return np.concatenate([w @ m for w, m in zip(np.split(W.astype(np.float64), len(means)), means, strict=True)])


_Carrier = tuple[torch.Tensor, torch.Tensor | float]


def bias_carrier(owners: _Owners, norms: dict[nn.Module, nn.Module]) -> _Carrier | None:
    """The bias that can shift a layer's output, and by how much it does per unit; None when there is none."""
    if len(owners) != 1 or owners[0][1].parameter != "weight":
        return None
    module = owners[0][0]
    norm = norms.get(module)
    if norm is not None:
        return norm.bias, norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = getattr(module, "bias", None)
    return (bias, 1.0) if isinstance(bias, nn.Parameter) else None


def add_shift(carrier: _Carrier, shift: np.ndarray) -> None:
    bias, scale = carrier
    bias.copy_(bias.double() + scale * torch.from_numpy(shift).to(bias.device))
