"""Choosing settings: sizes and errors end to end, scorers and rules for scikit-learn's searches, and a fast search."""
# SPDX-License-Identifier: BSD-3-Clause

from skfactor.selection.measures import distortion, load_tensor, measure, rate, save_tensor
from skfactor.selection.rules import best_under, elbow, smallest_within
from skfactor.selection.scorers import compression_scorer, distortion_scorer, rate_distortion_scorer, rate_scorer
from skfactor.selection.search import CompressionSearchCV
from skfactor.selection.splits import WholeMatrixSplit

__all__ = [
    "CompressionSearchCV",
    "WholeMatrixSplit",
    "best_under",
    "compression_scorer",
    "distortion",
    "distortion_scorer",
    "elbow",
    "load_tensor",
    "measure",
    "rate",
    "rate_distortion_scorer",
    "rate_scorer",
    "save_tensor",
    "smallest_within",
]
