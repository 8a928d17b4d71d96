"""Calibration without data: what the inputs of a layer are taken to be from the shape of its weight alone."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from typing import Any

import numpy as np

from skfactor.bridge.rules import Plan, TensorEntry
from skfactor.solvers.feedback import assumed_gram

__all__ = ["ASSUMED", "assumed_side", "check_calibration_word", "not_assumed"]

#: Value of `calibration` that asks for it.
ASSUMED = "assumed"
#: Longest row for which a second moment is made: 512 MB.
LONGEST_ROW = 8192


def check_calibration_word(calibration: Any) -> None:
    """TypeError for a string that is not "assumed"."""
    if isinstance(calibration, str) and calibration != ASSUMED:
        raise TypeError(f"calibration must be inputs of the network, {ASSUMED!r} or None, got str {calibration!r}")


def assumed_side(entry: TensorEntry) -> dict[str, np.ndarray]:
    """Fit parameters of a tensor: the second moment that `assumed_gram` gives for its kernel shape, or nothing.

    A row (c_in, *kernel) of a convolution reads inputs with a common positive mean, uncorrelated between channels and
    correlated between neighbouring pixels; a row (d,) of a linear layer the same without pixels.
    """
    return {} if _problem(entry) else {"input_gram": assumed_gram(_kernel_shape(entry))}


def not_assumed(plan: Plan, entries: list[TensorEntry]) -> dict[str, str]:
    """Tensors of the plan for which nothing is assumed, with the reason."""
    return {e.name: problem for e in entries if e.name in plan.taken and (problem := _problem(e))}


def _problem(entry: TensorEntry) -> str:
    if len(entry.shape) < 2 or entry.shape[0] == 1:
        return "not a matrix: it has no inputs to assume"
    if any(c.__name__ in ("Embedding", "EmbeddingBag") for c in entry.lead.types):
        return "an embedding has no input vectors"
    longest = math.prod(_kernel_shape(entry))
    return f"rows of more than {LONGEST_ROW} elements, got {longest}" if longest > LONGEST_ROW else ""


def _kernel_shape(entry: TensorEntry) -> tuple[int, ...]:
    return entry.layout.kernel_shape if entry.layout is not None else entry.shape[1:]
