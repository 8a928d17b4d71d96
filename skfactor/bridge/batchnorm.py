"""Batch normalisation moved into the layer before it: the same function with fewer different numbers to store."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from skfactor.bridge.calibrate import evaluation, hooked
from skfactor.bridge.layers import LayerSpec

__all__ = ["fold_batch_norm", "leaves", "normalisation_after"]


def normalisation_after(model: nn.Module, layers: Iterable[nn.Module], args: tuple,
                        kwargs: dict) -> dict[nn.Module, nn.Module]:
    """For each layer, the batch normalisation that reads its output, found by running one batch.

    Only pairs count in which both run once and the normalisation has running statistics and its own scale.
    """
    outputs: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # the tensor is kept so that no other takes its id
    calls: dict[nn.Module, int] = {}
    found: dict[nn.Module, nn.Module] = {}

    def remember(module, args, kwargs, output):
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, torch.Tensor):
            outputs[id(output)] = (module, output)

    def look(module, args, kwargs):
        calls[module] = calls.get(module, 0) + 1
        layer, output = outputs.get(id(args[0]), (None, None)) if args else (None, None)
        if layer is not None and output is args[0]:
            found[layer] = module

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine and m.running_mean is not None]
    with hooked((m, remember, "after") for m in layers), hooked((m, look, "before") for m in norms), evaluation(model):
        model(*args, **kwargs)
    return {a: b for a, b in found.items() if calls[a] == calls[b] == 1}


def fold_batch_norm(model: nn.Module, layers: Iterable[tuple[nn.Module, LayerSpec]], args: tuple, kwargs: dict) -> int:
    """Move scale and mean of each batch normalisation into the layer before it, in place.

    γ (W u + b − μ) / σ + β becomes W' u + b' + β' with W' = (γ/σ) W, b' = (γ/σ) b, β' = β − (γ/σ) μ, and the
    normalisation keeps γ = 1, μ = 0, σ = 1. Rows of W' have the scale with which they reach the next layer.

    Parameters
    ----------
    model : Module
    layers : iterable of (Module, LayerSpec)
        Layers whose weight belongs to nothing else.
    args, kwargs
        One batch; it shows which normalisation follows which layer, and that the network's output stays.

    Returns
    -------
    n_folded : int

    Raises
    ------
    ValueError
        The output changed: something else reads the output of a layer before its normalisation.
    """
    specs = dict(layers)
    pairs = normalisation_after(model, specs, args, kwargs)
    with evaluation(model):
        before = _flat(model(*args, **kwargs))
        for layer, norm in pairs.items():
            _fold(layer, specs[layer], norm)
        after = _flat(model(*args, **kwargs))
    for x, y in zip(before, after, strict=True):
        if (x - y).abs().max() > torch.finfo(x.dtype).eps ** 0.5 * x.abs().max():
            raise ValueError("batch normalisation cannot be folded into the layers before it: the network's output "
                             "changes, so something else reads the output of such a layer")
    return len(pairs)


def _fold(layer: nn.Module, spec: LayerSpec, norm: nn.Module) -> None:
    weight = getattr(layer, spec.parameter)
    shape = tuple(weight.shape)
    layout = spec.layout(layer, shape)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    X = layout.to_matrix(weight.detach().double().cpu().numpy()) * scale.cpu().numpy()[:, None]
    weight.copy_(torch.from_numpy(np.ascontiguousarray(layout.to_tensor(X, shape))))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() * scale)
    norm.bias.copy_(norm.bias.double() - scale * norm.running_mean.double())
    norm.weight.fill_(1.0)
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)


def _flat(output: Any) -> list[torch.Tensor]:
    """Floating-point tensors of a network's output, whatever holds them."""
    return [t for t in leaves(output) if t.is_floating_point() and t.numel()]


def leaves(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings: arguments or output of a network."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from leaves(value)
