"""What a network costs to run: its parameters, its multiplications and its latency, before and after."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skfactor.bridge.calibrate import evaluation
from skfactor.bridge.latency import REPEATS, describe, latencies
from skfactor.report import NetworkCost

__all__ = ["count_macs", "count_parameters", "measure_cost"]

#: Shortest time in which a whole network is measured.
LEAST_SECONDS = 0.02


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one forward pass: convolutions and matrix products, attention included.

    Recurrent layers run as one operation that torch does not count.

    Examples
    --------
    >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 4, 4)) == 3 * 8 * 9 * 4 * 4
    True
    """
    counter = FlopCounterMode(display=False)
    with evaluation(model), _countable(), counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


@contextmanager
def _countable() -> Iterator[None]:
    """Attention in operations that can be counted: the fused ones count as nothing on a CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def measure_cost(before: nn.Module, after: nn.Module, batch: tuple[tuple, dict]) -> NetworkCost:
    """Cost of one forward pass of two networks that compute the same.

    Parameters
    ----------
    before, after : Module
    batch : (args, kwargs)
    """
    args, kwargs = batch
    device = next((p.device for p in before.parameters()), torch.device("cpu"))
    with evaluation(before), evaluation(after):
        seconds = latencies([lambda: before(*args, **kwargs), lambda: after(*args, **kwargs)],
                            least_seconds=LEAST_SECONDS, device=device)
    return NetworkCost(
        count_parameters(before), count_parameters(after), count_macs(before, *args, **kwargs),
        count_macs(after, *args, **kwargs), *seconds, inputs=describe([args, kwargs]),
        threads=torch.get_num_threads(), device=str(device), repeats=REPEATS,
    )
