"""Exceptions of skfactor. Wrong arguments raise ValueError or TypeError as in scikit-learn."""
# SPDX-License-Identifier: BSD-3-Clause

__all__ = ["FormatError", "LayerError", "SkfactorError"]


class SkfactorError(Exception):
    """Base class of the errors that are skfactor's own."""


class FormatError(SkfactorError, ValueError):
    """A file or a stream is damaged, truncated, foreign, or of a newer format."""


class LayerError(SkfactorError, ValueError):
    """A layer of a network cannot be compressed; names the layer, its shape and the estimator."""
