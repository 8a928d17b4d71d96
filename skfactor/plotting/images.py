"""Displays of images: the atoms of a dictionary, reconstructions side by side."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from skfactor.codec.decoders import CodebookDecoder
from skfactor.codec.linear import ComponentsDecoder, LinearDecoder
from skfactor.plotting._axes import image_shape_of, matrix, mosaic, new_axes, vector

__all__ = ["AtomsDisplay", "ReconstructionDisplay"]


class AtomsDisplay:
    """Atoms of a dictionary, or centroids of rows, as images.

    Each image is divided by its largest absolute value. Atoms of both signs are drawn from blue over white to red,
    atoms without a negative value from white to black.

    Parameters
    ----------
    atoms : array-like of shape (n_atoms, height * width)
    image_shape : tuple (height, width) or None, default=None
        None is a square.
    usage : array-like of shape (n_atoms,) or None, default=None
        How much each atom is used; the most used is then drawn first.
    name : str or None, default=None
        What the dictionary is of, for the title.

    Attributes
    ----------
    order : ndarray of int
        Numbers of the atoms in the order they are drawn in.
    image_ : matplotlib AxesImage
        All atoms, row after row, with a pixel of NaN between them.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.plotting import AtomsDisplay
    >>> display = AtomsDisplay(np.eye(4), (2, 2), usage=[1, 5, 2, 3])
    >>> display.order
    array([1, 3, 2, 0])
    """

    def __init__(self, atoms, image_shape=None, *, usage=None, name=None):
        self.atoms = matrix("atoms", atoms)
        self.image_shape = image_shape_of(image_shape, self.atoms.shape[1])
        self.usage = None if usage is None else vector("usage", usage, len(self.atoms))
        self.name = name
        n_atoms = len(self.atoms)
        self.order = np.arange(n_atoms) if usage is None else np.argsort(-self.usage, kind="stable")

    @classmethod
    def from_estimator(cls, estimator, X=None, *, image_shape=None, index=0, ax=None, name=None, **kwargs):
        """Draw the atoms of a fitted estimator, or the centroids of one that shares whole rows or sub-vectors.

        Parameters
        ----------
        estimator : DictionaryFactorizer, KMeansWeightSharer, or any with a linear decoder
            Fitted.
        X : array-like of shape (n_samples, n_features) or None, default=None
            Orders the atoms by their use in these rows: the sum of the absolute codes, or how often a centroid is
            taken.
        image_shape : tuple (height, width) or None, default=None
        index : int, default=0
            Which codebook, where every row, column or group has its own.
        ax : matplotlib Axes or None, default=None
        name : str or None, default=None
        **kwargs
            Passed on to `plot`.

        Returns
        -------
        AtomsDisplay
        """
        decoder = getattr(estimator, "decoder_", None)
        if isinstance(decoder, CodebookDecoder) and decoder.codebooks.shape[2] > 1:
            if not 0 <= index < len(decoder.codebooks):
                raise ValueError(f"index must be in 0..{len(decoder.codebooks) - 1}, got {index}")
            atoms = decoder.codebooks[index]
        elif isinstance(decoder, ComponentsDecoder):
            atoms = decoder.components
        elif isinstance(decoder, LinearDecoder):
            atoms = decoder.basis()
        else:
            raise ValueError(f"AtomsDisplay needs a fitted estimator with a linear decoder or a codebook of vectors, "
                             f"got {estimator!r}")
        usage = None if X is None else _usage(decoder, estimator.transform(X), len(atoms), index)
        return cls(atoms, image_shape, usage=usage, name=name).plot(ax, **kwargs)

    def plot(self, ax=None, *, n_atoms=None, n_columns=None, cmap=None):
        """Draw the first `n_atoms` on `ax`, or on a new figure, `n_columns` side by side; returns self."""
        self.ax_ = ax = new_axes(ax)
        self.figure_ = ax.figure
        shown = self.atoms[self.order[:n_atoms]]
        largest = np.abs(shown).max(axis=1, keepdims=True)
        shown = np.divide(shown, largest, out=np.zeros_like(shown), where=largest > 0)
        signed = shown.min() < -1e-6  # a mean of zeros may be off by a rounding
        columns = n_columns or int(np.ceil(np.sqrt(1.5 * len(shown))))
        self.image_ = ax.imshow(mosaic(shown.reshape(-1, *self.image_shape), min(columns, len(shown))),
                                cmap=cmap or ("RdBu_r" if signed else "Greys"), vmin=-1 if signed else 0, vmax=1,
                                interpolation="nearest")
        ax.set_axis_off()
        counted = f"{len(shown)} of {len(self.atoms)} atoms" if len(shown) < len(self.atoms) else f"{len(shown)} atoms"
        ax.set_title(counted + (f": {self.name}" if self.name else "")
                     + (", the most used first" if self.usage is not None else ""))
        return self


def _usage(decoder, codes, n_atoms, index):
    """Sum of the absolute codes of every atom, or how often each centroid of one codebook is taken."""
    if not isinstance(decoder, CodebookDecoder):
        codes = codes.toarray() if hasattr(codes, "toarray") else np.asarray(codes)
        return np.abs(codes.reshape(-1, n_atoms), dtype=np.float64).sum(axis=0)
    size = decoder.group_size or 0
    part = {"tensor": np.s_[:], "row": np.s_[index], "column": np.s_[:, index],
            "group": np.s_[index * size : (index + 1) * size]}[decoder.granularity]
    return np.bincount(np.ravel(codes[part]), minlength=n_atoms)


class ReconstructionDisplay:
    """Images and what becomes of them, one row for each way to compress.

    Parameters
    ----------
    originals : array-like of shape (n_images, height * width)
    reconstructions : dict of str to array-like of shape (n_images, height * width)
        By the name of the row.
    image_shape : tuple (height, width) or None, default=None
        None is a square.
    errors : dict of str to float or None, default=None
        Relative error of each row; computed from the images given when None.

    Attributes
    ----------
    errors : dict of str to float
        ‖X − X̂‖ / ‖X‖ of each row.
    image_ : matplotlib AxesImage
        All rows, the originals first, with a pixel of NaN between the images.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.plotting import ReconstructionDisplay
    >>> display = ReconstructionDisplay(np.ones((3, 4)), {"half": np.full((3, 4), 0.5)})
    >>> display.errors
    {'half': 0.5}
    """

    def __init__(self, originals, reconstructions, image_shape=None, *, errors=None):
        self.originals = matrix("originals", originals)
        self.reconstructions = {}
        for name, images in reconstructions.items():
            images = matrix(f"reconstructions[{name!r}]", images, self.originals.shape[1])
            if len(images) != len(self.originals):
                raise ValueError(f"reconstructions[{name!r}] must have {len(self.originals)} rows, got {len(images)}")
            self.reconstructions[name] = images
        self.image_shape = image_shape_of(image_shape, self.originals.shape[1])
        if errors is not None and set(errors) != set(self.reconstructions):
            raise ValueError(f"errors must have the names {list(self.reconstructions)}, got {list(errors)}")
        self.errors = errors or {k: _relative_error(self.originals, v) for k, v in self.reconstructions.items()}

    @classmethod
    def from_estimator(cls, estimators, X, *, image_shape=None, n_images=10, ax=None, **kwargs):
        """Draw the first rows of `X` and their reconstructions; the errors are those of all rows.

        Parameters
        ----------
        estimators : compressor or Pipeline, or dict of str to these
            Fitted, with `transform` and `inverse_transform`; scikit-learn's `PCA` is one too.
        X : array-like of shape (n_samples, n_features)
        image_shape : tuple (height, width) or None, default=None
        n_images : int, default=10
        ax : matplotlib Axes or None, default=None
        **kwargs
            Passed on to `plot`.

        Returns
        -------
        ReconstructionDisplay
        """
        if not isinstance(estimators, dict):
            estimators = {type(estimators).__name__: estimators}
        found = {k: e.inverse_transform(e.transform(X)) for k, e in estimators.items()}
        return cls._of_all(X, found, image_shape, n_images).plot(ax, **kwargs)

    @classmethod
    def from_compressed_tensors(cls, tensors, X, *, image_shape=None, n_images=10, ax=None, **kwargs):
        """The same of `CompressedTensor` of one `X`, by name: what a file would give back.

        Parameters
        ----------
        tensors : dict of str to CompressedTensor
        X : array-like of shape (n_samples, n_features)
        image_shape : tuple (height, width) or None, default=None
        n_images : int, default=10
        ax : matplotlib Axes or None, default=None
        **kwargs
            Passed on to `plot`.

        Returns
        -------
        ReconstructionDisplay
        """
        found = {k: tensor.to_matrix() for k, tensor in tensors.items()}
        return cls._of_all(X, found, image_shape, n_images).plot(ax, **kwargs)

    @classmethod
    def _of_all(cls, X, found, image_shape, n_images):
        X = np.asarray(X)
        errors = {name: _relative_error(X, X_hat) for name, X_hat in found.items()}
        return cls(X[:n_images], {k: v[:n_images] for k, v in found.items()}, image_shape, errors=errors)

    def plot(self, ax=None, *, cmap="Greys"):
        """Draw on `ax`, or on a new figure; returns self."""
        self.ax_ = ax = new_axes(ax)
        self.figure_ = ax.figure
        height = self.image_shape[0]
        images = np.vstack([self.originals, *self.reconstructions.values()])
        self.image_ = ax.imshow(mosaic(images.reshape(-1, *self.image_shape), len(self.originals)), cmap=cmap,
                                vmin=self.originals.min(), vmax=self.originals.max(), interpolation="nearest")
        labels = ["original", *(f"{name}\nerror {100 * self.errors[name]:.3g} %" for name in self.reconstructions)]
        ax.set_yticks(np.arange(len(labels)) * (height + 1) + (height - 1) / 2, labels=labels)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        return self


def _relative_error(X, X_hat):
    norm = np.linalg.norm(np.asarray(X, dtype=np.float64))
    error = np.linalg.norm(np.asarray(X_hat, dtype=np.float64) - X)
    return float(error / norm) if norm else float(error)
