"""Names, sizes and casts of the tensor dtypes a file can hold.

numpy has no bfloat16 and no float8. Arrays of those are carried as unsigned integers holding the bits, next to the
dtype's name; `to_float` and `from_float` convert exactly resp. with round-to-nearest-even.
"""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

__all__ = ["DTYPES", "from_float", "host_dtype", "is_float", "itemsize", "to_float"]

#: dtype name -> (safetensors' name, numpy dtype that carries the bits)
DTYPES = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "u1"),
    "float8_e5m2": ("F8_E5M2", "u1"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "i1"),
    "uint64": ("U64", "<u8"),
    "uint32": ("U32", "<u4"),
    "uint16": ("U16", "<u2"),
    "uint8": ("U8", "u1"),
    "bool": ("BOOL", "?"),
    "complex64": ("C64", "<c8"),
}
_COMPRESSIBLE = ("float64", "float32", "float16", "bfloat16")


def host_dtype(name):
    """numpy dtype that carries the bits of dtype `name`."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {name!r}")
    return np.dtype(DTYPES[name][1])


def itemsize(name):
    """Bytes of one element of dtype `name`."""
    return host_dtype(name).itemsize


def is_float(name):
    """Whether estimators can work on a tensor of dtype `name` (float64, float32, float16, bfloat16)."""
    return name in _COMPRESSIBLE


def to_float(bits, name):
    """Values of an array that carries dtype `name`: float64 stays, every other float becomes float32, exactly.

    >>> import numpy as np
    >>> to_float(np.array([0x3F80, 0xC000], dtype=np.uint16), "bfloat16")
    array([ 1., -2.], dtype=float32)
    """
    if name == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if not is_float(name):
        raise ValueError(f"a tensor of dtype {name} has no floating-point values to compress; "
                         f"allowed: {', '.join(_COMPRESSIBLE)}")
    return bits.astype(np.float64 if name == "float64" else np.float32)


def from_float(values, name):
    """The array that carries `values` rounded to dtype `name` (to nearest, ties to even); `values` if it already does.

    >>> import numpy as np
    >>> [hex(b) for b in from_float(np.array([1.0, -2.0, 3.14159]), "bfloat16")]
    ['0x3f80', '0xc000', '0x4049']
    """
    if name != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(host_dtype(name), copy=False)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, np.uint16(0x7FC0), rounded)
