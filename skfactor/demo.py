"""`skfactor demo`: a small network is trained, compressed by weight sharing, written, and read back.

Everything a new user wants to see once, on the handwritten digits that come with scikit-learn: accuracy before and
after on images that neither the training nor the choice of the settings has seen, the size of real files, and plots.
"""
# SPDX-License-Identifier: BSD-3-Clause

import time
import warnings
from collections import OrderedDict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning

__all__ = ["FULL", "QUICK", "Digits", "Effort", "Trial", "build_network", "choose", "load_images", "run", "train"]

_TOLERATED_LOSS = 0.005  # of the accuracy on the validation images
_SHOWN_LAYER = "fc1.weight"  # the largest, for the plots
_TABLE_COLUMNS = ("tensor", "weights", "bits/weight", "before", "after", "ratio", "output error", "κ")
_CONTENTS = {
    "network.safetensors": "the trained network, float32",
    "network.skf": "the compressed network",
    "report.html": "the table above",
    "report.json": "the same figures for programs",
    "elbow.png": f"error of {_SHOWN_LAYER} for every number of clusters",
    "size_accuracy.png": "all settings that were tried",
    "codebook.png": f"the shared values of {_SHOWN_LAYER}",
}


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) in 0..1 as float32, and labels, of three disjoint parts."""

    X_train: np.ndarray
    y_train: np.ndarray
    X_validation: np.ndarray
    y_validation: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


class Effort(NamedTuple):
    """How long to train, and which settings to try."""

    n_epochs: int
    n_clusters: tuple[int, ...]
    entropy_weight: tuple[float, ...]


FULL = Effort(40, (4, 8, 12, 16), (0.0, 0.005, 0.01, 0.02, 0.04, 0.08))
QUICK = Effort(12, (8, 16), (0.0, 0.02))


class Trial(NamedTuple):
    """One setting of the weight sharing, the size of its file and its accuracy on the validation images."""

    n_clusters: int
    entropy_weight: float
    nbytes: int
    accuracy: float


def load_images():
    """The 1,797 digits of scikit-learn in a fixed split: 897 to train, 400 to choose settings, 500 to test.

    >>> from skfactor.demo import load_images
    >>> load_images().X_test.shape
    (500, 1, 8, 8)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    X, X_test, y, y_test = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
    X, X_validation, y, y_validation = train_test_split(X, y, test_size=400, stratify=y, random_state=0)
    return Digits(X, y, X_validation, y_validation, X_test, y_test)


def build_network(seed=0):
    """Three convolutions and two linear layers, 57,482 parameters, for images (n, 1, 8, 8), with random weights."""
    import torch
    from torch import nn

    # initial weights draw from torch's global generator, which is put back afterwards
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1), relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),  # (n, 32, 4, 4)
            conv3=nn.Conv2d(32, 64, 3, padding=1), relu3=nn.ReLU(), pool3=nn.MaxPool2d(2),  # (n, 64, 2, 2)
            flatten=nn.Flatten(), dropout=nn.Dropout(0.3),
            fc1=nn.Linear(256, 128), relu4=nn.ReLU(), fc2=nn.Linear(128, 10),
        ))


