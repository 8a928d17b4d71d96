"""skfactor: scikit-learn for network compression.

Public names are imported when first used: `import skfactor` costs next to nothing, and torch is imported only by what
touches a network.
"""
# SPDX-License-Identifier: BSD-3-Clause

import importlib

__version__ = "0.1.0.dev0"

# public name -> module that defines it
_MODULE_OF = {
    "AutoencoderCompressor": "skfactor.estimators",
    "BaseCompressor": "skfactor.estimators",
    "BlockTermFactorizer": "skfactor.estimators",
    "CPDFilterPruner": "skfactor.estimators",
    "Calibration": "skfactor.bridge",
    "CompressionResult": "skfactor.bridge",
    "CompressionSearchCV": "skfactor.selection",
    "CoupledCPDFactorizer": "skfactor.estimators",
    "DeepKMeansRegularizer": "skfactor.estimators",
    "DeepKMeansTraining": "skfactor.bridge",
    "DictionaryFactorizer": "skfactor.estimators",
    "EntropyTraining": "skfactor.bridge",
    "FormatError": "skfactor.exceptions",
    "GradualPruning": "skfactor.bridge",
    "HierarchicalTuckerFactorizer": "skfactor.estimators",
    "KMeansWeightSharer": "skfactor.estimators",
    "LayerError": "skfactor.exceptions",
    "LowRankFactorizer": "skfactor.estimators",
    "MagnitudePruner": "skfactor.estimators",
    "MantissaRounder": "skfactor.estimators",
    "PrunedNetwork": "skfactor.bridge",
    "Report": "skfactor.report",
    "SeparableFactorizer": "skfactor.estimators",
    "SkfactorError": "skfactor.exceptions",
    "SoftSharingTraining": "skfactor.bridge",
    "SoftWeightSharer": "skfactor.estimators",
    "TensorTrainFactorizer": "skfactor.estimators",
    "TrainedSharing": "skfactor.bridge",
    "TrainingMethod": "skfactor.bridge",
    "TuckerFactorizer": "skfactor.estimators",
    "UniformQuantizer": "skfactor.estimators",
    "allocate": "skfactor.bridge",
    "choose_formats": "skfactor.bridge",
    "compare": "skfactor.report",
    "compress": "skfactor.bridge",
    "compress_file": "skfactor.bridge",
    "decompress_file": "skfactor.bridge",
    "filter_groups": "skfactor.bridge",
    "finetune": "skfactor.bridge",
    "load": "skfactor.bridge",
    "load_into": "skfactor.bridge",
    "prune_filters": "skfactor.bridge",
    "register_layer": "skfactor.bridge",
    "remove_filters": "skfactor.bridge",
    "sensitivity": "skfactor.bridge",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'skfactor' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
