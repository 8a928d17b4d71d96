"""torch tensors to numpy arrays that carry their bits, and back."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import numpy as np
import torch

from skfactor.codec.dtypes import DTYPES, host_dtype

__all__ = ["dtype_name", "from_bits", "to_bits"]


def dtype_name(tensor: torch.Tensor) -> str:
    """Name of a tensor's dtype as `skfactor.codec.dtypes` has it; whether it can be stored is not asked."""
    return str(tensor.dtype).removeprefix("torch.")


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """Read-only array that carries the bits of a tensor; shares its memory when that is on the CPU and contiguous."""
    name = dtype_name(tensor)
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {name!r}")
    tensor = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    if name == "bfloat16":
        tensor = tensor.view(torch.uint16)
    elif name.startswith("float8"):
        tensor = tensor.view(torch.uint8)
    array = tensor.numpy()
    array.flags.writeable = False
    return array


def from_bits(array: np.ndarray, name: str) -> torch.Tensor:
    """A new CPU tensor of dtype `name` from the array that carries its bits."""
    array = np.array(array, dtype=host_dtype(name), order="C")
    return torch.from_numpy(array).view(getattr(torch, name))
