"""Which channels of a network belong together: what must go when one filter goes, and what may not go.

Every channel of every value in the graph is an *atom*, and so is every index of those axes of the parameters that count
channels. Operations join atoms: a normalisation joins its scales with the channels that it reads, an addition the
channels of both sides, a grouped convolution all channels of a group. What then is one set goes or stays as one. An
operation that is not understood freezes the atoms that reach it.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from skfactor.bridge.graph import Graph, operation

__all__ = ["Call", "ChannelMap", "Channels", "analyse"]


class Channels(NamedTuple):
    """Atoms along one axis of a value."""

    axis: int
    atoms: np.ndarray


@dataclass(frozen=True)
class Call:
    """A call in the network's own code whose arguments name channel counts.

    Attributes
    ----------
    function : {"pad", "split", "view"}
    node : Node
    axis : int
        Axis of the channels in the result.
    before, after : ndarray of int
        Atoms of the argument and of the result (of all parts, one after another).
    parts : tuple of int
        Sizes of the parts of a split.
    """

    function: str
    node: fx.Node
    axis: int
    before: np.ndarray
    after: np.ndarray
    parts: tuple[int, ...] = ()


@dataclass
class ChannelMap:
    """Atoms of a network, joined.

    Attributes
    ----------
    axes : dict of (str, int) to ndarray of int
        Atoms of every axis of a parameter or buffer that counts channels; tied tensors have their first name.
    outputs : dict of str to (str, int)
        For each weight of a layer the key in `axes` of its output channels; in the order in which the layers run.
    inputs : dict of str to int
        For each weight whose input channels can be removed one by one its axis of input channels.
    followers : set of str
        Weights of grouped convolutions: their filters go where their inputs go.
    calls : list of Call
    values : dict of Node to Channels
        What is known of the values of the graph.
    fixed : list of (ndarray of int, str)
        Atoms that may not go, with the reason.
    roots : ndarray of int
        For each atom the number of its set.
    """

    axes: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    outputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    followers: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    values: dict[fx.Node, Channels | list[Channels]] = field(default_factory=dict)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    roots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def reasons(self) -> dict[int, str]:
        """Sets that may not go, with the first reason of each."""
        reasons: dict[int, str] = {}
        for atoms, reason in self.fixed:
            for root in np.unique(self.roots[atoms]):
                reasons.setdefault(int(root), reason)
        return reasons

    def sets_of(self, weight: str) -> np.ndarray:
        """Set of every output channel of a layer, by the name of its weight."""
        return self.roots[self.axes[self.outputs[weight]]]


def analyse(model: nn.Module, graph: Graph) -> ChannelMap:
    """Join the channels of a network as its operations do.

    Parameters
    ----------
    model : Module
    graph : Graph
        Of `model`.
    """
    tracer = _Tracer(graph, _first_names(model))
    for node in graph.nodes:
        tracer.visit(node)
    return tracer.finish()


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer with the first name of the same tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(value), name) for name, value in named}


Rule = Callable[["_Tracer", fx.Node], Channels | list | None]
_RULES: dict[str, Rule] = {}


def _rule(*operations: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operations, function))
        return function

    return register


class _Tracer:
    """State of one walk over a graph: atoms, and what is known of each value."""

    def __init__(self, graph: Graph, first_names: dict[str, str]):
        self.map = ChannelMap()
        self.parent: list[int] = []
        self.names = {p: first_names[name] for p, name in graph.tensors.items() if name in first_names}
        self.opaque: dict[str, str] = {}
        self.understood: set[str] = set()

    # ---------------------------------------------------------------------------------------------------- atoms
    def fresh(self, n: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        return np.arange(start, start + n)

    def fixed(self, n: int, reason: str) -> np.ndarray:
        return self.freeze(self.fresh(n), reason)

    def freeze(self, atoms: np.ndarray, reason: str) -> np.ndarray:
        if len(atoms):
            self.map.fixed.append((np.asarray(atoms), reason))
        return atoms

    def find(self, atom: int) -> int:
        parent = self.parent
        while parent[atom] != atom:
            parent[atom] = atom = parent[parent[atom]]
        return atom

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Make one set of each pair; returns the first."""
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                self.parent[max(x, y)] = min(x, y)
        return a

    def join_all(self, atoms: np.ndarray) -> None:
        self.join(np.full(len(atoms), atoms[0]), atoms)

    def bind(self, tensor: str, axis: int, atoms: np.ndarray) -> None:
        """The atoms of an axis of a parameter."""
        self.understood.add(tensor)
        known = self.map.axes.setdefault((tensor, axis), atoms)
        if known is not atoms:
            self.join(known, atoms)

    def produced(self, tensor: str, axis: int | None, n: int) -> np.ndarray:
        """Atoms of the output channels of a weight: the same at every call. The weight may have no axis of them."""
        self.understood.add(tensor)
        key = (tensor, axis) if axis is not None else (f"{tensor}:outputs", 0)
        self.map.outputs.setdefault(tensor, key)
        if key not in self.map.axes:
            self.map.axes[key] = self.fresh(n)
        return self.map.axes[key]

    # --------------------------------------------------------------------------------------------------- values
    def tensor(self, value: Any) -> str | None:
        """First name of a parameter or buffer when a node is one."""
        return self.names.get(value.name) if isinstance(value, fx.Node) and value.op == "placeholder" else None

    def channels(self, value: Any) -> Channels | None:
        """What is known of a value; a parameter has channels where only one of its axes has more than one element."""
        known = self.map.values.get(value) if isinstance(value, fx.Node) else None
        if known is not None:
            return known if isinstance(known, Channels) else None
        name = self.tensor(value)
        if name is None:
            return None
        shape = shape_of(value)
        long = [axis for axis, n in enumerate(shape) if n > 1]
        if len(long) != 1 and len(shape) != 1:
            return None
        axis = long[0] if long else 0
        self.understood.add(name)
        if (name, axis) not in self.map.axes:
            self.map.axes[name, axis] = self.fresh(shape[axis])
        return Channels(axis, self.map.axes[name, axis])

    def atoms_at(self, value: fx.Node, axis: int, reason: str) -> np.ndarray:
        """Atoms of a value along `axis`; frozen ones where it has none there."""
        known = self.channels(value)
        if known is not None and known.axis == axis:
            return known.atoms
        self.freeze_value(value, reason)
        return self.fixed(shape_of(value)[axis], "they are inputs of the network, or of no known layer")

    def freeze_value(self, value: Any, reason: str) -> None:
        for known in _flat(self.map.values.get(value)) if isinstance(value, fx.Node) else ():
            self.freeze(known.atoms, reason)
        name = self.tensor(value)
        if name is not None:
            self.opaque.setdefault(name, reason)

    def unknown(self, node: fx.Node, what: str = "") -> None:
        """Freeze whatever reaches a node."""
        reason = f"{what or f'the operation {operation(node)} is not understood'}{_whereabouts(node)}"
        for value in node.all_input_nodes:
            self.freeze_value(value, reason)

    # ----------------------------------------------------------------------------------------------------- walk
    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            for value in node.all_input_nodes:
                self.freeze_value(value, "they are outputs of the network")
        elif node.op == "call_function":
            self.understood.clear()
            rule = _RULES.get(operation(node))
            known = rule(self, node) if rule else self.unknown(node)
            if known is not None:
                self.map.values[node] = known
            for name in filter(None, map(self.tensor, node.all_input_nodes)):
                if name not in self.understood:
                    self.opaque.setdefault(name, f"{operation(node)} reads the parameter{_whereabouts(node)}")
        elif node.op not in ("placeholder", "get_attr"):
            self.unknown(node)

    def finish(self) -> ChannelMap:
        for (name, _), atoms in self.map.axes.items():
            if name in self.opaque:
                self.freeze(atoms, self.opaque[name])
        self.map.roots = np.array([self.find(a) for a in range(len(self.parent))], dtype=np.int64)
        return self.map


