"""`SoftSharingTraining`: a Gaussian mixture learned together with the weights, then hard sharing."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch import nn

from skfactor.bridge.apply import deep_copy
from skfactor.bridge.layers import entries_of_module
from skfactor.bridge.result import CompressionResult
from skfactor.bridge.rules import resolve_rules
from skfactor.bridge.training._finish import compress_as_planned
from skfactor.bridge.training.base import TrainingMethod
from skfactor.estimators.soft_sharer import SoftWeightSharer, mixture_start, precision_prior

__all__ = ["MixturePrior", "SoftSharingTraining"]

_NODES_PER_STD = 16
_MOST_NODES = 1 << 15


class _Splat(torch.autograd.Function):
    """Mass of every node of a grid of step h, each value giving it to the two nodes beside it in linear proportion."""

    @staticmethod
    def forward(ctx, values, step, first, n_nodes):
        place = values / step - first
        left = place.floor().clamp_(0, n_nodes - 2)
        right_share = (place - left).double()
        left = left.long()
        moved = torch.bincount(left, right_share, minlength=n_nodes)
        mass = torch.bincount(left, minlength=n_nodes).double() - moved
        mass[1:] += moved[:-1]
        ctx.save_for_backward(left)
        ctx.step, ctx.dtype = step, values.dtype
        return mass

    @staticmethod
    def backward(ctx, of_mass):
        (left,) = ctx.saved_tensors
        slope = torch.diff(of_mass) / ctx.step
        return slope.to(ctx.dtype)[left], None, None, None


class MixturePrior(nn.Module):
    r"""Mixture of Gaussians over weights: its parameters are learned, its cost is minus the log density.

    Parameters
    ----------
    sharer : SoftWeightSharer
        Components, pinned mixing weight and hyper-priors.
    weights : Tensor of shape (n,)
        The weights at the start.

    Attributes
    ----------
    means : Parameter of shape (n_components - 1,)
        In units of `unit`, the root mean square of the weights at the start, as all that is learned: so one learning
        rate fits weights of any scale.
    log_precisions : Parameter of shape (n_components,)
    logits : Parameter of shape (n_components - 1,) or (n_components,)
        Of the mixing weights; without the pinned one.
    """

    def __init__(self, sharer: SoftWeightSharer, weights: torch.Tensor):
        super().__init__()
        self.zero_weight = sharer.zero_weight
        values = weights.detach().double().cpu().numpy()
        self.unit = float(np.sqrt(np.mean(np.square(values)))) or 1.0
        pi, mu, precision = mixture_start(sharer, values / self.unit, 1.0)
        prior = precision_prior(sharer, 1.0)
        device = weights.device

        def tensor(a):
            return torch.as_tensor(a, dtype=torch.float64, device=device)

        self.means = nn.Parameter(tensor(mu[1:]))
        self.log_precisions = nn.Parameter(tensor(np.log(precision)))
        self.logits = nn.Parameter(tensor(np.log(pi if self.zero_weight is None else pi[1:])))
        self.register_buffer("prior_shape", tensor(prior.shape))
        self.register_buffer("prior_rate", tensor(prior.rate))

    def mixture(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logarithms of the mixing weights, means and precisions, in units of `unit`; component 0 is at zero."""
        log_weights = torch.log_softmax(self.logits, 0)
        if self.zero_weight is not None:
            pinned = log_weights.new_tensor([math.log(self.zero_weight)])
            log_weights = torch.cat([pinned, log_weights + math.log1p(-self.zero_weight)])
        return log_weights, torch.cat([self.means.new_zeros(1), self.means]), self.log_precisions.exp()

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        r"""Cost :math:`-\sum_i \log p(w_i) - \sum_k \log \Gamma(t_k|a_k, b_k)` in nats, up to constants.

        The density is a function of one number: it is evaluated on a grid of a sixteenth of the smallest standard
        deviation, and weights between two nodes get the linear interpolation, whose gradient this has exactly.
        """
        log_weights, means, precisions = self.mixture()
        values = weights / self.unit
        low, high = (float(v) for v in torch.aminmax(values.detach()))
        step = self._step(low, high, float(precisions.detach().max()))
        first = math.floor(low / step)
        n_nodes = math.ceil(high / step) - first + 2
        mass = _Splat.apply(values, step, first, n_nodes)
        nodes = (torch.arange(n_nodes, dtype=torch.float64, device=mass.device) + first) * step
        log_joint = log_weights + 0.5 * precisions.log() - 0.5 * precisions * (nodes[:, None] - means).square()
        cost = -(mass * torch.logsumexp(log_joint, 1)).sum()
        hyper = ((self.prior_shape - 1) * self.log_precisions - self.prior_rate * precisions).sum()
        return cost - hyper

    @staticmethod
    def _step(low: float, high: float, largest_precision: float) -> float:
        """A power of two, so that 0 is always a node and small changes of the mixture do not move the grid."""
        step = 2.0 ** math.floor(math.log2(largest_precision**-0.5 / _NODES_PER_STD))
        while (high - low) / step > _MOST_NODES:
            step *= 2
        return step


