"""Context-adaptive coding of codes: learned while it codes, nothing transmitted but the codes.

A code ``k`` is the signed integer ``q = k - zero``. It is told in binary decisions, as CABAC does: is it zero; its
sign; then, for growing thresholds ``t``, is ``|q| > t``. Every decision is a logistic regression

    P(bit = 1) = 1 / (1 + exp(-w . x))

on what the decoder already knows: how often the decision fell that way so far, the running scale (mean
of ``|q|``) of the row (filter), of the input channel, of the column, of the kernel position and of the
kernel itself, the neighbours in the kernel, and a linear prediction of ``q`` from those neighbours. The
weights ``w`` start from a prior and follow the maximum of the posterior by one Newton step per block of
codes, so a few hundred codes are enough to learn from.

Blocks make it fast in numpy: all codes of a block share weights and statistics, which are frozen inside
the block and updated after it. Kernel positions are coded one after the other (position-major); inside a
position, kernels come in the order of a two-dimensional lattice that spreads every block over all rows
and channels.

Encoder and decoder must compute the same probabilities bit for bit on every machine. So: features are
integers (1/64 units), sums of their products stay below 2**53 and are therefore exact in any order;
everything else is element-wise IEEE arithmetic or a table computed with correctly rounded decimals. No
``exp``, ``log`` or solver of a library takes part.

References
----------
S. Wiedemann et al., DeepCABAC, :doi:`10.1109/JSTSP.2020.2969554`; M. Mahoney, Adaptive weighing of
context models for lossless data compression (2005), for logistic mixing.
"""
# SPDX-License-Identifier: BSD-3-Clause

import collections
from decimal import Decimal, localcontext
from functools import lru_cache

import constriction
import numpy as np

from skfactor.exceptions import FormatError

MAX_SYMBOLS = 4096
MAX_KERNEL = 64  # longer rows of a kernel are taken as separate channels
_RangeEncoder, _RangeDecoder = constriction.stream.queue.RangeEncoder, constriction.stream.queue.RangeDecoder
_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)

# Fixed point: features in 1/64, probabilities in 2**-20, curvature of the log-likelihood in 2**-16.
_ONE = 64.0
_CLIP = 8 * _ONE
_PROB_ONE = float(1 << 20)
_WEIGHT_ONE = 4096.0
_MAX_LOGIT = 12
_MAX_BLOCK = 1 << 18  # 2**(9 + 9 + 16 + 18) < 2**53: sums over a block are exact

_TAIL = 64  # decisions that are decoded again to find the shortest end of a stream

_N_FEATURES = 12
# Prior weights and their precisions: frequency, bias, row, channel, position, column, kernel, neighbours,
# |prediction|, log |prediction|, sign, sign * prediction.
_PRIOR_ZERO = (0.5, 0.0, 0.95, 1.1, 0.4, 0.15, 0.35, 0.4, 0.7, -0.1, 0.0, 0.0)
_PRIOR_MAGNITUDE = (0.5, -0.2, 0.75, 0.75, 0.45, 0.15, 0.45, 0.45, 0.4, -0.25, 0.0, 0.55)
_PRECISION = (10.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 10.0, 4.0)
# The sign reads other features: frequency, bias, row, column, kernel, neighbours, prediction.
_PRIOR_SIGN = (0.55, 0.0, 0.0, 0.0, 0.0, 0.75, 1.25, 0.0, 0.0, 0.0, 0.0, 0.0)
_PRECISION_SIGN = (30.0, 20.0, 5.0, 5.0, 5.0, 5.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_PRIOR_LINEAR = (0.4, 0.38, -0.15, 0.0, -0.06, -0.06, -0.03, -0.04, 0.0, -0.04, 0.04, 0.0)
_PRECISION_LINEAR = (50.0,) * _N_FEATURES
# Pseudo-observations that pull the scale of a row (channel, ...) to the global scale.
_SHRINK_GROUPS = (5.0, 8.0, 5.0, 8.0)  # row, column, channel, position
_SHRINK_NEAR = 3.0  # kernel, neighbours
_SHRINK_SIGN = 4.0
# Neighbours (dy, dx) inside a kernel that come before a position; the first two touch it.
# fmt: off
_BEFORE = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0),
           (-1, -2), (-1, 2), (-2, -1), (-2, 1), (-2, -2), (-2, 2))
