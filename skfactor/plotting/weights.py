"""Displays of weights: a codebook over their histogram, a map of filters."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.codec.decoders import CodebookDecoder
from skfactor.plotting._axes import GREY, ORANGE, matrix, new_axes, tidy, vector

__all__ = ["CodebookDisplay", "ManifoldDisplay"]


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
        self.weights = vector("weights", np.ravel(np.asarray(weights)))
        self.codebook = np.sort(vector("codebook", codebook))
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
        self.ax_ = ax = new_axes(ax)
        self.figure_ = ax.figure
        _, _, self.histogram_ = ax.hist(self.weights, bins=bins, color=GREY, label=f"{self.weights.size:,} weights")
        self.centroids_ = ax.vlines(
            self.codebook, 0, 1, transform=ax.get_xaxis_transform(), color=ORANGE, linewidth=1.3,
            label=f"{self.codebook.size} shared values",
        )
        title = "Codebook" + (f": {self.name}" if self.name else "")
        if self.codes is not None:
            share = np.unique(self.codes, return_counts=True)[1] / self.codes.size
            title += f"  ({-(share * np.log2(share)).sum() + 0.0:.2f} bits of entropy per code)"
        ax.set_title(title)
        ax.set_xlabel("value of the weight")
        ax.set_ylabel("weights per bin")
        tidy(ax)
        ax.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9)
        return self


class ManifoldDisplay:
    """Filters (or other rows) as points of the plane, coloured by their cluster.

    Parameters
    ----------
    embedding : array-like of shape (n_samples, 2)
        Where each row lies.
    labels : array-like of int of shape (n_samples,) or None, default=None
        Cluster of each row.
    method : str or None, default=None
        What made the embedding, for the title.
    name : str or None, default=None
        What the rows are, for the title.

    Attributes
    ----------
    scatter_ : matplotlib PathCollection
    colorbar_ : matplotlib Colorbar or None
        Without labels there is none.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from skfactor.plotting import ManifoldDisplay
    >>> display = ManifoldDisplay([[0.0, 1.0], [1.0, 0.0]], [0, 1], name="conv1")
    >>> display.plot()  # doctest: +SKIP
    """

    def __init__(self, embedding, labels=None, *, method=None, name=None):
        self.embedding = matrix("embedding", embedding, 2)
        self.labels = None if labels is None else np.asarray(labels)
        n = len(self.embedding)
        if labels is not None and (self.labels.shape != (n,) or self.labels.dtype.kind not in "iu"):
            raise ValueError(f"labels must be {n} integers, got {self.labels.dtype} {self.labels.shape}")
        self.method = method
        self.name = name

    @classmethod
    def from_estimator(cls, estimator, X, *, manifold=None, ax=None, name=None):
        """Map the rows of `X` and colour them by what a fitted estimator makes of them.

        The cluster of a row is its code, where it has one, as with `KMeansWeightSharer(vector_size=n_features)`; of a
        row of several real codes it is the number of the one that is largest in absolute value: its main atom.

        Parameters
        ----------
        estimator : BaseCompressor
            Fitted.
        X : array-like of shape (n_samples, n_features)
        manifold : object with `fit_transform`, default=None
            One of `sklearn.manifold`; None is `TSNE` started at the principal components, the same at every call.
        ax : matplotlib Axes or None, default=None
        name : str or None, default=None

        Returns
        -------
        ManifoldDisplay
        """
        codes = estimator.transform(X)
        codes = codes.toarray() if hasattr(codes, "toarray") else np.asarray(codes)
        if codes.shape[1] == 1 and codes.dtype.kind in "iu":
            labels = codes[:, 0]
        elif codes.dtype.kind == "f":
            labels = np.abs(codes).argmax(axis=1)
        else:
            raise ValueError(f"a row must have one integer code or several real ones, got {codes.shape[1]} of "
                             f"{codes.dtype}; share whole rows with vector_size=n_features")
        return cls.from_labels(X, labels.astype(int), manifold=manifold, ax=ax, name=name)

    @classmethod
    def from_labels(cls, X, labels=None, *, manifold=None, ax=None, name=None):
        """Map the rows of `X` and colour them by `labels`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        labels : array-like of int of shape (n_samples,) or None, default=None
        manifold : object with `fit_transform`, default=None
        ax : matplotlib Axes or None, default=None
        name : str or None, default=None

        Returns
        -------
        ManifoldDisplay
        """
        if manifold is None:
            from sklearn.manifold import TSNE

            n = len(X)
            if n < 3:
                raise ValueError(f"a map needs at least 3 rows, got {n}")
            manifold = TSNE(perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=0)
        embedding = manifold.fit_transform(np.asarray(X))
        return cls(embedding, labels, method=type(manifold).__name__, name=name).plot(ax)

    def plot(self, ax=None):
        """Draw on `ax`, or on a new figure; returns self."""
        self.ax_ = ax = new_axes(ax)
        self.figure_ = ax.figure
        colours = {"color": GREY} if self.labels is None else {"c": self.labels, "cmap": "nipy_spectral"}
        self.scatter_ = ax.scatter(*self.embedding.T, s=18, linewidths=0, **colours)
        self.colorbar_ = None
        if self.labels is not None:
            self.colorbar_ = self.figure_.colorbar(self.scatter_, ax=ax, label="cluster")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title("Map" + (f" of {self.name}" if self.name else "") + (f" by {self.method}" if self.method else ""))
        return self
