"""Calibration: the second moment of every layer's inputs, from unlabelled examples run through the network.

A layer computes y = W u for one input vector u per output position: a patch (c_in/g, kh, kw) of a convolution, a row of
a Linear. What a compressed weight costs at the output is then E‖(W − Ŵ) u‖² = tr((W − Ŵ) G (W − Ŵ)ᵀ) with
G = E[u uᵀ], and G is all that the estimators need to know of the data.
"""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from skfactor.bridge.layers import LayerSpec, unwrap

__all__ = ["Calibration", "Moments", "collect_moments", "evaluation", "first_tensor", "hooked", "input_vectors",
           "kind_of_inputs", "model_batches", "output_importance", "prediction_probe", "register_input_vectors",
           "thinned"]

#: Elements of unfolded input held at a time.
CHUNK = 1 << 23
#: Rows of a plain input tensor that run at a time.
BATCH = 64

#: What a layer's inputs are as vectors: (module, args, kwargs, parameter) -> tensors (g, n, d).
InputVectors = Callable[[nn.Module, tuple, dict, str], Iterator[torch.Tensor]]
_VECTORS: dict[type | str, InputVectors] = {}


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs and how they are used.

    Attributes
    ----------
    inputs : tensor, tuple, dict, list or loader
        Unlabelled inputs, as in `skfactor.compress`.
    sequential : bool, default=False
        Fit the layers in the order in which they run, each for the inputs that the compressed layers before it give,
        and let biases take up the shift of the mean (`skfactor.bridge.sequential`). Slower: every layer costs two
        passes over the inputs, and layers do not run in parallel. Biases change.
    fold_batch_norm : bool, default=False
        First move batch normalisations into the layers before them (`skfactor.bridge.batchnorm`): the same function,
        and rows of a weight are then as large as what they contribute. Weights, biases and statistics change.
    balance_rows : bool, default=False
        With `fold_batch_norm`: scale the rows of a folded layer so that an error costs the network's output the same
        in each, the normalisation undoing it; one step or codebook for the whole tensor then suits all its rows.
        The network's output, or the first element or value of it, must be logits.
    max_vectors : int, default=None
        At most so many of the input vectors that one batch gives a layer enter its moments, picked at random with a
        fixed seed (an image gives a convolution as many vectors as the output has pixels). All when None.
    """

    inputs: Any
    sequential: bool = False
    fold_batch_norm: bool = False
    balance_rows: bool = False
    max_vectors: int | None = None

    def __post_init__(self):
        if self.balance_rows and not self.fold_batch_norm:
            raise ValueError("balance_rows=True needs fold_batch_norm=True, got False")


@dataclass
class Moments:
    """What calibration gave.

    Attributes
    ----------
    grams : dict of str to ndarray
        By tensor name: G of shape (d, d), or (g, d, d) for g groups of rows.
    means : dict of str to ndarray
        By tensor name: E[u], (d,) or (g, d).
    importances : dict of str to ndarray
        By tensor name: weights of the squared errors, (n_rows, 1) or (n_rows, n_columns): how often each row of an
        embedding is looked up, or what `fisher_diagonal` found.
    missing : dict of str to str
        Tensors without either, with the reason.
    """

    grams: dict[str, np.ndarray] = field(default_factory=dict)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    importances: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def side(self, name: str) -> dict[str, np.ndarray]:
        """Fit parameters of one tensor."""
        side = {"input_gram": self.grams.get(name), "importance": self.importances.get(name)}
        return {k: v for k, v in side.items() if v is not None}


def register_input_vectors(module_type: type, vectors: InputVectors) -> None:
    """Tell calibration what the input vectors of a layer type are.

    Parameters
    ----------
    module_type : type
        Subclass of `torch.nn.Module`, as in `register_layer`.
    vectors : callable
        `vectors(module, args, kwargs, parameter)` yields tensors (g, n, d): n input vectors of d elements for each of
        the g equal blocks of rows; d is the number of columns of the weight's matrix.
    """
    _VECTORS[module_type] = vectors


def collect_moments(model: nn.Module, owners: Mapping[str, list[tuple[nn.Module, LayerSpec]]],
                    batches: Iterable[tuple[tuple, dict]], max_vectors: int | None = None) -> Moments:
    """Run the calibration inputs and accumulate the second moments of the inputs of the named layers.

    The network runs in eval mode without gradients; hooks and modes are as before on return, also after an error.

    Parameters
    ----------
    model : Module
    owners : dict of str to list of (Module, LayerSpec)
        For each tensor name the layers of `model` whose weight it is; the moments of several uses add up.
    batches : iterable of (args, kwargs)
        From `model_batches`.
    max_vectors : int, default=None
        As in `Calibration`.
    """
    moments, sums = Moments(), {}
    with ExitStack() as stack:
        for name, layers in owners.items():
            kind = kind_of_inputs(layers)
            if kind.vectors is None:
                moments.missing[name] = kind.problem
                continue
            sums[name] = _GramSum(max_vectors) if kind.is_vectors else _CountSum()
            hooks = [(m, _accumulate(sums[name], kind.vectors, spec.parameter), "before") for m, spec in layers]
            stack.enter_context(hooked(hooks))
        stack.enter_context(evaluation(model))
        for args, kwargs in batches if sums else ():
            model(*args, **kwargs)
    for name, total in sums.items():
        value = total.result()
        if value is None:
            moments.missing[name] = "not reached by the calibration inputs"
        elif not np.isfinite(value).all():
            moments.missing[name] = "its inputs are not finite"
        elif isinstance(total, _CountSum):
            moments.importances[name] = value
        else:
            moments.grams[name], moments.means[name] = value, total.mean()
    return moments


@dataclass(frozen=True)
class InputKind:
    """How the inputs of a tensor's layers become vectors, or why they cannot."""

    vectors: InputVectors | None
    problem: str = ""

    @property
    def is_vectors(self) -> bool:
        """Whether there is a second moment; the rows of an embedding are only counted."""
        return self.vectors is not None and self.vectors is not _rows_looked_up


