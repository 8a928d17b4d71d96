"""The end of a training method: hard codes of the trained weights, as `skfactor.compress` makes them."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from skfactor.bridge.apply import compress
from skfactor.bridge.result import CompressionResult
from skfactor.bridge.rules import Plan

__all__ = ["compress_as_planned"]


def compress_as_planned(model: nn.Module, plan: Plan, estimators: Mapping[str, Any]) -> CompressionResult:
    """Compress by the plan of a method, with the estimators that know what the training has found.

    Parameters
    ----------
    model : Module
        The trained network; not changed.
    plan : Plan
        Of the method's rules.
    estimators : dict of str to estimator
        By name of the tensor, in the place of the plan's; records keep the text of the plan's, without what was found.
    """
    result = compress(model, {**plan.taken, **estimators}, progress=False)
    result.skipped.update({name: reason for name, reason in plan.skipped.items() if name in result.skipped})
    result.records = [
        replace(record, skipped=plan.skipped[record.name]) if record.name in plan.skipped
        else replace(record, estimator=" ".join(repr(plan.taken[record.name]).split()))
        for record in result.records
    ]
    return result
