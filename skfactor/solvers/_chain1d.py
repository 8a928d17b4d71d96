"""Proof of optimality for one-dimensional k-means, in O(n) memory.

The cost of an interval is concave-Monge, hence the optimal inertia is convex in the number of cells and its
Lagrangian dual is tight: ``max_p (min over partitions of inertia + p * cells) - p * K`` equals the optimum for K
cells. For one price ``p`` the inner minimum is a cheapest chain over the samples, found exactly by a sequence
of totally monotone row minima.

References
----------
.. [1] Aggarwal, Schieber & Tokuyama, "Finding a minimum-weight k-link path in graphs with the concave Monge
   property", Discrete Comput. Geom. 12, 1994, :doi:`10.1007/BF02574380`
"""

# SPDX-License-Identifier: BSD-3-Clause
from typing import NamedTuple

import numpy as np

from skfactor.solvers._prefix import cell_means, interval_inertia

_DENSE = 1 << 16  # entries up to which a block of row minima is evaluated in full
_ROWS = 2048  # rows of a block solved level by level; more are halved first
_MIN_STEP = 16
_AHEAD = 8  # blocks that share their prefix sums
_CLOSED = 1e-12  # relative gap that counts as closed
_PATIENCE = 16  # passes after which an open bracket grows faster and faster
_MAX_PASSES = 64  # ... and after which it is given up


class _Chain(NamedTuple):
    borders: np.ndarray
    cost: float  # without the price of the cells
    price: float

    @property
    def cells(self):
        return self.borders.size - 1

    def bound(self, n_cells):
        """Dual bound on the inertia of every partition into ``n_cells`` cells."""
        return self.cost + self.price * (self.cells - n_cells)


def best_chain(data, n_cells, price, known=None, between=None):
    """Optimal partition of distinct sorted samples into ``n_cells`` cells, and its dual bound.

    Searches the price whose cheapest chain has ``n_cells`` cells, starting from ``price``. Stops early when the
    bound reaches ``known``, the inertia of a partition that the caller already has, or when ``between`` finds the
    partition from optimal ones with fewer and with more cells.

    Returns ``(borders or None, lower_bound, n_passes)``; None: the caller's partition is optimal.
    """
    bound, n_pass = 0.0, 0
    fewer = more = None  # chains with fewer and with more cells than asked
    while True:
        chain = _cheapest_chain(data, price)
        n_pass += 1
        bound = max(bound, chain.bound(n_cells))
        if chain.cells == n_cells:
            return chain.borders, bound, n_pass
        if known is not None and known - bound <= _CLOSED * known:
            return None, bound, n_pass
        if more is None and chain.cells < n_cells and n_pass >= _MAX_PASSES:
            return _divide(data, chain.borders, n_cells), bound, n_pass
        if fewer is not None and more is not None:
            expected = fewer.cost + price * (fewer.cells - n_cells)
            tied = abs(expected - (more.cost + price * (more.cells - n_cells))) <= _CLOSED * abs(expected)
            if (tied and chain.bound(n_cells) >= expected - _CLOSED * abs(expected)) or n_pass > 100:
                return _splice(fewer.borders, more.borders, n_cells), bound, n_pass
        if chain.cells < n_cells:
            fewer = chain
        else:
            more = chain
        if between is not None:
            borders = between(data, n_cells, fewer and fewer.borders, more and more.borders)
            if borders is not None:
                return borders, bound, n_pass
        price = _next_price(chain, fewer, more, n_cells, n_pass)


def _next_price(chain, fewer, more, n_cells, n_pass):
    """Price expected to give ``n_cells`` cells, from a power law through the last chain or from the bracket."""
    power = min(max(chain.price * chain.cells / max(chain.cost, 1e-300), 1.0), 8.0)
    price = chain.price * (chain.cells / n_cells) ** (power + 1)
    hurry = 0.5 ** max(0, n_pass - _PATIENCE)
    if more is None:
        return min(price, chain.price * 0.97 * hurry)
    if fewer is None:
        return max(price, chain.price * 1.03 / hurry)
    # Where both chains cost the same: any chain in between that is cheaper shows up here.
    tie = (fewer.cost - more.cost) / (more.cells - fewer.cells)
    if n_pass < 6 and more.cells - fewer.cells > 4:
        share = np.log(n_cells / fewer.cells) / np.log(more.cells / fewer.cells)
        return fewer.price * (more.price / fewer.price) ** share
    return tie


