"""`finetune`: one small training loop for networks that were compressed, and for methods that compress in training."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from skfactor.bridge.apply import deep_copy
from skfactor.bridge.calibrate import evaluation
from skfactor.bridge.layers import entries_of_module
from skfactor.bridge.training.base import TrainingMethod
from skfactor.bridge.training.checkpoint import load_state, save_state
from skfactor.bridge.training.weights import masks_of_zeros, multiply

__all__ = ["FineTuned", "finetune"]

_FORMAT = 1


@dataclass
class FineTuned:
    """What `finetune` gives back.

    Attributes
    ----------
    model : Module
        The trained network: a copy of the one given, or `method.model`.
    history : list of dict
        For every epoch its number, the mean `loss` (penalty included), the learning rate `lr` at its end and, with
        `validate`, the `score`.
    """

    model: nn.Module
    history: list[dict[str, Any]]


def finetune(model: nn.Module | TrainingMethod, train_loader: Any, *, epochs: int = 10, lr: float = 0.01,
             momentum: float = 0.9, weight_decay: float = 0.0, warmup_epochs: float = 0.0,
             label_smoothing: float = 0.0, loss: Callable | None = None, teacher: nn.Module | None = None,
             distillation: float = 0.5, temperature: float = 4.0, optimizer: Callable | None = None,
             batch_size: int = 128, augment: Callable | None = None, keep_zeros: bool = False,
             freeze_batch_norm: bool = False, validate: Callable | None = None, callback: Callable | None = None,
             amp: bool = False, channels_last: bool = False, checkpoint: str | PathLike | None = None,
             resume: bool = True, progress: bool = True, random_state: int = 0, device: Any = None) -> FineTuned:
    r"""Train a network on: SGD with momentum, a linear warm-up, then a cosine to zero.

    With a teacher the loss of a batch is

    .. math:: (1-w)\,\ell(f(x), y) + w\,T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(g(x)/T)\,\|\,\mathrm{softmax}(f(x)/T)
              \bigr)

    (Hinton, Vinyals, Dean 2015, arXiv:1503.02531). A method's `penalty()` is added, and its `after_step()` and
    `after_epoch()` are called. Nothing here is needed with a loop of your own.

    Parameters
    ----------
    model : Module or TrainingMethod
        Of a module a copy is trained; a method's network is trained in place.
    train_loader : iterable of (x, y), pair of tensors, or tensor
        Iterated once an epoch. A pair (X, y) is shuffled and cut into batches of `batch_size` (a last batch of one is
        left out); a tensor alone is inputs without labels, for `distillation=1`. `x` may be a tensor, a tuple of
        positional or a dict of keyword arguments.
    epochs : int, default=10
    lr, momentum, weight_decay : float, default=0.01, 0.9, 0.0
        Of SGD. A method may give its own parameters other rates.
    warmup_epochs : float, default=0.0
        Over which the rate rises from zero.
    label_smoothing : float, default=0.0
        Of the cross-entropy.
    loss : callable, default=None
        `loss(output, y)`, instead of the cross-entropy.
    teacher : Module, default=None
        Usually the original network. Run in eval mode; never changed.
    distillation : float, default=0.5
        Share w of the teacher's term, in [0, 1]; outputs must be logits.
    temperature : float, default=4.0
    optimizer : callable, default=None
        `optimizer(parameter_groups)`, such as `torch.optim.Adam`, instead of SGD; every group has its `lr`.
    batch_size : int, default=128
        Of a pair of tensors.
    augment : callable, default=None
        `augment(x, generator)`, called with every batch of inputs and a `torch.Generator`.
    keep_zeros : bool, default=False
        Of a module: weights of layers that are zero stay zero. A method decides that itself.
    freeze_batch_norm : bool, default=False
        Batch normalisations use and keep their running statistics: for networks into whose layers they were folded.
    validate : callable, default=None
        `validate(model)` after each epoch, in eval mode and without gradients; its number goes into the history.
    callback : callable, default=None
        `callback(record)` after each epoch, with the record that the history gets.
    amp : bool, default=False
        Mixed precision (bfloat16); on CUDA only, on a CPU it is slower.
    channels_last : bool, default=False
        The channels-last memory format for weights and batches of images.
    checkpoint : path, default=None
        File that has the state after each epoch, written beside its place and renamed.
    resume : bool, default=True
        Go on from the file at `checkpoint`, if there is one; the result is that of a run that was not interrupted.
    progress : bool, default=True
        Show a progress bar when the output is a terminal.
    random_state : int, default=0
        Every epoch draws from a seed of its own, also what the loader and the network draw from torch's global
        generator, whose state is put back at the end.
    device : device, default=None
        Where a copy of a module is trained; that of the network when None.

    Returns
    -------
    tuned : FineTuned

    Raises
    ------
    ValueError
        A setting out of range; a checkpoint of other settings; a loss that is not finite.

    Examples
    --------
    >>> import torch, skfactor
    >>> X = torch.linspace(-1, 1, 64)[:, None]
    >>> pruned = skfactor.compress(torch.nn.Linear(1, 2), skfactor.MagnitudePruner(0.5)).model
    >>> tuned = skfactor.finetune(pruned, (X, (X[:, 0] > 0).long()), epochs=3, lr=0.5, keep_zeros=True)
    >>> int((tuned.model.weight == 0).sum()), len(tuned.history)
    (1, 3)
    """
    method = _as_method(model, keep_zeros, device)
    place = _device_of(method.model)
    _check(epochs=epochs, lr=lr, batch_size=batch_size, distillation=distillation, temperature=temperature)
    if amp and place.type != "cuda":
        raise ValueError(f"amp is for CUDA, got a network on {place}")
    if channels_last:
        method.model.to(memory_format=torch.channels_last)
    if teacher is None and loss is None and isinstance(train_loader, torch.Tensor):
        raise ValueError("inputs without labels need a teacher and distillation=1")
    settings = {"epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                "warmup_epochs": warmup_epochs, "label_smoothing": label_smoothing, "distillation": distillation,
                "temperature": temperature, "batch_size": batch_size, "random_state": random_state,
                "has_teacher": teacher is not None}
    run = _Run(method, place, _Batches(train_loader, batch_size, augment),
               _Loss(loss, label_smoothing, teacher, distillation, temperature), amp, channels_last, freeze_batch_norm)
    groups = method.parameter_groups(lr)
    run.optimizer = (optimizer(groups) if optimizer
                     else torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay))
    run.schedule = _Schedule([group["lr"] for group in run.optimizer.param_groups], epochs, warmup_epochs)
    history = _resumed(run, checkpoint, settings) if checkpoint is not None and resume else []
    modes = [(module, module.training) for module in method.model.modules()]
    bar = tqdm(total=epochs, initial=len(history), disable=None if progress else True, unit="epoch", desc="finetune")
    try:
        with bar, _random_numbers_kept():
            for epoch in range(len(history), epochs):
                torch.manual_seed(_seed(random_state, epoch))
                record = {"epoch": epoch + 1} | run.epoch(epoch, bar) | _score(validate, method.model)
                history.append(record)
                if checkpoint is not None:
                    save_state(checkpoint, {"format": _FORMAT, "settings": settings, "history": history,
                                            "method": method.state_dict(), "optimizer": run.optimizer.state_dict()})
                if callback is not None:
                    callback(dict(record))
    finally:
        for module, training in modes:
            module.training = training
    return FineTuned(method.model, history)


def _check(epochs, lr, batch_size, distillation, temperature) -> None:
    if not (isinstance(epochs, int) and epochs >= 0):
        raise ValueError(f"epochs must be an integer of at least 0, got {epochs!r}")
    if not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive, got {lr!r}")
    if not 0 <= distillation <= 1:
        raise ValueError(f"distillation must be in [0, 1], got {distillation!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")


class _Plain(TrainingMethod):
    """A network that is trained as any other, with zeros kept or not."""

    def __init__(self, model: nn.Module, keep_zeros: bool, device: Any):
        self.model = deep_copy(model)
        if device is not None:
            self.model.to(device)
        network = entries_of_module(self.model)
        weights = [network.tensors[name] for name, owners in network.owners.items() if owners]
        self._masks = masks_of_zeros(weights) if keep_zeros else []

    def after_step(self) -> None:
        multiply(self._masks)


def _as_method(model: Any, keep_zeros: bool, device: Any) -> TrainingMethod:
    if isinstance(model, TrainingMethod):
        if keep_zeros:
            raise ValueError("keep_zeros is for modules; a method decides itself what stays zero")
        if device is not None and torch.device(device) != _device_of(model.model):
            raise ValueError(f"the method's network is on {_device_of(model.model)}, got device={device!r}: "
                             "move the network before it is given to the method")
        return model
    if isinstance(model, nn.Module):
        return _Plain(model, keep_zeros, device)
    hint = "; give result.model, or skfactor.TrainedSharing(result)" if hasattr(model, "tensors") else ""
    raise TypeError(f"model must be a torch.nn.Module or a TrainingMethod, got {type(model).__name__}{hint}")


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _seed(random_state: int, *more: int) -> int:
    """An independent seed for every epoch, so that a resumed run needs no state of a generator."""
    state = np.random.SeedSequence([random_state, *more]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Put torch's global random numbers back on exit."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _score(validate: Callable | None, model: nn.Module) -> dict[str, Any]:
    if validate is None:
        return {}
    with evaluation(model):
        return {"score": float(validate(model))}


@dataclass
class _Batches:
    """One epoch of (x, y) after the other, whatever they were given as."""

    source: Any
    batch_size: int
    augment: Callable | None

    def __post_init__(self):
        source = self.source
        is_pair = isinstance(source, (tuple, list)) and len(source) == 2 and all(map(_is_array, source))
        self.tensors = None
        if is_pair or _is_array(source):
            self.tensors = tuple(torch.as_tensor(t) for t in (source if is_pair else (source,)))
            if len({len(t) for t in self.tensors}) > 1:
                raise ValueError(f"inputs and labels must be equally many, got {[len(t) for t in self.tensors]}")
        elif not isinstance(source, Iterable) or isinstance(source, (str, bytes, Mapping, Iterator)):
            raise TypeError("train_loader must be an iterable of (x, y) that can be iterated every epoch, a pair of "
                            f"tensors or a tensor, got {type(source).__name__}")

    def __len__(self) -> int:
        """Batches of an epoch; 0 where that is not known."""
        if self.tensors is None:
            return len(self.source) if hasattr(self.source, "__len__") else 0
        n = len(self.tensors[0])
        return n // self.batch_size + (n % self.batch_size > 1) or 1

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
        for batch in self.source if self.tensors is None else self._shuffled(generator):
            x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
            yield (x if self.augment is None else self.augment(x, generator)), y

    def _shuffled(self, generator):
        order = torch.randperm(len(self.tensors[0]), generator=generator)
        for i in range(len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            x, *y = (t[chosen.to(t.device)] for t in self.tensors)
            yield x, (y[0] if y else None)


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 0


@dataclass
class _Loss:
    """The loss of one batch: of the labels, of the teacher, or both."""

    loss: Callable | None
    label_smoothing: float
    teacher: nn.Module | None
    weight: float
    temperature: float

    def __call__(self, output: Any, y: Any, inputs: Any) -> torch.Tensor:
        weight = self.weight if self.teacher is not None else 0.0
        total = 0.0
        if weight < 1:
            if y is None:
                raise ValueError("batches without labels need a teacher and distillation=1")
            total = (1 - weight) * (self.loss(output, y) if self.loss is not None else
                                    F.cross_entropy(output, y, label_smoothing=self.label_smoothing))
        if weight > 0:
            with evaluation(self.teacher):
                target = _forward(self.teacher, inputs)
            total = total + weight * distillation_loss(output, target, self.temperature)
        return total


def distillation_loss(output: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(softmax(target / T) ‖ softmax(output / T)), the mean over the batch; classes on axis 1."""
    log_p, log_q = ((z / temperature).log_softmax(1) for z in (target, output))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _forward(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


@dataclass
class _Schedule:
    """Factor of the learning rates: linear from 0 over the warm-up, then a cosine to 0."""

    rates: list[float]
    epochs: int
    warmup_epochs: float

    def factor(self, done: float) -> float:
        """At `done` epochs, which counts parts of one."""
        if done < self.warmup_epochs:
            return done / self.warmup_epochs
        rest = max(self.epochs - self.warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min((done - self.warmup_epochs) / rest, 1.0)))

    def apply(self, optimizer: torch.optim.Optimizer, done: float) -> None:
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(done)


