"""`EntropyTraining`: the bytes of the file as a term of the training loss."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from skfactor.bridge.apply import compress, deep_copy
from skfactor.bridge.result import CompressionResult
from skfactor.bridge.training.base import TrainingMethod
from skfactor.estimators.uniform_quantizer import UniformQuantizer
from skfactor.exceptions import LayerError

__all__ = ["EntropyTraining"]

_REFRESH = 100  # steps of the optimizer between two looks at how busy rows and columns are
_BIAS_STEP = 4.0  # step of a bias in steps of its layer's weight: biases need fewer digits
_BIAS_MARGIN = 6.0  # bits of a bias that is not zero
_RARE, _COMMON = 2e-3, 0.9  # bounds of the probability that a code is not zero
_KNEE = 0.5  # codes below it cost about linearly, codes above logarithmically
_FILE_BYTES, _TENSOR_BYTES = 81, 10  # an empty container; its entry, step and first bits of a tensor


class _Rounded(torch.autograd.Function):
    """weight -> nearest multiple of the step; gradients pass as if nothing were rounded."""

    @staticmethod
    def forward(ctx, weight, log_step, factor):
        step = log_step.exp() * factor
        scaled = weight / step
        codes = scaled.round()
        ctx.save_for_backward(codes - scaled, step)
        return codes * step

    @staticmethod
    def backward(ctx, grad):
        gap, step = ctx.saved_tensors
        return grad, (grad * gap).sum() * step, None


class _Price(torch.autograd.Function):
    """Penalty of one tensor: a log of every code, weighted, and `group_log_penalty`; a few operations instead of the
    two dozen that autograd would record for each small tensor."""

    @staticmethod
    def forward(ctx, weight, log_step, factor, margin, rate, group):
        step = log_step.exp() * factor
        size = (weight / step).abs()
        total = (margin * torch.log1p(size / _KNEE)).sum() * rate
        slope = margin * rate / (size + _KNEE)
        if group and size.dim() > 1:
            inner = tuple(range(2, size.dim()))
            rows, columns = size.sum((1, *inner), keepdim=True) + 1.0, size.sum((0, *inner), keepdim=True) + 1.0
            total = total + (rows.log2().sum() + columns.log2().sum()) * group
            slope += (1.0 / rows + 1.0 / columns) * (group / math.log(2))
        ctx.save_for_backward(slope * weight.sign() / step, (slope * size).sum())
        return total

    @staticmethod
    def backward(ctx, grad):
        of_weight, of_log_step = ctx.saved_tensors
        return grad * of_weight, -grad * of_log_step, None, None, None, None


class _StraightThrough(nn.Module):
    """Parametrization: weight -> nearest multiple of the step."""

    def __init__(self, log_step: nn.Parameter, factor: float):
        super().__init__()
        self.log_step = log_step
        self.factor = factor

    def step(self) -> torch.Tensor:
        return self.log_step.exp() * self.factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _Rounded.apply(weight, self.log_step, self.factor)


@dataclass
class _Coded:
    """One tensor in training: where it lives and what a code other than zero costs there, in bits."""

    name: str
    original: nn.Parameter
    codes: _StraightThrough
    margin: torch.Tensor

    def scaled(self) -> torch.Tensor:
        return self.original / self.codes.step()


class EntropyTraining(TrainingMethod):
    r"""Train weights and their quantisation steps for loss and file size together.

    Every weight is used as an integer multiple :math:`s q` of its tensor's step, rounded with straight-through
    gradients; the step is a parameter. With :math:`u = w / s` the penalty is

    .. math:: \frac{\lambda}{8} \sum_{ij} m_{ij} \frac{\log(1 + 2 |u_{ij}|)}{\log 3}
              + \gamma \sum_{g} \log_2 (1 + \textstyle\sum_{i \in g} |u_i|) ,

    where :math:`m_{ij}` is what the entropy coder charges for a code other than zero in that row and column: it is
    read off the codes every 100 steps. Weights in busy rows and columns are therefore cheap, lonely ones dear, and
    what remains is what the coder stores well.

    Parameters
    ----------
    model : Module
        Stays as it is; a copy is trained.
    rate_weight : float, default=1e-4
        :math:`\lambda`: what one byte costs in units of the loss. With a mean cross-entropy over N samples,
        ``8 * ln(2) / N`` is the price at which model and labels are described shortest together.
    group_weight : float, default=0.0
        :math:`\gamma`: weight of the group penalty on rows and columns, see `group_log_penalty`.
    step : float, default=0.5
        First step of each tensor, in units of the standard deviation of its values.
    step_lr : float, default=0.5
        Learning rate of the (logarithms of the) steps in units of that of the weights.
    skip : tuple of str, default=()
        Names (glob patterns) of parameters to leave as they are; they are stored losslessly.

    Attributes
    ----------
    model : Module
        The copy in training; its layers compute with rounded weights.

    Examples
    --------
    >>> import torch
    >>> from skfactor import EntropyTraining
    >>> net = torch.nn.Linear(8, 4)
    >>> method = EntropyTraining(net, rate_weight=1e-3)
    >>> optimizer = torch.optim.Adam(method.parameter_groups(lr=1e-2))
    >>> x, y = torch.eye(8), torch.arange(8) % 4
    >>> for _ in range(5):
    ...     loss = torch.nn.functional.cross_entropy(method.model(x), y) + method.penalty()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); method.after_step()
    >>> result = method.finish()
    >>> bool((result.model.weight == method.model.weight).all())
    True
    """

    def __init__(self, model: nn.Module, *, rate_weight: float = 1e-4, group_weight: float = 0.0, step: float = 0.5,
                 step_lr: float = 0.5, skip: tuple[str, ...] = ()):
        for name, value, positive in (("rate_weight", rate_weight, False), ("group_weight", group_weight, False),
                                      ("step", step, True), ("step_lr", step_lr, False)):
            _check_number(name, value, positive)
        self.rate_weight, self.group_weight, self.step_lr = rate_weight, group_weight, step_lr
        self.model, self._plain = deep_copy(model), deep_copy(model)
        self._coded = _parametrize_all(self.model, step, skip)
        if not self._coded:
            raise LayerError(f"no weight of the network is left to train: skip={skip!r}")
        self._n_steps = 0
        self._refresh()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Weights with `lr`, steps with ``step_lr * lr`` and no weight decay."""
        steps = list({id(c.codes.log_step): c.codes.log_step for c in self._coded}.values())
        own = {id(p) for p in steps}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [{"params": weights, "lr": lr}, {"params": steps, "lr": self.step_lr * lr, "weight_decay": 0.0}]

    def penalty(self) -> torch.Tensor:
        """Price of the bytes and of the groups; differentiable in weights and steps."""
        total = super().penalty()
        rate = self.rate_weight / 8 / math.log1p(1 / _KNEE)
        for coded in self._coded:
            codes = coded.codes
            total = total + _Price.apply(coded.original, codes.log_step, codes.factor, coded.margin, rate,
                                         self.group_weight)
        return total

    def after_step(self) -> None:
        """Every 100 steps the prices of codes are read off the rows and columns again."""
        self._n_steps += 1
        if self._n_steps % _REFRESH == 0:
            self._refresh()

    def steps(self) -> dict[str, float]:
        """Step of every tensor in training, by name, as a file stores it."""
        return {c.name: float(c.codes.step().detach().float()) for c in self._coded}

    @torch.no_grad()
    def estimated_bytes(self) -> float:
        """Bytes that a file of the present codes takes, without coding them."""
        bits = sum(_code_length(c.scaled().round()) for c in self._coded)
        coded = {id(c.original) for c in self._coded}
        raw = sum(p.numel() * p.element_size() for p in self.model.parameters()
                  if id(p) not in coded and p.dim() > 0)
        return bits / 8 + _FILE_BYTES + _TENSOR_BYTES * len(self._coded) + raw

    def finish(self) -> CompressionResult:
        """Plain layers with the rounded weights, and their codes as `UniformQuantizer` stores them."""
        # not by removing parametrizations from a copy: copies share the class that carries them
        plain = deep_copy(self._plain)
        with torch.no_grad():
            for name, value in [*plain.named_parameters(), *plain.named_buffers()]:
                owner, _, short = name.rpartition(".")
                value.copy_(getattr(self.model.get_submodule(owner), short))
        rules = {c.name: UniformQuantizer(step, unit="absolute", entropy_weight=0.0)
                 for c, step in zip(self._coded, self.steps().values(), strict=True)}
        return compress(plain, rules | {"*": None}, progress=False)

    def state_dict(self) -> dict[str, Any]:
        """Model with its steps, prices of codes, and how far the training is."""
        return {"model": {k: v.clone() for k, v in self.model.state_dict().items()}, "n_steps": self._n_steps,
                "margins": {c.name: c.margin.clone() for c in self._coded}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self._n_steps = state["n_steps"]
        for coded in self._coded:
            coded.margin = state["margins"][coded.name].to(coded.original).clone()

    @torch.no_grad()
    def _refresh(self) -> None:
        for coded in self._coded:
            coded.margin = _margins(coded.scaled())


def _check_number(name: str, value: Any, positive: bool) -> None:
    allowed = "a positive number" if positive else "a number of at least 0"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    if not (0 < value < math.inf or (value == 0 and not positive)):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _parametrize_all(model: nn.Module, step: float, skip: tuple[str, ...]) -> list[_Coded]:
    """Give every weight (and the bias beside it) codes; tied parameters are refused by name."""
    coded, seen = [], {}
    for prefix, module in list(model.named_modules()):
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.is_floating_point()]
        log_step = None
        for short, parameter in sorted(own, key=lambda item: -item[1].dim()):  # weights before their biases
            name = f"{prefix}.{short}" if prefix else short
            if id(parameter) in seen:
                raise LayerError(f"{name} is tied to {seen[id(parameter)]}: name both in skip")
            if any(fnmatchcase(name, pattern) for pattern in skip) or not parameter.requires_grad:
                continue
            if parameter.dim() < 2 and log_step is None:
                continue  # scales of a normalisation and the like have no weight beside them
            seen[id(parameter)] = name
            factor = _BIAS_STEP if parameter.dim() < 2 else 1.0
            if parameter.dim() > 1:
                log_step = _first_step(parameter, step, name)
            codes = _StraightThrough(log_step, factor)
            parametrize.register_parametrization(module, short, codes)
            original = module.parametrizations[short].original
            coded.append(_Coded(name, original, codes, torch.empty(0)))
    return coded


