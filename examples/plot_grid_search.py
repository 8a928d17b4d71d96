"""
========================
Grid search over K and α
========================

A dictionary writes the 3 x 3 kernels of a network as sparse sums of atoms, and weight sharing lets the coefficients
share K values. The price α of a coefficient and K trade size for error in different ways: which pair is best for a
given error? A search measures the file of every pair. scikit-learn's ``Pipeline.score`` would give another answer, and
a wrong one: it sees how well the *codes* can be shared, not what becomes of the kernels.

With the environment variable ``SKFACTOR_DATA`` the kernels are those of a ResNet-56 trained on CIFAR-10
(``weights/cifar10_resnet56.safetensors`` in that folder); otherwise a small network is trained on the digits of
scikit-learn.
"""
# SPDX-License-Identifier: BSD-3-Clause

import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from skfactor import CompressionSearchCV, DictionaryFactorizer, KMeansWeightSharer
from skfactor.plotting import ElbowDisplay, RateDistortionDisplay
from skfactor.selection import WholeMatrixSplit, best_under, elbow, load_tensor, measure, save_tensor, smallest_within


def load_kernels(n):
    """`n` kernels (n, 9) of a trained network, drawn at random, and where they are from."""
    path = Path(os.environ.get("SKFACTOR_DATA", "")) / "weights" / "cifar10_resnet56.safetensors"
    if path.exists():
        from safetensors.numpy import load_file

        tensors, name = load_file(path), "ResNet-56"
    else:
        from skfactor.demo import load_images, train

        network = train(load_images(), n_epochs=12, seed=0)
        tensors, name = {k: v.numpy() for k, v in network.state_dict().items()}, "a network for digits"
    kernels = np.vstack([w.reshape(-1, 9) for w in tensors.values() if w.shape[2:] == (3, 3)])
    return kernels[np.random.default_rng(0).permutation(len(kernels))[:n]], name


# %%
# The search
# ----------
# Five prices and five numbers of shared values. Each of the five dictionaries is fitted once. The choice is the
# smallest file whose relative squared error is at most 2 %.
kernels, name = load_kernels(6_000)
pipe = Pipeline([
    ("dict", DictionaryFactorizer(16, random_state=0)),
    ("share", KMeansWeightSharer(preserve_zeros=True, coder="ans")),
])
grid = {"dict__alpha": [0.05, 0.1, 0.2, 0.4, 0.8], "share__n_clusters": [4, 8, 16, 32, 64]}
search = CompressionSearchCV(pipe, grid, max_distortion=0.02).fit(kernels)
print(f"{len(kernels)} kernels of {name}: {kernels.nbytes:,} bytes in float32")
print(f"chosen by {search.choice_}: {search.best_params_}")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
RateDistortionDisplay.from_search(search, ax=left, title=f"{len(kernels)} kernels of {name}")
ElbowDisplay.from_search(search, "share__n_clusters", ax=right, name=f"α = {search.best_params_['dict__alpha']}")

# %%
# The file
# --------
# What the search said is what the file weighs.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "kernels.skf"
    save_tensor(path, search, kernels)
    restored = load_tensor(path)
    print(f"the search said {search.best_bytes_:,} bytes, the file has {path.stat().st_size:,}")
print("restored bit for bit:", np.array_equal(restored, search.inverse_transform(search.transform(kernels))))

# %%
# Other rules, and the trap
# -------------------------
# Rules read the same table, so that no further fit is needed. The last line is what `GridSearchCV` picks by
# `Pipeline.score`: the codes that are shared with the smallest error, whatever they decode to.
results = search.cv_results_
for rule in (smallest_within(distortion=0.05), best_under(bits_per_weight=4), elbow):
    i = rule(results)
    print(f"{rule.explain(results, i)}: {results['params'][i]}, {results['mean_test_bits_per_weight'][i]:.2f} bits per "
          f"weight, distortion {results['mean_test_distortion'][i]:.4f}")
naive = GridSearchCV(pipe, grid, cv=WholeMatrixSplit()).fit(kernels)
found = measure(naive, kernels)
print(f"Pipeline.score: {naive.best_params_}, score {naive.best_score_:.5f}, {found['bits_per_weight']:.2f} bits per "
      f"weight, distortion {found['distortion']:.4f}")
plt.show()
