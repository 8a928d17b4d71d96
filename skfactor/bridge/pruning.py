"""`prune_filters`: which filters go, and what the layers that read them become so that their outputs stay.

A layer y = W u + b behind removed filters has only the inputs û that are left. Its weights are refit in closed form:
the W' and the shift that minimise E‖W u − W' û − t‖², from second moments of unlabelled inputs
(`skfactor.bridge.sequential`); the shift goes into the layer's bias or that of the normalisation behind it.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from skfactor._validation import did_you_mean
from skfactor.bridge.batchnorm import normalisation_after
from skfactor.bridge.calibrate import (
    Calibration,
    Moments,
    collect_moments,
    kind_of_inputs,
    model_batches,
)
from skfactor.bridge.layers import Network, entries_of_module
from skfactor.bridge.sequential import (
    JointMoments,
    Runs,
    add_shift,
    apply_to_means,
    best_target,
    bias_carrier,
    calls_of_layers,
    covariance,
    joint_moments,
)
from skfactor.bridge.surgery import Anatomy, FilterGroup, PrunedNetwork, dissect, groups_of, remove_sets
from skfactor.bridge.tensors import from_bits, to_bits
from skfactor.codec.dtypes import from_float, to_float
from skfactor.codec.tensor import Layout
from skfactor.exceptions import LayerError
from skfactor.solvers.pruning import Readers, eliminate_units
from skfactor.solvers.whitening import DAMPING, damped_grams

__all__ = ["CRITERIA", "prune_filters"]

#: Names that `criterion` may be.
CRITERIA = ("least_squares", "norm", "batchnorm", "random", "principal_angles", "norton-2024", "vbd")
_OF_FACTORS = ("principal_angles", "norton-2024", "vbd")

#: Scores of the filters of one layer: (weight (c_out, *), layer name) -> (c_out,), the least go first.
Criterion = Callable[[np.ndarray, str], np.ndarray]


def prune_filters(model: nn.Module, amount: float | Mapping[str, float], *, criterion: str | Criterion | None = None,
                  calibration: Any = None, example_inputs: Any = None, refit: bool = True, sequential: bool = True,
                  damping: float = DAMPING, rank: int = 4, random_state: int | None = None,
                  progress: bool = True) -> PrunedNetwork:
    """Remove the filters of a network that matter least; with unlabelled inputs the next layers make up for them.

    Parameters
    ----------
    model : Module
        Not changed.
    amount : float, int or dict
        What is removed of every group of filters (`skfactor.filter_groups`): a share from 0 to 1 of its units, rounded
        up, or a number of them. A dict gives this for name patterns of layers ("layer1.*.conv1"); the first that
        matches a layer of a group decides, and groups that none matches stay.
    criterion : str or callable, default=None
        What goes first. "least_squares": the units without which the layers that read them lose least of their
        outputs once their weights are refit, found one by one; needs calibration. "norm": filters of least L2 norm.
        "batchnorm": norms times γ/σ of the normalisation behind them. "random". "principal_angles", "norton-2024",
        "vbd": those of `skfactor.CPDFilterPruner`, for convolutions that are in no group with others. A callable
        `criterion(weight, layer)` gives a score for every filter. "norm" when None: with a refit it kept most accuracy
        on held-back training images (docs, "Pruning filters").
    calibration : tensor, tuple, dict, list, loader or Calibration, default=None
        Unlabelled inputs, as in `skfactor.compress`; of a `Calibration` only `inputs` and `max_vectors` are used.
    example_inputs : tensor, tuple, dict or loader, default=None
        Inputs to trace the network and to verify the result with; the first calibration batch when None.
    refit : bool, default=True
        With calibration: refit the weights of the layers that read what was removed.
    sequential : bool, default=True
        Refit layer after layer, each for the inputs that the smaller network before it really gives, so that errors
        are made up for instead of adding up. Layers behind those that read removed filters are refit too. Two
        passes over all inputs for every layer. False: every layer for inputs of the original network, in one pass.
    damping : float, default=0.003
        Ridge of the refit, as a share of the mean of the second moment's diagonal.
    rank : int, default=4
        Of the CP decomposition of "principal_angles", "norton-2024" and "vbd".
    random_state : int, default=None
        Of "random".
    progress : bool, default=True
        Show a progress bar when the output is a terminal.

    Returns
    -------
    pruned : PrunedNetwork

    Raises
    ------
    LayerError
        The network cannot be traced, or the result is not the masked network.
    ValueError
        A pattern that matches no layer, an amount out of range, a criterion that is unknown or cannot be used.

    Notes
    -----
    Every unit that is removed and every layer that is refit is decided by second moments, so a few hundred inputs are
    enough. Columns of a layer that are fitted together are held as a dense matrix: a linear layer with 25,088 inputs
    needs 5 GB.

    Examples
    --------
    >>> import torch, skfactor
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    >>> x = torch.randn(64, 8)
    >>> pruned = skfactor.prune_filters(net, 0.5, calibration=x, progress=False)
    >>> pruned.model[0].out_features
    3
    """
    if not isinstance(calibration, Calibration):
        calibration = None if calibration is None else Calibration(calibration)
    criterion = _checked_criterion(criterion, calibration)
    if example_inputs is None:
        if calibration is None:
            raise ValueError("prune_filters needs example_inputs or calibration: the network is traced with inputs")
        args, kwargs = next(model_batches(model, calibration.inputs))
        example_inputs = kwargs if kwargs else _few(args) if isinstance(calibration.inputs, torch.Tensor) else args
    anatomy = dissect(model, example_inputs)
    task = _Task(anatomy, _amounts(amount, groups_of(anatomy).groups), calibration, damping)
    wanted = _chosen(task, criterion, rank, random_state, progress)
    if not wanted:
        raise ValueError("amount removes no filter of any group")
    pruned = remove_sets(anatomy, wanted)
    if calibration is not None and refit:
        pruned.refitted = _refit(task, pruned.model, wanted, sequential, progress)
    return pruned


def _few(args: tuple[torch.Tensor, ...], n: int = 8) -> tuple[torch.Tensor, ...]:
    """The first examples of a batch."""
    return tuple(a[:n] for a in args)


def _checked_criterion(criterion, calibration) -> str | Criterion:
    if criterion is None:
        return "norm"
    if not callable(criterion) and criterion not in CRITERIA:
        raise ValueError(f"criterion must be a callable or one of {', '.join(CRITERIA)}, got {criterion!r}"
                         f"{did_you_mean(criterion, CRITERIA)}")
    if criterion == "least_squares" and calibration is None:
        raise ValueError("criterion='least_squares' needs calibration inputs")
    return criterion


def _amounts(amount: float | Mapping[str, float], groups: tuple[FilterGroup, ...]) -> dict[FilterGroup, int]:
    """Units to remove from each group."""
    rules = amount if isinstance(amount, Mapping) else {"*": amount}
    layers = [layer for group in groups for layer in group.layers]
    for pattern, share in rules.items():
        is_number = isinstance(share, (int, float, np.integer, np.floating)) and not isinstance(share, bool)
        if not is_number or share < 0 or (not isinstance(share, (int, np.integer)) and share >= 1):
            raise ValueError(f"amount must be a share from 0 to 1 or a number of filters, got {share!r}")
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(f"no layer with filters that can be removed matches {pattern!r}"
                             f"{did_you_mean(pattern, layers)}")
    found = {}
    for group in groups:
        share = next((s for p, s in rules.items() if any(fnmatchcase(layer, p) for layer in group.layers)), 0)
        n = len(group.units)
        number = int(share) if isinstance(share, (int, np.integer)) else math.ceil(share * n - 1e-9)
        found[group] = min(number, n)
    return {group: number for group, number in found.items() if number}


@dataclass
class _Task:
    """What is to be removed from which network, and what is known of it."""

    anatomy: Anatomy
    amounts: dict[FilterGroup, int]
    calibration: Calibration | None
    damping: float
    network: Network = field(init=False)
    norms: dict[nn.Module, nn.Module] = field(init=False)

    def __post_init__(self):
        self.network = entries_of_module(self.anatomy.model)
        self.norms = norms_of(self.network, self.anatomy.model, self.anatomy.batch)

    def carrier(self, name: str):
        """The bias that takes up the shift of a layer's outputs."""
        return bias_carrier(self.owners(name), self.norms)

    def root(self, unit: tuple[tuple[str, int], ...]) -> int:
        layer, index = unit[0]
        return int(self.anatomy.map.sets_of(self.anatomy.weights[layer])[index])

    def owners(self, name: str) -> list:
        return self.network.owners[self.network.names[name]]

    def weight(self, name: str) -> np.ndarray:
        return weight_of(self.network, name)

    def layout(self, name: str) -> Layout:
        return layout_of(self.network, name)

    def readers(self) -> dict[str, np.ndarray]:
        """Weights whose inputs are atoms, in the order in which they run, with the set of every column."""
        found = {}
        for name, axis in self.anatomy.map.inputs.items():
            entry = self.network.names.get(name)
            if entry is None or not kind_of_inputs(self.network.owners[entry]).is_vectors:
                continue
            kernel = self.layout(name).kernel_shape
            sets = self.anatomy.map.roots[self.anatomy.map.axes[name, axis]]
            found[name] = np.repeat(sets, math.prod(kernel) // len(sets))
        return found

    def batches(self, model: nn.Module) -> list[tuple[tuple, dict]]:
        return list(model_batches(model, self.calibration.inputs))


def norms_of(network: Network, model: nn.Module, batch: tuple[tuple, dict]) -> dict[nn.Module, nn.Module]:
    """The batch normalisation behind each layer of a network."""
    return normalisation_after(model, [m for owners in network.owners.values() for m, _ in owners], *batch)


def layout_of(network: Network, name: str) -> Layout:
    entry = next(e for e in network.entries if e.name == network.names[name])
    return entry.layout or Layout.rows_first(entry.shape)


def weight_of(network: Network, name: str) -> np.ndarray:
    """Weight of a layer as rows, in float64."""
    tensor = network.tensors[network.names[name]]
    bits = to_bits(tensor)
    return layout_of(network, name).to_matrix(to_float(bits, str(tensor.dtype).removeprefix("torch."))).astype(
        np.float64)


# -------------------------------------------------------------------------------------------------- what goes first
class _Left:
    """Counts what is left of every axis, so that none becomes empty."""

    def __init__(self, anatomy: Anatomy):
        self.counts: dict[tuple[str, int], int] = {}
        self.members: dict[int, dict[tuple[str, int], int]] = {}
        for key, atoms in anatomy.map.axes.items():
            roots, counts = np.unique(anatomy.map.roots[atoms], return_counts=True)
            self.counts[key] = len(atoms)
            for root, n in zip(roots.tolist(), counts.tolist(), strict=True):
                self.members.setdefault(root, {})[key] = n

    def may_go(self, root: int) -> bool:
        return all(self.counts[key] > n for key, n in self.members.get(root, {}).items())

    def remove(self, root: int) -> None:
        for key, n in self.members.get(root, {}).items():
            self.counts[key] -= n


def _chosen(task: _Task, criterion, rank, random_state, progress) -> set[int]:
    """Sets of channels that go."""
    left = _Left(task.anatomy)
    if criterion == "least_squares":
        return _chosen_by_least_squares(task, left, progress)
    rng = np.random.default_rng(random_state)
    wanted: set[int] = set()
    for group, number in task.amounts.items():
        scores = _scores(task, group, number, criterion, rank, rng)
        taken = 0
        for unit in np.argsort(scores, kind="stable"):
            root = task.root(group.units[unit])
            if taken < number and left.may_go(root):
                left.remove(root)
                wanted.add(root)
                taken += 1
    return wanted


def _scores(task: _Task, group: FilterGroup, number: int, criterion, rank, rng) -> np.ndarray:
    """Score of every unit of a group: the root of the sum of squares over its filters."""
    if criterion == "random":
        return rng.permutation(len(group.units)).astype(float)
    if criterion in _OF_FACTORS:
        return _scores_of_factors(task, group, number, criterion, rank)
    by_layer = {}
    for layer in group.layers:
        name = task.anatomy.weights[layer]
        W = task.weight(name)
        if callable(criterion):
            shape = task.layout(name).kernel_shape
            scores = np.asarray(criterion(W.reshape(len(W), *shape), layer), dtype=float)
            if scores.shape != (len(W),) or not np.isfinite(scores).all():
                raise ValueError(f"criterion must give a finite score for each of the {len(W)} filters of {layer!r}, "
                                 f"got shape {scores.shape}")
        else:
            scores = np.sqrt(np.einsum("nd,nd->n", W, W))
            scores = scores * _normalisation_scale(task, name) if criterion == "batchnorm" else scores
        by_layer[layer] = scores
    if all(len(unit) == 1 for unit in group.units):  # a callable's scores may be negative
        return np.array([by_layer[layer][index] for ((layer, index),) in group.units])
    return np.array([math.sqrt(sum(by_layer[layer][i] ** 2 for layer, i in unit)) for unit in group.units])


def _normalisation_scale(task: _Task, name: str) -> np.ndarray | float:
    """|γ|/σ of the batch normalisation that reads the filters; 1 where there is none."""
    (module, _), *_ = task.network.owners[task.network.names[name]]
    norm = task.norms.get(module)
    if norm is None:
        return 1.0
    return (norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()).cpu().numpy()


def _scores_of_factors(task: _Task, group: FilterGroup, number: int, criterion: str, rank: int) -> np.ndarray:
    """0 for the filters that the CP-based pruner drops, 1 for those that it keeps."""
    from skfactor import estimators

    if not hasattr(estimators, "CPDFilterPruner"):
        raise ValueError(f"criterion={criterion!r} needs skfactor.CPDFilterPruner, which this version does not have")
    if len(group.layers) != 1:
        raise ValueError(f"criterion={criterion!r} judges the filters of one layer by themselves, but those of "
                         f"{', '.join(group.layers[:3])} are coupled; give a dict of patterns as amount")
    (layer,) = group.layers
    name = task.anatomy.weights[layer]
    W = task.weight(name)
    pruner = estimators.CPDFilterPruner(rank=rank, kernel_shape=task.layout(name).kernel_shape,
                                        prune_ratio=number / len(W), criterion=criterion)
    return pruner.fit(W).support_.astype(float)


def _chosen_by_least_squares(task: _Task, left: _Left, progress: bool) -> set[int]:
    columns = task.readers()
    pruned_sets = {task.root(unit) for group in task.amounts for unit in group.units}
    columns = {name: sets for name, sets in columns.items() if np.isin(sets, list(pruned_sets)).any()}
    moments = _moments(task, list(columns))
    states: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for name in columns:
        entry = task.network.names[name]
        gram = moments.grams.get(entry)
        if gram is not None:
            W = task.weight(name)
            gram = covariance(gram, moments.means[entry]) if task.carrier(name) is not None else gram
            G = damped_grams(gram, task.damping)[0]
            power = float(np.einsum("nd,de,ne->", W, G, W, optimize=True))
            states[name] = (W, np.linalg.inv(G), 1.0 / power if power > 0 else 0.0)
    wanted: set[int] = set()
    for group, number in tqdm(task.amounts.items(), disable=None if progress else True, unit="group", desc="select"):
        roots = [task.root(unit) for unit in group.units]
        readers = []
        for name, (W, inverse, scale) in states.items():
            by_set = {int(r): np.flatnonzero(columns[name] == r) for r in np.intersect1d(columns[name], roots)}
            if by_set:
                readers.append(Readers(W, inverse, [by_set.get(r, np.empty(0, dtype=np.int64)) for r in roots], scale))
        if not readers:
            raise LayerError(f"the calibration inputs reach no layer that reads the filters of {group.layers[0]!r}; "
                             "use another criterion")

        def take(unit, roots=roots):
            if not left.may_go(roots[unit]):
                return False
            left.remove(roots[unit])
            return True

        wanted |= {roots[unit] for unit in eliminate_units(readers, number, take)[0]}
    return wanted


def _moments(task: _Task, names: list[str]) -> Moments:
    owners = {task.network.names[name]: task.network.owners[task.network.names[name]] for name in names}
    return collect_moments(task.anatomy.model, owners, task.batches(task.anatomy.model), task.calibration.max_vectors)


# ------------------------------------------------------------------------------------------------------------- refit
def _refit(task: _Task, pruned: nn.Module, wanted: set[int], sequential: bool, progress: bool) -> tuple[str, ...]:
    """Refit the layers behind removed filters, in the order in which they run; writes into `pruned`."""
    columns = task.readers()
    gone = list(wanted)
    direct = [name for name, sets in columns.items() if np.isin(sets, gone).any()]
    names = list(columns)[list(columns).index(direct[0]):] if direct and sequential else direct
    network = entries_of_module(pruned)
    norms = norms_of(network, pruned, task.anatomy.batch)
    done = []
    bar = tqdm(total=len(names), disable=None if progress else True, unit="layer", desc="refit")

    def refit(name: str, joint: JointMoments) -> None:
        kept_rows = ~np.isin(task.anatomy.map.sets_of(name), gone)
        kept_columns = ~np.isin(columns[name], gone)
        W = task.weight(name)[kept_rows]
        carrier = bias_carrier(network.owners[network.names[name]], norms)
        target, _ = best_target(W, joint, carrier is not None, task.damping, W[:, kept_columns])
        _write(network, name, target)
        if carrier is not None:
            with torch.no_grad():
                add_shift(carrier, apply_to_means(W, joint.mean) - apply_to_means(target, joint.mean_hat))
        done.append(task.anatomy.layer_of(name))
        bar.update()

    with bar:
        if not sequential:
            _refit_at_once(task, columns, names, gone, refit)
        else:
            _refit_in_order(task, pruned, network, names, refit)
    return tuple(done)


def _write(network: Network, name: str, matrix: np.ndarray) -> None:
    tensor, layout = network.tensors[network.names[name]], layout_of(network, name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    with torch.no_grad():
        tensor.copy_(from_bits(from_float(layout.to_tensor(matrix, tuple(tensor.shape)), dtype), dtype))


def _refit_at_once(task: _Task, columns, names, gone, refit) -> None:
    """From moments of inputs of the original network, and of what is left of them."""
    moments = _moments(task, names)
    for name in names:
        entry = task.network.names[name]
        if entry in moments.grams:
            G, mean, kept = moments.grams[entry], moments.means[entry], ~np.isin(columns[name], gone)
            refit(name, JointMoments(mean[None], mean[None, kept], G[None][:, kept][:, :, kept], G[None][:, :, kept]))


def _refit_in_order(task: _Task, pruned: nn.Module, network: Network, names, refit) -> None:
    """Batch by batch, both networks run as far as each layer: two passes over the inputs for every layer."""
    owners = {name: task.owners(name) for name in names}
    batches = task.batches(task.anatomy.model)
    for name, n_calls in calls_of_layers(task.anatomy.model, owners, batches[0]).items():
        runs = (Runs(pruned, network.owners[network.names[name]], n_calls),
                Runs(task.anatomy.model, owners[name], n_calls))
        refit(name, joint_moments(*runs, batches, task.calibration.max_vectors))