def shape_of(value: fx.Node) -> tuple[int, ...]:
    found = value.meta.get("val")
    return tuple(int(n) for n in found.shape) if isinstance(found, torch.Tensor) else ()


def _flat(known: Channels | list | None) -> Iterable[Channels]:
    if isinstance(known, Channels):
        return (known,)
    return [c for c in known or () if c is not None]


def _whereabouts(node: fx.Node) -> str:
    paths = [path for path, *_ in node.meta.get("nn_module_stack", {}).values()]
    return f" (in {paths[-1]!r})" if paths and paths[-1] else ""


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _axis(node: fx.Node, axis: int) -> int:
    return axis % max(1, len(shape_of(node)))


# --------------------------------------------------------------------------------------------- layers with weights
@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(t: _Tracer, node: fx.Node) -> Channels | None:
    x, weight, bias = node.args[0], t.tensor(node.args[1]), _argument(node, 2, "bias")
    if weight is None or (bias is not None and t.tensor(bias) is None) or operation(node) == "convolution":
        return t.unknown(node, "the weight of a convolution is computed")
    groups = _argument(node, 6, "groups", 1)
    n_out = shape_of(node.args[1])[0]
    axis = len(shape_of(x)) - len(shape_of(node.args[1])) + 1
    atoms = t.atoms_at(x, axis, f"a convolution reads them along another axis{_whereabouts(node)}")
    outputs = t.produced(weight, 0, n_out)
    if groups == 1:
        t.bind(weight, 1, atoms)
        t.map.inputs[weight] = 1
    else:
        t.map.followers.add(weight)
        _join_groups(t, groups, atoms, outputs)
    if bias is not None:
        t.bind(t.tensor(bias), 0, outputs)
    return Channels(axis, outputs)


