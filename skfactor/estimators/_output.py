"""Codes and codebooks chosen for the output of a layer: the `input_gram` mode of `KMeansWeightSharer`."""
# SPDX-License-Identifier: BSD-3-Clause

from typing import NamedTuple

import numpy as np

from skfactor._validation import check_gram, check_importance, check_matrix, check_row_weights
from skfactor.estimators._codebooks import Solution, Weights, assign_codes
from skfactor.estimators.base import BaseCompressor
from skfactor.solvers.feedback import (
    ClassLengths,
    feedback_quantize,
    output_error,
    refine_codes,
    refit_centers,
)
from skfactor.solvers.feedback_vectors import feedback_quantize_vectors, refit_vector_centers

_ROUNDS = 4  # codes, centroids and code lengths are fitted to each other this often
DAMPING = 0.003  # of the gram, as a multiple of its mean diagonal


class CodebookCompressor(BaseCompressor):
    """What estimators with scalar codebooks share: checks of the fit, codes by error, rate and output.

    `fit` leaves behind `labels_`, `decoder_`, `code_lengths_` and, for `_codes`, `_solution`, `_plan` and `_problem`.
    """

    def fit_transform(self, X, y=None, sample_weight=None, importance=None, input_gram=None):
        """Fit and return the codes of `X`; see `fit`."""
        return self.fit(X, y, sample_weight=sample_weight, importance=importance, input_gram=input_gram).labels_

    def _check_fit(self, X, sample_weight, importance, input_gram):
        """Validated `X`, `Weights` and gram (n_groups, d, d) or None."""
        X = check_matrix(self, X, reset=True)
        weights = Weights(check_row_weights(X, sample_weight), check_importance(X, importance))
        if input_gram is None:
            return X, weights, None
        if weights.importance is not None and np.ptp(weights.importance, axis=1).any():
            raise ValueError("with input_gram the importance must be one number per row, (n_rows, 1), got different "
                             "values within a row")
        return X, weights, check_gram(input_gram, X)

    def _codes(self, X):
        """Codes of validated `X` under the fitted codebooks."""
        if self._problem is not None:
            return codes_for_output(X, self._solution, self._problem, self.labels_)
        return assign_codes(X, self.decoder_.codebooks, self._plan, code_lengths=self.code_lengths_)


class OutputProblem(NamedTuple):
    """What decides the codes of a row besides the row itself and the codebook."""

    gram: np.ndarray  # (n_groups, d, d)
    row_weight: np.ndarray | None  # (n_rows,) importance of each row's output
    plan: object


def fit_for_output(X, solution, codes, problem, counts, *, n_rounds=_ROUNDS, fixed_centers=False):
    """Lower the error of the layer's output by error feedback and refits; never worse than `solution` and `codes`.

    With `fixed_centers` only the code lengths are refitted.

    Returns
    -------
    solution : Solution
    codes : ndarray
    uses_feedback : bool
        Whether feedback won over the nearest codes it was compared with.
    error : float
        Output error of the codes.
    """
    best = (_objective(X, solution, codes, problem, counts), solution, codes, False)
    for _ in range(n_rounds):
        codes = choose_codes(X, solution, problem).astype(codes.dtype)
        value = _objective(X, solution, codes, problem, counts)
        if value < best[0]:
            best = (value, solution, codes, True)
        if fixed_centers:
            solution = with_lengths(solution, codes, counts)
        else:
            solution = _refit(X, solution, codes, problem, counts)
    _, solution, codes, uses_feedback = best
    return solution, codes, uses_feedback, _output_error(X, solution, codes, problem, counts)


def choose_codes(X, solution, problem):
    """Codes of `X` by error feedback and coordinate descent under the gram."""
    plan, books = problem.plan, solution.codebooks
    if plan.vector_size > 1:
        return feedback_quantize_vectors(X, books[0], problem.gram, damping=DAMPING)
    centers = _centers_of_rows(books, plan, len(X))
    lengths, price = _rate(X, solution, plan)
    given = {"code_lengths": lengths, "entropy_weight": price, "row_weight": problem.row_weight}
    codes = feedback_quantize(X, centers, problem.gram, damping=DAMPING, **given)
    return refine_codes(X, codes, centers, problem.gram, **given)


