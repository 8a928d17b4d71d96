"""Factorised layers: a chain of stock torch modules in the place of one layer.

A `FactorizedConv2d`, say, is an `nn.Sequential` of `nn.Conv2d`s, so everything that works on stock modules works on it:
compilation, export, fine-tuning. Beside that it answers as the layer it replaces: `weight` (dense, composed at every
access, differentiable), `bias`, `in_channels`, `kernel_size` and so on. `nn.TransformerEncoderLayer` and
`nn.MultiheadAttention` read these instead of calling their layers.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from skfactor.bridge.factors import Branches, Factor, LayerShape, NoSmallerModule

__all__ = ["FactorizedConv1D", "FactorizedConv1d", "FactorizedConv2d", "FactorizedConv3d", "FactorizedConvTranspose1d",
           "FactorizedConvTranspose2d", "FactorizedConvTranspose3d", "FactorizedEmbedding", "FactorizedLayer",
           "FactorizedLinear", "FactorizedSum1d", "FactorizedSum2d", "FactorizedSum3d", "SelectedConv1d",
           "SelectedConv2d", "SelectedConv3d", "SelectedConvTranspose1d", "SelectedConvTranspose2d",
           "SelectedConvTranspose3d", "composed_weight", "dense_copy", "factorized_layer", "layer_shape",
           "replacement_class", "stock_modules"]

_HOOKS = ("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks",
          "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                "_load_state_dict_post_hooks")


class FactorizedLayer(nn.Sequential):
    """Base of all: stock modules in a row that answer as the one layer they replace."""

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight of the original layer's shape, composed of the factors; gradients flow to these."""
        raise AttributeError(f"{type(self).__name__} has no weight")

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of the last module: the parameter that the original layer had."""
        return self[-1].bias

    def dense(self) -> nn.Module:
        """The original layer again, with the composed weight (a copy) and the same bias parameter."""
        shell = self.__dict__["_shell"][0]
        layer = copy.copy(shell)
        weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self[0].weight.requires_grad)
        values = {"weight": weight, "bias": getattr(self, "bias", None)}
        layer.__dict__["_parameters"] = {name: values[name] for name in shell._parameters}
        layer.training = self.training
        for name in _HOOKS:
            layer.__dict__[name] = self.__dict__[name]
        return layer

    def _become(self, layer: nn.Module) -> FactorizedLayer:
        """Take over what the layer says of itself, its mode and its hooks."""
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training" and not hasattr(type(self), name):
                setattr(self, name, value)
        for name in _HOOKS:
            self.__dict__[name] = layer.__dict__[name]
        shell = copy.copy(layer)
        shell.__dict__["_parameters"] = dict.fromkeys(layer._parameters)
        self.__dict__["_shell"] = (shell,)  # in a tuple: no child module
        return self.train(layer.training)


class FactorizedLinear(FactorizedLayer):
    """Several `nn.Linear` in the place of one; the last has the bias."""

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (out_features, in_features)."""
        return self._matrix()

    def _matrix(self):
        first, *rest = self
        matrix = first.weight
        for module in rest:
            matrix = module.weight @ matrix
        return matrix


class FactorizedConv1D(FactorizedLinear):
    """Several `nn.Linear` in the place of the `Conv1D` of transformers."""

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (nx, nf)."""
        return self._matrix().t()


class FactorizedEmbedding(FactorizedLayer):
    """A narrow `nn.Embedding` and `nn.Linear`s without bias in the place of one `nn.Embedding`."""

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (num_embeddings, embedding_dim)."""
        first, *rest = self
        matrix = first.weight
        for module in rest:
            matrix = matrix @ module.weight.t()
        return matrix

    @property
    def bias(self) -> None:
        raise AttributeError("an embedding has no bias")


