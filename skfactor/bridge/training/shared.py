"""`TrainedSharing`: a network with shared weights, trained in its shared form."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from skfactor.bridge.apply import compress, deep_copy
from skfactor.bridge.fitting import Fitted, TensorRecord, relative_error, squared_norm
from skfactor.bridge.result import CompressionResult
from skfactor.bridge.training.base import TrainingMethod
from skfactor.bridge.training.weights import (
    attach,
    masks_of_zeros,
    multiply,
    restored,
    slots_by_tensor,
    with_state_of,
)
from skfactor.codec.decoders import CodebookDecoder, IdentityDecoder
from skfactor.codec.dtypes import to_float
from skfactor.codec.floats import find_grid
from skfactor.codec.tensor import CompressedTensor, Layout
from skfactor.exceptions import LayerError

__all__ = ["SharedWeight", "TrainedSharing"]


class TrainedSharing(TrainingMethod):
    r"""Keep training a network whose weights are shared: the centroids learn, the codes stay (Deep Compression).

    Every weight is :math:`w_i = c_{a_i}`; the codebook :math:`c` is the parameter, the codes :math:`a` are buffers, and

    .. math:: \frac{\partial\,\ell}{\partial c_k} = \sum_{i:\,a_i = k} \frac{\partial\,\ell}{\partial w_i}

    (Han, Mao, Dally 2016, arXiv:1510.00149). Tied weights share one codebook; weights that are zero stay zero; other
    parameters train as usual and are stored as their rules say.

    Parameters
    ----------
    network : CompressionResult or Module
        A result whose layers end in codebooks (`KMeansWeightSharer`, `UniformQuantizer`, `Pipeline`s of a pruner and
        one of them), or a network and `rules` to compress it with. Never changed.
    rules : estimator, Pipeline or dict, default=None
        As `skfactor.compress` takes them; for a Module.
    grad : {"sum", "mean"}, default="sum"
        What a centroid gets of its members' gradients. With the mean, rates do not depend on the sizes of clusters.
        Soft assignment has its own gradient.
    codebook : {"auto", "free", "step"}, default="auto"
        "free": every centroid is a parameter. "step": the one step of a uniform codebook is, so that a file needs one
        number for it. "auto": the step where the codebook is uniform.
    reassign_every : int, default=None
        Epochs after which every weight takes its nearest centroid again. Each weight then also has a value of its own,
        which gets the gradient of the shared one (straight-through).
    soft : bool, default=False
        While training, a weight is an average of the centroids, weighed by
        :math:`\mathrm{softmax}_k(-(w_i - c_k)^2 / T)` (Cho et al. 2022, arXiv:2108.12659); in eval mode and at the end
        it is the nearest centroid. Takes memory for weights times centroids.
    temperature : float, default=0.1
        T in units of the mean squared distance of a centroid to its nearest other one.
    cooling : float, default=0.7
        Factor of the temperature after each epoch.
    pin_zeros : bool, default=True
        Weights that are zero stay zero, and so do centroids.

    Attributes
    ----------
    model : Module
        The network to train. Its shared weights are computed by parametrizations; `finish` gives plain layers.

    Examples
    --------
    >>> import torch, skfactor
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> method = TrainedSharing(net, skfactor.KMeansWeightSharer(n_clusters=4))
    >>> optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    >>> x, y = torch.randn(32, 8), torch.arange(32) % 2
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(method.model(x), y) + method.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     method.after_step()
    >>> result = method.finish()
    >>> len(result.model[0].weight.unique()) <= 4
    True
    """

    def __init__(self, network: CompressionResult | nn.Module, rules: Any = None, *, grad: str = "sum",
                 codebook: str = "auto", reassign_every: int | None = None, soft: bool = False,
                 temperature: float = 0.1, cooling: float = 0.7, pin_zeros: bool = True):
        _check_options(grad, codebook, reassign_every, temperature, cooling)
        result = _as_result(network, rules)
        self.reassign_every, self.cooling, self._epoch = reassign_every, cooling, 0
        self._rules = dict(result.estimators_)
        self._skipped = dict(result.skipped)
        self._plain = result.model
        self.model = deep_copy(result.model)
        slots = slots_by_tensor(self.model, result.names)
        shared = {n: t for n, t in result.tensors.items() if n in slots and _is_shared(n, t)}
        if not shared:
            raise ValueError("nothing is shared: no layer's weight ends in a codebook")
        values = dict(network.named_parameters(remove_duplicate=False)) if isinstance(network, nn.Module) else {}
        self._records = {r.name: r for r in result.records}
        self._slots = {n: slots[n] for n in shared}
        self._templates = shared
        self._weights: dict[str, SharedWeight] = {}
        for name, tensor in shared.items():
            parameter = getattr(*slots[name][0])
            latent = values.get(name, parameter) if soft or reassign_every else None
            self._weights[name] = self._share(name, tensor, parameter, latent, grad=grad, codebook=codebook,
                                              temperature=temperature if soft else None, pin_zeros=pin_zeros)
        rest = [getattr(*places[0]) for n, places in slots.items() if n not in shared
                and isinstance(result.tensors[n], CompressedTensor) and len(result.tensors[n].shape) > 1]
        self._masks = masks_of_zeros(rest) if pin_zeros else []

    def _share(self, name, tensor, parameter, latent, *, grad, codebook, temperature, pin_zeros) -> SharedWeight:
        decoder = tensor.decoders[-1]
        grid = None if codebook == "free" or len(decoder.codebooks) > 1 else find_grid(decoder.codebooks)
        if codebook == "step" and grid is None:
            raise LayerError(f"{name}: codebook='step' needs one uniform codebook, got "
                             f"{len(decoder.codebooks)} that are not; 'auto' trains these centroid by centroid")
        weight = SharedWeight(tensor, grid, grad=grad, pin_zeros=pin_zeros, temperature=temperature,
                              has_latent=latent is not None).to(parameter.device)
        book = nn.Parameter(weight.initial.to(parameter), requires_grad=parameter.requires_grad)
        originals = {"original": book}
        if latent is not None:
            latent = nn.Parameter(latent.detach().clone().to(parameter), requires_grad=parameter.requires_grad)
            originals = {"original0": book, "original1": latent}
        del weight.initial
        attach(self._slots[name], weight, originals)
        return weight

    def after_step(self) -> None:
        """Zeros of layers that are pruned but not shared stay zero; those of shared ones cannot move."""
        multiply(self._masks)

    def after_epoch(self) -> None:
        """Cool down, and let every weight take its nearest centroid, when it is time for it."""
        self._epoch += 1
        for weight in self._weights.values():
            weight.cool(self.cooling)
        if self.reassign_every and self._epoch % self.reassign_every == 0:
            self.reassign()

    def reassign(self) -> int:
        """Every weight takes the centroid nearest to its own value; returns how many changed."""
        if not all(weight.has_latent for weight in self._weights.values()):
            raise ValueError("codes change with reassign_every or soft=True only: without, weights have no own values")
        return sum(weight.reassign(*self._originals(name)) for name, weight in self._weights.items())

    def finish(self) -> CompressionResult:
        """The network with plain layers, and what its file holds.

        Returns
        -------
        result : CompressionResult
            `estimators_` of shared weights are those that were fitted before the training. Errors in its records are
            relative to the trained network.
        """
        made = {name: self._made(name) for name in self._weights}
        return restored(with_state_of(self._plain, self.model), made, self._rules, self._skipped)

    def _made(self, name: str) -> Fitted:
        """What is stored of one shared weight."""
        start = self._templates[name]
        book, codes = self._weights[name].stored(start.decoders[-1], *self._originals(name))
        decoder = replace(start.decoders[-1], codebooks=book)
        tensor = CompressedTensor((*start.decoders[:-1], decoder), codes, start.shape, start.dtype, start.layout,
                                  start.coder)
        X = start.layout.to_matrix(to_float(tensor.to_array(), start.dtype))
        error = relative_error(tensor.to_matrix(), X)
        record: TensorRecord = replace(self._records[name], relative_error=error, squared_norm=squared_norm(X),
                                       output_error=None, n_clusters=book.shape[1], info={})
        return Fitted(tensor, self._rules[name], record)

    def _originals(self, name: str) -> list[torch.Tensor]:
        module, attribute = self._slots[name][0]
        parametrization = module.parametrizations[attribute]
        if not self._weights[name].has_latent:
            return [parametrization.original]
        return [parametrization.original0, parametrization.original1]

    def state_dict(self) -> dict[str, Any]:
        """Codebooks, codes and all other parameters, and the epoch."""
        return {"model": self.model.state_dict(), "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self._epoch = state["epoch"]
        for weight in self._weights.values():
            weight.count()


def _check_options(grad, codebook, reassign_every, temperature, cooling) -> None:
    if grad not in ("sum", "mean"):
        raise ValueError(f"grad must be 'sum' or 'mean', got {grad!r}")
    if codebook not in ("auto", "free", "step"):
        raise ValueError(f"codebook must be 'auto', 'free' or 'step', got {codebook!r}")
    if reassign_every is not None and not (isinstance(reassign_every, int) and reassign_every >= 1):
        raise ValueError(f"reassign_every must be None or an integer of at least 1, got {reassign_every!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    if not 0 < cooling <= 1:
        raise ValueError(f"cooling must be in (0, 1], got {cooling!r}")


def _as_result(network: Any, rules: Any) -> CompressionResult:
    if isinstance(network, CompressionResult):
        if rules is not None:
            raise ValueError("rules are for a module; a CompressionResult has been compressed")
        if network.model is None:
            raise ValueError("training runs the network: compress the module, not its state dict or file")
        if any(e.execution == "factorized" for e in network.executions):
            raise ValueError("layers that run factorised have no codes to keep: compress with mode='dense', or train "
                             "result.model with skfactor.finetune")
        return network
    if isinstance(network, nn.Module):
        if rules is None:
            raise ValueError("a module needs rules: TrainedSharing(model, rules), or a CompressionResult")
        return compress(network, rules, progress=False)
    raise TypeError(f"network must be a CompressionResult or a torch.nn.Module, got {type(network).__name__}")


def _is_shared(name: str, tensor: Any) -> bool:
    """Whether codes of a codebook are all that makes the tensor; LayerError where there is more to it."""
    if not isinstance(tensor, CompressedTensor):
        return False
    *before, last = tensor.decoders
    if isinstance(last, CodebookDecoder) and all(isinstance(d, IdentityDecoder) for d in before):
        return True
    if all(isinstance(d, IdentityDecoder) for d in tensor.decoders) or len(tensor.shape) < 2:
        return False  # pruned or rounded: trained as it is, and compressed by its rule again
    raise LayerError(f"{name} is stored by {' of '.join(d.name for d in tensor.decoders)}: training keeps codebooks "
                     "alone; give its layer a rule that ends in one, or None")


class _Lookup(torch.autograd.Function):
    """Rows of a table by index; the gradient of a row is the sum or mean of its members', summed in float64.

    One-dimensional on purpose: torch takes 6 times as long forward and 30 times as long backward for a table (K, 1).
    """

    @staticmethod
    def forward(ctx, table, index, counts):
        ctx.save_for_backward(index, counts)
        ctx.n_rows = len(table)
        if table.shape[1] == 1:
            return table.reshape(-1).index_select(0, index)[:, None]
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, counts = ctx.saved_tensors
        zeros = torch.zeros(ctx.n_rows, dtype=torch.float64, device=grad.device)
        total = torch.stack([zeros.index_add(0, index, column.double()) for column in grad.unbind(1)], dim=1)
        if counts is not None:
            total = total / counts[:, None].clamp(min=1)
        return total.to(grad.dtype), None, None


class _PassThrough(torch.autograd.Function):
    """`value`; its gradient goes to `latent` as well."""

    @staticmethod
    def forward(ctx, value, latent):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class SharedWeight(nn.Module):
    """A weight that is looked up in codebooks: a parametrization of one tensor, whose parameter is the codebook.

    Parameters
    ----------
    tensor : CompressedTensor
        Ends in a `CodebookDecoder`.
    grid : (int, float) or None
        First multiple and step of a uniform codebook whose step is the parameter.
    grad : {"sum", "mean"}
    pin_zeros : bool
    temperature : float or None
        Soft assignment while training.
    has_latent : bool
        Whether weights have values of their own beside the shared ones.
    """

    def __init__(self, tensor: CompressedTensor, grid: tuple[int, np.floating] | None, *, grad: str, pin_zeros: bool,
                 temperature: float | None, has_latent: bool):
        super().__init__()
        decoder = tensor.decoders[-1]
        self.n_books, self.n_clusters, self.vector_size = decoder.codebooks.shape
        self.shape, self.layout, self.grad = tensor.shape, tensor.layout, grad
        self.has_latent, self.soft = has_latent, temperature is not None
        books = decoder.codebooks.astype(decoder.dtype).reshape(-1, self.vector_size)
        codes = torch.from_numpy(np.ascontiguousarray(tensor.codes, dtype=_code_dtype(self.n_clusters)))
        self.register_buffer("codes", codes)
        self.register_buffer("book", _book_of_codes(decoder, *tensor.codes.shape), persistent=False)
        multiples = None if grid is None else torch.arange(grid[0], grid[0] + self.n_clusters)
        self.register_buffer("multiples", multiples, persistent=False)
        #: what the parameter starts from
        self.initial = torch.from_numpy(books.copy()) if grid is None else torch.tensor([float(grid[1])])
        zero = (books == 0).all(1)
        free = torch.from_numpy(~zero)[:, None] if pin_zeros and zero.any() and grid is None else None
        self.register_buffer("free", free, persistent=False)
        moving = torch.from_numpy(~zero)[self._index()].reshape(codes.shape) if pin_zeros and has_latent else None
        self.register_buffer("moving", moving, persistent=False)
        self.register_buffer("counts", None, persistent=False)
        self.count()
        gap = _mean_square_gap(decoder.codebooks) if self.soft else 0.0
        self.register_buffer("temperature", torch.tensor(gap * temperature) if self.soft else None)

    def forward(self, parameter: torch.Tensor, latent: torch.Tensor | None = None) -> torch.Tensor:
        """The weight, from the codebook or its step and, with own values of the weights, from these."""
        table = self.table(parameter)
        if self.soft and latent is not None:
            values = (self._attention(table, latent) if self.training
                      else self._hard(table, self._nearest(table, latent)))
            return _to_tensor(values, self.layout, self.shape)
        weight = _to_tensor(self._hard(table, self.codes), self.layout, self.shape)
        return weight if latent is None else _PassThrough.apply(weight, latent)

    def right_inverse(self, weight: torch.Tensor) -> Any:
        """The codebook whose centroids are the means of a weight's members: what assigning to the layer does."""
        X = _to_vectors(weight, self.layout, self.vector_size).reshape(-1, self.vector_size).double()
        total = torch.zeros(self.n_books * self.n_clusters, self.vector_size, dtype=torch.float64, device=X.device)
        total.index_add_(0, self._index(), X)
        counts = torch.bincount(self._index(), minlength=len(total))[:, None]
        means = (total / counts.clamp(min=1)).to(weight.dtype)
        if self.multiples is not None:
            k = self.multiples.double()[:, None]
            means = ((k * total).sum() / (k * k * counts).sum().clamp(min=1)).reshape(1).to(weight.dtype)
        return (means, weight) if self.has_latent else means

    def table(self, parameter: torch.Tensor) -> torch.Tensor:
        """All centroids (n_books * n_clusters, vector_size); those that are pinned are zero."""
        if self.multiples is not None:
            return (parameter * self.multiples)[:, None]
        return parameter if self.free is None else parameter * self.free

    def reassign(self, parameter: torch.Tensor, latent: torch.Tensor) -> int:
        """Nearest centroids become the codes; how many changed."""
        with torch.no_grad():
            codes = self._nearest(self.table(parameter), latent).to(self.codes.dtype)
            changed = int((codes != self.codes).sum())
            self.codes.copy_(codes)
            self.count()
        return changed

    def cool(self, factor: float) -> None:
        """Lower the temperature of the soft assignment."""
        if self.temperature is not None:
            self.temperature.mul_(factor)

    def stored(self, decoder: CodebookDecoder, parameter: torch.Tensor,
               latent: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codebooks, in the dtype of `decoder`, and codes as a file has them: scalar codebooks in order."""
        with torch.no_grad():
            table = self.table(parameter.detach())
            codes = self._nearest(table, latent) if self.soft else self.codes
        codes = codes.cpu().numpy().astype(np.uint8 if self.n_clusters <= 256 else np.uint16)
        shape = self.n_books, self.n_clusters, self.vector_size
        books = table.double().cpu().numpy().reshape(shape).astype(decoder.codebooks.dtype)
        if self.vector_size == 1:
            order = np.argsort(books[:, :, 0], axis=1, kind="stable")
            place = np.argsort(order, axis=1).astype(codes.dtype)
            own = 0 if self.book is None else self.book.cpu().numpy()
            books, codes = np.take_along_axis(books, order[:, :, None], axis=1), place[own, codes]
        return books, codes

    def _index(self, codes: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the table, int32."""
        codes = (self.codes if codes is None else codes).int()
        return (codes if self.book is None else codes + self.book * self.n_clusters).reshape(-1)

    def count(self) -> None:
        """Take stock of the sizes of the clusters, where they matter."""
        if self.grad == "mean":
            self.counts = torch.bincount(self._index(), minlength=self.n_books * self.n_clusters)

    def _hard(self, table, codes):
        return _Lookup.apply(table, self._index(codes), self.counts).reshape(*codes.shape, self.vector_size)

    def _squared_distances(self, table, latent):
        """(n_rows, n_codes, n_clusters): of every weight to the centroids of its codebook."""
        x = _to_vectors(latent, self.layout, self.vector_size)[:, :, None]
        books = table.reshape(self.n_books, self.n_clusters, self.vector_size)
        own = books[:1, None] if self.book is None else books[self.book.long()]
        return (x - own).square().sum(-1), own

    def _nearest(self, table, latent):
        """Codes of the nearest centroids; weights that are pinned keep theirs."""
        with torch.no_grad():
            codes = self._squared_distances(table, latent)[0].argmin(-1)
            return codes if self.moving is None else torch.where(self.moving, codes, self.codes.long())

    def _attention(self, table, latent):
        distances, own = self._squared_distances(table, latent)
        values = ((-distances / self.temperature).softmax(-1)[..., None] * own).sum(-2)
        return values if self.moving is None else values * self.moving[..., None]


def _code_dtype(n_clusters: int) -> str:
    return "uint8" if n_clusters <= 256 else "int16" if n_clusters <= 1 << 15 else "int32"


def _book_of_codes(decoder: CodebookDecoder, n_rows: int, n_codes: int) -> torch.Tensor | None:
    """Codebook of every code, int32, to broadcast against the codes; None where there is one."""
    if decoder.granularity == "tensor":
        return None
    if decoder.granularity == "column":
        return torch.arange(n_codes, dtype=torch.int32)[None]
    size = 1 if decoder.granularity == "row" else decoder.group_size
    return (torch.arange(n_rows, dtype=torch.int32) // size)[:, None]


def _mean_square_gap(books: np.ndarray) -> float:
    """Mean over the centroids of the squared distance to the nearest other one of the same codebook."""
    found = []
    for book in books.astype(np.float64):
        distances = np.square(book[:, None] - book[None]).sum(-1)
        distances[distances == 0] = math.inf
        nearest = distances.min(1)
        found.append(nearest[np.isfinite(nearest)])
    gaps = np.concatenate(found)
    return float(gaps.mean()) if gaps.size else 1.0


def _to_tensor(values: torch.Tensor, layout: Layout, shape: tuple[int, ...]) -> torch.Tensor:
    """Tensor of a matrix in whatever pieces, as `Layout.to_tensor` has it, zero rows included."""
    X = values.reshape(layout.n_rows, -1)
    if layout.zero_rows:
        keep = torch.ones(layout.n_rows, 1, dtype=X.dtype, device=X.device)
        keep[list(layout.zero_rows)] = 0
        X = X * keep
    if layout.axes is None:
        return X.reshape(shape)
    view = layout.view if layout.view is not None else shape
    back = [int(a) for a in np.argsort(layout.axes)]
    return X.reshape([view[a] for a in layout.axes]).permute(back).reshape(shape)


def _to_vectors(tensor: torch.Tensor, layout: Layout, vector_size: int) -> torch.Tensor:
    """(n_rows, n_codes, vector_size): what the codes stand for."""
    X = tensor if layout.view is None else tensor.reshape(layout.view)
    X = X if layout.axes is None else X.permute(layout.axes)
    return X.reshape(layout.n_rows, -1, vector_size)