def codes_for_output(X, solution, problem, labels):
    """`choose_codes` for rows that need not be those of the fit, which had `labels`."""
    if problem.row_weight is not None and len(X) != len(labels):
        # the importance of a row is known for the rows of fit only
        problem = problem._replace(row_weight=np.full(len(X), problem.row_weight.mean()))
    if len(X) % len(problem.gram):
        raise ValueError(f"X must have a multiple of {len(problem.gram)} rows, one per group of input_gram, "
                         f"got {len(X)}")
    return choose_codes(X, solution, problem).astype(labels.dtype)


def _centers_of_rows(books, plan, n_rows):
    if plan.granularity == "tensor":
        return books[0, :, 0]
    size = 1 if plan.granularity == "row" else plan.group_size
    return np.repeat(books[:, :, 0], size, axis=0)[:n_rows]


def _rate(X, solution, plan):
    """Code lengths and their price; exact zeros that must stay are bound to their code by infinite lengths."""
    lengths = None if solution.code_lengths is None else solution.code_lengths[0]
    if not plan.preserve_zeros or X.all():
        return lengths, plan.lagrangian
    free = np.zeros(solution.codebooks.shape[1]) if lengths is None else plan.lagrangian * lengths
    bound = np.where(solution.codebooks[0, :, 0] == 0, 0.0, np.inf)
    return ClassLengths(np.stack([free, bound]), (X == 0).astype(np.int8)), 1.0


def _output_error(X, solution, codes, problem, counts):
    weight = _row_weight(problem, counts)
    return output_error(X, decode(solution.codebooks, codes, problem.plan), problem.gram, row_weight=weight)


def _row_weight(problem, counts):
    given = [w for w in (problem.row_weight, counts) if w is not None]
    return None if not given else given[0] if len(given) == 1 else given[0] * given[1]


def _objective(X, solution, codes, problem, counts):
    """Output error plus price of the bits, each row counted as often as `counts` says."""
    value = _output_error(X, solution, codes, problem, counts)
    if solution.code_lengths is not None:
        bits = solution.code_lengths[0][codes].sum(axis=1)
        value += problem.plan.lagrangian * float(bits.sum() if counts is None else counts @ bits)
    return value


def decode(books, codes, plan):
    """Matrix of the codes; one codebook, or one per row or group of rows."""
    if plan.granularity == "tensor":
        return books[0][codes].reshape(len(codes), -1)
    return np.take_along_axis(_centers_of_rows(books, plan, len(codes)), codes.astype(np.intp), axis=1)


def with_lengths(solution, codes, counts):
    """`solution` with the ideal lengths of these codes, if it has lengths."""
    if solution.code_lengths is None:
        return solution
    n = np.ones(len(codes)) if counts is None else counts
    share = np.bincount(codes.ravel(), np.repeat(n, codes.shape[1]), minlength=solution.codebooks.shape[1])
    share = np.maximum(share, 0.5)  # half a count for codes out of use, so that they may come back
    return solution._replace(code_lengths=-np.log2(share / share.sum())[None])


def _refit(X, solution, codes, problem, counts):
    """Centroids in closed form for the codes, and code lengths from their shares."""
    plan, books = problem.plan, solution.codebooks
    weight = _row_weight(problem, counts)
    if plan.vector_size > 1:
        centers = refit_vector_centers(X, codes, books[0], problem.gram, row_weight=weight)
        return solution._replace(codebooks=centers[None].astype(books.dtype))
    n_books, k, _ = books.shape
    size = {"tensor": len(X), "row": 1}.get(plan.granularity, plan.group_size)
    flat = codes.astype(np.intp) + k * (np.arange(len(X)) // size)[:, None]
    centers = refit_centers(X, flat, books.ravel(), problem.gram, row_weight=weight)
    if plan.preserve_zeros:
        centers[books.ravel() == 0] = 0.0
    lengths = with_lengths(solution, codes, counts).code_lengths
    # ascending again, so that |code - zero| keeps its meaning for the coder
    centers = centers.reshape(n_books, k)
    order = np.argsort(centers, axis=1, kind="stable")
    centers = np.take_along_axis(centers, order, axis=1)
    lengths = None if lengths is None else np.take_along_axis(lengths, order, axis=1)
    return Solution(centers[:, :, None].astype(books.dtype), lengths, 0.0, solution.n_iter)
