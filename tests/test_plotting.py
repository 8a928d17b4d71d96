"""Displays: what is drawn is the data, checked on the artists and not on pixels."""
# SPDX-License-Identifier: BSD-3-Clause

import builtins

import numpy as np
import pytest

from skfactor.estimators import KMeansWeightSharer, compressed_tensor
from skfactor.plotting import CodebookDisplay, ElbowDisplay, RateDistortionDisplay, pareto_front

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture
def ax():
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture
def W():
    return np.random.default_rng(0).laplace(size=(12, 20)).astype(np.float32)


def is_beaten(i, size, quality):
    """Definition of the Pareto front, point against point."""
    return any(
        size[j] <= size[i] and quality[j] >= quality[i] and (size[j] < size[i] or quality[j] > quality[i])
        for j in range(len(size))
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_pareto_front_is_what_nothing_beats(seed, higher_is_better):
    rng = np.random.default_rng(seed)
    size, quality = rng.integers(1, 9, 12), rng.integers(1, 9, 12)
    front = pareto_front(size, quality, higher_is_better=higher_is_better)
    signed = quality if higher_is_better else -quality
    unbeaten = {(size[i], signed[i]) for i in range(12) if not is_beaten(i, size, signed)}
    assert [(size[i], signed[i]) for i in front] == sorted(unbeaten)


def test_elbow_draws_the_error_of_real_fits(ax, W):
    display = ElbowDisplay.from_estimator(KMeansWeightSharer(n_clusters=5), W, k_max=12, ax=ax, name="conv")
    k, error = display.line_.get_data()
    assert list(k) == list(range(1, 13))
    for n_clusters in (1, 5, 12):
        sharer = KMeansWeightSharer(n_clusters=n_clusters, certify=True).fit(W)
        W_hat = sharer.inverse_transform(sharer.transform(W))
        expected = np.linalg.norm(W_hat - W) / np.linalg.norm(W)
        assert error[n_clusters - 1] == pytest.approx(expected, rel=1e-4)
    assert display.chosen_.get_xdata() == [5]
    assert display.chosen_.get_ydata() == [error[4]]
    assert display.figure_ is ax.figure
    assert "conv" in ax.get_title()


def test_elbow_kappa_axis(ax, W):
    display = ElbowDisplay.from_estimator(KMeansWeightSharer(n_clusters=4), W, k_max=16, ax=ax)
    shown = {x: t.get_text() for x, t in zip(display.kappa_ax_.get_xticks(), display.kappa_ax_.get_xticklabels())}
    sharer = KMeansWeightSharer(n_clusters=4).fit(W)
    assert float(shown[4]) == pytest.approx(100 * sharer.kappa_, abs=0.05)
    display.figure_.canvas.draw()
    assert display.kappa_ax_.get_xlim() == ax.get_xlim()


def test_elbow_of_zeros_has_no_error(ax):
    display = ElbowDisplay.from_estimator(KMeansWeightSharer(n_clusters=2), np.zeros((3, 4)), k_max=4, ax=ax)
    assert not display.line_.get_ydata().any()


def test_codebook_draws_histogram_and_centroids(ax, W):
    sharer = KMeansWeightSharer(n_clusters=6).fit(W)
    display = CodebookDisplay.from_estimator(sharer, W, ax=ax)
    assert sum(bar.get_height() for bar in display.histogram_) == W.size
    drawn = [segment[0, 0] for segment in display.centroids_.get_segments()]
    np.testing.assert_allclose(drawn, sharer.cluster_centers_[:, 0])
    share = np.bincount(sharer.labels_.ravel()) / W.size
    entropy = sum(-p * np.log2(p) for p in share)
    assert f"{entropy:.2f} bits" in ax.get_title()


@pytest.mark.parametrize(
    ("params", "index", "part"),
    [
        ({"granularity": "row"}, 3, np.s_[3]),
        ({"granularity": "column"}, 2, np.s_[:, 2]),
        ({"granularity": "group", "group_size": 5}, 2, np.s_[10:12]),
    ],
)
def test_codebook_of_one_row_column_or_group(ax, W, params, index, part):
    sharer = KMeansWeightSharer(n_clusters=2, **params).fit(W)
    display = CodebookDisplay.from_estimator(sharer, W, index=index, ax=ax)
    assert sorted(display.weights) == sorted(np.float64(W[part]).ravel())
    np.testing.assert_allclose(display.codebook, np.sort(sharer.decoder_.codebooks[index, :, 0]))


def test_rate_distortion_draws_points_front_and_marks(ax):
    size, quality = [4000, 1000, 2000, 3000], [0.97, 0.5, 0.9, 0.8]
    display = RateDistortionDisplay(size, quality, chosen=2, original=(50_000, 0.98)).plot(ax)
    assert list(display.points_.get_xdata()) == [4, 1, 2, 3]
    assert list(display.points_.get_ydata()) == quality
    assert list(display.front_.get_xdata()) == [1, 2, 4]
    assert (*display.chosen_.get_xdata(), *display.chosen_.get_ydata()) == (2, 0.9)
    assert (*display.original_.get_xdata(), *display.original_.get_ydata()) == (50, 0.98)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "chosen: 2 kB, 90.00 %" in labels


def test_rate_distortion_of_compressed_tensors(ax, W):
    sharers = [KMeansWeightSharer(n_clusters=k).fit(W) for k in (2, 4, 8)]
    tensors = [compressed_tensor(sharer, W) for sharer in sharers]
    display = RateDistortionDisplay.from_compressed_tensors(tensors, W, ax=ax)
    assert list(display.size) == [tensor.nbytes for tensor in tensors]
    np.testing.assert_allclose(display.quality, [np.sqrt(-sharer.score(W)) for sharer in sharers], rtol=1e-5)
    assert not display.higher_is_better


@pytest.mark.parametrize("n_points", [1, 3])
def test_figures_render_to_files(tmp_path, n_points, W):
    displays = [
        ElbowDisplay(np.arange(1, n_points + 1), np.linspace(1, 0.5, n_points), chosen=1, n_weights=100).plot(),
        CodebookDisplay(W[:n_points], [0.0] * n_points).plot(),
        RateDistortionDisplay(np.arange(1, n_points + 1), np.linspace(0, 1, n_points)).plot(),
    ]
    import matplotlib.pyplot as plt

    for i, display in enumerate(displays):
        display.figure_.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
        plt.close(display.figure_)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElbowDisplay([1, 2], [0.5]), "relative_error must have 2 values, got 1"),
        (lambda: ElbowDisplay([1, 2], [0.5, np.nan]), "finite"),
        (lambda: ElbowDisplay([1, 2], [0.5, 0.1], chosen=3), "chosen must be one of"),
        (lambda: CodebookDisplay([], [0.0]), "weights must be a non-empty"),
        (lambda: CodebookDisplay([1.0, 2.0], [0.0], codes=[0]), "codes must have 2 values"),
        (lambda: RateDistortionDisplay([0, 1], [0.5, 0.5]), "size must be positive"),
        (lambda: RateDistortionDisplay([1, 2], [0.5, 0.5], chosen=2), "chosen must be an index in 0..1"),
        (lambda: CodebookDisplay.from_estimator(KMeansWeightSharer(), [[1.0]]), "needs a fitted estimator"),
    ],
)
def test_wrong_data_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_codebook_of_vectors_and_unknown_index_are_refused(W):
    sharer = KMeansWeightSharer(n_clusters=3, vector_size=2, random_state=0).fit(W)
    with pytest.raises(ValueError, match="codebook of scalars"):
        CodebookDisplay.from_estimator(sharer, W)
    with pytest.raises(ValueError, match=r"index must be in 0\.\.0, got 1"):
        CodebookDisplay.from_estimator(KMeansWeightSharer(n_clusters=3).fit(W), W, index=1)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"skfactor\[plot\]"):
        ElbowDisplay([1, 2], [1.0, 0.5]).plot()