def _join_groups(t: _Tracer, groups: int, *axes: np.ndarray) -> None:
    """Inputs and outputs of each group of a convolution go together."""
    for members in zip(*(np.split(atoms, groups) for atoms in axes), strict=True):
        t.join_all(np.concatenate(members))


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(t: _Tracer, node: fx.Node) -> Channels | None:
    x, weight, bias = node.args[0], t.tensor(node.args[1]), _argument(node, 2, "bias")
    if weight is None or (bias is not None and t.tensor(bias) is None):
        return t.unknown(node, "the weight of a transposed convolution is computed")
    groups = _argument(node, 6, "groups", 1)
    n_out = shape_of(node.args[1])[1]
    axis = len(shape_of(x)) - len(shape_of(node.args[1])) + 1
    atoms = t.atoms_at(x, axis, f"a transposed convolution reads them along another axis{_whereabouts(node)}")
    t.bind(weight, 0, atoms)
    if groups == 1:
        outputs = t.produced(weight, 1, n_out)
        t.map.inputs[weight] = 0
    else:
        outputs = t.produced(weight, None, groups * n_out)
        t.map.followers.add(weight)
        _join_groups(t, groups, atoms, outputs)
    if bias is not None:
        t.bind(t.tensor(bias), 0, outputs)
    return Channels(axis, outputs)


@_rule("linear")
def _linear(t: _Tracer, node: fx.Node) -> Channels | None:
    return _product(t, node, node.args[0], node.args[1], _argument(node, 2, "bias"), 0, 1)


@_rule("addmm")
def _addmm(t: _Tracer, node: fx.Node) -> Channels | None:
    return _product(t, node, node.args[1], node.args[2], node.args[0], 1, 0)


@_rule("mm", "matmul")
def _matmul(t: _Tracer, node: fx.Node) -> Channels | None:
    return _product(t, node, node.args[0], node.args[1], None, 1, 0)


