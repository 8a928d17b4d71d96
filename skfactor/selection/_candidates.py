"""How candidates of a search are fitted and measured: in groups that share their first steps."""
# SPDX-License-Identifier: BSD-3-Clause

import time
import traceback
from itertools import groupby
from pickle import PicklingError
from typing import Any, NamedTuple

import joblib
import numpy as np
from sklearn import config_context
from sklearn.base import TransformerMixin, clone
from sklearn.pipeline import Pipeline

from skfactor._sklearn import rows_of_params, take_rows
from skfactor.estimators.base import fit_params, steps_of
from skfactor.selection.measures import measure, tensor_of
from skfactor.selection.scorers import CompressionScorer

__all__ = ["Job", "evaluate", "plan_tasks", "prepare", "refit"]


class Job(NamedTuple):
    """What all candidates of a search have in common."""

    estimator: Any
    X: Any
    splits: list  # (rows to fit, rows to score)
    weights: dict  # sample_weight, importance, input_gram of X, each or None
    fit_params: dict
    scoring: Any  # a scorer, or a dict of CompressionScorers
    error_score: Any
    seed: int
    caller: Any


class Prepared(NamedTuple):
    estimator: Any
    key: tuple  # one hash per step before the last


class Chosen(NamedTuple):
    estimator: Any
    tensor: Any
    n_bytes: int
    distortion: float
    seconds: float


def prepare(job, parameters):
    """The unfitted estimator of a candidate, every missing seed set, and what its first steps are known by."""
    estimator = clone(job.estimator).set_params(**clone(parameters, safe=False))
    seeds = {k: job.seed for k, v in estimator.get_params().items()
             if v is None and (k == "random_state" or k.endswith("__random_state"))}
    estimator.set_params(**seeds)
    return Prepared(estimator, tuple(_hash(step) for _, step in steps_of(estimator)[:-1]))


