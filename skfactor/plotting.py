"""Displays: error against the number of clusters, a codebook over its weights, size against quality.

They follow scikit-learn's Display style: `from_...` computes and draws, the constructor takes the figures alone, and
`plot(ax=None)` draws them (again) and leaves the artists in attributes that end in an underscore. matplotlib is
imported when something is drawn.
"""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.codec.decoders import CodebookDecoder

__all__ = ["CodebookDisplay", "ElbowDisplay", "RateDistortionDisplay", "pareto_front"]

_BLUE, _ORANGE, _GREY = "#1f6fb4", "#e4572e", "#9aa5b1"


def _new_axes(ax):
    """`ax`, or the axes of a new pyplot figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("a plot needs matplotlib, which is not installed; pip install 'skfactor[plot]'") from error
    return plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]


def _tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e6e9ed", linewidth=0.8)
    ax.set_axisbelow(True)


def _vector(name, values, length=None):
    """`values` as a finite 1-D float array (of `length`, where given)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{name} must be a non-empty 1-D array of finite numbers, got shape {values.shape}")
    if length is not None and len(values) != length:
        raise ValueError(f"{name} must have {length} values, got {len(values)}")
    return values


def pareto_front(size, quality, *, higher_is_better=True):
    """Indices of the points that no other beats: none is at most as large and at least as good, and better in one.

    Parameters
    ----------
    size, quality : array-like of shape (n_points,)
        Smaller sizes are better; larger qualities are, unless `higher_is_better=False`.
    higher_is_better : bool, default=True

    Returns
    -------
    ndarray of int
        Indices in order of growing size. Of points that are equal in both, the first is kept.

    Examples
    --------
    >>> from skfactor.plotting import pareto_front
    >>> pareto_front([10, 20, 30, 30], [0.5, 0.9, 0.8, 0.95])
    array([0, 1, 3])
    """
    size = _vector("size", size)
    quality = _vector("quality", quality, len(size)) * (1 if higher_is_better else -1)
    order = np.lexsort((-quality, size))
    best_so_far = np.maximum.accumulate(quality[order])
    is_record = np.r_[True, quality[order][1:] > best_so_far[:-1]]
    return order[is_record]


