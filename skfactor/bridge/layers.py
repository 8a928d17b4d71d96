"""Layers of a torch network: which parameter is a weight, how it becomes rows, and what may not be touched."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from skfactor.bridge.rules import Alias, TensorEntry
from skfactor.bridge.tensors import dtype_name
from skfactor.codec.dtypes import DTYPES, is_float
from skfactor.codec.tensor import Layout
from skfactor.exceptions import LayerError

__all__ = ["LayerSpec", "Network", "entries_of_module", "entries_of_state_dict", "layer_specs", "register_layer",
           "rows_first", "rows_last", "rows_of_transposed_convolution", "unwrap"]

#: What makes the rows of `X` out of a layer and the shape of its weight.
LayoutRule = Callable[[nn.Module, tuple[int, ...]], Layout]


@dataclass(frozen=True)
class LayerSpec:
    """How one parameter of a layer type becomes rows: `layout(module, shape)`."""

    parameter: str
    layout: LayoutRule


_SPECS: dict[type | str, list[LayerSpec]] = {}


def rows_first(module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """The first axis counts output units: Linear, convolutions (c_out, c_in/g, *k), embeddings (rows, d)."""
    return Layout.rows_first(shape)


def rows_last(module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """The last axis counts output units: `transformers`' Conv1D (n_in, n_out), y = u W + b."""
    return Layout(shape[-1], tuple(shape[:-1]), axes=(len(shape) - 1, *range(len(shape) - 1)))