class _FactorizedConv(FactorizedLayer):
    """Several convolutions in the place of one."""

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (out_channels, in_channels / groups, *kernel_size); the first two swapped if transposed."""
        first, *rest = self
        weight, groups = _rows_first(first), first.groups
        for module in rest:
            weight = weight[module.select] if isinstance(module, _Selected) else weight
            weight, groups = _composed(weight, groups, _rows_first(module), module.groups)
        return _inputs_first(weight, groups) if self.transposed else weight


class FactorizedConv1d(_FactorizedConv):
    """Several `nn.Conv1d` in the place of one."""


class FactorizedConv2d(_FactorizedConv):
    """Several `nn.Conv2d` in the place of one."""


class FactorizedConv3d(_FactorizedConv):
    """Several `nn.Conv3d` in the place of one."""


class _FactorizedConvTranspose(_FactorizedConv):
    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """As the transposed convolution; `output_size` goes to the modules that slide over its axes."""
        if output_size is None:
            return super().forward(input)
        n_axes = len(self.kernel_size)
        for module, axes in zip(self, self._axes, strict=True):
            if axes:
                size = [output_size[i - n_axes] if i in axes else input.shape[i - n_axes] for i in range(n_axes)]
                input = module(input, output_size=size)
            else:
                input = module(input)
        return input


class FactorizedConvTranspose1d(_FactorizedConvTranspose):
    """A narrow `nn.ConvTranspose1d` and `nn.Conv1d`s of one pixel in the place of one `nn.ConvTranspose1d`."""


class FactorizedConvTranspose2d(_FactorizedConvTranspose):
    """Narrow `nn.ConvTranspose2d` and `nn.Conv2d`s of one pixel in the place of one `nn.ConvTranspose2d`."""


class FactorizedConvTranspose3d(_FactorizedConvTranspose):
    """Narrow `nn.ConvTranspose3d` and `nn.Conv3d`s of one pixel in the place of one `nn.ConvTranspose3d`."""


class _FactorizedSum(FactorizedLayer):
    """Chains of convolutions that read the same input, and whose outputs are added."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Sum of all chains."""
        first, *rest = self
        total = first(input)
        for chain in rest:
            total = total + chain(input)
        return total

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (out_channels, in_channels / groups, *kernel_size)."""
        first, *rest = self
        total = first.weight
        for chain in rest:
            total = total + chain.weight
        return total


class FactorizedSum1d(_FactorizedSum):
    """Several chains of `nn.Conv1d`, added, in the place of one `nn.Conv1d`."""


class FactorizedSum2d(_FactorizedSum):
    """Several chains of `nn.Conv2d`, added, in the place of one `nn.Conv2d`."""


class FactorizedSum3d(_FactorizedSum):
    """Several chains of `nn.Conv3d`, added, in the place of one `nn.Conv3d`."""


class _Selected:
    """A convolution of some channels of its input, in an order of its own and as often as it likes."""

    def forward(self, input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Select the channels `select`, then convolve."""
        axis = input.dim() - len(self.kernel_size) - 1  # there may be no batch
        return super().forward(input.index_select(axis, self.select), *args, **kwargs)


class SelectedConv1d(_Selected, nn.Conv1d):
    """`nn.Conv1d` of selected channels."""


class SelectedConv2d(_Selected, nn.Conv2d):
    """`nn.Conv2d` of selected channels."""


class SelectedConv3d(_Selected, nn.Conv3d):
    """`nn.Conv3d` of selected channels."""


