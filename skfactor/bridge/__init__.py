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
    "EntropyTraining": "training.entropy",
    "Factor": "factors",
    "FactorizedLayer": "modules",
    "FileResult": "files",
    "LayerShape": "factors",
    "LayerSpec": "layers",
    "NoSmallerModule": "factors",
    "TensorRecord": "fitting",
    "allocate": "allocation",
    "collect_moments": "calibrate",
    "compress": "apply",
    "compress_file": "files",
    "count_macs": "cost",
    "decompress_file": "files",
    "dense_copy": "modules",
    "group_log_penalty": "training.groups",
    "input_vectors": "calibrate",
    "load": "apply",
    "load_into": "apply",
    "output_importance": "calibrate",
    "register_input_vectors": "calibrate",
    "register_layer": "layers",
    "register_module": "factors",
    "rows_first": "layers",
    "rows_last": "layers",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