def kind_of_inputs(layers: list[tuple[nn.Module, LayerSpec]]) -> InputKind:
    """Kind of the inputs of all layers that share one weight."""
    kinds = {_vectors_of(module) for module, _ in layers}
    if len(kinds) > 1:
        return InputKind(None, "tied between layers of different kinds")
    if not kinds or None in kinds:
        return InputKind(None, "the inputs of this kind of layer are not known to calibration")
    return InputKind(kinds.pop())


def _accumulate(total, vectors, parameter):
    def accumulate(module, args, kwargs):
        for u in vectors(module, args, kwargs, parameter):
            total.add(u, module)

    return accumulate


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable, str]]) -> Iterator[None]:
    """Register (module, hook, "before" or "after") forward hooks, and remove them on exit whatever happens."""
    with ExitStack() as stack:
        for module, hook, when in hooks:
            register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
            stack.callback(register(hook, with_kwargs=True).remove)
        yield


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; all as before on exit."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _GramSum:
    """Running sums of u uᵀ and u: products in the inputs' precision (float32 at least), the sums in float64."""

    def __init__(self, max_vectors: int | None = None):
        self.total, self.sum, self.count, self.max_vectors = None, 0.0, 0, max_vectors

    def add(self, u: torch.Tensor, module: nn.Module) -> None:
        """Add vectors u (g, n, d)."""
        u = u if u.dtype == torch.float64 else u.float()
        (u,) = thinned((u,), self.max_vectors, seed=self.count)
        self.sum = self.sum + u.sum(1).double()
        product = torch.bmm(u.transpose(1, 2), u)
        product = product.double() if product.shape[-1] <= 2048 else product
        self.total = product if self.total is None else self.total.add_(product)
        self.count += u.shape[1]

    def result(self) -> np.ndarray | None:
        if not self.count:
            return None
        gram = (self.total / self.count).cpu().numpy()
        return gram[0] if len(gram) == 1 else gram

    def mean(self) -> np.ndarray:
        mean = (self.sum / self.count).cpu().numpy()
        return mean[0] if len(mean) == 1 else mean


def thinned(vectors: tuple[torch.Tensor, ...], limit: int | None, seed: int) -> tuple[torch.Tensor, ...]:
    """The same `limit` of the n vectors of each (g, n, d), picked at random; all when there are no more."""
    n = vectors[0].shape[1]
    if limit is None or n <= limit:
        return vectors
    picked = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit]
    return tuple(u[:, picked.to(u.device)] for u in vectors)