def train(digits, *, n_epochs, seed):
    """A network trained on `digits`, randomly shifted by a pixel; the global random state of torch is untouched."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    X, y = torch.from_numpy(digits.X_train), torch.from_numpy(digits.y_train)
    network = build_network(seed)
    # batches and dropout draw from torch's global generator too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        n_steps = n_epochs * -(-len(X) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=n_steps)
        for _ in range(n_epochs):
            for batch in torch.randperm(len(X)).split(64):
                down, right = torch.randint(0, 3, (2,)).tolist()
                shifted = pad(X[batch], (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
                optimizer.zero_grad()
                cross_entropy(network(shifted), y[batch]).backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def accuracy(network, X, y):
    """Fraction of the images `X` whose label `network` finds."""
    import torch

    with torch.no_grad():
        return float((network(torch.from_numpy(X)).argmax(dim=1).numpy() == y).mean())


def choose(trials, original_accuracy, *, tolerated_loss=_TOLERATED_LOSS):
    """Index of the smallest trial that loses at most `tolerated_loss` of accuracy; without one, of the most accurate.

    >>> from skfactor.demo import Trial, choose
    >>> choose([Trial(4, 0.0, 900, 0.90), Trial(8, 0.0, 1200, 0.98), Trial(16, 0.0, 1500, 0.98)], 0.98)
    1
    """
    good = [i for i, trial in enumerate(trials) if trial.accuracy >= original_accuracy - tolerated_loss - 1e-12]
    if good:
        return min(good, key=lambda i: (trials[i].nbytes, -trials[i].accuracy))
    return max(range(len(trials)), key=lambda i: (trials[i].accuracy, -trials[i].nbytes))


def _compress(network, digits, n_clusters, entropy_weight):
    import torch

    from skfactor.bridge import compress
    from skfactor.estimators import KMeansWeightSharer

    sharer = KMeansWeightSharer(n_clusters, entropy_weight=entropy_weight)
    with warnings.catch_warnings():
        # a small layer may have fewer distinct values than clusters; then it is stored exactly
        warnings.simplefilter("ignore", ConvergenceWarning)
        return compress(network, sharer, calibration=torch.from_numpy(digits.X_train), progress=False)


def _try_settings(network, digits, path, effort):
    """A `Trial` for every setting; the sizes are those of a file that is written to `path` each time."""
    trials = []
    try:
        for n_clusters, entropy_weight in product(effort.n_clusters, effort.entropy_weight):
            result = _compress(network, digits, n_clusters, entropy_weight)
            result.save(path)
            found = accuracy(result.model, digits.X_validation, digits.y_validation)
            trials.append(Trial(n_clusters, entropy_weight, path.stat().st_size, found))
    finally:
        path.unlink(missing_ok=True)
    return trials


def _check_round_trip(result, path):
    """Number of tensors, all of which the file gives back bit for bit; RuntimeError where one is not."""
    from skfactor.bridge import load

    saved, loaded = result.state_dict(), load(path)
    for name, tensor in saved.items():
        if name not in loaded or tensor.numpy().tobytes() != loaded[name].numpy().tobytes():
            raise RuntimeError(f"tensor {name!r} of {path} is not what was saved")
    return len(saved)


def _save_plots(folder, weight, sharer, trials, chosen, original):
    """Three PNG files into `folder`; `original` is (bytes, validation accuracy)."""
    from matplotlib.figure import Figure

    from skfactor.plotting import CodebookDisplay, ElbowDisplay, RateDistortionDisplay

    curve = RateDistortionDisplay(
        [trial.nbytes for trial in trials], [trial.accuracy for trial in trials], chosen=chosen, original=original,
        quality_name="accuracy on the validation images", title="Size of the file against accuracy",
    )
    draw = {
        "elbow.png": lambda ax: ElbowDisplay.from_estimator(sharer, weight, k_max=64, ax=ax, name=_SHOWN_LAYER),
        "size_accuracy.png": curve.plot,
        "codebook.png": lambda ax: CodebookDisplay.from_estimator(sharer, weight, ax=ax, name=_SHOWN_LAYER),
    }
    for name, function in draw.items():
        # a figure of its own, without pyplot: no window, no global state
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        function(figure.subplots())
        figure.savefig(folder / name, dpi=150)


def run(out="skfactor-demo", *, effort=FULL, seed=0):
    """Train, choose, compress, save, load back, and print what came of it.

    Parameters
    ----------
    out : path, default="skfactor-demo"
        Folder for the files; made where it does not exist.
    effort : Effort, default=FULL
        `QUICK` takes a few seconds.
    seed : int, default=0
        Seed of the training; everything else is deterministic.

    Returns
    -------
    dict
        The figures printed: accuracies on the test images, bytes of the files, the chosen setting, and the number of
        tensors, all of which came back bit for bit.
    """
    from safetensors.torch import save_file

    from skfactor.bridge import load_into
    from skfactor.report import Report

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CONTENTS:
        (folder / name).unlink(missing_ok=True)
    dense, small = folder / "network.safetensors", folder / "network.skf"
    print("skfactor demo: from a trained network to a small file and back\n")

    with _Step("Train") as step:
        digits = load_images()
        network = train(digits, n_epochs=effort.n_epochs, seed=seed)
        save_file(network.state_dict(), dense)
        n_weights = sum(p.numel() for p in network.parameters())
        step.text = f"5 layers, {n_weights:,} weights, on {len(digits.X_train)} images of handwritten digits"
    with _Step("Choose") as step:
        trials = _try_settings(network, digits, folder / ".trial.skf", effort)
        validation = accuracy(network, digits.X_validation, digits.y_validation)
        chosen = choose(trials, validation)
        best = trials[chosen]
        step.text = (f"smallest of {len(trials)} settings within {100 * _TOLERATED_LOSS:g} points on "
                     f"{len(digits.X_validation)} other images")
    with _Step("Compress") as step:
        result = _compress(network, digits, best.n_clusters, best.entropy_weight)
        result.save(small)
        step.text = (f"KMeansWeightSharer(n_clusters={best.n_clusters}, entropy_weight={best.entropy_weight:g}), "
                     f"{len(digits.X_train)} images without labels")
    with _Step("Load") as step:
        n_tensors = _check_round_trip(result, small)
        restored = build_network().eval()
        load_into(restored, small)
        step.text = f"{n_tensors} of {n_tensors} tensors equal what was saved, bit for bit"

    report = Report.from_file(small, original=dense, records=result.records)
    report.to_json(folder / "report.json")
    report.to_html(folder / "report.html")
    print("\n" + report.to_text(_TABLE_COLUMNS) + "\n")
    figures = {
        "accuracy_before": accuracy(network, digits.X_test, digits.y_test),
        "accuracy_after": accuracy(restored, digits.X_test, digits.y_test),
        "bytes_before": dense.stat().st_size,
        "bytes_after": small.stat().st_size,
        "n_clusters": best.n_clusters,
        "entropy_weight": best.entropy_weight,
        "n_tensors": n_tensors,
    }
    _print_outcome(figures, len(digits.y_test))
    weight, sharer = network.state_dict()[_SHOWN_LAYER].numpy(), result.estimators_[_SHOWN_LAYER]
    try:
        _save_plots(folder, weight, sharer, trials, chosen, original=(dense.stat().st_size, validation))
    except ImportError:
        print("no plots: matplotlib is not installed; pip install 'skfactor[plot]'\n")
    _print_files(folder)
    return figures


class _Step:
    """Times a step and prints its line."""

    def __init__(self, name):
        self.name, self.text = name, ""

    def __enter__(self):
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            print(f"{self.name:9} {self.text}  ({time.perf_counter() - self._started:.1f} s)", flush=True)


def _print_outcome(figures, n_test):
    """Accuracy and size, before and after, in two lines."""
    before, after = figures["accuracy_before"], figures["accuracy_after"]
    ratio = figures["bytes_before"] / figures["bytes_after"]
    print(f"{'':9}{'original':>16}{'compressed':>16}")
    print(f"{'accuracy':9}{100 * before:>14.1f} %{100 * after:>14.1f} %   on {n_test} images never used before")
    print(f"{'file':9}{figures['bytes_before']:>10,} bytes{figures['bytes_after']:>10,} bytes   "
          f"{ratio:.1f}x smaller, everything counted\n")


def _print_files(folder):
    print(f"Written to {folder}:")
    for name, text in _CONTENTS.items():
        if (folder / name).exists():
            print(f"  {name:20} {text}")
    print(f"\nNext: skfactor inspect {folder / 'network.skf'} --detail")
