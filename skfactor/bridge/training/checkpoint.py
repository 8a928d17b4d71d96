"""State of a training run on disk: whole or not there, and read without running anything that the file says."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from skfactor.codec._files import AtomicFile
from skfactor.exceptions import FormatError

__all__ = ["load_state", "save_state"]

_PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def save_state(path: str | PathLike, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values, nested in dicts, lists and tuples; the file appears once it is complete.

    Raises
    ------
    TypeError
        Something else is in it, which `load_state` would refuse; nothing is written.
    """
    _check(state, "state")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with AtomicFile(path) as file:
        file.write(buffer.getbuffer())


def load_state(path: str | PathLike) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU; FormatError for a damaged or foreign file.

    torch's own restricted reader takes tensors and plain values only.
    """
    with open(path, "rb") as file:  # a missing file is an error of its own
        data = io.BytesIO(file.read())
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise FormatError(f"{os.fspath(path)!r} is no checkpoint, or is damaged: {str(error).splitlines()[0]}"
                          ) from error


def _check(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"a key in {where} must be a string or integer, got {key!r}")
            _check(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check(item, f"{where}[{number}]")
    elif not isinstance(value, _PLAIN):
        raise TypeError(f"{where} must be a tensor or a plain value to be checkpointed, got {type(value).__name__}")