class ElbowDisplay:
    """Error of weight sharing against the number of clusters.

    Draws the relative error ‖X − X̂‖ / ‖X‖ of the best sharing with K clusters over K, with the compression factor
    κ = 1 − K/N on a second axis.

    Parameters
    ----------
    n_clusters : array-like of shape (n_points,)
        Numbers of clusters K.
    relative_error : array-like of shape (n_points,)
        ‖X − X̂‖ / ‖X‖ at each K.
    chosen : int or None, default=None
        The K to mark; one of `n_clusters`.
    n_weights : int or None, default=None
        Number N of shared weights; gives the κ axis.
    name : str or None, default=None
        What was shared, for the title.

    Attributes
    ----------
    line_, chosen_ : matplotlib Line2D
        The curve, and the mark of the chosen K (None without one).
    ax_, kappa_ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from skfactor.plotting import ElbowDisplay
    >>> display = ElbowDisplay([1, 2, 4, 8], [0.9, 0.5, 0.3, 0.2], chosen=4, n_weights=1000)
    >>> display.plot()  # doctest: +SKIP
    """

    def __init__(self, n_clusters, relative_error, *, chosen=None, n_weights=None, name=None):
        self.n_clusters = _vector("n_clusters", n_clusters)
        self.relative_error = _vector("relative_error", relative_error, len(self.n_clusters))
        self.chosen = chosen
        self.n_weights = n_weights
        self.name = name
        if chosen is not None and chosen not in self.n_clusters:
            raise ValueError(f"chosen must be one of the {len(self.n_clusters)} values of n_clusters, got {chosen}")

    @classmethod
    def from_estimator(cls, estimator, X, *, k_max=64, ax=None, name=None):
        """Draw the curve that `estimator.elbow_curve(X, k_max)` gives, with its `n_clusters` marked.

        Parameters
        ----------
        estimator : KMeansWeightSharer
            Fitted or not.
        X : array-like of shape (n_samples, n_features)
        k_max : int, default=64
            Largest number of clusters; raised to the estimator's own where that is larger.
        ax : matplotlib Axes or None, default=None
        name : str or None, default=None

        Returns
        -------
        ElbowDisplay
        """
        X = np.asarray(X)
        inertia = np.asarray(estimator.elbow_curve(X, max(k_max, estimator.n_clusters)), dtype=np.float64)
        energy = np.square(X, dtype=np.float64).sum()
        # a matrix of zeros has no relative error; one cluster restores it
        relative = np.sqrt(np.maximum(inertia, 0) / energy) if energy else np.zeros_like(inertia)
        display = cls(
            np.arange(1, len(inertia) + 1), relative, name=name, n_weights=X.size,
            chosen=min(estimator.n_clusters, len(inertia)),
        )
        return display.plot(ax)

    def plot(self, ax=None):
        """Draw on `ax`, or on a new figure; returns self."""
        self.ax_ = ax = _new_axes(ax)
        self.figure_ = ax.figure
        (self.line_,) = ax.plot(self.n_clusters, self.relative_error, "-", color=_BLUE, linewidth=2)
        ax.set_xscale("log", base=2)
        ticks = 2.0 ** np.arange(np.ceil(np.log2(self.n_clusters.min())), np.log2(self.n_clusters.max()) + 1e-9)
        ax.set_xticks(ticks, labels=[f"{t:g}" for t in ticks])
        ax.yaxis.set_major_formatter(_percent)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("clusters K")
        ax.set_ylabel("relative error ‖X − X̂‖ / ‖X‖")
        ax.set_title("Error of weight sharing" + (f": {self.name}" if self.name else ""))
        _tidy(ax)
        self.chosen_ = None
        if self.chosen is not None:
            self._mark_chosen(ax)
        self.kappa_ax_ = None
        if self.n_weights is not None:
            self._add_kappa_axis(ax, ticks)
        return self

    def _mark_chosen(self, ax):
        error = float(self.relative_error[self.n_clusters == self.chosen][0])
        (self.chosen_,) = ax.plot([self.chosen], [error], "o", color=_ORANGE, markersize=8, zorder=3)
        ax.annotate(
            f"K = {self.chosen:g}: error {100 * error:.2g} %", (self.chosen, error), color=_ORANGE,
            xytext=(8, 10), textcoords="offset points", fontweight="bold",
        )

    def _add_kappa_axis(self, ax, ticks):
        self.kappa_ax_ = upper = ax.twiny()
        upper.set_xscale(ax.get_xscale(), base=2)
        upper.set_xlim(ax.get_xlim())
        kappa = 1 - ticks / self.n_weights
        digits = int(np.clip(np.ceil(np.log10(self.n_weights)) - 2, 0, 6))
        upper.set_xticks(ticks, labels=[f"{100 * k:.{digits}f}" for k in kappa], fontsize="x-small", color="#5b6672")
        upper.minorticks_off()
        upper.set_xlabel("κ = 1 − K/N  [%]", fontsize="small", color="#5b6672")
        upper.spines[["top", "right"]].set_visible(False)
        upper.tick_params(length=0)


def _percent(value, _position=None):
    """Tick label of a fraction, in percent."""
    return f"{100 * value:.4g} %"


