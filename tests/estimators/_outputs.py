"""Second moments of made-up layer inputs, and the error of a layer's output computed from scratch."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np


def gram_of(rng, d, n_inputs, seed=0):
    """Second moment of inputs that depend on each other, in a way that `seed` decides."""
    mix = np.random.default_rng(seed).standard_normal((d, d)) * np.geomspace(1, 0.03, d)
    Z = rng.standard_normal((n_inputs, d)) @ mix.T + 0.3
    return Z.T @ Z / n_inputs


def output_errors(estimators, X, grams):
    """tr((X - X̂) G (X - X̂)ᵀ) of fitted estimators, blocks of rows with grams of their own."""
    errors = []
    for estimator in estimators:
        E = X.astype(float) - estimator.inverse_transform(estimator.transform(X))
        errors.append(sum(float(np.trace(e @ G @ e.T)) for e, G in zip(np.split(E, len(grams)), grams)))
    return errors