def _first_step(parameter: nn.Parameter, step: float, name: str) -> nn.Parameter:
    scale = float(parameter.detach().double().pow(2).mean().sqrt())
    if not 0 < scale < math.inf:
        raise LayerError(f"{name} has no finite weight other than zero; train or initialise it first")
    return nn.Parameter(torch.tensor(math.log(step * scale), dtype=parameter.dtype, device=parameter.device))


def _activity(nonzero: torch.Tensor) -> torch.Tensor:
    """Probability that a code is not zero, from how many are not in its row and in its column; (rows, columns)."""
    inside = nonzero.shape[2]
    mean = nonzero.mean() + 1e-6
    rows = (nonzero.sum((1, 2)) + 2 * mean) / (nonzero.shape[1] * inside + 2)
    columns = (nonzero.sum((0, 2)) + 2 * mean) / (nonzero.shape[0] * inside + 2)
    return (rows[:, None] * columns[None, :] / mean).clamp(_RARE, _COMMON)


def _margins(scaled: torch.Tensor) -> torch.Tensor:
    """Bits of a code other than zero above those of a zero, sign and first magnitude bit included."""
    if scaled.dim() < 2:
        return torch.full_like(scaled, _BIAS_MARGIN)
    size = scaled.abs().clamp(max=1.0)
    size = torch.where(size < 0.5, size * size, size)  # a weight on its way to zero counts a little
    p = _activity(size.flatten(2) if size.dim() > 2 else size[:, :, None])
    margin = (torch.log2((1 - p) / p) + 2.0).clamp(min=0.7)
    return margin.reshape(*scaled.shape[:2], *[1] * (scaled.dim() - 2)).expand_as(scaled).contiguous()