class _CountSum:
    """How often each row is looked up, every row once more so that rare rows keep a weight; mean 1."""

    def __init__(self):
        self.counts = None

    def add(self, rows: torch.Tensor, module: nn.Module) -> None:
        counts = torch.bincount(rows.reshape(-1), minlength=module.num_embeddings).double()
        self.counts = counts if self.counts is None else self.counts + counts

    def result(self) -> np.ndarray | None:
        if self.counts is None or not self.counts.sum():
            return None
        weight = self.counts.cpu().numpy()[:, None] + 1.0
        return weight / weight.mean()


def output_importance(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Any, *, temperature: float = 1.0,
                      random_state: int = 0) -> dict[str, np.ndarray]:
    """How much an error of each output channel of a layer costs at the network's output.

    To second order, errors e of a layer's outputs change the network's own prediction p = softmax(z / T) by
    KL = ½ E Σ (∂z e)ᵀ H (∂z e) with H = (diag(p) − p pᵀ) / T². Averaged over channels c that err independently it is
    ½ Σ_c r_c E[e_c²] with r_c = E Σ_positions (∂(vᵀz)/∂y_c)², v random with E[v vᵀ] = H. One backward pass a batch;
    no labels.

    Parameters
    ----------
    model : Module
        Its output, or the first element or value of it, are logits with the classes on the last axis.
    layers : dict of str to Module
    calibration : tensor, tuple, dict, list or loader
        As in `skfactor.compress`.
    temperature : float, default=1.0
        T; above 1 unlikely classes count more, which few confident examples need.
    random_state : int, default=0
        Seed of the signs of v.

    Returns
    -------
    importance : dict of str to ndarray of shape (n_channels,)
        Layers that no batch reached are left out.
    """
    return importance_of_batches(model, layers, model_batches(model, calibration), temperature=temperature,
                                 random_state=random_state)


def importance_of_batches(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[tuple[tuple, dict]], *,
                          temperature: float = 1.0, random_state: int = 0) -> dict[str, np.ndarray]:
    """`output_importance` for forward passes given as (args, kwargs)."""
    generator = torch.Generator().manual_seed(random_state)
    sums: dict[str, torch.Tensor] = {}
    n_examples = 0
    for args, kwargs in batches:
        seen: list[tuple[str, torch.Tensor]] = []
        hooks = [(module, partial(_remember_output, seen, name), "after") for name, module in layers.items()]
        with evaluation(model), hooked(hooks), torch.enable_grad():
            args = tuple(_with_gradient(a) for a in args)
            logits = first_tensor(model(*args, **kwargs))
            v = prediction_probe(logits.detach(), temperature, generator)
            gradients = torch.autograd.grad(logits, [y for _, y in seen], v, allow_unused=True)
        for (name, _), gradient in zip(seen, gradients, strict=True):
            if gradient is not None:
                axis = 1 if isinstance(layers[name], nn.modules.conv._ConvNd) else gradient.dim() - 1
                squares = gradient.double().square().movedim(axis, -1)
                sums[name] = sums.get(name, 0) + squares.reshape(-1, squares.shape[-1]).sum(0)
        n_examples += len(logits)
    return {name: (total / n_examples).cpu().numpy() for name, total in sums.items()}


