"""
==========================================
Atoms of digits and of convolution filters
==========================================

A dictionary writes every row as a sum of few atoms, each times a number: X ≈ UV with sparse U and rows of V of unit
norm. The atoms of images are strokes and whole digits. The atoms of a trained network's 3 x 3 kernels are edges and
spots of either sign; 32 of them are 288 numbers for all the kernels of a network, so that what a file weighs is the
codes.

With the environment variable ``SKFACTOR_DATA`` the kernels are those of a ResNet-56 trained on CIFAR-10
(``weights/cifar10_resnet56.safetensors`` in that folder); otherwise a small network is trained on the digits of
scikit-learn.
"""
# SPDX-License-Identifier: BSD-3-Clause

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.pipeline import Pipeline

from skfactor import DictionaryFactorizer, KMeansWeightSharer
from skfactor.estimators import compressed_tensor
from skfactor.plotting import AtomsDisplay, ManifoldDisplay, RateDistortionDisplay, ReconstructionDisplay


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
# Digits
# ------
# The more weight the sparsity has (α), the more an atom looks like a whole digit, and the fewer atoms an image takes.
digits = load_digits().data / 16
figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
factorizers = {}
for alpha, ax in zip((0.1, 1.0), axes):
    factorizer = DictionaryFactorizer(64, alpha=alpha, random_state=0).fit(digits)
    factorizers[f"α = {alpha}"] = factorizer
    AtomsDisplay.from_estimator(factorizer, digits, ax=ax, name=f"digits, α = {alpha}")
    used = (factorizer.transform(digits) != 0).sum(axis=1).mean()
    print(f"digits, alpha = {alpha}: {used:.1f} of 64 atoms in a mean image, "
          f"relative error {np.sqrt(-factorizer.score(digits)):.3f}")
ReconstructionDisplay.from_estimator(factorizers, digits, n_images=12).figure_.set_size_inches(8, 3)

# %%
# Kernels of a network
# --------------------
# 32 atoms of nine numbers. On the right, large kernels after k-means on whole kernels, on a map that keeps neighbours
# together; they are divided by their length, so that what is left is their shape.
kernels, name = load_kernels(4_000)
kernel_atoms = DictionaryFactorizer(32, alpha=0.1, random_state=0).fit(kernels)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
AtomsDisplay.from_estimator(kernel_atoms, kernels, ax=left, name=f"kernels of {name}")
lengths = np.linalg.norm(kernels, axis=1, keepdims=True)
shapes = (kernels / np.maximum(lengths, 1e-12))[np.argsort(-lengths[:, 0])[:500]]
clusters = KMeansWeightSharer(10, vector_size=9, random_state=0).fit(shapes)
ManifoldDisplay.from_estimator(clusters, shapes, ax=right, name=f"500 large kernels of {name}")

# %%
# What it costs
# -------------
# Codes in full precision are dear, however sparse they are: the number of a used atom and 32 bits for its coefficient.
# `KMeansWeightSharer(preserve_zeros=True)` after the dictionary lets the coefficients share 32 values.
compressors = {}
for alpha in (0.05, 0.1, 0.2):
    factorizer = DictionaryFactorizer(32, alpha=alpha, max_iter=100, random_state=0)
    compressors[f"alpha = {alpha}"] = factorizer
    compressors[f"alpha = {alpha}, shared"] = Pipeline(
        [("dict", factorizer), ("share", KMeansWeightSharer(32, preserve_zeros=True))]
    )
tensors = [compressed_tensor(clone(c).fit(kernels), kernels) for c in compressors.values()]
display = RateDistortionDisplay.from_compressed_tensors(tensors, kernels, title=f"{len(kernels)} kernels of {name}")
print(f"{len(kernels)} kernels of {name}: {kernels.nbytes:,} bytes in float32")
for setting, size, error in zip(compressors, display.size, display.quality):
    print(f"{setting}: {size:,.0f} bytes, relative error {error:.3f}")
plt.show()
