"""`GradualPruning`: weights that become zero step by step while a network is trained, and how many in each layer."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from skfactor.bridge.apply import deep_copy
from skfactor.bridge.batchnorm import leaves
from skfactor.bridge.calibrate import evaluation, model_batches
from skfactor.bridge.layers import entries_of_module
from skfactor.bridge.result import CompressionResult
from skfactor.bridge.training.base import TrainingMethod
from skfactor.bridge.training.weights import attach, restored, slots_by_tensor, with_state_of
from skfactor.estimators.magnitude_pruner import MagnitudePruner
from skfactor.solvers.knapsack import choose

__all__ = ["GradualPruning", "Sensitivity", "sensitivity"]

AMOUNTS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99)


class GradualPruning(TrainingMethod):
    r"""Prune the smallest weights of a network, more and more of them, while it is trained.

    After step t of the optimizer, every `update_every` steps, the share

    .. math:: s_t = s_1 + (s_0 - s_1)\,\Bigl(1 - \frac{t - t_0}{n}\Bigr)^3

    of the weights is zero (Zhu, Gupta 2017, arXiv:1710.01878): fast while there is much to lose, slowly at the end.

    Parameters
    ----------
    model : Module
        Never changed; a copy is trained.
    amount : float or dict, default=0.9
        Final share s_1 of zeros in the weights of all known layers; or the share by name or name pattern of the tensor
        (`{"ip1.weight": 0.95, "conv*": 0.5}`, the first that matches), and weights without one stay whole.
        `sensitivity(...).amounts(0.9)` gives such a dict.
    n_steps : int, default=1000
        Steps n of the optimizer over which the share grows. Afterwards the zeros stay where they are.
    start_amount : float, default=0.0
        Share s_0; at most the final one counts.
    begin : int, default=0
        Step t_0 after which it begins to grow.
    update_every : int, default=50
        Steps between two choices of the zeros.
    scope : {"layer", "global"}, default="layer"
        Whether every layer has the same share of zeros, or all layers one threshold. A dict of amounts is by layer.
    regrow : bool, default=False
        Weights keep learning while they are zero, and come back when they have become large: dynamic network surgery
        (Guo, Yao, Chen 2016, arXiv:1608.04493). The last choice is made without it.
    margin : float, default=0.1
        With `regrow`: a weight is pruned below 1 - margin and comes back above 1 + margin of the threshold.

    Attributes
    ----------
    model : Module
        The network to train.

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> method = GradualPruning(net, 0.75, n_steps=20, update_every=5)
    >>> optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    >>> x, y = torch.randn(32, 8), torch.arange(32) % 2
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(method.model(x), y).backward()
    ...     optimizer.step()
    ...     method.after_step()
    >>> pruned = method.finish().model
    >>> int((pruned[0].weight == 0).sum())
    96
    """

    def __init__(self, model: nn.Module, amount: float | Mapping[str, float] = 0.9, *, n_steps: int = 1000,
                 start_amount: float = 0.0, begin: int = 0, update_every: int = 50, scope: str = "layer",
                 regrow: bool = False, margin: float = 0.1):
        _check_options(n_steps, start_amount, begin, update_every, scope, margin)
        self._plain, self.model = model, deep_copy(model)
        network = entries_of_module(self.model)
        weights = [e.name for e in network.entries if e.name in network.names and network.owners.get(e.name)
                   and not e.unfit]
        self.amounts = _amounts_by_name(amount, weights)
        self.n_steps, self.start_amount, self.begin, self.update_every = n_steps, start_amount, begin, update_every
        self.scope = "layer" if isinstance(amount, Mapping) else scope
        self.regrow, self.margin, self._step = regrow, margin, 0
        self._weights = {name: network.tensors[name] for name in self.amounts}
        self._masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self._weights.items()}
        if regrow:
            slots = slots_by_tensor(self.model, network.names)
            for name, weight in self._weights.items():
                masked = _Masked(self._masks[name])
                self._masks[name] = masked.mask
                own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                attach(slots[name], masked, {"original": own})
                self._weights[name] = own
        self._update()

    def amount_at(self, step: int, final: float) -> float:
        """Share of zeros after a step, on the way to the final one."""
        first = min(self.start_amount, final)
        done = min(max((step - self.begin) / self.n_steps, 0.0), 1.0)
        return final + (first - final) * (1 - done) ** 3

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights that are pruned."""
        return 1 - sum(int(m.sum()) for m in self._masks.values()) / sum(m.numel() for m in self._masks.values())

    def after_step(self) -> None:
        """Choose the zeros anew when it is time for it, and keep them."""
        self._step += 1
        end = self.begin + self.n_steps
        if self._step <= end and ((self._step - self.begin) % self.update_every == 0 or self._step == end):
            self._update()
        elif not self.regrow:
            self._apply()

    def finish(self) -> CompressionResult:
        """The pruned network with plain layers; zeros are stored as such, all other values losslessly.

        `skfactor.compress(result.model, Pipeline([("prune", MagnitudePruner(threshold=0.0)), ("share", ...)]))` goes on
        from it, and `skfactor.finetune(result.model, ..., keep_zeros=True)` trains it further.
        """
        model = with_state_of(self._plain, self.model)
        targets = entries_of_module(model).tensors
        with torch.no_grad():
            for name, mask in self._masks.items():
                targets[name].copy_(self._weights[name] * mask)
        rules = {name: MagnitudePruner(threshold=0.0) for name in self._masks}
        return restored(model, {}, rules, {})

    def state_dict(self) -> dict[str, Any]:
        """Parameters, masks and the step."""
        return {"model": self.model.state_dict(), "masks": {n: m.clone() for n, m in self._masks.items()},
                "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        for name, mask in self._masks.items():
            mask.copy_(state["masks"][name])
        self._step = state["step"]

    def _update(self) -> None:
        """Choose what is zero at this step."""
        with torch.no_grad():
            sizes = {name: w.abs() for name, w in self._weights.items()}
            if self.scope == "global":
                flat = torch.cat([s.reshape(-1) for s in sizes.values()])
                mask = self._mask(flat, torch.cat([m.reshape(-1) for m in self._masks.values()]),
                                  next(iter(self.amounts.values())))
                parts = mask.split([s.numel() for s in sizes.values()])
                masks = dict(zip(sizes, parts, strict=True))
            else:
                masks = {n: self._mask(s.reshape(-1), self._masks[n].reshape(-1), self.amounts[n])
                         for n, s in sizes.items()}
            for name, mask in self._masks.items():
                mask.copy_(masks[name].reshape(mask.shape))
        if not self.regrow:
            self._apply()

    def _mask(self, size: torch.Tensor, before: torch.Tensor, final: float) -> torch.Tensor:
        """Which of the weights stay, given their magnitudes and which are there now."""
        n_zeros = round(self.amount_at(self._step, final) * size.numel())
        if n_zeros == 0:
            return torch.ones_like(before)
        order = size.argsort(stable=True)
        keep = torch.ones_like(before)
        keep[order[:n_zeros]] = False
        if self.regrow and self._step < self.begin + self.n_steps:
            threshold = size[order[n_zeros - 1]]
            keep = torch.where(size <= (1 - self.margin) * threshold, False,
                               torch.where(size > (1 + self.margin) * threshold, True, before))
        return keep

    def _apply(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.mul_(self._masks[name])


class _Masked(nn.Module):
    """Parametrization: weights times a mask; the gradient of the product goes to all weights."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightMask.apply(weight, self.mask)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class _StraightMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask):
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _check_options(n_steps, start_amount, begin, update_every, scope, margin) -> None:
    for name, value, least in (("n_steps", n_steps, 1), ("begin", begin, 0), ("update_every", update_every, 1)):
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not 0 <= start_amount <= 1:
        raise ValueError(f"start_amount must be in [0, 1], got {start_amount!r}")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin!r}")


def _amounts_by_name(amount: float | Mapping[str, float], weights: list[str]) -> dict[str, float]:
    if not weights:
        raise ValueError("nothing to prune: no tensor is the weight of a known layer")
    rules = amount if isinstance(amount, Mapping) else {"*": amount}
    for key, value in rules.items():
        if not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(f"amount must be in [0, 1], got {value!r}" + (f" for {key!r}" if rules is amount else ""))
        if not any(fnmatch.fnmatchcase(name, key) for name in weights):
            raise ValueError(f"amount names {key!r}, which matches no weight; there are {', '.join(weights[:5])}"
                             + (f" and {len(weights) - 5} more" if len(weights) > 5 else ""))
    found = {name: next((v for k, v in rules.items() if fnmatch.fnmatchcase(name, k)), None) for name in weights}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Sensitivity:
    """What pruning each layer alone does to a network.

    Attributes
    ----------
    names : list of str
    n_weights : list of int
    grid : ndarray of shape (n_amounts,)
        Shares of zeros that were tried; the first is 0.
    damage : ndarray of shape (n_layers, n_amounts)
        Divergence of the output, or what the evaluation lost.
    """

    names: list[str]
    n_weights: list[int]
    grid: np.ndarray
    damage: np.ndarray

    def amounts(self, amount: float) -> dict[str, float]:
        """Share of zeros by tensor with at least this share in all, so that the damages add up to the least.

        That the damages of layers add up is an assumption, and re-training is not foreseen in them.
        """
        total = sum(self.n_weights)
        costs = list(np.maximum.accumulate(np.maximum(self.damage, 0), axis=1))
        kept = [n * (1 - self.grid) for n in self.n_weights]
        choice = choose(costs, kept, (1 - amount) * total * (1 + 1e-9))
        if choice is None:
            raise ValueError(f"amount must be at most the largest share tried, {self.grid.max():g}, got {amount!r}")
        return {name: float(self.grid[i]) for name, i in zip(self.names, choice.index, strict=True)}


def sensitivity(model: nn.Module, calibration: Any = None, *, evaluate: Callable[[nn.Module], float] | None = None,
                amounts: Sequence[float] = AMOUNTS) -> Sensitivity:
    """Prune every layer alone, by magnitude, to several degrees, and measure what the network loses.

    Parameters
    ----------
    model : Module
        Never changed.
    calibration : tensor, tuple, dict, list or loader, default=None
        Unlabelled inputs: what is measured is the divergence of the network's prediction on them,
        KL(softmax(f) ‖ softmax(f̂)), classes on axis 1.
    evaluate : callable, default=None
        Instead: `evaluate(model)`, higher is better (an accuracy); what is measured is how much it falls.
    amounts : sequence of float
        Shares of zeros to try.

    Returns
    -------
    sensitivity : Sensitivity

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> found = sensitivity(net, torch.randn(64, 8))
    >>> sorted(found.amounts(0.8))
    ['0.weight', '2.weight']
    """
    if (calibration is None) == (evaluate is None):
        raise ValueError("give either calibration or evaluate")
    grid = np.unique([0.0, *amounts])
    if grid[0] < 0 or grid[-1] > 1:
        raise ValueError(f"amounts must be in [0, 1], got {list(amounts)}")
    model = deep_copy(model)
    network = entries_of_module(model)
    weights = {e.name: network.tensors[e.name] for e in network.entries
               if e.name in network.names and network.owners.get(e.name) and not e.unfit}
    with evaluation(model):
        measure = _Fall(evaluate, model) if evaluate else _Divergence(model, calibration)
        damage = [[measure(model) for _ in _pruned_to(w, grid)] for w in weights.values()]
    return Sensitivity(list(weights), [w.numel() for w in weights.values()], grid, np.array(damage))


def _pruned_to(weight: torch.Tensor, grid: np.ndarray):
    """Prune a weight in place to each share in turn; as it was at the end."""
    saved = weight.detach().clone()
    order = saved.abs().reshape(-1).argsort(stable=True)
    for amount in grid:
        keep = torch.ones(saved.numel(), dtype=saved.dtype, device=saved.device)
        keep[order[: round(float(amount) * saved.numel())]] = 0
        weight.detach().copy_(saved * keep.reshape(saved.shape))
        yield amount
    weight.detach().copy_(saved)


class _Fall:
    """How far an evaluation lies below that of the whole network."""

    def __init__(self, evaluate, model):
        self._evaluate, self._before = evaluate, float(evaluate(model))

    def __call__(self, model) -> float:
        return self._before - float(self._evaluate(model))


class _Divergence:
    """Mean KL divergence of the predictions from those of the whole network."""

    def __init__(self, model, calibration):
        self._batches = list(model_batches(model, calibration))
        self._targets = [self._log_p(model, *batch) for batch in self._batches]

    def __call__(self, model) -> float:
        total = count = 0.0
        for batch, target in zip(self._batches, self._targets, strict=True):
            total += float((target.exp() * (target - self._log_p(model, *batch))).sum())
            count += target.numel() / target.shape[1]
        return total / count

    @staticmethod
    def _log_p(model, args, kwargs):
        logits = next(leaves(model(*args, **kwargs)))
        if logits.dim() < 2:
            raise ValueError(f"the network's output must be logits with classes on axis 1, got shape {logits.shape}")
        return logits.double().log_softmax(1)
