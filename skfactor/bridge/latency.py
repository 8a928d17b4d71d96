"""How long layers and networks take on this machine: repeated, warmed up, the candidates by turns."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skfactor.bridge.batchnorm import leaves
from skfactor.bridge.calibrate import evaluation, hooked, model_batches

__all__ = ["LayerInputs", "describe", "example_batch", "inputs_of_layers", "latencies", "layer_latencies",
           "quiet_clock"]

#: Shortest time that is measured at once; a layer that is faster runs in a loop.
LEAST_SECONDS = 0.004
REPEATS = 7


def latencies(functions: Iterable[Callable[[], Any]], *, repeats: int = REPEATS, least_seconds: float = LEAST_SECONDS,
              device: torch.device | None = None, clock: Callable[[], float] | None = None) -> list[float]:
    """Seconds of one call of each function: the least of `repeats`, taken by turns after a warm-up.

    What disturbs a measurement makes it longer, never shorter; and what disturbs for a while disturbs all. `clock` is
    that of the wall when None.
    """
    functions = list(functions)
    stopwatch = _Stopwatch(clock or time.perf_counter, device)
    loops = [_loops(function, least_seconds, stopwatch) for function in functions]
    best = [math.inf] * len(functions)
    for _ in range(repeats):
        for i, (function, n) in enumerate(zip(functions, loops, strict=True)):
            best[i] = min(best[i], stopwatch(function, n) / n)
    return best


def _loops(function, least_seconds, stopwatch) -> int:
    """Calls that take `least_seconds` together; the first two calls are the warm-up."""
    for _ in range(2):
        function()
    return max(1, math.ceil(least_seconds / max(1e-7, stopwatch(function, 1))))


@dataclass(frozen=True)
class _Stopwatch:
    clock: Callable[[], float]
    device: torch.device | None

    def __call__(self, function: Callable[[], Any], n: int) -> float:
        """Seconds of n calls."""
        self._wait()
        start = self.clock()
        for _ in range(n):
            function()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def quiet_clock(device: torch.device) -> Callable[[], float]:
    """The clock that other work on the machine disturbs least.

    Where one thread of the CPU does everything, that is its own time: the same as the time of the wall on an idle
    machine, and right on a busy one, where the wall's would choose by chance.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone and time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter


def example_batch(model: nn.Module, example_inputs: Any, calibration: Any, what: str) -> tuple[tuple, dict]:
    """Arguments of one forward pass: of the example inputs, or else the first calibration batch.

    ValueError, saying what needs them, where there are neither.
    """
    if example_inputs is None:
        if calibration is None or isinstance(calibration, str):
            raise ValueError(f"{what} runs the network: give example_inputs, or inputs as calibration")
        return next(iter(model_batches(model, calibration)))
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)  # one pass, whatever its length
    return next(iter(model_batches(model, example_inputs)))


@dataclass(frozen=True)
class LayerInputs:
    """One kind of input of a layer: a tensor whose values do not matter (integers are kept, they index)."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    values: torch.Tensor | None = None

    @classmethod
    def of(cls, x: torch.Tensor) -> LayerInputs:
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device, None if x.is_floating_point() else x.detach())

    def __hash__(self):
        return hash((self.shape, self.stride, self.dtype))

    def __eq__(self, other):
        return (self.shape, self.stride, self.dtype) == (other.shape, other.stride, other.dtype)

    def tensor(self) -> torch.Tensor:
        if self.values is not None:
            return self.values
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(self.shape, generator=generator).to(self.device, self.dtype)
        dense = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1 == values.numel()
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype,
                                   device=self.device).copy_(values) if dense else values


def inputs_of_layers(model: nn.Module, layers: Iterable[nn.Module],
                     batch: tuple[tuple, dict]) -> dict[nn.Module, Counter]:
    """The inputs that each layer gets in one forward pass and how often; layers that are not called are left out."""
    seen: dict[nn.Module, Counter] = {}

    def remember(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(module, Counter())[LayerInputs.of(x)] += 1

    args, kwargs = batch
    with hooked((layer, remember, "before") for layer in layers), evaluation(model):
        model(*args, **kwargs)
    return seen


def layer_latencies(layers: list[nn.Module], inputs: Mapping[LayerInputs, int]) -> list[float]:
    """Seconds that each of several layers takes for all calls of one forward pass, by the quiet clock."""
    totals = [0.0] * len(layers)
    with torch.no_grad():
        for kind, count in inputs.items():
            x = kind.tensor()
            times = latencies([_call(layer.forward, x) for layer in layers], device=kind.device,
                              clock=quiet_clock(kind.device))
            totals = [total + count * t for total, t in zip(totals, times, strict=True)]
    return totals


def _call(function, x):
    return lambda: function(x)


def describe(value: Any) -> tuple[str, ...]:
    """Shape and dtype of all tensors in the arguments of a forward pass: "64x3x32x32 float32"."""
    return tuple(f"{'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}"
                 for x in leaves(value))
