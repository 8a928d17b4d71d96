"""The operations of one forward pass as a graph: `torch.export`, and behind `torch.fx` what that refuses."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from skfactor.bridge.calibrate import evaluation
from skfactor.exceptions import LayerError

__all__ = ["Graph", "operation", "trace"]


@dataclass(frozen=True)
class Graph:
    """The ATen operations of a forward pass in eval mode, for inputs of one shape.

    Attributes
    ----------
    module : GraphModule
        Parameters and buffers are inputs of its graph.
    tensors : dict of str to str
        Placeholder of a parameter or buffer -> its name in the network.
    constants : dict of str to Tensor
        Placeholder -> tensor that belongs to no module.
    outputs : list of bool
        Which of the graph's outputs are the network's (others are new values of buffers).
    located : bool
        Whether nodes know the module that they come from; behind `torch.fx` they do not.
    """

    module: fx.GraphModule
    tensors: dict[str, str]
    constants: dict[str, torch.Tensor]
    outputs: list[bool]
    located: bool

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def run(self, model: nn.Module, args: tuple, kwargs: dict, after: Callable[[fx.Node, Any], Any]) -> list[Any]:
        """Outputs of the graph with the tensors of `model`, every value passed through `after(node, value)`.

        The tensors are copies: what `after` does to a value in place does not reach the network.
        """
        state = _named_tensors(model)
        given = iter(pytree.tree_leaves((args, kwargs)))
        inputs = []
        for node in self.module.graph.find_nodes(op="placeholder"):
            if node.name in self.tensors:
                inputs.append(state[self.tensors[node.name]].detach().clone())
            elif node.name in self.constants:
                inputs.append(self.constants[node.name].clone())
            else:
                value = next(given)
                inputs.append(value.clone() if isinstance(value, torch.Tensor) else value)
        with torch.no_grad():
            results = _Observed(self.module, after).run(*inputs)
        return [value for value, wanted in zip(results, self.outputs, strict=True) if wanted]

    def places(self, kinds: tuple[str, ...]) -> dict[fx.Node, list[tuple[str, int]]]:
        """For each node of these kinds, every module that it runs in and the how many-eth such call it is there.

        Modules go from the network, "", inwards; a call of a module twice counts anew.
        """
        counts: Counter[str] = Counter()
        places = {}
        for node in self.nodes:
            if node.op == "call_function" and operation(node) in kinds:
                stack = node.meta.get("nn_module_stack", {}) if self.located else {}
                scopes = {"": ""} | {key: path for key, (path, *_) in stack.items() if path}
                places[node] = [(path, counts[key]) for key, path in scopes.items()]
                counts.update(scopes.keys())
        return places


class _Observed(fx.Interpreter):
    """Runs a graph and shows every value to a function, which may change it."""

    def __init__(self, module: fx.GraphModule, after: Callable[[fx.Node, Any], Any]):
        super().__init__(module)
        self.after = after

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        return self.after(node, value) if node.op == "call_function" else value


def operation(node: fx.Node) -> str:
    """Name of an ATen operation without overload: "conv2d", "add", "relu_"; of anything else the function's name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name.removeprefix("aten::") if name.startswith("aten::") else name
    return getattr(target, "__name__", str(target))


def trace(model: nn.Module, args: tuple, kwargs: dict) -> Graph:
    """Trace a network in eval mode; the network is unchanged.

    Raises
    ------
    LayerError
        Neither `torch.export` nor `torch.fx` can trace it.
    """
    with evaluation(model), _plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _graph(torch.export.export(model, args, kwargs, strict=False), located=True)
        except Exception as error:
            first = error
        try:
            return _graph(torch.export.export(fx.symbolic_trace(model), args, kwargs, strict=False), located=False)
        except Exception as error:
            raise LayerError(f"the network cannot be traced: torch.export says {_line(first)!r}, torch.fx says "
                             f"{_line(error)!r}") from first


def _graph(program: torch.export.ExportedProgram, located: bool) -> Graph:
    kinds = torch.export.graph_signature.InputKind
    tensors, constants = {}, {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (kinds.PARAMETER, kinds.BUFFER):
            tensors[spec.arg.name] = spec.target
        elif spec.kind == kinds.CONSTANT_TENSOR:
            constants[spec.arg.name] = program.constants[spec.target]
        elif spec.kind != kinds.USER_INPUT:
            raise ValueError(f"the graph has an input of kind {spec.kind.name}")
    wanted = [spec.kind == torch.export.graph_signature.OutputKind.USER_OUTPUT
              for spec in program.graph_signature.output_specs]
    return Graph(program.graph_module, tensors, constants, wanted, located)


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all of their names, those included that no state dict has."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Transformer layers in their single operations: the fused one cannot be looked into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