class SelectedConvTranspose1d(_Selected, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` of selected channels."""


class SelectedConvTranspose2d(_Selected, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` of selected channels."""


class SelectedConvTranspose3d(_Selected, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` of selected channels."""


def stock_modules(layer: FactorizedLayer) -> list[nn.Module]:
    """The modules of a chain, or of all chains of a sum, in order."""
    return [m for child in layer for m in (stock_modules(child) if isinstance(child, FactorizedLayer) else [child])]


def _composed(a: torch.Tensor, groups_a: int, b: torch.Tensor, groups_b: int) -> tuple[torch.Tensor, int]:
    """Weight and groups of one convolution that does what convolution b after convolution a does.

    Weights are (n_out, n_in / groups, *kernel); along every axis one of the kernels has length 1. The number of groups
    of one divides that of the other.
    """
    if groups_a % groups_b == 0:  # every group of b reads q groups of a
        g, q = groups_b, groups_a // groups_b
        a = a.reshape(g, q, -1, *a.shape[1:])  # (g, q, m, c, *kernel)
        b = b.reshape(g, -1, q, a.shape[2], *b.shape[2:])  # (g, n, q, m, *kernel)
        return torch.einsum("gnqm...,gqmc...->gnqc...", b, a).flatten(2, 3).flatten(0, 1), g
    g, p = groups_a, groups_b // groups_a  # every group of a feeds p groups of b
    a = a.reshape(g, p, -1, *a.shape[1:])
    b = b.reshape(g, p, -1, *b.shape[1:])
    return torch.einsum("gpnm...,gpmc...->gpnc...", b, a).flatten(0, 2), g


def composed_weight(factors: list[Factor] | Branches) -> np.ndarray:
    """Weight (n_rows, *kernel_shape) in float64 of the one layer that does what the chain does."""
    if isinstance(factors, Branches):
        return sum(composed_weight(chain) for chain in factors.chains)
    weights = [torch.from_numpy(np.ascontiguousarray(factor.weight, dtype=np.float64)) for factor in factors]
    weight, groups = weights[0], factors[0].groups
    for other, factor in zip(weights[1:], factors[1:], strict=True):
        weight = weight if factor.select is None else weight[torch.from_numpy(factor.select)]
        weight, groups = _composed(weight, groups, other, factor.groups)
    return weight.numpy()


def _rows_first(module: nn.Module) -> torch.Tensor:
    """Weight (n_out, n_in / groups, *kernel) of a convolution, transposed or not."""
    return _inputs_first(module.weight, module.groups) if module.transposed else module.weight


def _inputs_first(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(g n, m, *kernel) as (g m, n, *kernel), the way of transposed convolutions, and back."""
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    return weight.transpose(1, 2).flatten(0, 1)


# --------------------------------------------------------------------------------------------------- one layer
def factorized_layer(layer: nn.Module, factors: list[Factor] | Branches) -> FactorizedLayer:
    """Chain of stock modules in the place of a layer.

    Device, dtype, memory format, training mode, `requires_grad`, stride, padding, dilation, groups and forward and
    backward hooks are the layer's; so is the bias parameter itself.

    Parameters
    ----------
    layer : Module
        Not changed.
    factors : list of Factor, or Branches
        From `factors_of`, for `layer_shape(layer)`.

    Raises
    ------
    NoSmallerModule
        The layer does something that the chain would not, or the factors overflow its dtype.
    """
    base, (cls, modules) = _kind_of(layer)
    _check_plain(layer, base)
    if isinstance(factors, Branches):
        if base not in _SUMS:
            raise NoSmallerModule(f"{type(layer).__name__} has no form as a sum of chains")
        *others, last = factors.chains
        chains = [factorized_layer(_one_branch(layer, None), chain) for chain in others]
        chains.append(factorized_layer(_one_branch(layer, layer.bias), last))
        return _SUMS[base](*chains)._become(layer)
    weights = [_like_weight(factor.weight, layer) for factor in factors]
    chain = modules(layer, factors, weights)
    replacement = cls(*chain)._become(layer)
    if isinstance(replacement, _FactorizedConvTranspose):
        replacement.__dict__["_axes"] = tuple(factor.axes for factor in factors)
    return replacement


def _one_branch(layer: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    """The layer with this bias and without its hooks, which belong to the sum."""
    branch, blank = copy.copy(layer), nn.Identity()
    branch.__dict__["_parameters"] = layer._parameters | {"bias": bias}
    branch.__dict__.update({name: blank.__dict__[name] for name in _HOOKS})
    return branch


def layer_shape(layer: nn.Module) -> LayerShape:
    """Rows of a layer's weight; NoSmallerModule for layers of other kinds."""
    base, _ = _kind_of(layer)
    shape = tuple(layer.weight.shape)
    if base is None:
        return LayerShape(shape[1], (shape[0],))
    if not hasattr(layer, "kernel_size"):
        return LayerShape(shape[0], (shape[1],))
    return LayerShape(layer.out_channels, (layer.in_channels // layer.groups, *layer.kernel_size), layer.groups)


def replacement_class(layer: nn.Module) -> type[FactorizedLayer]:
    """Class of a layer's replacement; NoSmallerModule for layers of other kinds."""
    return _kind_of(layer)[1][0]


def _kind_of(layer: nn.Module):
    """Base class (None for `Conv1D`), and the class of the replacement with the function that makes its modules."""
    for cls in type(layer).__mro__:
        if cls in _KINDS:
            return cls, _KINDS[cls]
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return None, (FactorizedConv1D, _linear_modules)
    raise NoSmallerModule(f"{type(layer).__name__} has no factorised form")


def _check_plain(layer: nn.Module, base: type | None) -> None:
    """NoSmallerModule for a layer that is more than its class, weight and bias say."""
    name = type(layer).__name__
    for method in ("forward", "_conv_forward"):
        if method in vars(layer) or (base and getattr(type(layer), method, None) is not getattr(base, method, None)):
            raise NoSmallerModule(f"{name} has a {method} of its own")
    extra = [*(set(layer._parameters) - {"weight", "bias"}), *layer._buffers, *layer._modules]
    if extra:
        raise NoSmallerModule(f"{name} has more than weight and bias: {', '.join(sorted(extra))}")
    if any(vars(layer).get(hooks) for hooks in _STATE_HOOKS):
        raise NoSmallerModule("it has hooks on its state dict")
    if getattr(layer, "max_norm", None) is not None:
        raise NoSmallerModule("max_norm rescales the rows of the dense weight")


def _like_weight(array: np.ndarray, layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(weight.dtype)
    if not torch.isfinite(tensor).all():
        raise NoSmallerModule(f"its factors overflow {str(weight.dtype).removeprefix('torch.')}")
    return tensor.to(weight.device)


def _parameter(value: torch.Tensor, layer: nn.Module) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=layer.weight.requires_grad)


def _linear_modules(layer, factors, weights):
    modules = [_linear(weight, layer) for weight in weights]
    if layer.bias is not None:
        modules[-1].bias = layer.bias
    return modules


def _linear(weight: torch.Tensor, layer: nn.Module) -> nn.Linear:
    # on the meta device: nothing is drawn from the global random numbers
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = _parameter(weight, layer)
    return module


def _embedding_modules(layer, factors, weights):
    """Rows of codes are looked up; what came before them in a linear layer comes after, transposed."""
    *inner, codes = weights
    table = nn.Embedding(*codes.shape, padding_idx=layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq,
                         sparse=layer.sparse, device="meta")
    table.weight = _parameter(codes, layer)
    return [table, *(_linear(weight.t().contiguous(), layer) for weight in reversed(inner))]


def _convolution_modules(layer, factors, weights):
    modules = [_convolution(factor, weight, layer) for factor, weight in zip(factors, weights, strict=True)]
    if layer.bias is not None:
        modules[-1].bias = layer.bias
    return modules


def _convolution(factor: Factor, weight: torch.Tensor, layer: nn.Module) -> nn.Module:
    n_axes = len(layer.kernel_size)

    def along(values, otherwise):
        return tuple(values[i] if i in factor.axes else otherwise for i in range(n_axes))

    transposed = layer.transposed and bool(factor.axes)
    options = {"stride": along(layer.stride, 1), "dilation": along(layer.dilation, 1), "groups": factor.groups}
    if isinstance(layer.padding, str):
        options["padding"] = layer.padding if factor.axes else 0
    else:
        options["padding"] = along(layer.padding, 0)
    if factor.axes:
        options["padding_mode"] = layer.padding_mode
    if transposed:
        options["output_padding"] = along(layer.output_padding, 0)
    kinds = _PLAIN if factor.select is None else _SELECTED
    cls = kinds[n_axes][transposed]
    n_out, n_in = weight.shape[0], weight.shape[1] * factor.groups
    module = cls(n_in, n_out, tuple(weight.shape[2:]), bias=False, device="meta", **options)
    weight = _inputs_first(weight, factor.groups).contiguous() if transposed else weight
    module.weight = _parameter(_in_memory_format(weight, layer.weight), layer)
    if factor.select is not None:
        module.register_buffer("select", torch.from_numpy(factor.select.astype(np.int64)).to(weight.device))
    return module


def _in_memory_format(weight: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Channels last where the layer's weight is (and a kernel of one pixel does not hide it)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(model.dim())
    if last is None or model.is_contiguous() or not model.is_contiguous(memory_format=last):
        return weight
    return weight.contiguous(memory_format=last)


#: number of axes -> classes of plain and of transposed convolutions
_PLAIN = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
_SELECTED = {1: (SelectedConv1d, SelectedConvTranspose1d), 2: (SelectedConv2d, SelectedConvTranspose2d),
             3: (SelectedConv3d, SelectedConvTranspose3d)}
_SUMS = {nn.Conv1d: FactorizedSum1d, nn.Conv2d: FactorizedSum2d, nn.Conv3d: FactorizedSum3d}
_KINDS: dict[type[nn.Module], tuple[type[FactorizedLayer], Callable]] = {
    nn.Linear: (FactorizedLinear, _linear_modules),
    nn.Embedding: (FactorizedEmbedding, _embedding_modules),
    nn.Conv1d: (FactorizedConv1d, _convolution_modules),
    nn.Conv2d: (FactorizedConv2d, _convolution_modules),
    nn.Conv3d: (FactorizedConv3d, _convolution_modules),
    nn.ConvTranspose1d: (FactorizedConvTranspose1d, _convolution_modules),
    nn.ConvTranspose2d: (FactorizedConvTranspose2d, _convolution_modules),
    nn.ConvTranspose3d: (FactorizedConvTranspose3d, _convolution_modules),
}


# --------------------------------------------------------------------------------------------- a whole network
def dense_copy(model: nn.Module) -> nn.Module:
    """Copy of a network in which every factorised layer is the one dense layer again.

    Parameters
    ----------
    model : Module
        Not changed.

    Returns
    -------
    dense : Module
        Of the class of the user, with the names of its state dict; tied weights of factorised layers are tied again.

    Examples
    --------
    >>> import numpy as np
    >>> layer = nn.Linear(6, 4)
    >>> pair = factorized_layer(layer, [Factor(np.ones((1, 6))), Factor(np.ones((4, 1)))])
    >>> dense_copy(nn.Sequential(pair))[0].weight.shape
    torch.Size([4, 6])
    """
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    weights: dict[tuple, nn.Parameter] = {}
    done: tuple[str, ...] = ()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FactorizedLayer) and not path.startswith(done):
            done += (f"{path}." if path else "",)
            if id(module) not in made:
                made[id(module)] = layer = module.dense()
                key = tuple(id(child.weight) for child in stock_modules(module))
                layer.weight = weights.setdefault(key, layer.weight)
            if path:
                model.set_submodule(path, made[id(module)])
    return made.get(id(model), model)