# fmt: on


# --- exact elementary functions -------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tables():
    """Return correctly rounded (probabilities of logits, 64 ln of mantissas, exp of 1/64ths, 64 ln 2)."""
    with localcontext() as context:
        context.prec = 30
        logits = [Decimal(i) / 64 for i in range(-64 * _MAX_LOGIT, 64 * _MAX_LOGIT + 1)]
        squash = [int((Decimal(1 << 20) / (1 + (-x).exp())).to_integral_value()) for x in logits]
        log = [float(64 * ((Decimal(2 * i + 1) / 4096).ln())) for i in range(1024, 2048)]
        exp = [float((Decimal(i) / 64).exp()) for i in range(-512, 513)]
        ln2 = float(64 * Decimal(2).ln())
    return np.array(squash, dtype=np.float64), np.array(log), np.array(exp), ln2


def _log(x):
    """Return ``64 * ln(x)`` of positive floats to 11 bits of the mantissa; the same on every machine."""
    _, log, _, ln2 = _tables()
    mantissa, exponent = np.frexp(x)
    return log[(mantissa * 2048.0).astype(np.int64) - 1024] + exponent * ln2


def _effect(total, count, shrink, mean):
    """Return the clipped integer ``64 * ln`` of a shrunken mean relative to the global mean."""
    ratio = _log(total + shrink * mean) - _log((count + shrink) * mean)
    return _round(ratio)


def _clip(x, limit):
    """Return ``x`` clipped to ``[-limit, limit]``; np.clip takes longer on short arrays."""
    return np.minimum(np.maximum(x, -limit), limit)


def _round(x):
    """Return features as integers of 1/64, clipped to [-8, 8]."""
    return _clip(np.rint(x), _CLIP)


def _solve(matrix, right):
    """Solve ``matrix[k] x[k] = right[k]`` for positive definite matrices by element-wise elimination."""
    a = np.concatenate([matrix, right[:, :, None]], axis=2)
    n = right.shape[1]
    for i in range(n):
        a[:, i, i:] /= a[:, i, i, None].copy()
        factor = a[:, :, i].copy()
        factor[:, i] = 0.0
        a[:, :, i:] -= factor[:, :, None] * a[:, i, None, i:]
    return a[:, :, n]


# --- the order of coding --------------------------------------------------------------------------


@lru_cache(maxsize=4)  # the blocks of a large matrix have one shape
def _lattice_order(n_rows, n_channels):
    """Return all kernels ``row * n_channels + channel`` so that every prefix is spread over rows and channels."""
    row = np.arange(n_rows, dtype=np.uint32)[:, None] * np.uint32(3242174889)  # 2**32 / plastic number
    channel = np.arange(n_channels, dtype=np.uint32)[None, :] * np.uint32(2447445413)  # 2**32 / its square
    order = np.argsort((row + channel).reshape(-1), kind="stable")
    order.flags.writeable = False
    return order


