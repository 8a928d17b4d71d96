"""`AutoencoderCompressor`: a deep autoencoder on rows, trained with torch, used like scikit-learn's `MLPRegressor`."""
# SPDX-License-Identifier: BSD-3-Clause

import warnings
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from skfactor._sklearn import Interval, StrOptions, fit_context
from skfactor._validation import check_matrix, check_row_weights
from skfactor.codec.mlp import ACTIVATIONS, MLPDecoder, block_rows, dense_layers
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.mlp_start import Layers, pca_start, principal_axes, random_start

__all__ = ["AutoencoderCompressor"]

_BLOCK_ELEMENTS = 1 << 20
_CHUNK_ROWS = 4096  # rows that go through the network at once: bounds the memory of a large batch
_LARGEST_AUTO_BATCH, _SMALLEST_AUTO_BATCH, _AUTO_BATCHES = 4096, 200, 64
_RATE_CUT, _RATE_CUTS = 5.0, 3  # the adaptive learning rate is divided by 5, three times at most

_APPLY = {
    "relu": torch.Tensor.relu_,
    "tanh": torch.Tensor.tanh_,
    "logistic": torch.Tensor.sigmoid_,
    "identity": lambda a: a,
}
# derivative of an activation, written over its output
_SLOPE = {
    "relu": torch.Tensor.sign_,
    "tanh": lambda a: a.square_().neg_().add_(1.0),
    "logistic": lambda a: a.addcmul_(a, a, value=-1.0),
}