@dataclass
class _Run:
    """All that an epoch needs."""

    method: TrainingMethod
    device: torch.device
    batches: _Batches
    loss: _Loss
    amp: bool
    channels_last: bool
    freeze_batch_norm: bool
    optimizer: Any = field(default=None, init=False)
    schedule: Any = field(default=None, init=False)

    def epoch(self, number: int, bar: Any) -> dict[str, float]:
        """Train once through the batches; the mean loss and the last learning rate."""
        self._train_mode()
        generator = torch.Generator().manual_seed(torch.initial_seed())
        n_batches, total, count = len(self.batches), 0.0, 0
        for x, y in self.batches.epoch(generator):
            part = (count + 0.5) / n_batches if n_batches else 0.0  # a rate that is never zero
            self.schedule.apply(self.optimizer, number + min(part, 1.0))
            total, count = total + self._step(self._moved(x), _to(y, self.device)), count + 1
            if n_batches:
                bar.update(1 / n_batches)
        if not count:
            raise ValueError("train_loader gave no batches")
        if not n_batches:
            bar.update(1)
        mean = float(total) / count
        if not math.isfinite(mean):
            raise ValueError(f"the loss is {mean} in epoch {number + 1}; a lower lr or a warm-up may help")
        self.method.after_epoch()
        bar.set_postfix(loss=f"{mean:.4g}")
        return {"loss": mean, "lr": self.optimizer.param_groups[0]["lr"]}

    def _step(self, x: Any, y: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss = self.loss(_forward(self.method.model, x), y, x)
        loss = loss + self.method.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.method.after_step()
        return loss.detach()

    def _train_mode(self) -> None:
        model = self.method.model.train()
        if self.freeze_batch_norm:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _moved(self, x: Any) -> Any:
        x = _to(x, self.device)
        if self.channels_last and isinstance(x, torch.Tensor) and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _to(v, device) for k, v in value.items()}
    return type(value)(_to(v, device) for v in value) if isinstance(value, (tuple, list)) else value


def _resumed(run: _Run, checkpoint: str | PathLike, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """History of the checkpoint, once its state is in the method and the optimizer."""
    if not os.path.exists(checkpoint):
        return []
    state = load_state(checkpoint)
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(checkpoint)!r} is no checkpoint of finetune")
    different = [f"{k} {state['settings'].get(k)!r}, now {v!r}" for k, v in settings.items()
                 if state["settings"].get(k) != v]
    if different:
        raise ValueError(f"the checkpoint {os.fspath(checkpoint)!r} was made with other settings: "
                         f"{'; '.join(different)}; resume=False starts again")
    before = copy.deepcopy(run.method.state_dict())
    try:
        run.method.load_state_dict(state["method"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        run.method.load_state_dict(before)
        raise ValueError(f"the checkpoint {os.fspath(checkpoint)!r} is of another network or method: {error}"
                         ) from error
    return list(state["history"])