class SoftSharingTraining(TrainingMethod):
    r"""Soft weight-sharing: train under loss + :math:`\tau` times the cost of the weights under a learned mixture.

    All weights that one rule takes share one mixture, as in the paper; a rule of its own gives a layer a mixture of its
    own. `finish` merges components and gives every weight the value of its component.

    Parameters
    ----------
    model : Module
        Copied, never changed.
    rules : SoftWeightSharer or dict
        As in `skfactor.compress`: `{"*": sharer, "*.bias": sharer}` has the biases in it too. Other compressors do
        nothing until `finish`.
    tau : float, default=1e-6
        Price of a nat beside a loss that is a mean over examples. 1 / (number of training examples) is the price of
        Bayes' rule; smaller ones keep more of the weights.
    mixture_lr : float, default=5e-3
        Learning rate of the mixture in `parameter_groups`, for an optimizer like Adam. Its parameters are logarithms
        and means in units of the root mean square of the weights.

    Attributes
    ----------
    model : Module
        The copy to train.
    mixtures : list of MixturePrior
        One for each rule with a `SoftWeightSharer`.

    Examples
    --------
    >>> import torch
    >>> from skfactor import SoftSharingTraining, SoftWeightSharer
    >>> net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 2))
    >>> x, y = torch.randn(64, 20), torch.arange(64) % 2
    >>> method = SoftSharingTraining(net, SoftWeightSharer(n_components=5), tau=1e-4)
    >>> optimizer = torch.optim.Adam(method.parameter_groups(lr=1e-3))
    >>> for step in range(5):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(method.model(x), y) + method.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     method.after_step()
    >>> result = method.finish()
    >>> len(result.model[0].weight.unique()) <= 5
    True
    """

    def __init__(self, model: nn.Module, rules: Any, *, tau: float = 1e-6, mixture_lr: float = 5e-3):
        for name, value in (("tau", tau), ("mixture_lr", mixture_lr)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        self.tau, self.mixture_lr = tau, mixture_lr
        self.model = deep_copy(model)
        network = entries_of_module(self.model)
        self._plan = resolve_rules(rules, network.entries)
        groups: dict[int, list[str]] = {}
        for name, rule in self._plan.taken.items():
            if isinstance(rule, SoftWeightSharer):
                rule._validate_params()
                groups.setdefault(id(rule), []).append(name)
        if not groups:
            raise ValueError("rules must give at least one layer a SoftWeightSharer, got none")
        self._groups = list(groups.values())
        self._tensors = {name: network.tensors[name] for names in self._groups for name in names}
        self.mixtures = [MixturePrior(self._plan.taken[names[0]], self._flat(names)) for names in self._groups]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Those of the network at `lr`, and those of the mixtures at `mixture_lr` and without weight decay."""
        mixture = [p for m in self.mixtures for p in m.parameters()]
        return [*super().parameter_groups(lr), {"params": mixture, "lr": self.mixture_lr, "weight_decay": 0.0}]

    def penalty(self) -> torch.Tensor:
        """:math:`\\tau` times the cost of all weights under their mixtures, in nats."""
        costs = [mixture(self._flat(names)) for mixture, names in zip(self.mixtures, self._groups, strict=True)]
        return self.tau * sum(costs[1:], costs[0]).float()

    def finish(self) -> CompressionResult:
        """Merge components, share by the largest responsibility."""
        estimators = {}
        for mixture, names in zip(self.mixtures, self._groups, strict=True):
            with torch.no_grad():
                log_weights, means, precisions = (t.cpu().numpy() for t in mixture.mixture())
            start = {"weights_init": np.exp(log_weights), "means_init": means * mixture.unit,
                     "precisions_init": precisions / mixture.unit**2}
            for name in names:
                estimators[name] = clone(self._plan.taken[name]).set_params(max_iter=0, **start)
        return compress_as_planned(self.model, self._plan, estimators)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(),
                "mixtures": [{"unit": m.unit, **m.state_dict()} for m in self.mixtures]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["mixtures"]) != len(self.mixtures):
            raise ValueError(f"the state has {len(state['mixtures'])} mixtures, this method {len(self.mixtures)}")
        self.model.load_state_dict(state["model"])
        for mixture, saved in zip(self.mixtures, state["mixtures"], strict=True):
            mixture.unit = float(saved["unit"])
            mixture.load_state_dict({k: v for k, v in saved.items() if k != "unit"})

    def _flat(self, names: list[str]) -> torch.Tensor:
        """All weights of a group as one vector, in float32 at least, on the device of the first."""
        device = self._tensors[names[0]].device
        parts = [self._tensors[name].reshape(-1).to(device) for name in names]
        return torch.cat([p if p.dtype == torch.float64 else p.float() for p in parts])
