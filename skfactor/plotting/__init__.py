"""Displays: elbow, size against quality, codebook, atoms, reconstructions, a map of filters.

They follow scikit-learn's Display style: `from_...` computes and draws, the constructor takes the figures alone, and
`plot(ax=None)` draws them (again) and leaves the artists in attributes that end in an underscore. matplotlib is
imported when something is drawn.
"""
# SPDX-License-Identifier: BSD-3-Clause

from skfactor.plotting.curves import ElbowDisplay, RateDistortionDisplay, pareto_front
from skfactor.plotting.images import AtomsDisplay, ReconstructionDisplay
from skfactor.plotting.weights import CodebookDisplay, ManifoldDisplay

__all__ = [
    "AtomsDisplay",
    "CodebookDisplay",
    "ElbowDisplay",
    "ManifoldDisplay",
    "RateDistortionDisplay",
    "ReconstructionDisplay",
    "pareto_front",
]