class CodebookDisplay:
    """A codebook drawn over the histogram of the weights it shares.

    Parameters
    ----------
    weights : array-like
        Weights before sharing, of any shape.
    codebook : array-like of shape (n_clusters,)
        Shared values.
    codes : array-like or None, default=None
        Code of every weight, same number as `weights`; gives the entropy of the codes.
    name : str or None, default=None
        What was shared, for the title.

    Attributes
    ----------
    histogram_ : matplotlib BarContainer
    centroids_ : matplotlib LineCollection
        One vertical line per shared value.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.plotting import CodebookDisplay
    >>> display = CodebookDisplay(np.random.default_rng(0).normal(size=1000), [-1.0, 0.0, 1.0])
    >>> display.plot()  # doctest: +SKIP
    """

    def __init__(self, weights, codebook, *, codes=None, name=None):
        self.weights = _vector("weights", np.ravel(np.asarray(weights)))
        self.codebook = np.sort(_vector("codebook", codebook))
        self.codes = None if codes is None else np.ravel(np.asarray(codes))
        self.name = name
        if self.codes is not None and len(self.codes) != len(self.weights):
            raise ValueError(f"codes must have {len(self.weights)} values, one per weight, got {len(self.codes)}")

    @classmethod
    def from_estimator(cls, estimator, X, *, index=0, ax=None, name=None):
        """Draw a codebook of a fitted sharer over the weights of `X` that refer to it.

        Parameters
        ----------
        estimator : KMeansWeightSharer
            Fitted, with `vector_size=1`.
        X : array-like of shape (n_samples, n_features)
        index : int, default=0
            Which codebook, where every row, column or group has its own.
        ax : matplotlib Axes or None, default=None
        name : str or None, default=None

        Returns
        -------
        CodebookDisplay
        """
        decoder = getattr(estimator, "decoder_", None)
        if not isinstance(decoder, CodebookDecoder) or decoder.codebooks.shape[2] != 1:
            raise ValueError(f"CodebookDisplay needs a fitted estimator with a codebook of scalars, got {estimator!r}")
        if not 0 <= index < len(decoder.codebooks):
            raise ValueError(f"index must be in 0..{len(decoder.codebooks) - 1}, got {index}")
        X, codes = np.asarray(X), estimator.transform(X)
        part = {
            "tensor": np.s_[:],
            "row": np.s_[index : index + 1],
            "column": np.s_[:, index : index + 1],
            "group": np.s_[index * (decoder.group_size or 0) : (index + 1) * (decoder.group_size or 0)],
        }[decoder.granularity]
        return cls(X[part], decoder.codebooks[index, :, 0], codes=codes[part], name=name).plot(ax)

    def plot(self, ax=None, *, bins=120):
        """Draw on `ax`, or on a new figure, with `bins` bars; returns self."""
        self.ax_ = ax = _new_axes(ax)
        self.figure_ = ax.figure
        _, _, self.histogram_ = ax.hist(self.weights, bins=bins, color=_GREY, label=f"{self.weights.size:,} weights")
        self.centroids_ = ax.vlines(
            self.codebook, 0, 1, transform=ax.get_xaxis_transform(), color=_ORANGE, linewidth=1.3,
            label=f"{self.codebook.size} shared values",
        )
        title = "Codebook" + (f": {self.name}" if self.name else "")
        if self.codes is not None:
            share = np.unique(self.codes, return_counts=True)[1] / self.codes.size
            title += f"  ({-(share * np.log2(share)).sum() + 0.0:.2f} bits of entropy per code)"
        ax.set_title(title)
        ax.set_xlabel("value of the weight")
        ax.set_ylabel("weights per bin")
        _tidy(ax)
        ax.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9)
        return self


