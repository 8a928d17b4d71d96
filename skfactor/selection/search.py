"""`CompressionSearchCV`: a grid search that measures files and fits shared steps once."""
# SPDX-License-Identifier: BSD-3-Clause

from numbers import Integral, Real

import numpy as np
from joblib import effective_n_jobs
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, ParameterGrid, check_cv
from sklearn.utils import TransformerTags, check_random_state
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted

from skfactor._sklearn import (
    Interval,
    StrOptions,
    callback_context,
    fit_context,
    insert_error_scores,
    warn_or_raise_about_fit_failures,
)
from skfactor.selection._candidates import Job, evaluate, plan_tasks, prepare, refit
from skfactor.selection.measures import distortion
from skfactor.selection.rules import best_under, elbow, smallest_within
from skfactor.selection.scorers import CompressionScorer, compression_scorer
from skfactor.selection.splits import WholeMatrixSplit

__all__ = ["CompressionSearchCV"]

_COSTS = ("bytes", "distortion", "bits_per_weight")


class CompressionSearchCV(GridSearchCV):
    """Grid search over the settings of a compressor or a Pipeline of them, by the size of the file and the error.

    A `GridSearchCV` with other defaults: it fits and scores on the whole matrix, measures every candidate from end to
    end (`Pipeline.score` sees the last step alone), and chooses by a constraint, or by the elbow where none is given.
    Steps that candidates have in common are fitted once, so a grid over the last step costs little more than that
    step. Every candidate is fitted from scratch with the same seeds, so that refitting gives the same file.

    Parameters
    ----------
    estimator : BaseCompressor or Pipeline of them
    param_grid : dict or list of dict
        As for `GridSearchCV`.
    max_distortion : float, default=None
        Choose the fewest bytes among the candidates of at most this relative squared error.
    max_bytes : int, default=None
        Choose the least error among the candidates of at most this size. With both limits, the fewest bytes within
        both.
    scoring : callable, str, dict or None, default=None
        None is `compression_scorer`: bytes, distortion, bits per weight and kappa, from one encoding.
    refit : "auto", callable, str or bool, default="auto"
        "auto" and True choose by the limits, without them by `elbow` (with a `scoring` of one number: by that). A
        callable is a rule such as `elbow`, `smallest_within(...)` or `best_under(...)`; a str is a metric. False
        searches only.
    cv : int, splitter or iterable, default=None
        None is `WholeMatrixSplit()`. With other splitters the error is that of the held-out rows, and the size still
        that of the whole matrix.
    n_jobs : int, default=None
        Jobs of joblib. Candidates that share steps go to one job as long as there are jobs enough.
    verbose : int, default=0
        1 prints how much is fitted.
    pre_dispatch : int or str, default="2*n_jobs"
        As for `GridSearchCV`.
    error_score : "raise" or float, default=np.nan
        Score of a candidate whose fit fails; rules leave NaN out.
    random_state : int, RandomState instance or None, default=None
        Seeds every `random_state=None` in the estimator, once for all candidates.

    Attributes
    ----------
    cv_results_ : dict
        As for `GridSearchCV`, with `mean_test_bytes`, `mean_test_distortion`, `mean_test_bits_per_weight` and
        `mean_test_kappa`. Rank 1 of a cost is the least.
    best_index_, best_params_, best_estimator_
        As for `GridSearchCV`, whatever `refit` chooses by.
    best_score_ : float
        Minus `mean_test_distortion` of the chosen candidate, or its `mean_test_score`.
    best_bytes_ : int
        Size of the file that `save_tensor(path, search)` writes.
    best_distortion_ : float
        Relative squared error of `best_estimator_` on the whole matrix.
    best_tensor_ : CompressedTensor
        What is stored of the matrix with `best_estimator_`.
    choice_ : str
        What the choice was made by; for the elbow, over which range.
    scorer_, multimetric_, n_splits_, refit_time_, n_features_in_, feature_names_in_
        As for `GridSearchCV`.

    See Also
    --------
    skfactor.allocate : Settings for every layer of a network.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor import CompressionSearchCV, KMeansWeightSharer
    >>> X = np.random.default_rng(0).normal(size=(200, 9))
    >>> search = CompressionSearchCV(KMeansWeightSharer(), {"n_clusters": [2, 4, 8, 16, 32]}, max_distortion=0.05)
    >>> search.fit(X).best_params_
    {'n_clusters': 8}
    >>> search.best_distortion_ <= 0.05
    True
    """

    _parameter_constraints: dict = {
        **{k: v for k, v in GridSearchCV._parameter_constraints.items() if k != "return_train_score"},
        "max_distortion": [Interval(Real, 0, None, closed="left"), None],
        "max_bytes": [Interval(Integral, 1, None, closed="left"), None],
        "refit": ["boolean", StrOptions({"auto"}), str, callable],
        "cv": ["cv_object", None],
        "random_state": ["random_state"],
    }

    def __init__(self, estimator, param_grid, *, max_distortion=None, max_bytes=None, scoring=None, refit="auto",
                 cv=None, n_jobs=None, verbose=0, pre_dispatch="2*n_jobs", error_score=np.nan, random_state=None):
        super().__init__(estimator, param_grid, scoring=scoring, n_jobs=n_jobs, refit=refit, cv=cv, verbose=verbose,
                         pre_dispatch=pre_dispatch, error_score=error_score)
        self.max_distortion = max_distortion
        self.max_bytes = max_bytes
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=False)
    def fit(self, X, y=None, *, sample_weight=None, importance=None, input_gram=None, groups=None, **fit_params):
        """Search, choose, and fit the choice on all of `X`.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
        importance : array-like of shape (n_rows, n_columns) or (n_rows, 1), default=None
        input_gram : array-like of shape (n_columns, n_columns) or (n_groups, n_columns, n_columns), default=None
            These three reach every step that takes them and speaks of X, and weigh the distortion.
        groups : array-like of shape (n_rows,), default=None
            For splitters by group, such as the layer of each row.
        **fit_params : dict
            Further parameters of `fit`, as `step__name` for a Pipeline.

        Returns
        -------
        self : CompressionSearchCV
        """
        self._check_limits()
        X = X if hasattr(X, "shape") else np.asarray(X)
        scoring, scorers = self._get_scoring()
        candidates = list(ParameterGrid(self.param_grid))
        splits = list(check_cv(WholeMatrixSplit() if self.cv is None else self.cv).split(X, None, groups))
        weights = {"sample_weight": sample_weight, "importance": importance, "input_gram": input_gram}
        job = Job(clone(self.estimator), X, splits, weights, fit_params, scoring, self.error_score,
                  int(check_random_state(self.random_state).randint(2**31 - 1)), clone(self))
        root = callback_context(self, 1 + bool(self.refit)).call_on_fit_task_begin(estimator=self, X=X, y=None)
        if self.verbose > 0:
            print(f"Fitting {len(splits)} folds for each of {len(candidates)} candidates")

        with Parallel(n_jobs=self.n_jobs, pre_dispatch=self.pre_dispatch) as parallel:
            out = self._evaluate(parallel, job, candidates, root)
            results = self._format_results(candidates, len(splits), out)
            _rank_costs(results, scoring)
            self.multimetric_ = isinstance(out[0]["test_scores"], dict)
            chosen = None
            if self.refit:
                index, choice = self._choose(results)
                context = root.subcontext(task_name="refit-with-best-params")
                # like the candidates, in a worker: as many threads, so the same bits
                (chosen,) = parallel([delayed(refit)(job, candidates[index], context)])
        self.scorer_, self.n_splits_, self.cv_results_ = scorers, len(splits), results
        if chosen is not None:
            self._keep(chosen, index, choice, job)
        root.call_on_fit_task_end(estimator=self, X=X, y=None)
        return self

    def fit_transform(self, X, y=None, **fit_params):
        """Fit and return the codes of `X`; see `fit`."""
        return self.fit(X, y, **fit_params).transform(X)

    def score(self, X, y=None, sample_weight=None):
        """Minus the relative squared error of `best_estimator_` on `X`; with a `scoring` of one number, that.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), default=None
            How many rows each row stands for.

        Returns
        -------
        score : float
        """
        check_is_fitted(self)
        if not self.refit:
            raise AttributeError("score needs best_estimator_, which refit=False does not fit")
        if self.multimetric_:
            return -distortion(self.best_estimator_, X, sample_weight=sample_weight)
        given = {} if sample_weight is None else {"sample_weight": sample_weight}
        return self.scorer_(self.best_estimator_, X, None, **given)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=[])  # codes are mostly integers
        return tags

    def _check_limits(self):
        limits = {k: v for k, v in (("max_distortion", self.max_distortion), ("max_bytes", self.max_bytes))
                  if v is not None}
        if limits and self.refit not in ("auto", True):
            raise ValueError(f"limits choose the candidate only with refit='auto', got refit={self.refit!r} and "
                             f"{', '.join(f'{k}={v}' for k, v in limits.items())}")

    def _get_scorers(self):
        return (compression_scorer, "distortion") if self.scoring is None else super()._get_scorers()

    def _check_refit_for_multimetric(self, scores):
        if self.refit not in ("auto", True):
            super()._check_refit_for_multimetric(scores)

    def _get_scoring(self):
        """What a job scores by, and `scorer_`: ours, one or a dict of them, are computed from one measurement."""
        scorers, _ = self._get_scorers()
        if isinstance(self.scoring, dict):
            ours = all(isinstance(s, CompressionScorer) and s.kind != "all" for s in self.scoring.values())
            return (dict(self.scoring) if ours else scorers), dict(self.scoring)
        return scorers, scorers

    def _evaluate(self, parallel, job, candidates, root):
        """Results of every candidate on every split, splits fastest."""
        n_splits = len(job.splits)
        keys = [prepare(job, parameters).key for parameters in candidates]
        search = root.subcontext(task_name="search", max_subtasks=len(candidates) * n_splits,
                                 sequential_subtasks=False).call_on_fit_task_begin(estimator=self)
        contexts = [search.subcontext(task_name="candidate-split-evaluation", task_id=i)
                    for i in range(len(candidates) * n_splits)]
        tasks = plan_tasks(keys, n_splits, effective_n_jobs(self.n_jobs))
        found = parallel(
            delayed(evaluate)(job, split, [(candidates[c], contexts[c * n_splits + split]) for c in members])
            for split, members in tasks)
        out = [None] * len(contexts)
        for (split, members), results in zip(tasks, found):
            for c, result in zip(members, results):
                out[c * n_splits + split] = result
        if not out:
            raise ValueError("nothing was fitted: param_grid or cv is empty")
        warn_or_raise_about_fit_failures(out, self.error_score)
        insert_error_scores(out, self.error_score)
        search.call_on_fit_task_end(estimator=self)
        return out

    def _choose(self, results):
        """Index of the chosen candidate and why it was chosen."""
        rule = self.refit
        if rule in ("auto", True):
            rule = self._default_rule()
        if callable(rule):
            index = int(self._select_best_index(rule, None, results))
            return index, rule.explain(results, index) if hasattr(rule, "explain") else f"the rule {rule!r}"
        metric = rule if self.multimetric_ else "score"
        if f"rank_test_{metric}" not in results:
            raise ValueError(f"refit must be a rule, or one of the metrics "
                             f"{sorted(k[10:] for k in results if k.startswith('mean_test_'))}, got {rule!r}")
        return int(results[f"rank_test_{metric}"].argmin()), f"the best {metric}"

    def _default_rule(self):
        if self.max_distortion is not None:
            return smallest_within(self.max_distortion, self.max_bytes)
        if self.max_bytes is not None:
            return best_under(self.max_bytes)
        return elbow if self.multimetric_ else "score"

    def _keep(self, chosen, index, choice, job):
        self.best_index_, self.choice_ = index, choice
        self.best_params_ = self.cv_results_["params"][index]
        self.best_estimator_, self.refit_time_ = chosen.estimator, chosen.seconds
        self.best_tensor_, self.best_bytes_ = chosen.tensor, chosen.n_bytes
        self.best_distortion_ = chosen.distortion
        self.best_score_ = self._score_of(index)
        if hasattr(chosen.estimator, "feature_names_in_"):
            self.feature_names_in_ = chosen.estimator.feature_names_in_

    def _score_of(self, index):
        if not self.multimetric_:
            return float(self.cv_results_["mean_test_score"][index])
        if "mean_test_distortion" in self.cv_results_:
            return -float(abs(self.cv_results_["mean_test_distortion"][index]))
        return -self.best_distortion_


def _rank_costs(results, scoring):
    """Rank 1 is the least cost: scikit-learn ranks every metric as one of which more is better."""
    if scoring == compression_scorer:
        for name in _COSTS:
            cost = np.nan_to_num(results[f"mean_test_{name}"], nan=np.inf)
            results[f"rank_test_{name}"] = rankdata(cost, method="min").astype(np.int32)