def _code_length(codes: torch.Tensor) -> float:
    """Bits of integer codes: dead rows and columns told, then zero or not by row and column, sign, magnitude."""
    size = codes.abs().flatten(2) if codes.dim() > 2 else codes.abs().reshape(len(codes), -1, 1)
    some = (size > 0).float()
    rows, columns = some.sum((1, 2)) > 0, some.sum((0, 2)) > 0
    if not rows.any():
        return 0.0
    side = _flag_bits(rows) + _flag_bits(columns)
    size, some = size[rows][:, columns], some[rows][:, columns]
    p = _activity(some)[:, :, None].expand_as(some)
    zero_or_not = -(some * torch.log2(p) + (1 - some) * torch.log2(1 - p)).sum()
    n, total = some.sum(), size.sum()
    further = _entropy_of(n / total) * total  # magnitudes as a geometric distribution
    return side + float(zero_or_not + n + further)


def _flag_bits(flags: torch.Tensor) -> float:
    return len(flags) * float(_entropy_of(flags.float().mean()))


def _entropy_of(p: torch.Tensor) -> torch.Tensor:
    """Bits of one decision with probability `p`."""
    p = p.double().clamp(1e-9, 1 - 1e-9)
    return -(p * torch.log2(p) + (1 - p) * torch.log2(1 - p))
