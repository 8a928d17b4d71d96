"""
================================================
Quantising MNIST by k-means: kappa and the elbow
================================================

An image of MNIST has 256 greys. How many does it need? Weight sharing treats a data set as it treats the weights of a
layer: all N pixels share K values, each pixel stores the number of its value, and the compression factor of the
course is κ = 1 − K/N. κ says how few values are left; what a file weighs is another question, and the last picture
answers it.

The same estimator shares whole images instead of pixels: then the shared values are K typical digits.

MNIST is downloaded from OpenML. With the environment variable ``SKFACTOR_DATA``, nothing is downloaded: it names a
folder with ``mnist.npz`` (array ``X_train``), and without such a file the 8 x 8 digits of scikit-learn are taken.
"""
# SPDX-License-Identifier: BSD-3-Clause

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import fetch_openml, load_digits

from skfactor import KMeansWeightSharer
from skfactor.estimators import compressed_tensor
from skfactor.plotting import (
    AtomsDisplay,
    CodebookDisplay,
    ElbowDisplay,
    ManifoldDisplay,
    RateDistortionDisplay,
    ReconstructionDisplay,
)


def load_images(n):
    """The first `n` images as rows of greys in 0..1, and where they are from."""
    folder = os.environ.get("SKFACTOR_DATA")
    if folder is None:
        try:
            X = fetch_openml("mnist_784", version=1, as_frame=False, n_retries=0).data
            return (X[:n] / 255).astype(np.float32), "MNIST"
        except OSError as error:
            print(f"MNIST could not be downloaded ({error}): the digits of scikit-learn instead")
    elif (Path(folder) / "mnist.npz").exists():
        with np.load(Path(folder) / "mnist.npz") as archive:
            return (archive["X_train"][:n].reshape(n, -1) / 255).astype(np.float32), "MNIST"
    return (load_digits().data[:n] / 16).astype(np.float32), "digits"


X, name = load_images(1000)
print(f"{name}: {X.shape[0]} images of {X.shape[1]} pixels, {len(np.unique(X))} greys")

# %%
# The elbow
# ---------
# In one dimension the best K values can be computed, and one pass gives the error of every K. The first few greys do
# most of the work.
sharer = KMeansWeightSharer(n_clusters=4).fit(X)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
elbow = ElbowDisplay.from_estimator(sharer, X, k_max=32, ax=left, name=f"pixels of {name}")
CodebookDisplay.from_estimator(sharer, X, ax=right, name="4 greys")
print(f"4 greys: kappa = {sharer.kappa_:.6f}, relative error {np.sqrt(-sharer.score(X)):.3f}, "
      f"{sharer.bits_per_weight_:.2f} bits per pixel")

# %%
# What it looks like
# ------------------
tensors = {f"{k} greys": compressed_tensor(KMeansWeightSharer(k).fit(X), X) for k in (2, 3, 4, 8)}
ReconstructionDisplay.from_compressed_tensors(tensors, X, n_images=12).figure_.set_size_inches(8, 4)
for key, tensor in tensors.items():
    print(f"{key}: {tensor.nbytes:,} bytes, {X.size / tensor.nbytes:.1f} times less than a byte per pixel")

# %%
# Whole images
# ------------
# With sub-vectors as long as a row, K images are shared: an image costs a few bits, and the K typical images cost
# more than everything else. The map places images that look alike side by side; the colour is the shared image.
rows = KMeansWeightSharer(40, vector_size=X.shape[1], random_state=0).fit(X)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
AtomsDisplay.from_estimator(rows, X, ax=left, name=f"shared images of {name}")
ManifoldDisplay.from_estimator(rows, X[:500], ax=right, name=f"500 images of {name}")
print(f"40 shared images: kappa = {rows.kappa_:.3f}, relative error {np.sqrt(-rows.score(X)):.3f}, "
      f"{rows.rate_:,} bytes")

# %%
# κ is not the size
# -----------------
# Both ways drawn over their stored size, everything counted. Two greys and sixteen greys have the same κ to four
# digits, and files three times apart; ten shared images have a smaller κ than either, and the smallest file.
settings = [KMeansWeightSharer(k) for k in (2, 3, 4, 6, 8, 16)]
settings += [KMeansWeightSharer(16, entropy_weight=w) for w in (0.003, 0.01, 0.03)]
settings += [KMeansWeightSharer(k, vector_size=X.shape[1], random_state=0) for k in (10, 40)]
display = RateDistortionDisplay.from_compressed_tensors(
    [compressed_tensor(s.fit(X), X) for s in settings], X, title=f"Size against error: {name}"
)
for i in display.front:
    print(f"{settings[i]}: kappa = {settings[i].kappa_:.6f}, {display.size[i]:,.0f} bytes, "
          f"relative error {display.quality[i]:.3f}")
plt.show()