class RateDistortionDisplay:
    """Stored size against quality, with the Pareto front.

    Parameters
    ----------
    size : array-like of shape (n_points,)
        Stored sizes in bytes.
    quality : array-like of shape (n_points,)
        Accuracy (a fraction) or relative error of every point.
    quality_name : str, default="accuracy"
        Label of the vertical axis.
    higher_is_better : bool, default=True
        False for an error.
    chosen : int or None, default=None
        Index of the point to mark.
    original : tuple (size, quality) or None, default=None
        The uncompressed network.
    title : str, default="Size against quality"

    Attributes
    ----------
    front : ndarray of int
        Indices of the Pareto front; see `pareto_front`.
    points_, front_, chosen_, original_ : matplotlib Line2D
        `chosen_` and `original_` are None where not given.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from skfactor.plotting import RateDistortionDisplay
    >>> display = RateDistortionDisplay([1000, 2000, 3000], [0.90, 0.97, 0.96], original=(20000, 0.98))
    >>> display.front
    array([0, 1])
    """

    def __init__(self, size, quality, *, quality_name="accuracy", higher_is_better=True, chosen=None, original=None,
                 title="Size against quality"):
        self.size = _vector("size", size)
        self.quality = _vector("quality", quality, len(self.size))
        if (self.size <= 0).any():
            raise ValueError(f"size must be positive, got {self.size.min():g}")
        if chosen is not None and not 0 <= chosen < len(self.size):
            raise ValueError(f"chosen must be an index in 0..{len(self.size) - 1}, got {chosen}")
        self.quality_name = quality_name
        self.higher_is_better = higher_is_better
        self.chosen = chosen
        self.original = original
        self.title = title
        self.front = pareto_front(self.size, self.quality, higher_is_better=higher_is_better)

    @classmethod
    def from_compressed_tensors(cls, tensors, X, *, ax=None, **kwargs):
        """Draw size against relative error ‖X − X̂‖ / ‖X‖ of several `CompressedTensor` of one `X`.

        Parameters
        ----------
        tensors : sequence of CompressedTensor
            As `skfactor.estimators.compressed_tensor` makes them.
        X : array-like of shape (n_samples, n_features)
            The matrix they stand for.
        ax : matplotlib Axes or None, default=None
        **kwargs
            Passed on to the constructor.

        Returns
        -------
        RateDistortionDisplay
        """
        X = np.asarray(X, dtype=np.float64)
        norm = np.linalg.norm(X)
        error = [np.linalg.norm(t.to_matrix() - X) / norm if norm else 0.0 for t in tensors]
        defaults = {"quality_name": "relative error ‖X − X̂‖ / ‖X‖", "higher_is_better": False,
                    "title": "Size against error"}
        return cls([t.nbytes for t in tensors], error, **(defaults | kwargs)).plot(ax)

    def plot(self, ax=None):
        """Draw on `ax`, or on a new figure; returns self."""
        self.ax_ = ax = _new_axes(ax)
        self.figure_ = ax.figure
        kilobytes = self.size / 1000
        (self.points_,) = ax.plot(kilobytes, self.quality, "o", color=_GREY, markersize=5, label="settings tried")
        (self.front_,) = ax.plot(
            kilobytes[self.front], self.quality[self.front], "o-", color=_BLUE, markersize=5, linewidth=2,
            label="Pareto front",
        )
        self.original_ = self._mark(ax, self.original, "s", "#303a44", "original")
        picked = None if self.chosen is None else (self.size[self.chosen], self.quality[self.chosen])
        self.chosen_ = self._mark(ax, picked, "o", _ORANGE, "chosen")
        if self.original is not None:
            ax.axhline(self.original[1], color="#303a44", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        _set_log_ticks(ax)
        ax.yaxis.set_major_formatter(_percent)
        ax.set_xlabel("stored size [kB]")
        ax.set_ylabel(self.quality_name)
        ax.set_title(self.title)
        _tidy(ax)
        ax.legend(frameon=False, loc="lower right" if self.higher_is_better else "upper right")
        return self

    @staticmethod
    def _mark(ax, point, marker, color, label):
        """A labelled mark at (bytes, quality), or None."""
        if point is None:
            return None
        size, quality = point
        text = f"{label}: {size / 1000:.3g} kB, {100 * quality:.2f} %"
        return ax.plot([size / 1000], [quality], marker, color=color, markersize=9, zorder=3, linestyle="none",
                       label=text)[0]


def _set_log_ticks(ax):
    """Ticks 1, 2, 5 x 10^n written as plain numbers: a log axis over less than a decade has no labels otherwise."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _position=None: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