def _splice(fewer, more, n_cells):
    """Chain with exactly ``n_cells`` cells out of two equally cheap ones [1]_.

    Where a cell of the longer chain lies inside a cell of the shorter one, crossing over costs nothing.
    """
    d = n_cells - (fewer.size - 1)
    i = np.arange(fewer.size - 1)
    i = i[i + d + 1 < more.size]
    inside = (fewer[i] <= more[i + d]) & (more[i + d + 1] <= fewer[i + 1])
    at = i[inside][0]
    return np.concatenate((more[: at + d + 1], fewer[at + 1 :]))


def _divide(data, borders, n_cells):
    """Cells halved, those of the largest inertia first, until there are ``n_cells`` of them.

    For samples over so many decades that no price is felt by the smallest of them beside the cost of the others.
    """
    cells = [(*_best_cut(data, a, b), a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)]
    while len(cells) < n_cells:
        gain, cut, a, b = max(cells, key=lambda cell: (cell[0], cell[3] - cell[2]))
        cells.remove((gain, cut, a, b))
        cells += [(*_best_cut(data, a, cut), a, cut), (*_best_cut(data, cut, b), cut, b)]
    return np.array([*sorted(cell[2] for cell in cells), data.size])


def _best_cut(data, a, b):
    """What cutting the cell a..b saves at best, and where; -inf for a single sample."""
    if b - a < 2:
        return -np.inf, a
    _, s, t = _local_sums(data, a, (a + b) // 2, b)
    left, right = s[1:-1] ** 2 / t[1:-1], (s[-1] - s[1:-1]) ** 2 / (t[-1] - t[1:-1])
    gain = left + right - s[-1] ** 2 / t[-1]
    return float(gain.max()), a + 1 + int(gain.argmax())


def _cheapest_chain(data, price):
    """Partition of the samples that minimises inertia plus ``price`` per cell.

    ``cost[j]`` is the minimum over the first j samples. Extending the last cell of ``cost[j0]`` by samples that add
    no more than ``price`` is never worse than a new cell that starts among them, so all of these ``j`` look back
    to ``i <= j0`` only, and no further than the start of that last cell: one block of row minima.
    """
    n = data.size
    cost = np.empty(n + 1)
    cost[0] = 0.0
    origin = np.zeros(n + 1, dtype=np.int64)
    done, length = 0, _MIN_STEP
    sums, first, limit = None, 0, 0
    while done < n:
        start = int(origin[done])
        while True:
            stop = min(n, done + length)
            if stop > limit:
                first, limit = start, _horizon(data.x, start, done, stop)
                sums = _local_sums(data, first, done, limit)
            at, here = start - first, done - first
            q, s, t = (v[at : stop - first + 1] for v in sums)
            grown = q[here - at :] - q[0]
            if start < done:
                moment = s[here - at :] - s[0]
                grown -= moment * moment / (t[here - at :] - t[0])
            else:
                moment = s[1:] - s[0]
                grown[1:] -= moment * moment / (t[1:] - t[0])
            count = int(grown.searchsorted(grown[0] + price, side="right")) - 1
            if done + count < stop or stop == n:
                break
            length *= 2
        count = max(1, min(count, stop - done))
        length = max(_MIN_STEP, count + count // 2)
        m = done - start
        column, value = _row_minima(cost[start : done + 1] - q[: m + 1], s, t, m, count)
        rows = slice(done + 1, done + count + 1)
        value += q[m + 1 : m + count + 1]
        value += price
        cost[rows] = value
        origin[rows] = column
        origin[rows] += start
        done += count
    borders = [n]
    while borders[-1] > 0:
        borders.append(int(origin[borders[-1]]))
    borders = np.array(borders[::-1])
    # Summed afresh: cost[n] carries the rounding of every step.
    return _Chain(borders, interval_inertia(data, borders, cell_means(data, borders)), price)


def _horizon(x, start, done, stop):
    """How far local prefix sums may reach beyond ``stop``: not across a wide gap, beside which sums would cancel."""
    far = min(x.size, done + _AHEAD * (stop - done))
    wide = float(x[far - 1]) - float(x[start]) > 16 * (float(x[stop - 1]) - float(x[start]))
    return stop if wide else far


def _local_sums(data, start, middle, stop):
    """Prefix sums of ``w y^2``, ``w y`` and ``w`` over samples start..stop, ``y`` about the one in the middle."""
    y = data.x[start:stop].astype(np.float64)
    y -= y[middle - start]
    q, s, t = (np.zeros(y.size + 1) for _ in range(3))
    if data.w is None:
        np.cumsum(y, out=s[1:])
        np.cumsum(y * y, out=q[1:])
        t = np.arange(y.size + 1.0)
    else:
        w = data.w[start:stop]
        wy = w * y
        np.cumsum(wy, out=s[1:])
        np.cumsum(wy * y, out=q[1:])
        np.cumsum(w, out=t[1:])
    return q, s, t


def _row_minima(base, s, t, m, count):
    """``min_i base_i - (s_j - s_i)^2 / (t_j - t_i)`` over i = 0..m for j = m + 1..m + count, and the first argmin.

    The matrix is totally monotone: the argmin never falls as j grows.
    """
    if count * (m + 1) <= _DENSE:
        return _dense_minima(base, s[: m + 1], t[: m + 1], s[m + 1 : m + 1 + count], t[m + 1 : m + 1 + count])
    column = np.empty(count, dtype=np.intp)
    value = np.empty(count)
    todo = [(0, count, 0, m)]
    while todo:
        j0, j1, i0, i1 = todo.pop()
        if j0 >= j1:
            continue
        if (j1 - j0) * (i1 - i0 + 1) <= _DENSE:
            i, j = slice(i0, i1 + 1), slice(m + 1 + j0, m + 1 + j1)
            best, value[j0:j1] = _dense_minima(base[i], s[i], t[i], s[j], t[j])
            column[j0:j1] = i0 + best
        elif j1 - j0 <= _ROWS:
            _levels(base, s, t, m, (j0, j1, i0, i1), column, value)
        else:
            j = (j0 + j1) // 2
            row = s[m + 1 + j] - s[i0 : i1 + 1]
            row *= row
            row /= t[m + 1 + j] - t[i0 : i1 + 1]
            np.subtract(base[i0 : i1 + 1], row, out=row)
            best = int(np.argmin(row))
            column[j], value[j] = i0 + best, row[best]
            todo += [(j0, j, i0, i0 + best), (j + 1, j1, i0 + best, i1)]
    return column, value


def _dense_minima(base, s, t, s_rows, t_rows):
    table = s_rows[:, None] - s
    table *= table
    table /= t_rows[:, None] - t
    np.subtract(base, table, out=table)
    best = table.argmin(axis=1)
    return best, table[np.arange(best.size), best]


def _levels(base, s, t, m, part, column, value):
    """Row minima of rows j0..j1 within columns i0..i1, the middle rows of every level at once."""
    j0, j1, i0, i1 = part
    size = j1 - j0
    step = 1 << size.bit_length()
    known = np.array([-1, size])
    at = np.array([i0, i1])
    while step > 1:
        step //= 2
        rows = np.arange(step - 1, size, 2 * step)
        place = np.searchsorted(known, rows)
        low, high = at[place - 1], at[place]
        width = high - low + 1
        ends = np.cumsum(width)
        begin = ends - width
        i = np.arange(ends[-1]) - np.repeat(begin - low, width)
        j = m + 1 + j0 + rows
        v = np.repeat(s[j], width)
        v -= s[i]
        v *= v
        d = np.repeat(t[j], width)
        d -= t[i]
        v /= d
        np.subtract(base[i], v, out=v)
        best = np.minimum.reduceat(v, begin)
        hits = np.flatnonzero(v == np.repeat(best, width))
        hits = hits[np.searchsorted(hits, begin)]
        column[j0 + rows], value[j0 + rows] = i[hits], best
        known = np.insert(known, place, rows)
        at = np.insert(at, place, i[hits])