class AutoencoderCompressor(ClassNamePrefixFeaturesOutMixin, BaseCompressor):
    r"""Deep autoencoder: rows in, latent codes out, the decoder network is stored.

    Minimises over the weights :math:`\theta` of encoder :math:`e` and decoder :math:`d`

    .. math:: \frac{\sum_i w_i \|x_i - d(e(x_i))\|^2}{\sum_i w_i \|x_i - \mu\|^2}
              + \frac{\alpha}{2\sum_i w_i} \|\theta\|^2 ,

    the share of the variance that is lost, by Adam [1]_ on batches of rows. Rows are centred by :math:`\mu` and divided
    by one number, so that the error is that of `X` itself and the result is the same at any scale. Training starts at
    the principal components, which a wide enough network of activation "relu" or "identity" contains exactly, and so
    ends no higher than PCA; with "identity" nothing lies below it [3]_. Fitted weights are numpy arrays, and codes
    and reconstructions are computed in numpy, in float64.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int, or int, default=(128,)
        Widths of the encoder's hidden layers; the decoder mirrors them. With () both are linear.
    latent_dim : int, default=16
        Codes per row, or per sub-vector.
    activation : {"relu", "tanh", "logistic", "identity"}, default="relu"
        Of the hidden layers. Codes and output are linear.
    vector_size : int, default=None
        Compress sub-vectors of this many neighbouring columns instead of whole rows. Must divide the number of
        columns.
    solver : {"adam", "sgd"}, default="adam"
        "sgd" has Nesterov momentum of 0.9.
    alpha : float, default=0.0
        Weight decay: the L2 penalty of the formula, on weights and not on biases.
    batch_size : int or "auto", default="auto"
        "auto" is a 64th of the rows, at least 200 and at most 4096.
    learning_rate : {"adaptive", "constant"}, default="adaptive"
        "adaptive" divides the rate by 5 when the loss no longer falls, and stops at the fourth time.
    learning_rate_init : float, default=0.003
    max_iter : int, default=200
        Most passes over the data.
    shuffle : bool, default=True
        A new order of the rows in every pass.
    init : {"pca", "random"}, default="pca"
        Start at the principal components, as many as the narrowest hidden layer has room for (two units each with
        "relu", one otherwise), or at Glorot's random weights.
    tol : float, default=1e-4
        Relative decrease of the loss that counts as one.
    n_iter_no_change : int, default=10
        Passes without such a decrease after which the learning rate is cut, or training stops.
    early_stopping : bool, default=False
        Watch the loss on held-out rows instead, and keep the weights that were best there.
    validation_fraction : float, default=0.1
        Share of the rows that `early_stopping` holds out.
    warm_start : bool, default=False
        Continue from the weights, the standardisation and the optimiser of the fit before.
    device : str, default="auto"
        Where to train: a torch device; "auto" is "cuda" where there is one, else "cpu".
    random_state : int, RandomState instance or None, default=None
        Start, order of the rows and held-out rows. The global state of torch is neither read nor changed.
    verbose : bool, default=False
        Show a progress bar.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (n_in, n_out), float32
        Weights of all layers, those of the encoder first.
    intercepts_ : list of ndarray of shape (n_out,), float32
    mean_ : ndarray of shape (vector_size,)
    scale_ : float
        Rows are `(x - mean_) / scale_` for the network; 0 where all rows are equal.
    decoder_ : MLPDecoder
    loss_ : float
        Share of the variance of the training rows that is lost.
    best_loss_ : float
        The smallest of `loss_curve_`.
    loss_curve_ : list of float
        Share of the variance that was lost, mean over the batches of each pass.
    validation_scores_ : list of float or None
        Share of the variance of the held-out rows that is kept, after each pass.
    best_validation_score_ : float or None
    n_iter_ : int
        Passes over the data of the last fit.
    n_layers_ : int
    n_features_in_ : int

    Notes
    -----
    While all rows fit into one batch, training sees distinct rows with their total weights, in a fixed order: repeating
    a row and giving it a weight of 2 are the same, bit for bit. In several batches they are the same on average.

    References
    ----------
    .. [1] D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, :arxiv:`1412.6980`
    .. [2] G. Hinton, R. Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science 313 (2006),
       :doi:`10.1126/science.1127647`
    .. [3] C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936),
       :doi:`10.1007/BF02288367`

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import AutoencoderCompressor
    >>> t = np.random.RandomState(0).uniform(-1, 1, 300)
    >>> X = np.c_[t, t**2, t**3]  # a curve, which no line is close to
    >>> autoencoder = AutoencoderCompressor((32,), latent_dim=1, random_state=0).fit(X)
    >>> autoencoder.transform(X).shape
    (300, 1)
    >>> bool(autoencoder.loss_ < 0.05)
    True
    """

    _parameter_constraints: dict = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "latent_dim": [Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "vector_size": [Interval(Integral, 1, None, closed="left"), None],
        "solver": [StrOptions({"adam", "sgd"})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "learning_rate": [StrOptions({"adaptive", "constant"})],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "shuffle": ["boolean"],
        "init": [StrOptions({"pca", "random"})],
        "tol": [Interval(Real, 0, 1, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "warm_start": ["boolean"],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(self, hidden_layer_sizes=(128,), latent_dim=16, *, activation="relu", vector_size=None, solver="adam",
                 alpha=0.0, batch_size="auto", learning_rate="adaptive", learning_rate_init=0.003, max_iter=200,
                 shuffle=True, init="pca", tol=1e-4, n_iter_no_change=10, early_stopping=False,
                 validation_fraction=0.1, warm_start=False, device="auto", random_state=None, verbose=False):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.latent_dim = latent_dim
        self.activation = activation
        self.vector_size = vector_size
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.init = init
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None):
        """Train encoder and decoder.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.

        Returns
        -------
        self : AutoencoderCompressor
        """
        continues = self.warm_start and hasattr(self, "coefs_") and self.scale_ > 0
        X = check_matrix(self, X, reset=not continues)
        rows, weights = self._split(X, check_row_weights(X, sample_weight))
        rng = check_random_state(self.random_state)
        standard = (self.mean_, self.scale_) if continues else _standardisation(rows, weights)
        trainer = self._trainer(rows, weights, standard, rng, continues)
        report = self._iteration_reporter(self.max_iter)
        found = self._train(trainer, rng, X.dtype, standard, report) if standard[1] else _nothing_to_learn(trainer)

        self._assign(found.layers, standard, X)
        self.loss_, self.loss_curve_ = found.loss, found.curve
        self.best_loss_ = min(found.curve)
        self.validation_scores_ = found.scores
        self.best_validation_score_ = max(found.scores) if found.scores else None
        self.n_iter_ = len(found.curve)
        self._optimizer = trainer.optimizer_state() if self.warm_start else None
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y=None, sample_weight=None):
        """One pass over some rows; the first call fixes start and standardisation.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None

        Returns
        -------
        self : AutoencoderCompressor
        """
        known = hasattr(self, "coefs_")
        X = check_matrix(self, X, reset=not known)
        continues = known and self.scale_ > 0  # rows that were all equal say nothing of the scale
        rows, weights = self._split(X, check_row_weights(X, sample_weight))
        if not continues or not hasattr(self, "_random_state"):
            self._random_state = check_random_state(self.random_state)
        standard = (self.mean_, self.scale_) if continues else _standardisation(rows, weights)
        trainer = self._trainer(rows, weights, standard, self._random_state, continues)
        if standard[1]:
            loss = trainer.run_pass(_order(trainer.n_rows, self.shuffle, _generator(self._random_state)))
        else:
            loss = 0.0

        self._assign(trainer.layers(), standard, X)
        self.loss_ = loss
        self.loss_curve_ = [*(self.loss_curve_ if continues else []), loss]
        self.best_loss_ = min(self.loss_curve_)
        self.validation_scores_ = self.best_validation_score_ = None
        self.n_iter_ = len(self.loss_curve_)
        self._optimizer = trainer.optimizer_state()
        return self

    def transform(self, X):
        """Latent codes of `X`.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)

        Returns
        -------
        codes : ndarray of shape (n_rows, latent_dim * n_features_in_ // vector_size), dtype of `X`
        """
        check_is_fitted(self)
        X = check_matrix(self, X, reset=False)
        rows = X.reshape(-1, len(self.mean_))
        n_encoder = self.n_layers_ // 2
        weights, biases = self.coefs_[:n_encoder], self.intercepts_[:n_encoder]
        codes = np.empty((len(rows), weights[-1].shape[1]), dtype=X.dtype)
        step = block_rows(weights)
        for start in range(0, len(rows), step):
            block = (rows[start : start + step] - self.mean_) / (self.scale_ or 1.0)
            codes[start : start + step] = dense_layers(block, weights, biases, self.decoder_.activation)
        return codes.reshape(len(X), -1)

    @property
    def _n_features_out(self):
        return self.n_features_in_ // len(self.mean_) * self.decoder_.weights[0].shape[0]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _split(self, X, weights):
        """`X` as rows of `vector_size` columns without those of weight 0, and their weights (n,) or None."""
        size = self.vector_size or X.shape[1]
        if X.shape[1] % size:
            raise ValueError(f"vector_size must divide the {X.shape[1]} columns of X, got {size}")
        rows = X.reshape(-1, size)
        if weights is not None:
            weights = np.repeat(weights[:, 0], X.shape[1] // size)
            rows, weights = rows[weights > 0], weights[weights > 0]
        if len(rows) <= self._batch_size(len(rows)):
            weights = np.ones(len(rows)) if weights is None else weights
            rows, group = np.unique(rows, axis=0, return_inverse=True)
            weights = np.bincount(group.reshape(-1), weights=weights)
        return rows, weights

    def _batch_size(self, n_rows):
        if self.batch_size != "auto":
            return self.batch_size
        return min(max(n_rows // _AUTO_BATCHES, _SMALLEST_AUTO_BATCH), _LARGEST_AUTO_BATCH)

    def _sizes(self, width):
        one = isinstance(self.hidden_layer_sizes, Integral)
        hidden = (self.hidden_layer_sizes,) if one else tuple(self.hidden_layer_sizes)
        if not all(isinstance(n, Integral) and n >= 1 for n in hidden):
            raise ValueError(f"hidden_layer_sizes must be integers of at least 1, got {self.hidden_layer_sizes!r}")
        return [width, *map(int, hidden), self.latent_dim, *map(int, hidden[::-1]), width]

    def _trainer(self, rows, weights, standard, rng, continues):
        """Network, optimiser and data on the device, at the start or where the fit before ended."""
        sizes = self._sizes(rows.shape[1])
        S = _standardised(rows, *standard)
        if continues:
            layers = Layers(self.coefs_, self.intercepts_)
            before = [len(self.coefs_[0]), *(W.shape[1] for W in self.coefs_)]
            if before != sizes:
                raise ValueError(f"to continue, the layers must be those of the fit before, {before}, got {sizes}")
        else:
            layers = random_start(sizes, self.activation, rng)
            if self.init == "pca" and standard[1]:
                axes = principal_axes(S, min(self.latent_dim, sizes[0]), weights, rng)
                reach = np.abs(S @ axes).max(axis=0) if self.activation in ("logistic", "tanh") else None
                layers = pca_start(layers, axes, reach, self.activation, len(sizes) // 2)
        total = len(S) if weights is None else weights.sum()
        optimizer = _Optimizer(self.solver, self.learning_rate_init, self.alpha / total,
                               getattr(self, "_optimizer", None) if continues else None)
        return _Trainer(layers, self.activation, S, weights, self._batch_size(len(S)), optimizer,
                        _resolve_device(self.device))

    def _train(self, trainer, rng, dtype, standard, report):
        """Passes over the data until the loss stays; the weights that were best."""
        held_out = None
        if self.early_stopping:
            held_out = _hold_out(trainer.n_rows, self.validation_fraction, rng)
        generator = _generator(rng)
        progress = _Progress(self.tol, self.n_iter_no_change, self.learning_rate == "adaptive")
        kept = np.setdiff1d(np.arange(trainer.n_rows), [] if held_out is None else held_out)
        kept, held_out = torch.from_numpy(kept), None if held_out is None else torch.from_numpy(held_out)
        watched = kept if held_out is None else held_out
        variance = 1.0 if held_out is None else trainer.variance(held_out)
        best, best_loss = trainer.snapshot(), trainer.loss(watched)
        curve, scores = [], []
        bar = tqdm(range(self.max_iter), desc="autoencoder", unit="pass", disable=not self.verbose)
        for _ in bar:
            loss = trainer.run_pass(kept[_order(len(kept), self.shuffle, generator)])
            curve.append(loss)
            bar.set_postfix(loss=f"{loss:.4g}")
            if not np.isfinite(loss):
                warnings.warn(f"training diverged after {len(curve)} passes; the best weights before are kept. A "
                              f"learning_rate_init smaller than {self.learning_rate_init} helps", ConvergenceWarning,
                              stacklevel=4)
                break
            if held_out is not None:
                loss = trainer.loss(held_out)
                scores.append(1.0 - loss / variance)
                if loss < best_loss:
                    best, best_loss = trainer.snapshot(), loss
            if report and report(lambda: self._attributes(trainer.layers(), standard, dtype)):
                break
            if progress.stalls(loss):
                if not progress.may_cut():
                    break
                trainer.divide_rate(_RATE_CUT)
        if held_out is not None or not trainer.loss(kept) <= best_loss:
            trainer.restore(best)
        if held_out is not None:
            return _Found(trainer.layers(), trainer.loss(kept) / trainer.variance(kept), curve, scores)
        return _Found(trainer.layers(), trainer.loss(kept), curve, None)

    def _attributes(self, layers, standard, dtype):
        n_encoder = len(layers.weights) // 2
        decoder = MLPDecoder(tuple(layers.weights[n_encoder:]), tuple(layers.biases[n_encoder:]), standard[0],
                             standard[1], self.activation, dtype.name)
        return {"coefs_": layers.weights, "intercepts_": layers.biases, "mean_": standard[0], "scale_": standard[1],
                "n_layers_": len(layers.weights), "decoder_": decoder}

    def _assign(self, layers, standard, X):
        for name, value in self._attributes(layers, standard, X.dtype).items():
            setattr(self, name, value)


class _Found(NamedTuple):
    """What training ends with; `scores` is None without held-out rows."""

    layers: Layers
    loss: float
    curve: list
    scores: list | None


class _Optimizer(NamedTuple):
    """What makes an optimiser: name, rate, weight decay, and the state to continue from (numpy) or None."""

    name: str
    rate: float
    decay: float
    state: dict | None


class _Progress:
    """Decides when the loss no longer falls."""

    def __init__(self, tol, patience, adaptive):
        self.tol, self.patience = tol, patience
        self.cuts_left = _RATE_CUTS if adaptive else 0
        self.best, self.waited = np.inf, 0

    def stalls(self, loss):
        if loss < self.best * (1.0 - self.tol):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def may_cut(self):
        self.waited = 0
        self.cuts_left -= 1
        return self.cuts_left >= 0


class _Trainer:
    """A network on a device, its gradients, buffers and optimiser.

    All weights and biases are views of one vector, so that the optimiser updates a single tensor. Batches are gathered
    into buffers that are made once, and gradients are written by hand into their place, so that a pass allocates next
    to nothing.
    """

    def __init__(self, layers, activation, S, row_weights, batch_size, optimizer, device):
        self.activation = activation
        self.X = torch.from_numpy(S).to(device)
        self.row_weights = None
        if row_weights is not None:
            scaled = (row_weights / row_weights.mean()).astype(np.float32)
            self.row_weights = torch.from_numpy(scaled).to(device)[:, None]
        self.n_rows, self.batch_size, self.device = len(S), batch_size, device
        self.shapes = [W.shape for W in layers.weights]
        self.linear = {len(self.shapes) // 2 - 1, len(self.shapes) - 1}  # layers without activation: codes and output
        flat = np.concatenate([np.ravel(a) for part in layers for a in part]).astype(np.float32)
        self.parameters = torch.from_numpy(flat).to(device)
        self.parameters.grad = torch.zeros_like(self.parameters)
        self.weights, self.biases = self._views(self.parameters)
        self.weight_grads, self.bias_grads = self._views(self.parameters.grad)
        self.decay = optimizer.decay
        self.optimizer = self._make_optimizer(optimizer)
        chunk = min(batch_size, _CHUNK_ROWS, self.n_rows)
        widths = [self.shapes[0][0], *(n_out for _, n_out in self.shapes)]
        single = {"dtype": torch.float32, "device": device}
        self.outputs, self.deltas = ([torch.empty((chunk, n), **single) for n in widths] for _ in range(2))
        self.ones = torch.ones(chunk, **single)

    def _views(self, vector):
        """Matrices and bias vectors that share memory with the flat vector."""
        n = len(self.shapes)
        parts = torch.split(vector, [a * b for a, b in self.shapes] + [b for _, b in self.shapes])
        return [m.view(shape) for m, shape in zip(parts[:n], self.shapes)], list(parts[n:])

    def _make_optimizer(self, optimizer):
        if optimizer.name == "adam":
            made = torch.optim.Adam([self.parameters], lr=optimizer.rate, fused=True)
        else:
            made = torch.optim.SGD([self.parameters], lr=optimizer.rate, momentum=0.9, nesterov=True)
        if optimizer.state:
            made.state[self.parameters] = {k: torch.from_numpy(v.copy()).to(self.device)
                                           for k, v in optimizer.state.items()}
        return made

    def optimizer_state(self):
        """State of the optimiser as numpy arrays by name."""
        return {k: v.detach().cpu().numpy().copy() for k, v in self.optimizer.state[self.parameters].items()}

    def divide_rate(self, factor):
        for group in self.optimizer.param_groups:
            group["lr"] /= factor

    def snapshot(self):
        return self.parameters.clone()

    def restore(self, snapshot):
        self.parameters.copy_(snapshot)

    def layers(self):
        """Weights and biases as numpy arrays of their own."""
        return Layers(*([a.cpu().numpy().copy() for a in part] for part in (self.weights, self.biases)))

    def run_pass(self, order):
        """One pass over the rows in this order, a step after every batch; the mean loss, read from the device once."""
        order = order.to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for first in range(0, len(batch), len(self.ones)):
                rows = batch[first : first + len(self.ones)]
                total += self._forward(rows)
                self._backward(len(rows), 2.0 / (len(batch) * self.X.shape[1]), accumulate=first > 0)
            if self.decay:
                for gradient, W in zip(self.weight_grads, self.weights):
                    gradient.add_(W, alpha=self.decay)
            self.optimizer.step()
        return float(total) / (len(order) * self.X.shape[1])

    def loss(self, rows):
        """Mean weighted square of the residual of some rows, in units of the variance of the training data."""
        rows = rows.to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in rows.split(len(self.ones)):
            total += self._forward(part)
        return float(total) / (len(rows) * self.X.shape[1])

    def variance(self, rows):
        """What `loss` would be if the reconstruction were 0, the mean of the training data."""
        X = self.X[rows.to(self.device)].double().square_()
        if self.row_weights is not None:
            X *= self.row_weights[rows.to(self.device)]
        return float(X.mean()) or 1.0

    def _forward(self, rows):
        """Fill the buffers for these rows; returns the weighted sum of squares, leaves the residual in `deltas`."""
        m = len(rows)
        h = torch.index_select(self.X, 0, rows, out=self.outputs[0][:m])
        for i, (W, b) in enumerate(zip(self.weights, self.biases)):
            h = torch.addmm(b, h, W, out=self.outputs[i + 1][:m])
            if i not in self.linear:
                _APPLY[self.activation](h)
        residual = torch.sub(h, self.outputs[0][:m], out=self.deltas[-1][:m])
        if self.row_weights is None:
            return torch.dot(residual.view(-1), residual.view(-1))
        torch.mul(residual, self.row_weights[rows], out=h)
        total = torch.dot(residual.view(-1), h.view(-1))
        residual.copy_(h)
        return total

    def _backward(self, m, factor, accumulate):
        """Gradients of `factor` / 2 times that sum of squares, put in place of the old ones or added to them."""
        delta = self.deltas[-1][:m].mul_(factor)
        beta = 1.0 if accumulate else 0.0
        for i in reversed(range(len(self.weights))):
            h = self.outputs[i][:m]
            self.weight_grads[i].addmm_(h.T, delta, beta=beta)
            self.bias_grads[i].addmv_(delta.T, self.ones[:m], beta=beta)
            if i == 0:
                return
            delta = torch.mm(delta, self.weights[i].T, out=self.deltas[i][:m])
            if i - 1 not in self.linear and self.activation != "identity":
                delta.mul_(_SLOPE[self.activation](h))


def _nothing_to_learn(trainer):
    """All rows are equal: the mean alone restores them."""
    return _Found(trainer.layers(), 0.0, [0.0], None)


def _standardisation(rows, weights):
    """Weighted mean of the columns, and one scale: the root of the mean variance; 0 where all rows are equal."""
    n, d = rows.shape
    peak = float(np.abs(rows).max())
    unit = np.ldexp(1.0, int(np.frexp(peak)[1]))  # a power of two: squares neither overflow nor lose bits
    total = n if weights is None else weights.sum()
    step = max(1, _BLOCK_ELEMENTS // d)

    def weighted_sum(function):
        found = 0.0
        for start in range(0, n, step):
            w = 1.0 if weights is None else weights[start : start + step, None]
            found = found + (w * function(rows[start : start + step] / np.float64(unit))).sum(axis=0)
        return found

    mean = weighted_sum(lambda block: block) / total
    scale = float(np.sqrt(weighted_sum(lambda block: np.square(block - mean)).sum() / (total * d)))
    # the mean of equal rows may be off by a rounding
    return mean * unit, scale * unit if scale > 1e-14 else 0.0


def _standardised(rows, mean, scale):
    """`(rows - mean) / scale` in float32."""
    out = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        out[start : start + step] = (rows[start : start + step] - mean) / (scale or 1.0)
    return out


def _hold_out(n_rows, fraction, rng):
    """Numbers of the rows that are held out, ascending."""
    n_held = min(max(1, round(fraction * n_rows)), n_rows - 1)
    return np.sort(rng.permutation(n_rows)[:n_held])


def _generator(rng):
    """A torch generator seeded from a RandomState."""
    return torch.Generator(device="cpu").manual_seed(int(rng.randint(np.iinfo(np.int32).max)))


def _order(n_rows, shuffle, generator):
    # on the CPU whatever the default device is, so that every device sees the same order
    return torch.randperm(n_rows, generator=generator, device="cpu") if shuffle else torch.arange(n_rows, device="cpu")


def _resolve_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto' or a torch device, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch sees, got {name!r}, and torch sees no CUDA device")
    return device
