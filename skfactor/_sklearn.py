"""The only importer of scikit-learn's private names, and the home of its callbacks.

scikit-learn 1.9 brought callbacks (progress bars, score monitors; experimental, SLEP 23); older versions have none and
then everything here does nothing. What an estimator has to do:

* Nothing, to be one task of a progress bar: `BaseCompressor` is a `CallbackSupport`, and `fit_context` around `fit`
  opens and closes the task. (`fit_transform` must go through `fit`, as `TransformerMixin`'s does.)
* To report iterations, ask once in `fit`, before the solver runs, and let the solver call what came back::

      report = self._iteration_reporter(self.max_iter)        # None when no callback listens
      result = solve(X, ..., callback=report and (lambda V: report(lambda: {"decoder_": LinearDecoder(V)})))

  A solver calls `callback(...)` at the end of each iteration and stops where it returns True. The dict names the
  fitted attributes that make the estimator usable as if the fit had stopped here; it is only built where a callback
  wants it. In a loop that is part of `fit`: `if report and report(lambda: {...}): break`.

A monitor scores against the data itself: where `fit` has no `y`, callbacks get `X` in its place.
"""
# SPDX-License-Identifier: BSD-3-Clause

import contextlib
import functools
import inspect

from sklearn.base import _fit_context
from sklearn.model_selection._validation import _insert_error_scores as insert_error_scores
from sklearn.model_selection._validation import _warn_or_raise_about_fit_failures as warn_or_raise_about_fit_failures
from sklearn.utils import _safe_indexing as take_rows
from sklearn.utils._param_validation import HasMethods, Interval, RealNotInt, StrOptions
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_method_params as rows_of_params

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn < 1.9
    CallbackSupportMixin = object

__all__ = [
    "CallbackSupport",
    "HasMethods",
    "Interval",
    "RealNotInt",
    "StrOptions",
    "callback_context",
    "check_feature_names_in",
    "fit_context",
    "insert_error_scores",
    "rows_of_params",
    "take_rows",
    "warn_or_raise_about_fit_failures",
    "with_callbacks",
]


class CallbackSupport(CallbackSupportMixin):
    """Mixin of estimators whose `fit` is a task that scikit-learn's callbacks can follow.

    From scikit-learn 1.9 on it brings `set_callbacks`; before, it brings nothing.
    """

    def _iteration_reporter(self, max_iter, name="iteration"):
        """Announce at most `max_iter` iterations (None: not known) of the running fit.

        Call at most once in a fit.

        Returns
        -------
        report : callable or None
            `report(attributes=None) -> bool` ends one iteration and says whether a callback wants to stop;
            `attributes` is a dict of fitted attributes, or a function that makes it. None where no callback listens.
        """
        task = self.__dict__.get("_callback_task")
        if task is None:
            return None
        task.begin(max_iter)
        return functools.partial(task.end_iteration, name)


class _FitTask:
    """The task of one running fit: begun when the number of iterations is known, at the latest when it ends."""

    def __init__(self, estimator, X, y, sample_weight):
        self.estimator = estimator
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        self.data = {"X": X, "y": X if y is None else y, "metadata": metadata}
        self.context = None

    def begin(self, max_iter):
        self.context = self.estimator._init_callback_context(max_subtasks=max_iter)
        self.context.call_on_fit_task_begin(estimator=self.estimator, **self.data)

    def end_iteration(self, name, attributes=None):
        context = self.context.subcontext(task_name=name)
        context.call_on_fit_task_begin(estimator=self.estimator, **self.data)
        return context.call_on_fit_task_end(estimator=self.estimator, **self.data,
                                            reconstruction_attributes=attributes)

    def end(self):
        if self.context is None:
            self.begin(0)
        self.context.call_on_fit_task_end(estimator=self.estimator, **self.data,
                                          reconstruction_attributes=dict)


def with_callbacks(fit):
    """Decorator: the method is one task of the callbacks of a `CallbackSupport`.

    `fit_context` has it already for a method called `fit`.
    """

    @functools.wraps(fit)
    def fit_as_task(self, X, y=None, *args, **kwargs):
        listens = bool(getattr(self, "_skl_callbacks", None)) and isinstance(self, CallbackSupport)
        if not listens or "_callback_task" in self.__dict__:
            return fit(self, X, y, *args, **kwargs)
        weight = inspect.signature(fit).bind(self, X, y, *args, **kwargs).arguments.get("sample_weight")
        self._callback_task = task = _FitTask(self, X, y, weight)
        try:
            result = fit(self, X, y, *args, **kwargs)
            task.end()
        finally:
            del self._callback_task
        return result

    return fit_as_task


def fit_context(*, prefer_skip_nested_validation):
    """Parameters are validated before, nested validation is skipped, callbacks are set up and torn down."""
    validated = _fit_context(prefer_skip_nested_validation=prefer_skip_nested_validation)

    def decorator(method):
        return validated(with_callbacks(method) if method.__name__ == "fit" else method)

    return decorator


def callback_context(estimator, max_subtasks):
    """Root context of the running fit of a meta-estimator; one that does nothing where no callback listens."""
    if getattr(estimator, "_skl_callbacks", None) or hasattr(estimator, "_parent_callback_ctx"):
        return estimator._init_callback_context(max_subtasks=max_subtasks)
    return _NoContext()


class _NoContext:
    """Stands for scikit-learn's `CallbackContext` where no callback listens."""

    def subcontext(self, **kwargs):
        return self

    def call_on_fit_task_begin(self, **kwargs):
        return self

    def call_on_fit_task_end(self, **kwargs):
        return False

    def propagate_callback_context(self, sub_estimator):
        return contextlib.nullcontext()
