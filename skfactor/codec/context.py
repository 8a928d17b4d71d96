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

from decimal import Decimal, localcontext
from functools import lru_cache

import constriction
import numpy as np

from skfactor.codec.ans import AnsCoder, bytes_to_coder, check_exhausted, coder_to_bytes
from skfactor.exceptions import FormatError

MAX_SYMBOLS = 4096
MAX_KERNEL = 64  # longer rows of a kernel are taken as separate channels
_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)

# Fixed point: features in 1/64, probabilities in 2**-20, curvature of the log-likelihood in 2**-16.
_ONE = 64.0
_CLIP = 8 * _ONE
_PROB_BITS = 20
_MAX_LOGIT = 12
_MAX_BLOCK = 1 << 18  # 2**(9 + 9 + 16 + 18) < 2**53: sums over a block are exact

_N_FEATURES = 12
# Prior weights and their precisions: frequency, bias, row, channel, position, column, kernel, neighbours,
# |prediction|, log |prediction|, sign, sign * prediction.
_PRIOR_ZERO = (0.65, 0.0, 0.8, 0.8, 0.5, 0.25, 0.5, 0.5, 0.3, 0.0, 0.0, 0.0)
_PRIOR_MAGNITUDE = (0.65, 0.0, 0.8, 0.8, 0.5, 0.25, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5)
_PRECISION = (30.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 10.0, 4.0)
# The sign reads other features: frequency, bias, row, column, kernel, neighbours, prediction.
_PRIOR_SIGN = (0.65, 0.0, 0.2, 0.2, 0.3, 0.3, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_PRECISION_SIGN = (30.0, 20.0, 5.0, 5.0, 5.0, 5.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0)
# Pseudo-observations that pull the scale of a row (channel, ...) to the global scale.
_SHRINK_ROW, _SHRINK_COLUMN, _SHRINK_POSITION, _SHRINK_NEAR = 5.0, 8.0, 8.0, 3.0
_SHRINK_SIGN = 4.0
# Neighbours (dy, dx) inside a kernel that come before a position; the first two touch it.
_BEFORE = (
    ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))
    + ((-1, -2), (-1, 2), (-2, -1), (-2, 1), (-2, -2), (-2, 2))
)


# --- exact elementary functions -------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tables():
    """Return correctly rounded (probabilities of logits, 64 ln of mantissas, exp of 1/64ths, 64 ln 2)."""
    with localcontext() as context:
        context.prec = 30
        logits = [Decimal(i) / 64 for i in range(-64 * _MAX_LOGIT, 64 * _MAX_LOGIT + 1)]
        squash = [int((Decimal(1 << _PROB_BITS) / (1 + (-x).exp())).to_integral_value()) for x in logits]
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
    return np.clip(np.rint(ratio), -_CLIP, _CLIP)


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


def _lattice_order(n_rows, n_channels):
    """Return all kernels ``row * n_channels + channel`` so that every prefix is spread over rows and channels."""
    row = np.arange(n_rows, dtype=np.uint32)[:, None] * np.uint32(3242174889)  # 2**32 / plastic number
    channel = np.arange(n_channels, dtype=np.uint32)[None, :] * np.uint32(2447445413)  # 2**32 / its square
    return np.argsort((row + channel).reshape(-1), kind="stable")