def _product(t: _Tracer, node, x, weight_node, bias, out_axis: int, in_axis: int) -> Channels | None:
    weight = t.tensor(weight_node)
    if weight is None or len(shape_of(weight_node)) != 2 or (bias is not None and t.tensor(bias) is None):
        return t.unknown(node, "a matrix product of two computed values")
    last = len(shape_of(x)) - 1
    atoms = t.atoms_at(x, last, f"a linear layer reads them along another axis{_whereabouts(node)}")
    outputs = t.produced(weight, out_axis, shape_of(weight_node)[out_axis])
    t.bind(weight, in_axis, atoms)
    t.map.inputs[weight] = in_axis
    if bias is not None:
        t.bind(t.tensor(bias), 0, outputs)
    return Channels(len(shape_of(node)) - 1, outputs)


@_rule("embedding")
def _embedding(t: _Tracer, node: fx.Node) -> Channels | None:
    weight = t.tensor(node.args[0])
    if weight is None:
        return t.unknown(node)
    return Channels(len(shape_of(node)) - 1, t.produced(weight, 1, shape_of(node.args[0])[1]))


# -------------------------------------------------------------------------------------------------- normalisations
@_rule("batch_norm", "instance_norm")
def _normalisation(t: _Tracer, node: fx.Node) -> Channels | None:
    x = node.args[0]
    return _scaled(t, node, x, 1, node.args[1:5])


@_rule("group_norm")
def _group_norm(t: _Tracer, node: fx.Node) -> Channels | None:
    x, groups = node.args[:2]
    if groups != shape_of(x)[1]:
        return t.unknown(node, "a group normalisation takes its statistics over several channels")
    return _scaled(t, node, x, 1, (_argument(node, 2, "weight"), _argument(node, 3, "bias")))


@_rule("prelu")
def _prelu(t: _Tracer, node: fx.Node) -> Channels | None:
    x, weight = node.args
    if t.tensor(weight) is not None and shape_of(weight) == (1,):
        return t.channels(x)
    return _scaled(t, node, x, 1, (weight,))


def _scaled(t: _Tracer, node, x, axis: int, tensors) -> Channels | None:
    """Per-channel parameters on one axis."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    known = t.channels(x)
    if known is None or known.axis != axis or any(t.tensor(tensor) is None for tensor in tensors):
        return t.unknown(node, f"{operation(node)} of values whose channels are not known")
    for tensor in tensors:
        t.bind(t.tensor(tensor), 0, known.atoms)
    return known


# ------------------------------------------------------------------------------------------- element by element
_ELEMENTWISE = (
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "hardsigmoid",
    "hardswish", "tanh", "softplus", "softsign", "log_sigmoid", "softshrink", "hardshrink", "tanhshrink", "threshold",
    "rrelu", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "clone", "contiguous", "to",
    "_to_copy", "alias", "detach", "neg", "abs", "sqrt", "rsqrt", "exp", "log", "log1p", "square", "sin", "cos", "erf",
    "clamp", "clamp_min", "clamp_max", "reciprocal", "round", "floor", "ceil", "sign", "nan_to_num", "type_as", "float",
    "detach_", "lift_fresh_copy", "zeros_like", "ones_like",
)


@_rule(*_ELEMENTWISE, *(f"{name}_" for name in _ELEMENTWISE))
def _elementwise(t: _Tracer, node: fx.Node) -> Channels | None:
    return t.channels(node.args[0])


_BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "copy", "rsub", "fmod", "remainder", "where",
           "true_divide", "multiply", "subtract", "divide", "addcmul", "lerp")


@_rule(*_BINARY, *(f"{name}_" for name in _BINARY))
def _binary(t: _Tracer, node: fx.Node) -> Channels | None:
    """Values that are broadcast against each other: their channels are counted from the last axis."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    n_axes = len(shape_of(node))
    known = [(t.channels(a), a) for a in operands]
    # a channel that is stretched over an axis is no channel there
    found = [(n_axes - len(shape_of(a)) + c.axis, c.atoms, a) for c, a in known if c is not None]
    wide = [(axis, atoms) for axis, atoms, _ in found if len(atoms) == shape_of(node)[axis]]
    if not wide:
        return t.unknown(node) if found else None
    axis, atoms = wide[0]
    for other_axis, others, _ in found:
        if other_axis != axis or len(others) != len(atoms):
            t.freeze(others, f"they are combined with others along another axis{_whereabouts(node)}")
        else:
            t.join(atoms, others)
    for c, a in known:
        place = axis - n_axes + len(shape_of(a))
        if c is None and place >= 0 and shape_of(a)[place] > 1:
            t.freeze(atoms, f"they are combined with values whose channels are not known{_whereabouts(node)}")
            t.freeze_value(a, f"combined with channels{_whereabouts(node)}")
    if any(other_axis != axis for other_axis, _, _ in found):
        t.freeze(atoms, f"they are combined with others along another axis{_whereabouts(node)}")
    return Channels(axis, atoms)