def prediction_probe(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Random v with E[v vᵀ] = (diag(p) − p pᵀ) / T² for p = softmax(logits / T)."""
    p = torch.softmax(logits / temperature, -1)
    signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
    root = p.sqrt() * signs
    return (root - p * root.sum(-1, keepdim=True)) / temperature


def _remember_output(seen, name, module, args, kwargs, output) -> None:
    if output.requires_grad:
        seen.append((name, output))


def _with_gradient(value: Any) -> Any:
    """A float input that asks for its gradient, so that layers behind frozen ones have theirs too."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_float else value


def first_tensor(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


# ------------------------------------------------------------------------------------------- inputs of the network
def model_batches(model: nn.Module, calibration: Any) -> Iterator[tuple[tuple, dict]]:
    """Arguments of each forward pass, on the model's device and floats in the model's dtype.

    Parameters
    ----------
    model : Module
    calibration : tensor, tuple, dict, list or loader
        A tensor or array is a batch of inputs and runs in pieces; a tuple is the positional arguments of one pass, a
        dict its keyword arguments. Anything else is iterated and gives one batch each: a tensor, a dict, or a tuple or
        list such as (x, y), of which only as many elements are used as `forward` requires, so labels are left out.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    place = _Place(first.device if first is not None else torch.device("cpu"),
                   first.dtype if first is not None else torch.float32)
    n_batches = 0
    for args, kwargs in _arguments(model, calibration):
        n_batches += 1
        yield tuple(place(a) for a in args), {k: place(v) for k, v in kwargs.items()}
    if not n_batches:
        raise ValueError("calibration holds no inputs")


def _arguments(model, calibration):
    if isinstance(calibration, (torch.Tensor, np.ndarray)):
        inputs = torch.as_tensor(calibration)
        if inputs.dim() == 0:
            raise ValueError("calibration must be a batch of inputs, got a scalar")
        yield from (((piece,), {}) for piece in (inputs.split(BATCH) if len(inputs) else ()))
    elif isinstance(calibration, tuple):
        yield calibration, {}
    elif isinstance(calibration, Mapping):
        yield (), dict(calibration)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes)):
        n_required = _n_required_inputs(model)
        for batch in calibration:
            if isinstance(batch, Mapping):
                yield (), dict(batch)
            elif isinstance(batch, (tuple, list)):
                yield tuple(batch[:n_required]), {}
            else:
                yield (batch,), {}
    else:
        raise TypeError("calibration must be a tensor, a tuple or dict of inputs, or an iterable of batches, "
                        f"got {type(calibration).__name__}")


def _n_required_inputs(model: nn.Module) -> int:
    """Positional arguments that forward cannot do without, at least one."""
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    return max(1, sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                      for p in parameters))


@dataclass(frozen=True)
class _Place:
    """Moves one input to the model's device, floats to its dtype."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value)
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


# --------------------------------------------------------------------------------------------- inputs of one layer
def input_vectors(module: nn.Module, *args: Any, parameter: str = "weight", **kwargs: Any) -> Iterator[torch.Tensor]:
    """Input vectors (g, n, d) of a layer for given arguments of its `forward`, in pieces of bounded size."""
    vectors = _vectors_of(module)
    if vectors is None:
        raise TypeError(f"the inputs of {type(module).__name__} are not known to calibration; "
                        "tell it by register_input_vectors")
    return vectors(module, args, kwargs, parameter)


def _vectors_of(module: nn.Module) -> InputVectors | None:
    for cls in type(module).__mro__:
        if cls in _VECTORS:
            return _VECTORS[cls]
    return _linear_vectors if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def _argument(args: tuple, kwargs: dict, position: int, name: str) -> torch.Tensor:
    return args[position] if len(args) > position else kwargs[name]


def _linear_vectors(module, args, kwargs, parameter):
    u = args[0] if args else next(iter(kwargs.values()))
    u = u.reshape(1, -1, u.shape[-1])
    yield from u.split(max(1, CHUNK // u.shape[-1]), dim=1)


def _bilinear_vectors(module, args, kwargs, parameter):
    """y_o = Σ W[o,i,j] a_i b_j: the input vector is the outer product a ⊗ b."""
    a = _argument(args, kwargs, 0, "input1").reshape(-1, module.in1_features)
    b = _argument(args, kwargs, 1, "input2").reshape(-1, module.in2_features)
    step = max(1, CHUNK // (a.shape[1] * b.shape[1]))
    for i in range(0, len(a), step):
        yield torch.einsum("ni,nj->nij", a[i : i + step], b[i : i + step]).flatten(1)[None]


def _attention_vectors(module, args, kwargs, parameter):
    """Rows of `in_proj_weight` are three blocks that read query, key and value."""
    names = ("query", "key", "value")
    inputs = [_argument(args, kwargs, i, n) for i, n in enumerate(names)]
    if parameter != "in_proj_weight":
        inputs = [inputs[names.index({"q": "query", "k": "key", "v": "value"}[parameter[0]])]]
    elif inputs[0] is inputs[1] is inputs[2]:
        inputs = inputs[:1]
    flat = [u.reshape(-1, u.shape[-1]) for u in inputs]
    longest = max(map(len, flat))
    # keys may be more or fewer than queries: rows of zeros and a scale keep the mean of u uᵀ of each block
    yield torch.stack([F.pad(u * math.sqrt(longest / len(u)), (0, 0, 0, longest - len(u))) for u in flat])


def _rows_looked_up(module, args, kwargs, parameter):
    yield args[0] if args else kwargs["input"]


def _convolution_vectors(module, args, kwargs, parameter):
    """Patches of the padded input, one vector (c_in/g, *kernel) per output position."""
    x = _batched(args[0] if args else kwargs["input"], module)
    padding = _padding_of_convolution(module)
    for piece in _pieces(x, module, math.prod(_output_size(x, module, padding))):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(piece, _pad_argument(padding), mode=mode)
        yield _windows(padded, module.kernel_size, module.stride, module.dilation, module.groups)


def _transposed_convolution_vectors(module, args, kwargs, parameter):
    """A transposed convolution is a convolution, with the kernel turned round, of a stretched input.

    The input gets stride − 1 zeros between its elements, and a padding of dilation (kernel − 1) − padding (negative:
    cropped) on both sides and of `output_padding` more at the end.
    """
    x = _batched(args[0] if args else kwargs["input"], module)
    reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padding = [(r - p, r - p + o) for r, p, o in zip(reach, module.padding, module.output_padding, strict=True)]
    stretched = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    n_positions = math.prod(n + a + b - r for n, (a, b), r in zip(stretched, padding, reach, strict=True))
    for piece in _pieces(x, module, n_positions):
        spread = piece.new_zeros(*piece.shape[:2], *stretched)
        spread[(..., *(slice(None, None, s) for s in module.stride))] = piece
        padded = F.pad(spread, _pad_argument(padding))
        ones = (1,) * len(stretched)
        yield _windows(padded, module.kernel_size, ones, module.dilation, module.groups, turned=True)


def _batched(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    return x if x.dim() == len(module.kernel_size) + 2 else x[None]


def _padding_of_convolution(module: nn.Module) -> list[tuple[int, int]]:
    """(before, after) of every spatial axis; 'same' puts the odd one after."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    return [(p, p) for p in module.padding]


def _pad_argument(padding: list[tuple[int, int]]) -> list[int]:
    """`F.pad` wants the last axis first."""
    return [n for pair in reversed(padding) for n in pair]


def _output_size(x, module, padding):
    sizes = zip(x.shape[2:], padding, module.kernel_size, module.stride, module.dilation, strict=True)
    return [(n + a + b - d * (k - 1) - 1) // s + 1 for n, (a, b), k, s, d in sizes]


def _pieces(x: torch.Tensor, module: nn.Module, n_positions: int) -> Iterable[torch.Tensor]:
    """Pieces of the batch whose unfolded inputs hold at most CHUNK elements (one image at least)."""
    per_image = max(1, x.shape[1] * math.prod(module.kernel_size) * n_positions)
    return x.split(max(1, CHUNK // per_image))


def _windows(x, kernel_size, stride, dilation, groups, turned=False):
    """Windows of x (N, C, *size) as vectors (g, N * positions, C/g * prod(kernel)).

    The memory order is (g, d, n): positions lie beside each other as they do in x, which copies three times faster.
    """
    n_axes = len(kernel_size)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    if turned:
        x = x.flip(tuple(range(-n_axes, 0)))
    d = x.shape[1] // groups * math.prod(kernel_size)
    positions, kernel = range(2, 2 + n_axes), range(2 + n_axes, 2 + 2 * n_axes)
    return x.permute(1, *kernel, 0, *positions).reshape(groups, d, -1).transpose(1, 2)


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_input_vectors(_type, _convolution_vectors)
for _type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_input_vectors(_type, _transposed_convolution_vectors)
for _type in (nn.Embedding, nn.EmbeddingBag):
    register_input_vectors(_type, _rows_looked_up)
register_input_vectors(nn.Linear, _linear_vectors)
register_input_vectors(nn.Bilinear, _bilinear_vectors)
register_input_vectors(nn.MultiheadAttention, _attention_vectors)
