"""How compressed layers run, and what a network costs to run: parameters, multiplications, measured latency."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from skfactor.report.tables import ratio_text, text_table

__all__ = ["FACTORIZED", "REMOVED", "LayerExecution", "NetworkCost", "execution_cells", "execution_footnotes"]

#: Key of a file's metadata: names of the tensors whose layers run factorised.
FACTORIZED = "skfactor.factorized"
#: Key under which a file's metadata has the removals of filters, to replay on a fresh network.
REMOVED = "skfactor.removed"


@dataclass(frozen=True)
class LayerExecution:
    """How one compressed layer runs in `CompressionResult.model`.

    Attributes
    ----------
    layer : str
        Names of the layer, joined by ", " where several are tied.
    tensor : str
        Name of the stored weight.
    execution : {"factorized", "dense"}
    reason : str
        Why the layer is dense; empty where it is factorised.
    modules : str
        The chain of smaller layers, also where the dense layer was kept because it is faster.
    parameters_dense, parameters_factorized : int or None
        Elements of the weight and of the weights of the chain; None where there is no chain.
    seconds_dense, seconds_factorized : float or None
        Measured time of all calls of the layer in one forward pass (of one thread its CPU time, which other work on the
        machine does not disturb); None where it was not measured.
    inputs : str
        Shape and dtype of the inputs that were measured.
    threads : int or None
    device : str
    """

    layer: str
    tensor: str
    execution: str
    reason: str = ""
    modules: str = ""
    parameters_dense: int | None = None
    parameters_factorized: int | None = None
    seconds_dense: float | None = None
    seconds_factorized: float | None = None
    inputs: str = ""
    threads: int | None = None
    device: str = ""

    @property
    def parameters(self) -> int | None:
        """Elements of the weights that really run."""
        return self.parameters_factorized if self.execution == "factorized" else self.parameters_dense

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all fields."""
        return asdict(self)


@dataclass(frozen=True)
class NetworkCost:
    """What one forward pass of a network costs, with dense layers and as it is compressed.

    Attributes
    ----------
    parameters_before, parameters_after : int
        Of the whole network, tied ones counted once.
    macs_before, macs_after : int
        Multiplications with an addition, of convolutions and matrix products, for the whole batch. Recurrent layers
        are not counted.
    seconds_before, seconds_after : float
        Wall time of one forward pass in eval mode: the least of the repeats, both networks by turns.
    inputs : tuple of str
        Shape and dtype of every tensor that the pass got.
    threads : int
        Of torch, within one operation.
    device : str
    repeats : int
    """

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    seconds_before: float
    seconds_after: float
    inputs: tuple[str, ...]
    threads: int
    device: str
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all fields."""
        return asdict(self) | {"inputs": list(self.inputs)}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines of a table."""
        milliseconds = [f"{1e3 * s:.3g}" for s in (self.seconds_before, self.seconds_after)]
        lines = [
            ["parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}",
             _ratio(self.parameters_before, self.parameters_after)],
            ["MACs", f"{self.macs_before:,}", f"{self.macs_after:,}", _ratio(self.macs_before, self.macs_after)],
            ["latency, ms", *milliseconds, _ratio(self.seconds_before, self.seconds_after)],
        ]
        return ["one forward pass", "dense", "compressed", "ratio"], lines

    def footnotes(self) -> list[str]:
        """What was measured, and how."""
        return [f"inputs {', '.join(self.inputs)}; {_place(self.device, self.threads)}; "
                f"least of {self.repeats} repeats, by turns"]

    def __str__(self) -> str:
        return "\n".join([text_table(*self.cells()), *self.footnotes()])


def _ratio(before, after):
    return ratio_text(before / after if after else None)


def _place(device, threads):
    return f"{device}, {threads} thread{'s' if threads != 1 else ''}"


def execution_cells(layers: tuple[LayerExecution, ...]) -> tuple[list[str], list[list[str]]]:
    """Table of the layers: header and lines, the total last."""
    timed = any(layer.seconds_dense is not None for layer in layers)
    header = ["layer", "runs", "dense weights", "weights", *(["input", "dense ms", "chain ms"] if timed else []),
              "as"]
    lines = []
    for layer in layers:
        times = [layer.inputs, _milliseconds(layer.seconds_dense), _milliseconds(layer.seconds_factorized)]
        text = layer.modules if layer.execution == "factorized" else layer.reason
        lines.append([layer.layer, layer.execution, _count(layer.parameters_dense), _count(layer.parameters),
                      *(times if timed else []), text])
    n_factorized = sum(layer.execution == "factorized" for layer in layers)
    lines.append(["total", f"{n_factorized} of {len(layers)}",
                  _count(sum(layer.parameters_dense or 0 for layer in layers)),
                  _count(sum(layer.parameters or 0 for layer in layers)), *([""] * (3 if timed else 0)), ""])
    return header, lines


def execution_footnotes(layers: tuple[LayerExecution, ...]) -> list[str]:
    """What the latencies of a table of layers are; empty without."""
    timed = [layer for layer in layers if layer.seconds_dense is not None]
    places = sorted({_place(layer.device, layer.threads) for layer in timed})
    return [f"ms: all calls of the layer in one forward pass with these inputs; {', '.join(places)}; "
            "the least of several repeats, by turns"] if timed else []


def _milliseconds(seconds):
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _count(number):
    return "" if number is None else f"{number:,}"
