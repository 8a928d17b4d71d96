"""
==========================
An autoencoder against PCA
==========================

PCA is the best linear way to write an image with a few numbers, and it is where `AutoencoderCompressor` starts: a wide
enough network contains the principal components exactly. Training can only improve on them, as long as the images
lie on something more curved than a plane. With linear layers it cannot: nothing linear lies below PCA.
"""
# SPDX-License-Identifier: BSD-3-Clause

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline

from skfactor import AutoencoderCompressor, KMeansWeightSharer
from skfactor.estimators import compressed_tensor
from skfactor.plotting import ManifoldDisplay, RateDistortionDisplay, ReconstructionDisplay

images, labels = load_digits(return_X_y=True)
X, X_test, _, y_test = train_test_split((images / 16).astype(np.float32), labels, test_size=500, random_state=0)
print(f"{len(X)} images to learn from, {len(X_test)} that were never used")


def lost(estimator, X):
    """Share of the variance that is lost."""
    X_hat = estimator.inverse_transform(estimator.transform(X))
    return np.square(X - X_hat).sum() / np.square(X - X.mean(axis=0)).sum()


# %%
# Error for every number of codes
# -------------------------------
# The linear autoencoder lies on PCA's curve. The other one has one hidden layer on each side and is stopped early: the
# loss on held-out rows says when.
sizes = [1, 2, 4, 8, 16]
found = {"PCA": [PCA(n).fit(X) for n in sizes]}
found["linear autoencoder"] = [AutoencoderCompressor((), n, activation="identity", random_state=0).fit(X)
                               for n in sizes]
found["autoencoder, 128 hidden units"] = [AutoencoderCompressor((128,), n, early_stopping=True, random_state=0).fit(X)
                                          for n in sizes]
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
for (name, fitted), style in zip(found.items(), ("o-", "x--", "s-")):
    for data, part, axes in (("learned from", X, left), ("new", X_test, right)):
        errors = [lost(estimator, part) for estimator in fitted]
        axes.plot(sizes, errors, style, label=name)
        print(f"{name}, {data} images: " + ", ".join(f"{n} codes {e:.3f}" for n, e in zip(sizes, errors)))
for axes, title in ((left, "images it learned from"), (right, "images it never saw")):
    axes.set(xscale="log", xlabel="codes per image", ylabel="share of the variance that is lost", title=title)
    axes.set_xticks(sizes, labels=sizes)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)

# %%
# What four numbers can say
# -------------------------
four = {name: fitted[sizes.index(4)] for name, fitted in found.items() if "linear" not in name}
ReconstructionDisplay.from_estimator(four, X_test, n_images=12).figure_.set_size_inches(8, 3)

# %%
# What two numbers can say
# ------------------------
# Codes of two numbers are a map. The colour is the digit, which neither of them was told.
figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
for (name, fitted), ax in zip((item for item in found.items() if "linear" not in item[0]), axes):
    ManifoldDisplay(fitted[sizes.index(2)].transform(X_test), y_test, method=name, name="new images").plot(ax)

# %%
# The size of the whole
# ---------------------
# A file holds the codes and the decoder. `KMeansWeightSharer` after the autoencoder quantises the codes, to a few bits
# each. For a thousand small images the decoder is most of the file, and to share the values of the pixels is cheaper
# at every size: a network pays where it serves many rows.
pipelines = [Pipeline([("encode", AutoencoderCompressor((16,), n, random_state=0)),
                       ("share", KMeansWeightSharer(16, granularity="column"))]) for n in (4, 8, 16)]
settings = [*pipelines, *(KMeansWeightSharer(k) for k in (2, 3, 4, 8))]
names = [f"autoencoder with {n} codes of 16 values" for n in (4, 8, 16)] + [f"{k} pixel values" for k in (2, 3, 4, 8)]
display = RateDistortionDisplay.from_compressed_tensors(
    [compressed_tensor(s.fit(X), X) for s in settings], X, title=f"Size of {len(X)} images against error"
)
for setting, size, error in zip(names, display.size, display.quality):
    print(f"{setting}: {size:,.0f} bytes, relative error {error:.3f}")
plt.show()
