"""What the displays share: axes, colours, ticks, and the check of what is drawn."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

__all__ = ["BLUE", "GREY", "ORANGE", "image_shape_of", "matrix", "mosaic", "new_axes", "percent", "set_log_ticks",
           "tidy", "vector"]

BLUE, ORANGE, GREY = "#1f6fb4", "#e4572e", "#9aa5b1"


def new_axes(ax):
    """`ax`, or the axes of a new pyplot figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("a plot needs matplotlib, which is not installed; pip install 'skfactor[plot]'") from error
    return plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]


def tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e6e9ed", linewidth=0.8)
    ax.set_axisbelow(True)


def vector(name, values, length=None):
    """`values` as a finite 1-D float array (of `length`, where given)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{name} must be a non-empty 1-D array of finite numbers, got shape {values.shape}")
    if length is not None and len(values) != length:
        raise ValueError(f"{name} must have {length} values, got {len(values)}")
    return values


def percent(value, _position=None):
    """Tick label of a fraction, in percent."""
    return f"{100 * value:.4g} %"


def set_log_ticks(ax):
    """Ticks 1, 2, 5 x 10^n written as plain numbers: a log axis over less than a decade has no labels otherwise."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _position=None: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def matrix(name, values, n_columns=None):
    """`values` as a finite 2-D float array (of `n_columns`, where given)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{name} must be a non-empty 2-D array of finite numbers, got shape {values.shape}")
    if n_columns is not None and values.shape[1] != n_columns:
        raise ValueError(f"{name} must have {n_columns} columns, got {values.shape[1]}")
    return values


def image_shape_of(shape, n_pixels):
    """(height, width), given or the square of `n_pixels`."""
    if shape is None:
        side = round(n_pixels**0.5)
        shape = (side, side)
    shape = tuple(int(n) for n in shape)
    if len(shape) != 2 or shape[0] * shape[1] != n_pixels or min(shape) < 1:
        raise ValueError(f"image_shape must be (height, width) with a product of {n_pixels}, got {shape}")
    return shape


def mosaic(images, n_columns):
    """Images (n, height, width) side by side in one array, row after row, with a pixel of NaN between them."""
    n, height, width = images.shape
    n_rows = -(-n // n_columns)
    tiles = np.full((n_rows * n_columns, height + 1, width + 1), np.nan)
    tiles[:n, :height, :width] = images
    whole = tiles.reshape(n_rows, n_columns, height + 1, width + 1).transpose(0, 2, 1, 3)
    return whole.reshape(n_rows * (height + 1), n_columns * (width + 1))[:-1, :-1]
