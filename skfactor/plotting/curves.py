"""Displays of curves: error against the number of clusters, size against quality."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.plotting._axes import BLUE, GREY, ORANGE, new_axes, percent, set_log_ticks, tidy, vector

__all__ = ["ElbowDisplay", "RateDistortionDisplay", "pareto_front"]


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
    size = vector("size", size)
    quality = vector("quality", quality, len(size)) * (1 if higher_is_better else -1)
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
        self.n_clusters = vector("n_clusters", n_clusters)
        self.relative_error = vector("relative_error", relative_error, len(self.n_clusters))
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

    @classmethod
    def from_search(cls, search, param, *, n_weights=None, ax=None, name=None):
        """Draw the error of the candidates of a search against one parameter, with the chosen one marked.

        Parameters
        ----------
        search : CompressionSearchCV or GridSearchCV
            Fitted, with `mean_test_distortion` in `cv_results_`. Of the candidates, those are drawn that differ from
            the chosen one in `param` alone.
        param : str
            Name of the parameter that counts clusters, "share__n_clusters" for example.
        n_weights : int or None, default=None
            Number of weights, for the κ axis.
        ax : matplotlib Axes or None, default=None
        name : str or None, default=None

        Returns
        -------
        ElbowDisplay
        """
        results, best = search.cv_results_, search.best_index_
        params = results["params"]
        if param not in params[best]:
            raise ValueError(f"param must be one of {sorted(params[best])}, got {param!r}")
        error = np.sqrt(np.abs(_column(results, "mean_test_distortion")))
        others = [{k: v for k, v in p.items() if k != param} for p in params]
        same = [i for i, other in enumerate(others) if other == others[best] and np.isfinite(error[i])]
        same.sort(key=lambda i: params[i][param])
        return cls([params[i][param] for i in same], error[same], chosen=params[best][param], n_weights=n_weights,
                   name=name).plot(ax)

    def plot(self, ax=None):
        """Draw on `ax`, or on a new figure; returns self."""
        self.ax_ = ax = new_axes(ax)
        self.figure_ = ax.figure
        (self.line_,) = ax.plot(self.n_clusters, self.relative_error, "-", color=BLUE, linewidth=2)
        ax.set_xscale("log", base=2)
        ticks = 2.0 ** np.arange(np.ceil(np.log2(self.n_clusters.min())), np.log2(self.n_clusters.max()) + 1e-9)
        ax.set_xticks(ticks, labels=[f"{t:g}" for t in ticks])
        ax.yaxis.set_major_formatter(percent)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("clusters K")
        ax.set_ylabel("relative error ‖X − X̂‖ / ‖X‖")
        ax.set_title("Error of weight sharing" + (f": {self.name}" if self.name else ""))
        tidy(ax)
        self.chosen_ = None
        if self.chosen is not None:
            self._mark_chosen(ax)
        self.kappa_ax_ = None
        if self.n_weights is not None:
            self._add_kappa_axis(ax, ticks)
        return self

    def _mark_chosen(self, ax):
        error = float(self.relative_error[self.n_clusters == self.chosen][0])
        (self.chosen_,) = ax.plot([self.chosen], [error], "o", color=ORANGE, markersize=8, zorder=3)
        ax.annotate(
            f"K = {self.chosen:g}: error {100 * error:.2g} %", (self.chosen, error), color=ORANGE,
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
        self.size = vector("size", size)
        self.quality = vector("quality", quality, len(self.size))
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

    @classmethod
    def from_search(cls, search, *, ax=None, **kwargs):
        """Draw size against relative error of all candidates of a search, with the chosen one marked.

        Parameters
        ----------
        search : CompressionSearchCV or GridSearchCV, or its `cv_results_`
            With the columns `mean_test_bytes` (or `mean_test_rate`) and `mean_test_distortion`, as
            `skfactor.selection.compression_scorer` makes them. Candidates that failed are left out.
        ax : matplotlib Axes or None, default=None
        **kwargs
            Passed on to the constructor; `chosen` is an index of `cv_results_`.

        Returns
        -------
        RateDistortionDisplay
        """
        results = search if isinstance(search, dict) else search.cv_results_
        size = np.abs(_column(results, "mean_test_bytes", "mean_test_rate"))
        error = np.sqrt(np.abs(_column(results, "mean_test_distortion")))
        whole = np.flatnonzero(np.isfinite(size) & np.isfinite(error))
        chosen = kwargs.pop("chosen", None if isinstance(search, dict) else getattr(search, "best_index_", None))
        if chosen is not None and chosen not in whole:
            raise ValueError(f"chosen must be the index of a candidate that did not fail, got {chosen}")
        defaults = {"quality_name": "relative error ‖X − X̂‖ / ‖X‖", "higher_is_better": False,
                    "title": "Size against error",
                    "chosen": None if chosen is None else int(np.searchsorted(whole, chosen))}
        return cls(size[whole], error[whole], **(defaults | kwargs)).plot(ax)

    def plot(self, ax=None):
        """Draw on `ax`, or on a new figure; returns self."""
        self.ax_ = ax = new_axes(ax)
        self.figure_ = ax.figure
        kilobytes = self.size / 1000
        (self.points_,) = ax.plot(kilobytes, self.quality, "o", color=GREY, markersize=5, label="settings tried")
        (self.front_,) = ax.plot(
            kilobytes[self.front], self.quality[self.front], "o-", color=BLUE, markersize=5, linewidth=2,
            label="Pareto front",
        )
        self.original_ = self._mark(ax, self.original, "s", "#303a44", "original")
        picked = None if self.chosen is None else (self.size[self.chosen], self.quality[self.chosen])
        self.chosen_ = self._mark(ax, picked, "o", ORANGE, "chosen")
        if self.original is not None:
            ax.axhline(self.original[1], color="#303a44", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        set_log_ticks(ax)
        ax.yaxis.set_major_formatter(percent)
        ax.set_xlabel("stored size [kB]")
        ax.set_ylabel(self.quality_name)
        ax.set_title(self.title)
        tidy(ax)
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


def _column(results, *names):
    """The first of these columns of `cv_results_`, NaN where a candidate failed."""
    for name in names:
        if name in results:
            return np.asarray(results[name], dtype=np.float64)
    raise ValueError(f"cv_results_ must have {' or '.join(map(repr, names))}; search with scoring=compression_scorer "
                     "of skfactor.selection")