def rows_of_transposed_convolution(module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """(c_in, c_out/g, *k): rows are the c_out output channels, one row is (c_in/g, *k)."""
    c_in, c_out_per_group, *kernel = shape
    g = module.groups
    view = (g, c_in // g, c_out_per_group, *kernel)
    return Layout(g * c_out_per_group, (c_in // g, *kernel), view, (0, 2, 1, *range(3, len(view))))


def register_layer(module_type: type, *, parameter: str = "weight", layout: LayoutRule = rows_first) -> None:
    """Make the bridge know a layer type, so that rules take `parameter` of its instances and of subclasses.

    Parameters
    ----------
    module_type : type
        Subclass of `torch.nn.Module`.
    parameter : str, default="weight"
        Attribute name of the parameter; call again for a further one.
    layout : callable, default=rows_first
        `layout(module, shape) -> Layout`: which axis counts output units. `rows_first` and `rows_last` cover most.

    Examples
    --------
    >>> import torch
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = torch.nn.Parameter(torch.ones(4, 8))
    >>> register_layer(Scale, parameter="table")
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if not callable(layout):
        raise TypeError(f"layout must be callable as layout(module, shape), got {layout!r}")
    specs = [s for s in _SPECS.get(module_type, []) if s.parameter != parameter]
    _SPECS[module_type] = [*specs, LayerSpec(parameter, layout)]


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag):
    register_layer(_type)
for _type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_type, layout=rows_of_transposed_convolution)
for _name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
    register_layer(nn.MultiheadAttention, parameter=_name)


def layer_specs(module: nn.Module) -> list[LayerSpec]:
    """Specs of the nearest registered base class; empty for an unknown layer."""
    for cls in type(module).__mro__:
        if cls in _SPECS:
            return _SPECS[cls]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return [LayerSpec("weight", rows_last)]
    return []


@dataclass(frozen=True)
class Network:
    """Tensors of a network by entry, and every name with the entry's name that holds it.

    Attributes
    ----------
    entries : list of TensorEntry
        One for each tensor, ties joined; in the order of the state dict.
    tensors : dict of str to Tensor
        The live tensor of every entry.
    names : dict of str to str
        Every name of the state dict, in order, with the name of its entry.
    not_stored : dict of str to str
        State dict items that are no tensors, with the reason.
    owners : dict of str to list of (Module, LayerSpec)
        For each entry the layers whose weight it is.
    """

    entries: list[TensorEntry]
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]
    not_stored: dict[str, str]
    owners: dict[str, list[tuple[nn.Module, LayerSpec]]]


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def plain_name(name: str) -> str:
    """Name without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def entries_of_module(model: nn.Module) -> Network:
    """Take stock of a network: every item of its state dict, ties joined, layers recognised.

    Raises
    ------
    LayerError
        A tensor that cannot even be stored: on the meta device, lazy, of a tensor subclass, of a foreign dtype.
    """
    model = unwrap(model)
    found, not_stored = {}, {}
    modules = {plain_name(k): m for k, m in model.named_modules(remove_duplicate=False)}
    for key, value in model.state_dict(keep_vars=True).items():
        name = plain_name(key)
        if isinstance(value, torch.Tensor):
            found[name] = value
        else:
            not_stored[name] = f"{type(value).__name__}, not a tensor: not stored"
    aliases = {name: _alias(name, value, modules) for name, value in found.items()}
    layouts = {name: _weight_spec(name, modules) for name in found}
    network = _join_ties(found, aliases, layouts, not_stored)
    ghosts = [ghost for name, module in modules.items() for ghost in _recomputed_weights(name, module)]
    return Network(network.entries + ghosts, network.tensors, network.names, not_stored, network.owners)


def entries_of_state_dict(state: dict[str, torch.Tensor]) -> Network:
    """Take stock of a state dict: float tensors of at least two dimensions are weights, rows on the first axis."""
    found, not_stored = {}, {}
    names = list(state)
    if wrong := next((n for n in names if not isinstance(n, str)), None):
        raise TypeError(f"names of a state dict must be strings, got {wrong!r}")
    for prefix in ("_orig_mod.", "module."):
        if names and all(n.startswith(prefix) for n in names):
            names = [n.removeprefix(prefix) for n in names]
    for name, value in zip(names, state.values(), strict=True):
        if isinstance(value, torch.Tensor):
            found[plain_name(name)] = value
        else:
            not_stored[name] = f"{type(value).__name__}, not a tensor: not stored"
    aliases = {n: Alias(n, (), "weight" if t.dim() >= 2 else "vector") for n, t in found.items()}
    return _join_ties(found, aliases, dict.fromkeys(found), not_stored)


def _alias(name: str, value: torch.Tensor, modules: dict[str, nn.Module]) -> Alias:
    owner, _, own_name = name.rpartition(".")
    module = modules.get(owner)
    if module is None or own_name not in module._parameters:
        role = "buffer"
    elif _weight_spec(name, modules) is not None:
        role = "weight"
    else:
        role = "bare" if not nn.parameter.is_lazy(value) and value.dim() >= 2 else "vector"
    return Alias(name, _bases(module), role)


def _bases(module: nn.Module | None) -> tuple[type, ...]:
    return () if module is None else tuple(c for c in type(module).__mro__ if issubclass(c, nn.Module))


def _weight_spec(name: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, LayerSpec] | None:
    """The layer and spec when a name is a known layer's weight."""
    owner, _, own_name = name.rpartition(".")
    module = modules.get(owner)
    for spec in () if module is None else layer_specs(module):
        if spec.parameter == own_name and own_name in module._parameters:
            return module, spec
    return None


def _join_ties(found, aliases, specs, not_stored) -> Network:
    """One entry for each distinct tensor; names of the same memory, shape and strides are one tensor."""
    groups: dict[tuple, list[str]] = {}
    for name, value in found.items():
        _check_storable(name, value, aliases[name])
        groups.setdefault(_identity(value), []).append(name)
    entries, tensors, canonical, owners = [], {}, {}, {}
    for names in groups.values():
        first = names[0]
        value = tensors[first] = found[first]
        owners[first] = list({id(specs[n][0]): specs[n] for n in names if specs[n] is not None}.values())
        entries.append(TensorEntry(tuple(aliases[n] for n in names), tuple(value.shape), dtype_name(value),
                                   _layout(value, owners[first]), _unfit(value)))
        canonical.update(dict.fromkeys(names, first))
    return Network(entries, tensors, {n: canonical[n] for n in found}, not_stored, owners)


def _identity(value: torch.Tensor) -> tuple:
    if value.numel() == 0:
        return (id(value),)
    return (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())


def _layout(value: torch.Tensor, owners: list[tuple[nn.Module, LayerSpec]]) -> Layout:
    """Layout of the first layer; `padding_idx` rows that are zero stay zero."""
    shape = tuple(value.shape)
    if not owners:
        return Layout.rows_first(shape)
    module, spec = owners[0]
    layout = spec.layout(module, shape)
    padding = {m.padding_idx for m, _ in owners if getattr(m, "padding_idx", None) is not None}
    zero_rows = tuple(sorted(r for r in padding if layout.axes is None and not value[r].any()))
    return Layout(layout.n_rows, layout.kernel_shape, layout.view, layout.axes, zero_rows) if zero_rows else layout


def _unfit(value: torch.Tensor) -> str:
    name = dtype_name(value)
    if not is_float(name):
        return f"{name} tensor: no floating-point values to compress"
    return "empty tensor" if value.numel() == 0 else ""


def _check_storable(name: str, value: torch.Tensor, alias: Alias) -> None:
    """LayerError for a tensor whose values cannot be read, with what to do about it."""
    types = {torch.Tensor, nn.Parameter, getattr(nn, "Buffer", nn.Parameter)}
    who = f"layer {alias.owner!r} ({alias.types[0].__name__})" if alias.types else f"tensor {name!r}"
    if nn.parameter.is_lazy(value):
        raise LayerError(f"{who}: {name} is not initialised yet; run one forward pass before compressing")
    if value.is_meta:
        raise LayerError(f"{who}: {name} is on the meta device and has no values; load the weights first")
    if type(value) not in types:
        raise LayerError(f"{who}: {name} is a {type(value).__name__}, a tensor subclass; convert it to a plain tensor "
                         "first (DTensor: full_tensor(); quantized tensors: dequantize())")
    if value.layout is not torch.strided or value.is_quantized:
        raise LayerError(f"{who}: {name} is a sparse or quantized tensor; call to_dense() or dequantize() first")
    if dtype_name(value) not in DTYPES:
        raise LayerError(f"{who}: {name} has dtype {dtype_name(value)}, which a file cannot hold; "
                         f"allowed: {', '.join(sorted(DTYPES))}")


def _recomputed_weights(name: str, module: nn.Module) -> Iterator[TensorEntry]:
    """Entries of weights that are no parameters because something recomputes them: a write would be lost."""
    for spec in layer_specs(module):
        own = spec.parameter
        if own in module._parameters:
            continue
        if parametrize.is_parametrized(module, own):
            remedy = (f"its {own} is parametrized and a new value would be lost; call "
                      f"torch.nn.utils.parametrize.remove_parametrizations(layer, {own!r}) first")
        elif f"{own}_orig" in module._parameters and f"{own}_mask" in module._buffers:
            remedy = (f"its {own} is masked by torch.nn.utils.prune and a new value would be lost; call "
                      f"torch.nn.utils.prune.remove(layer, {own!r}) first")
        elif f"{own}_orig" in module._parameters or f"{own}_g" in module._parameters:
            call = "remove_weight_norm" if f"{own}_g" in module._parameters else "remove_spectral_norm"
            remedy = f"its {own} is recomputed at every forward pass; call torch.nn.utils.{call}(layer, {own!r}) first"
        else:
            continue
        value = getattr(module, own)
        alias = Alias(f"{name}.{own}" if name else own, _bases(module))
        yield TensorEntry((alias,), tuple(value.shape), dtype_name(value),
                          refusal=f"{remedy}, or give the layer the rule None")
