"""Joint moves of all borders of a one-dimensional codebook, and the passages between borders and centres."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np

from skfactor.solvers._assign1d import midpoints, round_down
from skfactor.solvers._prefix import build_prefix, cell_means, interval_inertia, merge_duplicates, sums_at

_MOVES, _MOVES_LAST = 6, 24  # joint moves per level
_WORTH, _WORTH_LAST = 1e-6, 1e-8  # relative gain that is worth another move at the same level

def distinct(data):
    """``data`` with equal values merged."""
    if not (data.x[1:] == data.x[:-1]).any():
        return data
    x, w = merge_duplicates(data.x, data.w)
    return build_prefix(x, w, data.shift)


def spread(borders):
    """Nearest strictly increasing borders: every cell holds a sample."""
    k = np.arange(borders.size)
    n = borders[-1]
    inner = np.maximum.accumulate(borders - k) + k
    inner = np.minimum(inner, n - (borders.size - 1 - k))
    inner[0] = 0
    return inner


def _knots(n):
    """Positions 0..n: dense at both ends (an outlier may deserve a cell), then growing, then evenly spaced."""
    if n <= 4096:
        return np.arange(n + 1)
    step = n / 4096
    edge = [np.arange(33)]
    at, width = 33.0, 1.0
    while width < step and at < n / 4:
        edge.append([int(at)])
        width *= 1.15
        at += width
    edge = np.concatenate(edge)
    return np.unique(np.concatenate((edge, np.linspace(edge[-1], n - edge[-1], 4096).astype(np.intp), n - edge)))


def compander_borders(data, n_clusters):
    """Starting borders, equally spaced in the compander coordinate ``integral of density^(1/3)`` [2]_."""
    n = data.size
    knots = _knots(n)
    x = data.x[np.minimum(knots, n - 1)].astype(np.float64)
    mass = np.diff(knots).astype(np.float64) if data.t is None else np.diff(sums_at(data, knots)[1])
    room = np.diff(knots).astype(np.float64)  # borders that fit between two knots
    g = np.cbrt(mass * np.diff(x) ** 2)
    for _ in range(30):
        # A gap between two samples takes one border, however wide it is (5 % more than one step, to be sure of it).
        cap = room * (1.05 * g.sum() / n_clusters)
        if (g <= cap * 1.01).all():
            break
        g = np.minimum(g, cap)
    coordinate = np.concatenate(([0.0], np.cumsum(g)))
    at = np.interp(np.arange(n_clusters + 1) * (coordinate[-1] / n_clusters), coordinate, knots)
    at[0], at[-1] = 0, n
    return spread(np.ceil(at).astype(np.intp))  # a place between samples p and p + 1 is border p + 1


def refine(data, borders, inertia, *, tau, half, narrow=8):
    """Joint moves of all borders over ever finer windows, until nothing is left to gain.

    Parameters
    ----------
    data : SortedSamples
    borders : ndarray of shape (K + 1,)
        A partition near the optimum, of inertia about ``inertia``.
    tau : float
        First step of the windows, in cells; halved from level to level, down to single samples.
    half, narrow : int
        Steps on either side of a border, and no fewer than ``narrow`` at the finer levels.

    Returns
    -------
    borders, n_moves
    """
    n_moves = 0
    while True:
        last = tau * np.diff(borders).max() <= 1
        worth = _WORTH_LAST if last else _WORTH
        for _ in range(_MOVES_LAST if last else _MOVES):
            n_moves += 1
            positions = _window(borders, tau, half)
            choice, gain = _joint_move(data, borders, positions)
            borders = np.concatenate(([0], positions[np.arange(choice.size), choice], [data.size]))
            inside = not last and np.abs(choice - half).max() < half
            if inside or gain <= worth * inertia:
                break
        if last:
            return borders, n_moves
        # a window reaches many steps of the level before: near the end the steps may shrink faster
        tau /= 2 if tau > 1 / 64 else 4
        if tau < 1 / 64:
            half = max(half // 2, narrow)


def _window(borders, tau, half):
    """Candidate positions (K - 1, 2 * half + 1) of the inner borders: steps of ``tau`` cells, at least one sample."""
    cells, n = borders.size - 1, borders[-1]
    step = np.arange(-half, half + 1)
    k = np.arange(1, cells)
    if half * tau <= 1:
        sizes = np.diff(borders)
        shift = np.where(step < 0, sizes[:-1, None], sizes[1:, None]) * (tau * step)
    else:
        shift = np.interp(k[:, None] + tau * step, np.arange(cells + 1), borders) - borders[1:-1, None]
    shift = np.where(step < 0, np.minimum(np.rint(shift), step), np.maximum(np.rint(shift), step)).astype(np.intp)
    shift[:, half] = 0
    positions = borders[1:-1, None] + shift
    np.clip(positions, k[:, None], (n - cells + k)[:, None], out=positions)
    return positions


def _joint_move(data, borders, positions):
    """Best combination of one position per border -> chosen columns and what they gain.

    With cell means ``r_k``, moving border k by samples of weight ``c`` and sum ``d`` (about the midpoint of its two
    means, half distance h) changes the cost against fixed means by ``4 h d``; refitting the means then
    gains ``s^2 / t`` per cell, s being its new sum about its old mean. Every term is local to a border, so nothing
    cancels even beside an outlier or between distant groups of samples.
    """
    s_border, t_border = sums_at(data, borders)
    t_cell = np.diff(t_border)
    mean = np.diff(s_border) / t_cell
    half = np.diff(mean) / 2
    middle = mean[:-1] + half
    s, t = sums_at(data, positions)
    c = t - t_border[1:-1, None]
    d = s - s_border[1:-1, None] - middle[:, None] * c
    shift = half[:, None] * c
    into_left, out_of_right = d + shift, d - shift
    penalty = 4 * half[:, None] * d
    n_inner, width = positions.shape
    first = into_left[0] ** 2 / (t_cell[0] + c[0])
    scores = np.empty((n_inner, width))
    scores[0] = first - penalty[0]
    last = out_of_right[-1] ** 2 / (t_cell[-1] - c[-1])
    gains = []
    batch = max(1, (1 << 16) // (width * width))
    table = np.empty((width, width))
    for lo in range(1, n_inner, batch):
        hi = min(lo + batch, n_inner)
        gain = into_left[lo:hi, None, :] - out_of_right[lo - 1 : hi - 1, :, None]
        weight = (t_cell[lo:hi, None] + c[lo:hi])[:, None, :] - c[lo - 1 : hi - 1, :, None]
        if (positions[lo - 1 : hi - 1].max(axis=1) >= positions[lo:hi].min(axis=1)).any():
            empty = positions[lo - 1 : hi - 1, :, None] >= positions[lo:hi, None, :]
            weight[empty] = 1.0
            np.square(gain, out=gain)
            gain /= weight
            gain[empty] = -np.inf
        else:
            np.square(gain, out=gain)
            gain /= weight
        gain -= penalty[lo:hi, None, :]
        gains.append(gain)
        for k in range(lo, hi):
            np.add(gain[k - lo], scores[k - 1][:, None], out=table)
            np.max(table, axis=0, out=scores[k])
    choice = np.empty(n_inner, dtype=np.intp)
    final = scores[-1] + last
    choice[-1] = np.argmax(final)
    for k in range(n_inner - 1, 0, -1):
        gain = gains[(k - 1) // batch][(k - 1) % batch]
        choice[k - 1] = np.argmax(scores[k - 1] + gain[:, choice[k]])
    return choice, final[choice[-1]]


def settle(data, borders, max_iter=100):
    """Centres and inertia of a partition whose cells are the nearest-centre cells of its means."""
    centers = cell_means(data, borders)
    for _ in range(max_iter):
        nearest = cut(data.x, centers)
        if np.array_equal(nearest, borders) or (np.diff(nearest) <= 0).any():
            break
        borders = nearest
        centers = cell_means(data, borders)
    return centers, interval_inertia(data, borders, centers), borders


def cut(x, centers):
    """Borders of the nearest-centre cells of sorted ``x``; a value on a midpoint belongs to the lower cell."""
    middle = round_down(midpoints(centers), x.dtype)
    return np.concatenate(([0], np.searchsorted(x, middle, side="right"), [x.size]))
