"""Estimators: one file, one estimator."""
# SPDX-License-Identifier: BSD-3-Clause

from skfactor.estimators.base import BaseCompressor, compressed_tensor, decoder_chain, fit_params
from skfactor.estimators.kmeans_sharer import KMeansWeightSharer

__all__ = ["BaseCompressor", "KMeansWeightSharer", "compressed_tensor", "decoder_chain", "fit_params"]
