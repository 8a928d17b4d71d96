"""Networks and files: which tensors there are, who compresses them, and how the result goes back.

The only part of skfactor that sees a user's `nn.Module`. Files (`files`, `fitting`, `rules`, `result`) need no torch;
names that need it are imported at first use.
"""
# SPDX-License-Identifier: BSD-3-Clause

from importlib import import_module

_HOME = {
    "Allocation": "allocation",
    "Calibration": "calibrate",
    "CompressionResult": "result",
    "DeepKMeansTraining": "training.deep_kmeans",
    "EntropyTraining": "training.entropy",
    "Factor": "factors",
    "FactorizedLayer": "modules",
    "FileResult": "files",
    "FilterGroup": "surgery",
    "FilterGroups": "surgery",
    "GradualPruning": "training.schedules",
    "FormatChoice": "formats",
    "LayerShape": "factors",
    "LayerSpec": "layers",
    "Moments": "calibrate",
    "NoSmallerModule": "factors",
    "PrunedNetwork": "surgery",
    "Sensitivity": "training.schedules",
    "SoftSharingTraining": "training.soft_sharing",
    "TensorRecord": "fitting",
    "TrainedSharing": "training.shared",
    "TrainingMethod": "training.base",
    "allocate": "allocation",
    "calibration_moments": "apply",
    "choose_formats": "formats",
    "collect_moments": "calibrate",
    "compress": "apply",
    "compress_file": "files",
    "count_macs": "cost",
    "decompress_file": "files",
    "dense_copy": "modules",
    "filter_groups": "surgery",
    "finetune": "training.finetune",
    "fisher_diagonal": "fisher",
    "group_log_penalty": "training.groups",
    "input_vectors": "calibrate",
    "load": "apply",
    "load_into": "apply",
    "output_importance": "calibrate",
    "prune_filters": "pruning",
    "register_input_vectors": "calibrate",
    "register_layer": "layers",
    "register_module": "factors",
    "remove_filters": "surgery",
    "rows_first": "layers",
    "rows_last": "layers",
    "sensitivity": "training.schedules",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
