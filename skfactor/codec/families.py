"""Importing this module makes every decoder class known to the file format."""
# SPDX-License-Identifier: BSD-3-Clause

from skfactor.codec import cp, decoders, linear, mlp, separable, tensor_decoders

__all__ = ["cp", "decoders", "linear", "mlp", "separable", "tensor_decoders"]
