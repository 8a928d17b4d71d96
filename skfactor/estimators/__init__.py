"""Estimators: one file, one estimator."""
# SPDX-License-Identifier: BSD-3-Clause

from skfactor.estimators.base import BaseCompressor, compressed_tensor, decoder_chain, fit_params
from skfactor.estimators.kmeans_sharer import KMeansWeightSharer
from skfactor.estimators.low_rank import LowRankFactorizer
from skfactor.estimators.mantissa_rounder import MantissaRounder
from skfactor.estimators.uniform_quantizer import UniformQuantizer

__all__ = [
    "BaseCompressor",
    "KMeansWeightSharer",
    "LowRankFactorizer",
    "MantissaRounder",
    "UniformQuantizer",
    "compressed_tensor",
    "decoder_chain",
    "fit_params",
]