def _blocks(n_kernels, kernel):
    """Yield (position, first, last): small blocks while there is much to learn, then growing ones."""
    for position in range(kernel):
        if position == 0:
            size, numerator, denominator = 24, 1, 4
        else:
            size, numerator, denominator = max(128, n_kernels // 10), 7, 10
        first = 0
        while first < n_kernels:
            last = min(first + min(size, _MAX_BLOCK), n_kernels)
            yield position, first, last
            first = last
            size = max(size, first * numerator // denominator)


def _thresholds(maximum):
    """Return 0, 1, ..., 8, then four steps per octave, below ``maximum``."""
    out, step = list(range(9)), 2
    while out[-1] < maximum:
        out += [out[-1] + step * k for k in (1, 2, 3, 4)]
        step *= 2
    return [t for t in out if t < maximum]


# --- the model ------------------------------------------------------------------------------------


class _Regressions:
    """The logistic regressions of all decisions, and the linear one that predicts codes.

    Row ``k`` of the arrays is threshold ``k``, row ``sign`` the sign, row ``linear`` the prediction.
    """

    def __init__(self, n_thresholds):
        n = n_thresholds + 2
        self.sign, self.linear = n_thresholds, n_thresholds + 1
        self.weights = np.tile(np.array(_PRIOR_MAGNITUDE), (n, 1))
        self.weights[0], self.weights[self.sign], self.weights[self.linear] = _PRIOR_ZERO, _PRIOR_SIGN, _PRIOR_LINEAR
        precision = np.tile(np.array(_PRECISION), (n, 1))
        precision[self.sign], precision[self.linear] = _PRECISION_SIGN, _PRECISION_LINEAR
        self.hessian = precision[:, :, None] * np.eye(_N_FEATURES)
        self.gradient = np.zeros((n, _N_FEATURES))
        self.counts = np.zeros((n, 2))
        self._touched = np.zeros(n, dtype=bool)
        self._round_weights()

    def _round_weights(self):
        """Round weights to ``2**-12``: their products with features are then exact in any order."""
        self.rounded = np.rint(self.weights * _WEIGHT_ONE)

    def apply(self, node, features):
        """Return ``w . x`` in 1/64, rounded; features of shape (n_features, n)."""
        return np.rint((self.rounded[node, : len(features)] @ features) / _WEIGHT_ONE)

    def frequencies(self, mean):
        """Return for every decision the integer ``64 * logit`` of how often it was 1, with two pseudo-counts.

        Those are of a geometric distribution of ``|q|`` with this mean; even for the sign.
        """
        pseudo = np.tile((2.0 * mean / (1.0 + mean), 2.0 / (1.0 + mean)), (len(self.counts), 1))
        pseudo[self.sign] = 1.0
        log = _log(self.counts + pseudo)
        return _round(log[:, 0] - log[:, 1])

    def probability(self, node, features):
        """Return ``P(bit = 1)`` in units of ``2**-20``."""
        logit = _clip(self.apply(node, features), 64.0 * _MAX_LOGIT)
        return _tables()[0].take(logit.astype(np.int64) + 64 * _MAX_LOGIT)

    def observe(self, node, features, probability, bits):
        """Add the decisions of a block to counts, gradient and curvature."""
        p = probability / _PROB_ONE
        error = bits - p
        # 0.7 of the expected and 0.3 of the observed curvature: robust where p was far from the truth.
        curvature = np.rint((0.7 * (p * (1.0 - p)) + 0.3 * (error * error)) * 65536.0)
        self.accumulate(node, features, error * _PROB_ONE, _PROB_ONE, curvature, 65536.0)
        n_ones = np.count_nonzero(bits)
        self.counts[node] += (n_ones, len(bits) - n_ones)

    def accumulate(self, node, features, error, error_one, curvature, curvature_one):
        """Add ``X error`` and ``X diag(curvature) X^T``, all integers with the stated units."""
        k = len(features)
        self.gradient[node, :k] += (features @ error) / (error_one * _ONE)
        self.hessian[node, :k, :k] += ((features * curvature) @ features.T) / (curvature_one * _ONE * _ONE)
        self._touched[node] = True

    def step(self):
        """Take the Newton step of all regressions that saw something since the last one."""
        some = np.flatnonzero(self._touched)
        if len(some):
            move = _solve(self.hessian[some], self.gradient[some])
            self.weights[some] = _clip(self.weights[some] + move, 32.0)
            self.gradient[some] = 0.0
            self._touched[some] = False
            self._round_weights()


class _Context:
    """Everything the coder knows of the codes so far, and the features of the next block."""

    def __init__(self, shape, kernel):
        self.n_rows, self.n_columns = shape
        self.kernel = kernel
        self.n_channels = self.n_columns // kernel
        self.q = np.zeros(self.n_rows * self.n_columns, dtype=np.int16)
        self.known = np.zeros(len(self.q) if kernel == 1 else 0, dtype=bool)
        # Sums of |q|, of q, and counts over four kinds of groups that lie one after the other in one array.
        sizes = (self.n_rows, self.n_columns, self.n_channels, kernel)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.magnitude, self.signed, self.count = np.zeros((3, self.starts[-1]))
        self.shrink = np.repeat(_SHRINK_GROUPS, sizes)
        self.kernel_magnitude, self.kernel_signed = np.zeros((2, self.n_rows * self.n_channels if kernel > 1 else 0))
        side = int(kernel**0.5 + 0.5)
        self.width = side if side * side == kernel else kernel
        self.before = [] if kernel == 1 else [d for d in _BEFORE if self.width < kernel or d[0] == 0]

    def mean(self):
        """Return the mean ``|q|`` so far."""
        rows = slice(0, self.n_rows)
        return float(self.magnitude[rows].sum() + 1.0) / float(self.count[rows].sum() + 2.0)

    def features(self, models, position, kernel_index):
        """Return (features of zero and magnitude, features of the sign, what :meth:`update` needs)."""
        row, channel = np.divmod(kernel_index, self.n_channels)
        column = channel * self.kernel + position
        place = kernel_index * self.kernel + position
        mean = self.mean()
        pull = _SHRINK_SIGN * mean
        n_signed = self.n_rows + self.n_columns
        effect = _effect(self.magnitude, self.count, self.shrink, mean)
        bias = np.rint(_ONE * (self.signed[:n_signed] / (self.magnitude[:n_signed] + pull)))
        column_group, channel_group = column + self.starts[1], channel + self.starts[2]
        near_q, near_magnitude, near_count, design = self._neighbours(place, position, row, column)

        level = np.zeros((10, len(place)))
        sign = np.zeros((7, len(place)))
        level[1] = sign[1] = _ONE
        level[2], level[3], level[5] = effect[row], effect[channel_group], effect[column_group]
        level[4] = effect[self.starts[3] + position]
        sign[2], sign[3] = bias[row], bias[column_group]
        if self.kernel > 1:
            magnitude = self.kernel_magnitude[kernel_index]
            level[6] = _effect(magnitude, float(position), _SHRINK_NEAR, mean)
            sign[4] = np.rint(_ONE * self.kernel_signed[kernel_index] / (magnitude + 0.5 * pull))
        level[7] = _effect(near_magnitude, near_count, _SHRINK_NEAR, mean)
        sign[5] = np.rint(_ONE * near_q / (near_magnitude + 0.25 * pull))
        scale = None
        if self.before:
            # Linear prediction of q from the codes before it, in units of the local scale.
            index = _clip(np.rint(0.8 * (level[2] + level[3])), 320.0).astype(np.int64)
            scale = mean * _tables()[2][index + 512] + 0.1
            design = _round(_ONE * design / scale)
            sign[6] = _clip(models.apply(models.linear, design), _CLIP)
            level[8] = np.abs(sign[6])
        level[9] = np.rint(_log(level[8] + 0.2 * _ONE)) - 4 * _ONE  # ln of the size of the prediction, nearly
        return level, sign, (place, row, (column_group, channel_group), scale, design)

    def _neighbours(self, place, position, row, column):
        """Return sum, sum of magnitudes and number of the known codes that touch, and the codes before."""
        if self.kernel > 1:
            y, x = divmod(position, self.width)
            design = np.zeros((len(self.before), len(place)))
            inside = [y + dy >= 0 and 0 <= x + dx < self.width for dy, dx in self.before]
            for k, (dy, dx) in enumerate(self.before):
                if inside[k]:
                    design[k] = self.q[place + (dy * self.width + dx)]
            near = design[:2]
            return near.sum(axis=0), np.abs(near).sum(axis=0), float(sum(inside[:2])), design
        q, count = np.zeros((4, len(place))), np.zeros(len(place))
        for k, (inside, step) in enumerate(
            (
                (column > 0, -1),
                (column < self.n_columns - 1, 1),
                (row > 0, -self.n_columns),
                (row < self.n_rows - 1, self.n_columns),
            )
        ):
            there = np.where(inside, place + step, place)  # a code itself is still unknown
            q[k] = self.q[there]
            count += self.known[there]
        return q.sum(axis=0), np.abs(q).sum(axis=0), count, None

    def update(self, models, position, kernel_index, q, sign, known):
        """Enter the codes ``q`` of a block; ``known`` is the last result of :meth:`features`."""
        place, row, (column_group, channel_group), scale, design = known
        self.q[place] = q
        q = q.astype(np.float64)
        magnitude = np.abs(q)
        group = np.concatenate([row, column_group, channel_group])
        n, n_groups = len(place), len(self.count)
        self.magnitude += np.bincount(group, weights=np.tile(magnitude, 3), minlength=n_groups)
        self.signed += np.bincount(group, weights=np.tile(q, 3), minlength=n_groups)
        self.count += np.bincount(group, minlength=n_groups)
        self.magnitude[self.starts[3] + position] += magnitude.sum()  # integers: exact in any order
        self.count[self.starts[3] + position] += n
        if self.kernel > 1:
            self.kernel_magnitude[kernel_index] += magnitude
            self.kernel_signed[kernel_index] += q
        else:
            self.known[place] = True
        if position:
            error = _round(_ONE * q / scale) - sign[6]
            models.accumulate(models.linear, design, error, _ONE, 1.0, 1.0)


class _BitWriter:
    """Range-codes decisions; remembers the last few of them and the state before those."""

    def __init__(self):
        self._coder = _RangeEncoder()
        self._recent = collections.deque()  # (state before, bits, probabilities) of at least _TAIL decisions in all
        self._n_recent = 0

    def code(self, probability, bits):
        values, probability = bits.astype(np.int32), probability / _PROB_ONE
        head = max(0, len(values) - _TAIL)
        if head:
            self._coder.encode(values[:head], _BERNOULLI, probability[:head])
            self._recent.clear()
            self._n_recent = 0
        if len(values):
            self._recent.append((self._coder.pos(), values[head:], probability[head:]))
            self._coder.encode(values[head:], _BERNOULLI, probability[head:])
            self._n_recent += len(values) - head
            while self._n_recent - len(self._recent[0][1]) >= _TAIL:
                self._n_recent -= len(self._recent.popleft()[1])
        return bits

    def payload(self):
        data = self._coder.get_compressed().astype(">u4").tobytes()
        tail = tuple(np.concatenate(parts) for parts in zip(*(r[1:] for r in self._recent), strict=True))
        return _shortest(data, self._recent[0][0], *tail)


def _words(data):
    return np.frombuffer(data + bytes(-len(data) % 4), dtype=">u4").astype(np.uint32)


def _shortest(data, before, bits, probability):
    """Drop the bytes at the end of a range-coded stream that do not change what it decodes to.

    Missing bytes read as zeros, and any number inside the coder's last interval stands for the same decisions: a
    shorter prefix, or that prefix plus one, may do. Intervals are nested, so it is enough that the number lies in the
    interval ``before`` (words before it, then lower end and length of 64 bits) and that the decisions after it come
    out again. The lower end is known modulo 2**64; that the whole stream lies in the interval settles the carry.
    """
    words_before, (lower, length) = before
    kept = 4 * words_before

    def point(stream):
        return int.from_bytes(stream[kept : kept + 8].ljust(8, b"\0"), "big")

    offset = (point(data) - lower) % 2**64 - point(data)

    def is_same(candidate):
        full = candidate + bytes(len(data) - len(candidate))
        if full[:kept] != data[:kept] or not 0 <= point(full) + offset < length:
            return False
        decoder = _RangeDecoder(_words(full))
        decoder.seek(*before)
        try:
            return bool((decoder.decode(_BERNOULLI, probability) == bits).all())
        except AssertionError:
            return False

    best = data.rstrip(b"\0")
    while best:
        shorter = best[:-1]
        candidates = [shorter.rstrip(b"\0")]
        if shorter and shorter[-1] < 255:
            candidates.append(shorter[:-1] + bytes([shorter[-1] + 1]))
        candidates = [c for c in candidates if is_same(c)]
        if not candidates:
            break
        best = min(candidates, key=len)
    return best


class _BitReader:
    """Decodes decisions in the same order."""

    def __init__(self, data):
        if data.endswith(b"\0"):
            raise FormatError("a context-coded stream never ends in a zero byte")
        self._coder = _RangeDecoder(_words(data))

    def code(self, probability, bits):
        try:
            return self._coder.decode(_BERNOULLI, probability / _PROB_ONE).astype(bool)
        except AssertionError:  # a state that no encoder reaches
            raise FormatError("context-coded stream is damaged") from None


def _code_live(bits, n, live):
    """Code which of ``n`` rows or channels hold a code other than zero; mostly all do.

    Each flag has an adaptive probability given the flag before it.
    """

    def code(probability, bit):
        bit = None if bit is None else np.array([bit])
        return bool(bits.code(np.array([float(probability)]), bit)[0])

    one = int(_PROB_ONE)
    if code(one * 7 // 8, None if live is None else bool(live.all())):
        return np.ones(n, dtype=bool)
    if live is not None:
        bits.code(_live_probabilities(live), live)
        return live
    out = np.zeros(n, dtype=bool)
    seen = [[1, 1], [1, 1]]  # given the flag before: twice the number of dead and of live ones, plus 1
    before = 1
    for i in range(n):
        dead, alive = seen[before]
        out[i] = code(one * alive // (dead + alive), None)
        seen[before][int(out[i])] += 2
        before = int(out[i])
    return out


def _live_probabilities(live):
    """The probabilities that `_code_live` meets in turn when it reads the flags ``live``."""
    before = np.r_[True, live[:-1]]
    probability = np.empty(len(live))
    for place in (np.flatnonzero(before), np.flatnonzero(~before)):
        alive = 1 + 2 * np.cumsum(live[place]) - 2 * live[place]
        total = 2 + 2 * np.arange(len(place))
        probability[place] = int(_PROB_ONE) * alive // total
    return probability


def _walk(bits, shape, kernel, below, above, target):
    """Code all blocks; ``target`` holds the signed codes when encoding and is None when decoding.

    Parameters
    ----------
    bits : _BitWriter or _BitReader
    below, above : int
        Codes lie in ``[-below, above]``.

    Returns
    -------
    ndarray of int16
        The signed codes in the order of the matrix.
    """
    context = _Context(shape, kernel)
    thresholds = _thresholds(max(below, above))
    models = _Regressions(len(thresholds))
    order = _lattice_order(context.n_rows, context.n_channels)
    for position, first, last in _blocks(len(order), kernel):
        kernel_index = order[first:last]
        level, sign, known = context.features(models, position, kernel_index)
        truth = None if target is None else target[known[0]]
        q = _code_block(bits, models, thresholds, (below, above), context.mean(), level, sign, truth)
        context.update(models, position, kernel_index, q, sign, known)
        models.step()
    return context.q


def _code_block(bits, models, thresholds, limits, mean, level, sign, target):
    """Code one block: zero or not, sign, magnitudes; return its signed codes."""
    below, above = limits
    frequencies = models.frequencies(mean)

    def decide(node, features, truth):
        features[0] = frequencies[node]
        probability = models.probability(node, features)
        decided = bits.code(probability, truth)
        models.observe(node, features, probability, decided)
        return decided

    some = decide(0, level, None if target is None else target != 0)
    active = np.flatnonzero(some)
    if target is not None:
        target = target.astype(np.int64)
    sizes = None if target is None else np.abs(target)
    positive = np.full(len(active), above > 0)
    if below and above and len(active):
        truth = None if target is None else target[active] > 0
        positive = decide(models.sign, sign.take(active, axis=1), truth)
    direction = np.where(positive, 1, -1)
    signs, magnitude = np.zeros((2, level.shape[1]), dtype=np.int64)
    signs[active], magnitude[active] = direction, 1
    limit = np.where(positive, above, below)
    features = np.empty((_N_FEATURES, len(active)))
    features[:10] = level.take(active, axis=1)
    features[10], features[11] = _ONE * direction, direction * sign[6, active]
    for node in range(1, len(thresholds)):
        threshold = thresholds[node]
        keep = np.flatnonzero(limit > threshold)
        if len(keep) < len(active):
            active, limit, features = active[keep], limit[keep], features.take(keep, axis=1)
        if not len(active):
            break
        larger = decide(node, features, None if sizes is None else sizes[active] > threshold)
        larger = np.flatnonzero(larger)
        active, limit, features = active[larger], limit[larger], features.take(larger, axis=1)
        magnitude[active] = threshold + 1
    _code_low_bits(bits, thresholds, magnitude, limits, sizes)
    q = signs * magnitude
    if int(q.max()) > above or int(q.min()) < -below:
        raise FormatError(f"context-coded stream holds a code outside [-{below}, {above}]")
    return q.astype(np.int16)


def _code_low_bits(bits, thresholds, magnitude, limits, sizes):
    """Code the place of each magnitude between its threshold and the next, in plain bits, in ``magnitude``."""
    maximum = max(limits)
    for low, high in zip(thresholds, [*thresholds[1:], maximum], strict=True):
        width = (high - low - 1).bit_length()
        if not width:
            continue
        active = np.flatnonzero(magnitude == low + 1)
        for k in range(width if len(active) else 0):
            half = np.full(len(active), 0.5 * _PROB_ONE)
            wanted = None if sizes is None else ((sizes[active] - low - 1) >> k) & 1 == 1
            magnitude[active] += bits.code(half, wanted).astype(np.int64) << k


# --- the coder ------------------------------------------------------------------------------------


def _effective_kernel(shape, kernel):
    return kernel if 1 < kernel <= MAX_KERNEL and shape[1] % kernel == 0 else 1


def _code_matrix(bits, shape, kernel, limits, target):
    """Code the rows and channels that are not all zero, then what they hold; return the signed codes."""
    n_rows, n_channels = shape[0], shape[1] // kernel
    nonzero = None if target is None else (target != 0).reshape(n_rows, n_channels, kernel)
    rows = _code_live(bits, n_rows, None if target is None else nonzero.any(axis=(1, 2)))
    channels = _code_live(bits, n_channels, None if target is None else nonzero.any(axis=(0, 2)))
    columns = np.repeat(channels, kernel)
    live = np.ix_(rows, columns)
    part = (int(rows.sum()), int(columns.sum()))
    out = np.zeros(shape, dtype=np.int16)
    if min(part):
        flat = _walk(bits, part, kernel, *limits, None if target is None else target[live].reshape(-1))
        out[live] = flat.reshape(part)
    return out


def encode(codes, n_symbols, zero, kernel=1):
    """Return the context-coded payload of ``codes``.

    Parameters
    ----------
    codes : ndarray of int of shape (n_rows, n_columns)
        Not empty, in ``[0, n_symbols)``.
    n_symbols : int
        At most 4096.
    zero : int
        The code that stands for zero; ``|code - zero|`` is a magnitude.
    kernel : int, default=1
        Inner period of a row (``kh * kw``); ignored where it does not divide the row.

    Examples
    --------
    >>> codes = np.arange(600).reshape(20, 30) % 7
    >>> payload = encode(codes, 7, 3)
    >>> bool((decode(payload, (20, 30), 7, 3) == codes).all())
    True
    """
    writer = _BitWriter()
    target = (codes.astype(np.int64) - zero).astype(np.int16)
    _code_matrix(writer, codes.shape, _effective_kernel(codes.shape, kernel), (zero, n_symbols - 1 - zero), target)
    return writer.payload()


def decode(data, shape, n_symbols, zero, kernel=1):
    """Invert :func:`encode`; return ``uint16`` codes.

    Raises
    ------
    FormatError
        If the payload cannot have come from an encoder. Most damage is not visible here and gives other codes
        of the alphabet: the file's checksum is what tells.
    """
    if not 2 <= n_symbols <= MAX_SYMBOLS:
        raise FormatError(f"a context-coded stream has 2 to {MAX_SYMBOLS} symbols, got {n_symbols}")
    reader = _BitReader(data)
    q = _code_matrix(reader, shape, _effective_kernel(shape, kernel), (zero, n_symbols - 1 - zero), None)
    return (q.astype(np.int32) + zero).astype(np.uint16)
