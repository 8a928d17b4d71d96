"""What errors of a layer's output channels cost, and rows scaled so that they cost the same in each."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from skfactor.bridge.batchnorm import normalisation_after
from skfactor.bridge.calibrate import importance_of_batches
from skfactor.bridge.layers import LayerSpec

__all__ = ["balance_layers", "balance_rows", "importance_of_rows"]

#: Above 1, unlikely classes count in the importance too: few examples of a confident network say little otherwise.
TEMPERATURE = 10.0
_LEAST_IMPORTANCE = 1e-3  # of the mean: what a row that the output does not depend on is taken to have

_Owners = Mapping[str, list[tuple[nn.Module, LayerSpec]]]


def importance_of_rows(model: nn.Module, owners: _Owners, batches: Iterable[tuple[tuple, dict]],
                       random_state: int = 0) -> dict[str, np.ndarray]:
    """What an error costs at the network's output (`output_importance`), by tensor and output channel.

    A tensor that several layers share has one number, (1,): the sum of their means. One that no input reaches has 0.
    """
    modules = {f"{name}\n{i}": m for name, layers in owners.items() for i, (m, _) in enumerate(layers)}
    found = importance_of_batches(model, modules, batches, temperature=TEMPERATURE, random_state=random_state)
    total = {name: np.zeros(1) for name in owners}
    for key, r in found.items():
        name = key.partition("\n")[0]
        total[name] = r if len(owners[name]) == 1 else total[name] + r.mean()
    return total


def balance_layers(model: nn.Module, owners: _Owners, importance: dict[str, np.ndarray],
                   batch: tuple[tuple, dict]) -> dict[str, np.ndarray]:
    """`balance_rows` of every folded layer, in place; the importance of all tensors after it."""
    args, kwargs = batch
    alone = {layers[0][0]: (name, layers[0][1]) for name, layers in owners.items()
             if len(layers) == 1 and layers[0][1].parameter == "weight"}
    found = dict(importance)
    for layer, norm in normalisation_after(model, alone, args, kwargs).items():
        name, spec = alone[layer]
        found[name] = balance_rows(layer, spec, norm, importance[name])
    return found


def balance_rows(layer: nn.Module, spec: LayerSpec, norm: nn.Module, importance: np.ndarray) -> np.ndarray:
    """Scale the rows of a folded layer so that an error costs the same in each, in place; return what it costs then.

    Row i is multiplied by a_i and the scale of the normalisation by 1/a_i, a_i² being the row's importance over the
    geometric mean, rounded to a power of √2. One step for the whole tensor then is the right step for every row, and
    rows that the output does not depend on shrink to nothing.

    Parameters
    ----------
    layer, spec, norm
        A layer that `fold_batch_norm` folded, and the normalisation after it.
    importance : ndarray of shape (n_rows,)
        Cost of an error per unit of its variance, by output channel.

    Returns
    -------
    importance : ndarray of shape (n_rows,)
        Of the scaled rows.
    """
    least = _LEAST_IMPORTANCE * importance.mean()
    if not least > 0:
        return importance
    halves = np.log2(np.maximum(importance, least))
    # 8 significant bits, those that the file keeps of a vector
    inverse = _significant_bits(2.0 ** (-np.round(halves - halves.mean()) / 2), 8)
    weight = getattr(layer, spec.parameter)
    shape = tuple(weight.shape)
    layout = spec.layout(layer, shape)
    X = layout.to_matrix(weight.detach().double().cpu().numpy()) / inverse[:, None]
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.ascontiguousarray(layout.to_tensor(X, shape))))
        if layer.bias is not None:
            layer.bias.div_(torch.from_numpy(inverse).to(layer.bias))
        norm.weight.copy_(torch.from_numpy(inverse))
    return importance * inverse**2


def _significant_bits(values: np.ndarray, n_bits: int) -> np.ndarray:
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, n_bits)), exponent - n_bits)