def _blocks(n_kernels, kernel):
    """Yield (position, first, last): small blocks while there is much to learn, then growing ones."""
    for position in range(kernel):
        if position == 0:
            size, numerator, denominator = 24, 1, 4
        else:
            size, numerator, denominator = max(24, n_kernels // 10), 7, 10
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
    """The logistic regressions of all decisions: last row is the sign, row ``k`` is threshold ``k``."""

    def __init__(self, n_thresholds):
        n = n_thresholds + 1
        self.weights = np.tile(np.array(_PRIOR_MAGNITUDE), (n, 1))
        self.weights[0], self.weights[-1] = _PRIOR_ZERO, _PRIOR_SIGN
        precision = np.tile(np.array(_PRECISION), (n, 1))
        precision[-1] = _PRECISION_SIGN
        self.hessian = precision[:, :, None] * np.eye(_N_FEATURES)
        self.gradient = np.zeros((n, _N_FEATURES))
        self.ones = np.zeros(n)
        self.zeros = np.zeros(n)
        self._touched = np.zeros(n, dtype=bool)

    def frequency(self, node, prior_ones, prior_zeros):
        """Return the integer ``64 * logit`` of how often the decision was 1, with pseudo-counts."""
        odds = _log(self.ones[node] + prior_ones) - _log(self.zeros[node] + prior_zeros)
        return float(np.clip(np.rint(odds), -_CLIP, _CLIP))

    def probability(self, node, features):
        """Return ``P(bit = 1)`` in units of ``2**-20`` for ``features`` of shape (<= 12, n)."""
        logit = features[0] * self.weights[node, 0]
        for k in range(1, len(features)):
            logit += features[k] * self.weights[node, k]
        limit = 64.0 * _MAX_LOGIT
        index = np.clip(np.rint(logit), -limit, limit).astype(np.int64) + 64 * _MAX_LOGIT
        return _tables()[0][index]

    def observe(self, node, features, probability, bits):
        """Add the decisions of a block to gradient and curvature."""
        scale = float(1 << _PROB_BITS)
        p = probability / scale
        error = bits - p
        # 0.7 of the expected and 0.3 of the observed curvature: robust where p was far from the truth.
        curvature = np.rint((0.7 * (p * (1.0 - p)) + 0.3 * (error * error)) * 65536.0)
        k = len(features)
        self.gradient[node, :k] += (features @ (error * scale)) / (scale * _ONE)
        self.hessian[node, :k, :k] += ((features * curvature) @ features.T) / (65536.0 * _ONE * _ONE)
        n_ones = float(np.count_nonzero(bits))
        self.ones[node] += n_ones
        self.zeros[node] += len(bits) - n_ones
        self._touched[node] = True

    def step(self):
        """Take the Newton step of all regressions that saw decisions since the last one."""
        some = np.flatnonzero(self._touched)
        if len(some):
            move = _solve(self.hessian[some], self.gradient[some])
            self.weights[some] = np.clip(self.weights[some] + move, -32.0, 32.0)
            self.gradient[some] = 0.0
            self._touched[some] = False


class _Sums:
    """Sums of ``|q|``, of ``q`` and counts over groups of codes (rows, columns, ...)."""

    def __init__(self, n):
        self.magnitude, self.signed, self.count = np.zeros(n), np.zeros(n), np.zeros(n)

    def add(self, group, q, magnitude):
        n = len(self.count)
        self.magnitude += np.bincount(group, weights=magnitude, minlength=n)
        self.signed += np.bincount(group, weights=q, minlength=n)
        self.count += np.bincount(group, minlength=n)


class _Context:
    """Everything the coder knows of the codes so far, and the features of the next block."""

    def __init__(self, shape, kernel):
        self.n_rows, self.n_columns = shape
        self.kernel = kernel
        self.n_channels = self.n_columns // kernel
        self.q = np.zeros(self.n_rows * self.n_columns, dtype=np.int16)
        self.known = np.zeros(len(self.q) if kernel == 1 else 0, dtype=bool)
        self.rows, self.channels = _Sums(self.n_rows), _Sums(self.n_channels)
        self.columns, self.positions = _Sums(self.n_columns), _Sums(kernel)
        self.kernels = _Sums(self.n_rows * self.n_channels if kernel > 1 else 0)
        self.total, self.n_seen = 0.0, 0.0
        side = int(kernel**0.5 + 0.5)
        self.width = side if side * side == kernel else kernel
        n_before = 0 if kernel == 1 else len(_BEFORE) if self.width < kernel else 2
        self.before = [d for d in _BEFORE if self.width < kernel or d[0] == 0][:n_before]
        self.predictor = np.zeros(len(self.before))
        self.predictor_hessian = 20.0 * np.eye(len(self.before))

    def features(self, place, position, kernel_index):
        """Return (features of zero and magnitude, features of the sign, what :meth:`update` needs)."""
        row, channel = np.divmod(kernel_index, self.n_channels)
        column = channel * self.kernel + position
        mean = (self.total + 1.0) / (self.n_seen + 2.0)

        def of(sums, group, shrink):
            return _effect(sums.magnitude, sums.count, shrink, mean)[group]

        by_row, by_channel = of(self.rows, row, _SHRINK_ROW), of(self.channels, channel, _SHRINK_ROW)
        by_column = of(self.columns, column, _SHRINK_COLUMN)
        by_position = of(self.positions, position, _SHRINK_POSITION)
        near_q, near_magnitude, near_count, before = self._neighbours(place, position, row, column)
        near = _effect(near_magnitude, near_count, _SHRINK_NEAR, mean)
        if self.kernel > 1:
            k_magnitude, k_signed = self.kernels.magnitude[kernel_index], self.kernels.signed[kernel_index]
            by_kernel = _effect(k_magnitude, float(position), _SHRINK_NEAR, mean)
        else:
            k_magnitude = k_signed = by_kernel = np.zeros(len(place))

        # Linear prediction of q in units of the local scale.
        scale_index = np.clip(np.rint(0.8 * (by_row + by_channel)), -320, 320).astype(np.int64)
        scale = mean * _tables()[2][scale_index + 512] + 0.1
        before = [np.clip(np.rint(_ONE * b / scale), -_CLIP, _CLIP) if b is not None else None for b in before]
        prediction = np.zeros(len(place))
        for weight, b in zip(self.predictor, before, strict=True):
            if b is not None:
                prediction = prediction + weight * b
        prediction = np.clip(np.rint(prediction), -_CLIP, _CLIP)
        size = np.abs(prediction)
        log_size = np.rint(_log(size + 0.2 * _ONE)) - 4 * _ONE  # ln of the prediction in units of the scale, nearly

        ones = np.full(len(place), _ONE)
        level = np.stack(
            [ones, ones, by_row, by_channel, np.full(len(place), by_position), by_column, by_kernel,
            near, size, log_size]
        )
        pull = _SHRINK_SIGN * mean
        r, c = self.rows, self.columns
        sign = np.stack(
            [
                ones,
                ones,
                np.rint(_ONE * (r.signed / (r.magnitude + pull)))[row],
                np.rint(_ONE * (c.signed / (c.magnitude + pull)))[column],
                np.rint(_ONE * k_signed / (k_magnitude + 0.5 * pull)),
                np.rint(_ONE * near_q / (near_magnitude + 0.25 * pull)),
                prediction,
            ]
        )
        return level, sign, (row, channel, column, scale, before, prediction)

    def _neighbours(self, place, position, row, column):
        """Return sum, sum of magnitudes and number of the touching codes known, and the codes before."""
        if self.kernel > 1:
            y, x = divmod(position, self.width)
            before = []
            for dy, dx in self.before:
                inside = y + dy >= 0 and 0 <= x + dx < self.width
                before.append(self.q[place + (dy * self.width + dx)].astype(np.float64) if inside else None)
            touching = [b for b in before[:2] if b is not None]
            offsets = [(b, 1.0) for b in touching]
        else:
            before, offsets = [], []
            for inside, step in (
                (column > 0, -1),
                (column < self.n_columns - 1, 1),
                (row > 0, -self.n_columns),
                (row < self.n_rows - 1, self.n_columns),
            ):
                there = np.where(inside, place + step, place)  # a code itself is still unknown
                offsets.append((self.q[there].astype(np.float64), self.known[there].astype(np.float64)))
        near_q, near_magnitude, near_count = np.zeros(len(place)), np.zeros(len(place)), np.zeros(len(place))
        for q, known in offsets:
            near_q += q
            near_magnitude += np.abs(q)
            near_count += known
        return near_q, near_magnitude, near_count, before

    def update(self, place, position, kernel_index, q, known):
        """Enter the codes ``q`` of a block; ``known`` is the last result of :meth:`features`."""
        row, channel, column, scale, before, prediction = known
        self.q[place] = q
        q = q.astype(np.float64)
        magnitude = np.abs(q)
        self.rows.add(row, q, magnitude)
        self.channels.add(channel, q, magnitude)
        self.columns.add(column, q, magnitude)
        self.positions.add(np.full(len(place), position), q, magnitude)
        self.total += float(magnitude.sum())  # integers: exact in any order
        self.n_seen += len(place)
        if self.kernel > 1:
            self.kernels.magnitude[kernel_index] += magnitude
            self.kernels.signed[kernel_index] += q
        else:
            self.known[place] = True
        present = [k for k, b in enumerate(before) if b is not None]
        if present:
            target = np.clip(np.rint(_ONE * q / scale), -_CLIP, _CLIP)
            design = np.stack([before[k] for k in present])
            every = np.ix_(present, present)
            unit = _ONE * _ONE
            self.predictor_hessian[every] += (design @ design.T) / unit
            gradient = np.zeros(len(before))
            gradient[present] = (design @ (target - prediction)) / unit
            self.predictor += _solve(self.predictor_hessian[None], gradient[None])[0]


class _BitWriter:
    """Collects decisions with their probabilities; the ANS coder takes them all at the end, last first."""

    def __init__(self):
        self._bits, self._probabilities = [], []

    def code(self, probability, bits):
        self._bits.append(bits)
        self._probabilities.append(probability)
        return bits

    def payload(self):
        coder = AnsCoder()
        bits = np.concatenate(self._bits).astype(np.int32)
        coder.encode_reverse(bits, _BERNOULLI, np.concatenate(self._probabilities) / float(1 << _PROB_BITS))
        return coder_to_bytes(coder)


class _BitReader:
    """Decodes decisions in the same order."""

    def __init__(self, data):
        self._coder = bytes_to_coder(data)

    def code(self, probability, bits):
        return self._coder.decode(_BERNOULLI, probability / float(1 << _PROB_BITS)).astype(bool)

    def finish(self):
        check_exhausted(self._coder)


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
        place = kernel_index * kernel + position
        level, sign, known = context.features(place, position, kernel_index)
        q = _code_block(bits, models, thresholds, (below, above), level, sign, known[-1], context,
                        None if target is None else target[place])
        models.step()
        context.update(place, position, kernel_index, q, known)
    return context.q


def _code_block(bits, models, thresholds, limits, level, sign, prediction, context, target):
    """Code one block: zero or not, sign, magnitudes; return its signed codes."""
    below, above = limits
    n = level.shape[1]
    mean = (context.total + 1.0) / (context.n_seen + 2.0)
    prior_ones, prior_zeros = 2.0 * mean / (1.0 + mean), 2.0 / (1.0 + mean)

    def decide(node, features, truth, ones, zeros):
        features[0] = models.frequency(node, ones, zeros)
        probability = models.probability(node, features)
        decided = bits.code(probability, truth)
        models.observe(node, features, probability, decided)
        return decided

    def truth(condition):
        return None if target is None else condition()

    some = decide(0, level.copy(), truth(lambda: target != 0), prior_ones, prior_zeros)
    active = np.flatnonzero(some)
    positive = np.full(len(active), above > 0)
    if below and above and len(active):
        positive = decide(-1, sign[:, active], truth(lambda: target[active] > 0), 1.0, 1.0)
    direction = np.where(positive, 1.0, -1.0)
    magnitude = np.zeros(n, dtype=np.int64)
    magnitude[active] = 1
    limit = np.where(positive, above, below)
    features = np.concatenate(
        [level[:, active], _ONE * direction[None], (direction * prediction[active])[None]]
    )
    signs = np.zeros(n, dtype=np.int64)
    signs[active] = direction.astype(np.int64)
    for node in range(1, len(thresholds)):
        threshold = thresholds[node]
        keep = limit > threshold
        if not keep.all():
            active, limit, features = active[keep], limit[keep], features[:, keep]
        if not len(active):
            break
        larger = decide(node, features, truth(lambda: np.abs(target[active]) > threshold), prior_ones, prior_zeros)
        active, limit, features = active[larger], limit[larger], features[:, larger]
        magnitude[active] = threshold + 1
    _code_low_bits(bits, thresholds, magnitude, limits, target)
    q = signs * magnitude
    if int(q.max()) > above or int(q.min()) < -below:
        raise FormatError(f"context-coded stream holds a code outside [-{below}, {above}]")
    return q.astype(np.int16)


def _code_low_bits(bits, thresholds, magnitude, limits, target):
    """Code the place of each magnitude between its threshold and the next, in plain bits, in ``magnitude``."""
    maximum = max(limits)
    for low, high in zip(thresholds, [*thresholds[1:], maximum], strict=True):
        width = (high - low - 1).bit_length()
        if not width:
            continue
        active = np.flatnonzero(magnitude == low + 1)
        for k in range(width if len(active) else 0):
            half = np.full(len(active), float(1 << (_PROB_BITS - 1)))
            wanted = None if target is None else ((np.abs(target[active].astype(np.int64)) - low - 1) >> k) & 1 == 1
            magnitude[active] += bits.code(half, wanted).astype(np.int64) << k


# --- the coder ------------------------------------------------------------------------------------


def _effective_kernel(shape, kernel):
    return kernel if 1 < kernel <= MAX_KERNEL and shape[1] % kernel == 0 else 1


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
    target = (codes.reshape(-1).astype(np.int64) - zero).astype(np.int16)
    _walk(writer, codes.shape, _effective_kernel(codes.shape, kernel), zero, n_symbols - 1 - zero, target)
    return writer.payload()


def decode(data, shape, n_symbols, zero, kernel=1):
    """Invert :func:`encode`; return ``uint16`` codes.

    Raises
    ------
    FormatError
        If the payload does not end with its last code, or holds a code outside the alphabet.
    """
    if not 2 <= n_symbols <= MAX_SYMBOLS:
        raise FormatError(f"a context-coded stream has 2 to {MAX_SYMBOLS} symbols, got {n_symbols}")
    reader = _BitReader(data)
    q = _walk(reader, shape, _effective_kernel(shape, kernel), zero, n_symbols - 1 - zero, None)
    reader.finish()
    return (q.astype(np.int32) + zero).astype(np.uint16).reshape(shape)
