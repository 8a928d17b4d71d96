"""Every estimator of the list, under scikit-learn's checks and the project's own."""
# SPDX-License-Identifier: BSD-3-Clause

import inspect

import pytest
from _checks import CHECKS
from _estimators import CASES
from sklearn.base import clone
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

# importable checks of scikit-learn that its check_estimator leaves out
EXTRA = [
    "check_param_validation",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_dataframe_column_names_consistency",
    "check_inplace_ensure_writeable",
]
SKLEARN_CASES = [case for case in CASES if case.sklearn]


@parametrize_with_checks([case.estimator for case in SKLEARN_CASES])
def test_sklearn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("case", SKLEARN_CASES, ids=lambda case: case.id)
def test_sklearn_extra(case, name):
    getattr(estimator_checks, name)(type(case.estimator).__name__, clone(case.estimator))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_project(case, check, request):
    if "tmp_path" in inspect.signature(check).parameters:
        check(case, request.getfixturevalue("tmp_path"))
    else:
        check(case)
