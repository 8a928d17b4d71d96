"""The demo: split, training, choice, and the files it leaves."""
# SPDX-License-Identifier: BSD-3-Clause

import builtins
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

import skfactor
from skfactor.demo import FULL, Effort, Trial, build_network, choose, load_images, run, train

SMALL = Effort(n_epochs=4, n_clusters=(4, 16), entropy_weight=(0.0, 0.03))
FILES = {"network.safetensors", "network.skf", "report.json", "report.html", "elbow.png", "size_accuracy.png",
         "codebook.png"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One reduced run: its folder, the figures it returned, and the global random states around it."""
    folder = tmp_path_factory.mktemp("demo")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    figures = run(folder / "out", effort=SMALL, seed=1)
    after = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    return folder / "out", figures, before, after


def test_split_is_disjoint_and_complete():
    digits = load_images()
    parts = [digits.X_train, digits.X_validation, digits.X_test]
    assert [len(part) for part in parts] == [897, 400, 500]
    assert all(part.dtype == np.float32 and part.min() == 0 and part.max() == 1 for part in parts)
    together = np.concatenate(parts).reshape(-1, 64)
    original = load_digits().data
    assert sorted(map(tuple, together * 16)) == sorted(map(tuple, original))
    labels = np.concatenate([digits.y_train, digits.y_validation, digits.y_test])
    found = {tuple(x): set() for x in original}
    for x, y in zip(original, load_digits().target):
        found[tuple(x)].add(y)
    assert all(y in found[tuple(x)] for x, y in zip(together * 16, labels))


def test_files_and_figures(outcome):
    folder, figures, _, _ = outcome
    assert {path.name for path in folder.iterdir()} == FILES
    assert figures["bytes_before"] == (folder / "network.safetensors").stat().st_size
    assert figures["bytes_after"] == (folder / "network.skf").stat().st_size
    assert figures["bytes_after"] * 5 < figures["bytes_before"]
    assert figures["n_tensors"] == len(load_file(folder / "network.safetensors"))
    report = json.loads((folder / "report.json").read_text())
    assert report["total"]["bytes_after"] == figures["bytes_after"]
    for name in ("elbow.png", "size_accuracy.png", "codebook.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_accuracies_are_those_of_the_files(outcome):
    folder, figures, _, _ = outcome
    digits = load_images()
    for key, state in (("accuracy_before", load_file(folder / "network.safetensors")),
                       ("accuracy_after", skfactor.load(folder / "network.skf"))):
        network = build_network().eval()
        network.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in state.items()})
        with torch.no_grad():
            labels = network(torch.from_numpy(digits.X_test)).argmax(1).numpy()
        assert figures[key] == np.mean(labels == digits.y_test)
    assert figures["accuracy_before"] > 0.5


def test_global_random_states_are_untouched(outcome):
    _, _, before, after = outcome
    assert torch.equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_same_seed_same_network_whatever_the_global_state():
    digits = load_images()
    first = train(digits, n_epochs=1, seed=3).state_dict()
    torch.rand(7)
    again = train(digits, n_epochs=1, seed=3).state_dict()
    other = train(digits, n_epochs=1, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


@pytest.mark.parametrize(("accuracies", "sizes", "chosen"), [
    ([0.980, 0.975, 0.9749], [30, 20, 10], 1),
    ([0.90, 0.80, 0.90], [30, 20, 20], 2),
    ([0.99, 0.98, 0.985], [20, 20, 20], 0),
])
def test_choice_is_the_smallest_within_half_a_point(accuracies, sizes, chosen):
    trials = [Trial(0, 0.0, size, found) for size, found in zip(sizes, accuracies)]
    assert choose(trials, 0.98) == chosen


def test_without_matplotlib_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    run(tmp_path, effort=Effort(1, (4,), (0.0,)))
    printed = capsys.readouterr().out
    assert "matplotlib is not installed" in printed
    assert {path.name for path in tmp_path.iterdir()} == {name for name in FILES if not name.endswith("png")}
    assert "elbow.png" not in printed


@pytest.mark.slow
def test_full_demo_loses_little_and_gains_much(tmp_path):
    figures = run(tmp_path, effort=FULL)
    assert figures["accuracy_before"] > 0.96
    assert figures["accuracy_after"] > figures["accuracy_before"] - 0.02
    assert figures["bytes_before"] > 8 * figures["bytes_after"]
