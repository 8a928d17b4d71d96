"""Estimators: one file, one estimator.

Those that are trained with torch are imported when first used.
"""
# SPDX-License-Identifier: BSD-3-Clause

import importlib

from skfactor.estimators.base import BaseCompressor, compressed_tensor, decoder_chain, fit_chain, fit_params
from skfactor.estimators.block_term import BlockTermFactorizer
from skfactor.estimators.cpd_filter_pruner import CPDFilterPruner
from skfactor.estimators.dictionary_factorizer import DictionaryFactorizer
from skfactor.estimators.hierarchical_tucker import HierarchicalTuckerFactorizer
from skfactor.estimators.kmeans_sharer import KMeansWeightSharer
from skfactor.estimators.low_rank import LowRankFactorizer
from skfactor.estimators.magnitude_pruner import MagnitudePruner
from skfactor.estimators.mantissa_rounder import MantissaRounder
from skfactor.estimators.separable import SeparableFactorizer
from skfactor.estimators.tensor_train import TensorTrainFactorizer
from skfactor.estimators.tucker import TuckerFactorizer
from skfactor.estimators.uniform_quantizer import UniformQuantizer

# public name -> module that imports torch
_TRAINED = {"AutoencoderCompressor": "skfactor.estimators.autoencoder"}

__all__ = [
    "AutoencoderCompressor",
    "BaseCompressor",
    "BlockTermFactorizer",
    "CPDFilterPruner",
    "DictionaryFactorizer",
    "HierarchicalTuckerFactorizer",
    "KMeansWeightSharer",
    "LowRankFactorizer",
    "MagnitudePruner",
    "MantissaRounder",
    "SeparableFactorizer",
    "TensorTrainFactorizer",
    "TuckerFactorizer",
    "UniformQuantizer",
    "compressed_tensor",
    "decoder_chain",
    "fit_chain",
    "fit_params",
]


def __getattr__(name):
    if name in _TRAINED:
        return getattr(importlib.import_module(_TRAINED[name]), name)
    raise AttributeError(f"module 'skfactor.estimators' has no attribute {name!r}")