def plan_tasks(keys, n_splits, n_jobs):
    """Tasks (split, candidates): candidates with the same first steps together, as long as every job gets work.

    >>> plan_tasks([("a",), ("b",), ("a",), ("b",)], 1, 2)
    [(0, [0, 2]), (0, [1, 3])]
    """
    # every first part of a key by its first appearance: sorted, equal parts are neighbours
    rank = {}
    for key in keys:
        for d in range(1, len(key) + 1):
            rank.setdefault(key[:d], len(rank))
    order = sorted(range(len(keys)), key=lambda c: [rank[keys[c][:d]] for d in range(1, len(keys[c]) + 1)])
    depth = max(map(len, keys), default=0)
    groups = [[c] for c in order]
    for d in range(1, depth + 1):
        groups = [list(members) for _, members in groupby(order, key=lambda c: keys[c][:d])]
        if len(groups) * n_splits >= n_jobs:
            break
    n_parts = -(-n_jobs // max(1, len(groups) * n_splits))
    groups = [group[i::n_parts] for group in groups for i in range(n_parts) if group[i::n_parts]]
    return [(split, group) for split in range(n_splits) for group in groups]


def evaluate(job, split, members):
    """Scores and times of candidates `members`, (parameters, callback context) each, on one split."""
    data = _SplitData(job, *job.splits[split])
    memory = StepMemory()
    return [_evaluate_one(job, data, memory, *member) for member in members]


def refit(job, parameters, context):
    """Fit a candidate on all rows."""
    everything = np.arange(job.X.shape[0])
    data = _SplitData(job, everything, everything)
    estimator, memory, start = prepare(job, parameters).estimator, StepMemory(), time.time()
    _fit(job, data, memory, estimator, context)
    seconds = time.time() - start
    codes = memory.codes(estimator, job.X)
    tensor = tensor_of(estimator, job.X, codes)
    measures = measure(estimator, job.X, codes=codes, **job.weights)
    return Chosen(estimator, tensor, measures["bytes"], measures["distortion"], seconds)


class _SplitData:
    """Rows of one split; those of the whole matrix are the matrix itself."""

    def __init__(self, job, train, test):
        n = job.X.shape[0]
        self.is_whole = len(train) == n and np.array_equal(train, np.arange(n))
        self.rows = None if len(test) == n and np.array_equal(test, np.arange(n)) else test
        self.X = job.X if self.is_whole else take_rows(job.X, train)
        self.weights, self.fit_params = job.weights, job.fit_params
        if not self.is_whole:
            if np.ndim(job.weights["input_gram"]) == 3 and len(job.weights["input_gram"]) > 1:
                raise ValueError("an input_gram of several groups needs all rows: cv must be WholeMatrixSplit()")
            self.weights = {k: v if v is None or k == "input_gram" else take_rows(np.asarray(v), train)
                            for k, v in job.weights.items()}
            self.fit_params = rows_of_params(job.X, params=job.fit_params, indices=train)


def _fit(job, data, memory, estimator, context):
    arguments = {**fit_params(estimator, **data.weights), **data.fit_params}
    with context.propagate_callback_context(estimator), config_context(enable_metadata_routing=False):
        context.call_on_fit_task_begin(estimator=job.caller, X=data.X, y=None)
        if not isinstance(estimator, Pipeline) or estimator.memory is not None:
            estimator.fit(data.X, **arguments)
            return
        estimator.memory = memory
        try:
            estimator.fit(data.X, **arguments)
        finally:
            estimator.memory = None


def _evaluate_one(job, data, memory, parameters, context):
    start = time.time()
    result = {"fit_error": None, "score_time": 0.0, "test_scores": job.error_score}
    try:
        estimator = prepare(job, parameters).estimator
        _fit(job, data, memory, estimator, context)
        result["fit_time"] = time.time() - start
        result["test_scores"] = _scores(job, data, memory, estimator)
        result["score_time"] = time.time() - start - result["fit_time"]
    except Exception:
        if job.error_score == "raise":
            raise
        result["fit_error"] = traceback.format_exc()
        result.setdefault("fit_time", time.time() - start)
    finally:
        context.call_on_fit_task_end(estimator=job.caller, X=data.X, y=None)
    return result


def _scores(job, data, memory, estimator):
    scorers = list(job.scoring.values()) if isinstance(job.scoring, dict) else [job.scoring]
    if not all(isinstance(scorer, CompressionScorer) for scorer in scorers):
        return job.scoring(estimator, job.X if data.rows is None else take_rows(job.X, data.rows), None)
    codes = memory.codes(estimator, job.X)
    measures = measure(estimator, job.X, codes=codes, rows=data.rows, **job.weights)
    if isinstance(job.scoring, dict):
        return {name: scorer.of(measures) for name, scorer in job.scoring.items()}
    return job.scoring.of(measures)


def _hash(estimator):
    """What tells one unfitted estimator from another: class and parameters."""
    try:
        return joblib.hash((type(estimator), estimator.get_params()))
    except (PicklingError, AttributeError, TypeError):  # a parameter that cannot be pickled: equal to nothing
        return str(id(estimator))


class _Step(NamedTuple):
    key: str
    X: Any
    output: Any
    fitted: Any


class StepMemory:
    """`Pipeline.memory` of one job: keeps, for every step before the last, what the latest candidate made of it.

    Candidates come sorted by their first steps, so one place per step is enough. A step is taken from memory where it
    has the same parameters and gets the same array (the very object).
    """

    def __init__(self):
        self._fits, self._codes, self._depth = [], {}, 0

    def cache(self, func, ignore=None):
        """What `Pipeline` asks of its `memory` once in every fit: `func` fits one step and transforms by it."""
        self._depth = 0

        def fit_transform_one(transformer, X, *args, **kwargs):
            depth, self._depth = self._depth, self._depth + 1
            key = _hash(transformer)
            if depth < len(self._fits) and self._fits[depth].key == key and self._fits[depth].X is X:
                context = kwargs.get("callback_ctx")
                if context is not None:
                    context.call_on_fit_task_begin(estimator=kwargs["caller"], X=X, y=None)
                    context.call_on_fit_task_end(estimator=kwargs["caller"], X=X, y=None)
            else:
                del self._fits[depth:]
                output, fitted = func(transformer, X, *args, **kwargs)
                self._fits.append(_Step(key, X, output, fitted))
            return self._fits[depth].output, self._fits[depth].fitted

        return fit_transform_one

    def codes(self, estimator, X):
        """`estimator.transform(X)`, with what is known already of the steps before the last."""
        *first, (_, last) = steps_of(estimator)
        for depth, (_, step) in enumerate(first):
            X = self._transform(depth, step, X)
        return last.transform(X)

    def _transform(self, depth, step, X):
        known = [self._codes[depth]] if depth in self._codes else []
        # fit_transform of a class of its own need not give what transform gives
        if getattr(type(step), "fit_transform", None) is TransformerMixin.fit_transform:
            known += self._fits
        for entry in known:
            if entry.fitted is step and entry.X is X:
                return entry.output
        self._codes[depth] = _Step("", X, step.transform(X), step)
        return self._codes[depth].output
