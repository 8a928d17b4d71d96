"""Joint moves of all borders of a one-dimensional codebook, and the passages between borders and centres."""

# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from skfactor.solvers._assign1d import midpoints, round_down
from skfactor.solvers._prefix import build_prefix, cell_means, interval_inertia, merge_duplicates, sums_at

_MOVES, _MOVES_LAST = 6, 24  # joint moves per level
_WORTH_SLIDE, _WORTH, _WORTH_LAST = 1e-5, 1e-6, 1e-8  # relative gain that is worth another move at the same level
_BAND = 8  # steps by which neighbouring borders may slide apart
_TABLE = 1 << 14  # entries of a batch of tables: they stay in the cache
_PAIRS = 600  # pairs of positions for each sample that take about as long as a cheapest chain


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
    knots = np.sort(np.concatenate((edge, np.linspace(edge[-1], n - edge[-1], 4096).astype(np.intp), n - edge)))
    return knots[np.concatenate(([True], knots[1:] != knots[:-1]))]  # np.unique hashes, which takes longer


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
            borders = _chosen(positions, choice, data.size)
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


def _joint_move(data, borders, positions, band=None, counts=None):
    """Best combination of one position per border -> chosen columns and what they gain.

    Rows of ``positions`` ascend; only the first ``counts`` of each count. The columns of neighbouring borders differ
    by at most ``band``.

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
    into_left, out_of_right, kept, penalty = d + shift, d - shift, t_cell[:-1, None] + c, 4 * half[:, None] * d
    n_inner, width = positions.shape
    pad = 0 if band is None or 2 * band + 1 >= width else band
    # Tables (columns of border k - 1, columns of border k); with a band only the columns up to ``band`` away, shifted.
    scores, before = _left_side(np.empty((n_inner, width)), pad, -np.inf)
    sums, left_sum = _left_side(out_of_right, pad, 0.0)
    lost, left_lost = _left_side(c, pad, -np.inf)  # infinite weight beyond the edges
    reach = np.minimum(np.arange(width) + (pad or width), width - 1)
    narrow = np.append(False, (positions[1:] <= positions[:-1, reach]).any(axis=1))
    columns = np.full(n_inner, width) if counts is None else counts
    rows = np.full(n_inner, 2 * pad + 1) if pad else columns
    batch = max(1, _TABLE // (rows[0] * width)) if counts is None else 1
    room = np.empty((2, batch * int(rows.max()) * width))
    own = scores[:, pad : pad + width]
    own[0] = into_left[0] ** 2 / kept[0] - penalty[0]
    for lo in range(1, n_inner, batch):
        hi = min(lo + batch, n_inner)
        here, left = np.s_[lo:hi, None, : columns[lo]], np.s_[lo - 1 : hi - 1, : rows[lo - 1], : columns[lo]]
        shape = (hi - lo, rows[lo - 1], columns[lo])
        sums_here, kept_here = room[:, : shape[0] * shape[1] * shape[2]].reshape(2, *shape)
        np.subtract(into_left[here], left_sum[left], out=sums_here)
        np.subtract(kept[here], left_lost[left], out=kept_here)
        tables = _cell_gains(sums_here, kept_here, narrow[lo:hi].any())
        for k, table in enumerate(tables, lo):
            table += before[k - 1, : len(table), : columns[k]]
            np.maximum.reduce(table, axis=0, out=own[k, : columns[k]])
            own[k] -= penalty[k]
    choice = np.empty(n_inner, dtype=np.intp)
    final = (own[-1] + out_of_right[-1] ** 2 / (t_cell[-1] - c[-1]))[: columns[-1]]
    j = choice[-1] = int(np.argmax(final))
    for k in range(n_inner - 1, 0, -1):
        left = np.s_[k - 1, j : j + rows[k - 1]] if pad else np.s_[k - 1, : rows[k - 1]]
        gain = _cell_gains(into_left[k, j] - sums[left], kept[k, j] - lost[left], narrow[k])
        gain += scores[left]
        j = choice[k - 1] = int(np.argmax(gain)) + (j - pad if pad else 0)
    return choice, final[choice[-1]]


def _chosen(positions, choice, n):
    return spread(np.concatenate(([0], positions[np.arange(choice.size), choice], [n])))


def _left_side(values, pad, edge):
    """Rows of values, padded on both sides, and the tables in which they meet the columns of the next border."""
    if pad == 0:
        return values, values[:, :, None]
    width = values.shape[1]
    values = np.pad(values, ((0, 0), (pad, pad)), constant_values=edge)
    return values, sliding_window_view(values, width, axis=1)


def _cell_gains(s, t, narrow):
    """``s^2 / t`` in place; -inf where no weight is left, as ``narrow`` says may be."""
    s *= s
    if not narrow:
        s /= t
        return s
    empty = t <= 0
    np.copyto(t, 1.0, where=empty)
    s /= t
    np.copyto(s, -np.inf, where=empty)
    return s


def interlaced(data, n_cells, fewer, more):
    """Optimal partition into ``n_cells`` cells from optimal ones with fewer and with more cells (one may be None).

    Optimal partitions interlace: border i with d cells more lies at or before border i, border i + d at or after it.
    None where these windows are so wide that searching them is more work than another chain.
    """
    i = np.arange(n_cells + 1)
    low, high = i, data.size - n_cells + i
    if more is not None:
        low, high = np.maximum(low, more[: n_cells + 1]), np.minimum(high, more[more.size - 1 - n_cells :])
    if fewer is not None:
        low = np.maximum(low, fewer[np.maximum(i - (n_cells + 1 - fewer.size), 0)])
        high = np.minimum(high, fewer[np.minimum(i, fewer.size - 1)])
    counts = (high - low + 1)[1:-1]
    if (counts[1:] * counts[:-1]).sum() > _PAIRS * data.size:
        return None
    borders = spread(np.concatenate(([0], (low + high)[1:-1] // 2, [data.size])))
    positions = np.minimum(low[1:-1, None] + np.arange(counts.max()), high[1:-1, None])
    choice, _ = _joint_move(data, borders, positions, counts=counts)
    return _chosen(positions, choice, data.size)


def slide(data, borders, inertia, per_cell, reach):
    """Joint moves of all borders by up to ``reach`` cells, those of neighbours by about the same, while it pays.

    A step is one of ``per_cell`` parts of a cell; no border is better off for its place before the move.
    """
    cells, n = borders.size - 1, data.size
    k = np.arange(1, cells)
    half = int(reach * per_cell)
    step = np.arange(-half, half + 1) / per_cell
    n_moves, inside = 0, False
    while not inside and n_moves < _MOVES:
        n_moves += 1
        positions = np.rint(np.interp(k[:, None] + step, np.arange(cells + 1), borders)).astype(np.intp)
        np.clip(positions, k[:, None], (n - cells + k)[:, None], out=positions)
        choice, gain = _joint_move(data, borders, positions, _BAND)
        borders = _chosen(positions, choice, n)
        inside = np.abs(choice - half).max() < half and np.abs(np.diff(choice)).max(initial=0) < _BAND
        inside |= gain <= _WORTH_SLIDE * inertia
    return borders, n_moves


def settle(data, borders, max_iter=100):
    """Centres and inertia of a partition whose cells are the nearest-centre cells of its means."""
    centers, borders = nearest_cells(data, borders, max_iter)
    return centers, interval_inertia(data, borders, centers), borders


def nearest_cells(data, borders, max_iter=100):
    """Centres and borders of a partition whose cells are the nearest-centre cells of its means."""
    centers = cell_means(data, borders)
    for _ in range(max_iter):
        nearest = cut(data.x, centers)
        if np.array_equal(nearest, borders) or (np.diff(nearest) <= 0).any():
            break
        borders = nearest
        centers = cell_means(data, borders)
    return centers, borders


def cut(x, centers):
    """Borders of the nearest-centre cells of sorted ``x``; a value on a midpoint belongs to the lower cell."""
    middle = round_down(midpoints(centers), x.dtype)
    return np.concatenate(([0], np.searchsorted(x, middle, side="right"), [x.size]))