# ------------------------------------------------------------------------------------------------ pooling, resizing
_POOLING = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)]
_RESIZING = ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
             "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
             "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")


@_rule(*_POOLING, *_RESIZING)
def _spatial(t: _Tracer, node: fx.Node) -> Channels | None:
    """The channel axis comes before the axes that are pooled or resized."""
    x = node.args[0]
    n_spatial = next((int(c) for c in reversed(operation(node)) if c.isdigit()), None)
    known = t.channels(x)
    if known is None:
        return None
    if n_spatial is None or known.axis != len(shape_of(x)) - n_spatial - 1 or shape_of(node) == ():
        return t.unknown(node)
    return known


@_rule("mean", "sum", "amax", "amin", "var", "std")
def _reduction(t: _Tracer, node: fx.Node) -> Channels | None:
    x = node.args[0]
    known = t.channels(x)
    if known is None:
        return None
    n_axes = len(shape_of(x))
    axes = _argument(node, 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if not axes or known.axis in (axes := [a % n_axes for a in axes]):
        return t.unknown(node, f"{operation(node)} runs over the channels")
    kept = len(shape_of(node)) == n_axes
    return Channels(known.axis if kept else known.axis - sum(a < known.axis for a in axes), known.atoms)


@_rule("softmax", "log_softmax", "cumsum", "flip")
def _along_one_axis(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    axes = _argument(node, 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if known is not None and known.axis in [_axis(node, a) for a in axes]:
        return t.unknown(node, f"{operation(node)} runs over the channels")
    return known


# ------------------------------------------------------------------------------------------- joining and splitting
@_rule("cat", "concat", "concatenate")
def _concatenation(t: _Tracer, node: fx.Node) -> Channels | None:
    parts, axis = node.args[0], _axis(node, _argument(node, 1, "dim", 0))
    known = [t.channels(part) for part in parts]
    if not any(known):
        return None
    where = next(c.axis for c in known if c is not None)
    if any(c is not None and c.axis != where for c in known):
        return t.unknown(node, "values with channels on different axes are concatenated")
    atoms = [c.atoms if c is not None else t.fixed(shape_of(p)[where], "they are inputs, or of no known layer")
             for c, p in zip(known, parts, strict=True)]
    if where == axis:
        return Channels(axis, np.concatenate(atoms))
    for others in atoms[1:]:
        t.join(atoms[0], others)
    return Channels(where, atoms[0])


@_rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def _splitting(t: _Tracer, node: fx.Node) -> list[Channels | None] | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    axis = _argument(node, 2, "dim", 0) % len(shape_of(node.args[0]))
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]
    if axis != known.axis:
        return [known] * len(sizes)
    t.map.calls.append(Call("split", node, axis, known.atoms, known.atoms, tuple(sizes)))
    return [Channels(axis, part) for part in np.split(known.atoms, np.cumsum(sizes)[:-1])]


@_rule("getitem")
def _getitem(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.map.values.get(node.args[0])
    return known[node.args[1]] if isinstance(known, list) else t.unknown(node)


@_rule("slice")
def _slice(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is not None and _axis(node, _argument(node, 1, "dim", 0)) == known.axis \
            and shape_of(node) != shape_of(node.args[0]):
        return t.unknown(node, "a slice takes channels by their place")
    return known


@_rule("select")
def _select(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    axis = node.args[1] % len(shape_of(node.args[0]))
    if axis == known.axis:
        return t.unknown(node, "an index takes channels by their place")
    return Channels(known.axis - (axis < known.axis), known.atoms)


@_rule("pad")
def _pad(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    n_axes, amounts = len(shape_of(node)), list(node.args[1])
    place = 2 * (n_axes - 1 - known.axis)
    left, right = amounts[place : place + 2] if place < len(amounts) else (0, 0)
    if left == right == 0:
        return known
    if _argument(node, 2, "mode", "constant") != "constant" or min(left, right) < 0:
        return t.unknown(node, "channels are padded by others")
    atoms = np.concatenate([t.fresh(left), known.atoms, t.fresh(right)])
    t.map.calls.append(Call("pad", node, known.axis, known.atoms, atoms))
    return Channels(known.axis, atoms)


# ----------------------------------------------------------------------------------------------------------- shapes
@_rule("permute")
def _permute(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    order = [_axis(node, a) for a in node.args[1]]
    return Channels(order.index(known.axis), known.atoms)


@_rule("transpose", "transpose_", "swapaxes")
def _transpose(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    a, b = (_axis(node, a) for a in node.args[1:3])
    return Channels({a: b, b: a}.get(known.axis, known.axis), known.atoms)


@_rule("t", "t_")
def _turned(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    return known and Channels(len(shape_of(node)) - 1 - known.axis, known.atoms)


@_rule("expand", "expand_as")
def _expand(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    axis = known.axis + len(shape_of(node)) - len(shape_of(node.args[0]))
    if shape_of(node)[axis] != len(known.atoms):
        return t.unknown(node, "one channel is repeated")
    return Channels(axis, known.atoms)


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "unsqueeze_", "squeeze", "squeeze_",
       "view_as", "reshape_as")
def _reshape(t: _Tracer, node: fx.Node) -> Channels | None:
    known = t.channels(node.args[0])
    if known is None:
        return None
    old, new = shape_of(node.args[0]), shape_of(node)
    found = _reshaped(t, known, old, new)
    if found is None:
        return t.unknown(node, "a reshape puts channels on several axes")
    if operation(node) in ("view", "reshape", "_unsafe_view", "unflatten") and t.tensor(node.args[0]) is None:
        t.map.calls.append(Call("view", node, found.axis, known.atoms, found.atoms))
    return found


def _reshaped(t: _Tracer, known: Channels, old: tuple[int, ...], new: tuple[int, ...]) -> Channels | None:
    """Channels after a reshape; None where they come to lie on several axes."""
    before, n, after = math.prod(old[: known.axis]), old[known.axis], math.prod(old[known.axis + 1 :])
    if 0 in new:
        return None
    for axis, size in enumerate(new):  # the axis is still there
        if size == n and math.prod(new[:axis]) == before:
            return Channels(axis, known.atoms)
    for axis, size in enumerate(new):  # it is joined with axes before or behind it
        outer, inner = math.prod(new[:axis]), math.prod(new[axis + 1 :])
        if size % n == 0 and before % outer == 0 and after % inner == 0 and size == n * (before // outer) * (
                after // inner):
            return Channels(axis, np.tile(np.repeat(known.atoms, after // inner), before // outer))
    for axis, size in enumerate(new):  # it is split: (C·k) -> (C, k), the k of each go together
        if math.prod(new[:axis]) == before and size > 1 and n % size == 0:
            blocks = known.atoms.reshape(size, -1)
            for block in blocks:
                t.join_all(block)
            return Channels(axis, blocks[:, 0])
    return None
