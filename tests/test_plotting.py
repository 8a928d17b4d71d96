"""Displays: what is drawn is the data, checked on the artists and not on pixels."""
# SPDX-License-Identifier: BSD-3-Clause

import builtins

import numpy as np
import pytest
from sklearn.decomposition import PCA

from skfactor import CompressionSearchCV
from skfactor.estimators import KMeansWeightSharer, LowRankFactorizer, compressed_tensor
from skfactor.plotting import (
    AtomsDisplay,
    CodebookDisplay,
    ElbowDisplay,
    ManifoldDisplay,
    RateDistortionDisplay,
    ReconstructionDisplay,
    pareto_front,
)

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


@pytest.fixture(scope="module")
def search():
    X = np.random.default_rng(0).laplace(size=(12, 20)).astype(np.float32)
    grid = {"n_clusters": [2, 16, 4, 8], "entropy_weight": [0.0, 0.02]}
    return CompressionSearchCV(KMeansWeightSharer(), grid, max_distortion=0.05).fit(X)


def test_elbow_of_a_search_draws_what_differs_in_one_parameter(ax, W, search):
    display = ElbowDisplay.from_search(search, "n_clusters", n_weights=W.size, ax=ax)
    k, error = display.line_.get_data()
    assert list(k) == [2, 4, 8, 16]
    for n_clusters, found in zip(k, error):
        params = search.best_params_ | {"n_clusters": int(n_clusters)}
        expected = np.sqrt(-KMeansWeightSharer(**params).fit(W).score(W))
        assert found == pytest.approx(expected, rel=1e-5)
    assert display.chosen_.get_xdata() == [search.best_params_["n_clusters"]]


def test_rate_distortion_of_a_search(ax, search):
    for given in (search, search.cv_results_):
        display = RateDistortionDisplay.from_search(given, ax=ax)
        np.testing.assert_array_equal(display.size, search.cv_results_["mean_test_bytes"])
        np.testing.assert_allclose(display.quality**2, np.abs(search.cv_results_["mean_test_distortion"]))
    assert display.chosen_ is None
    display = RateDistortionDisplay.from_search(search, ax=ax)
    assert display.chosen_.get_xdata()[0] * 1000 == search.best_bytes_
    assert display.chosen_.get_ydata()[0] ** 2 == pytest.approx(search.best_distortion_, rel=1e-6)


def test_candidates_that_failed_are_not_drawn(ax):
    results = {"mean_test_rate": [-300, np.nan, -100], "mean_test_distortion": [-0.01, np.nan, -0.04]}
    display = RateDistortionDisplay.from_search(results, chosen=2, ax=ax)
    assert list(display.size) == [300, 100]
    np.testing.assert_allclose(display.quality, [0.1, 0.2])
    assert display.chosen_.get_xdata() == [0.1]
    with pytest.raises(ValueError, match="did not fail, got 1"):
        RateDistortionDisplay.from_search(results, chosen=1)
    with pytest.raises(ValueError, match="must have 'mean_test_bytes' or 'mean_test_rate'"):
        RateDistortionDisplay.from_search({"mean_test_score": [1.0]})


def tiles(display, n, shape):
    """The images that were drawn, cut out of the whole again."""
    whole = np.ma.filled(display.image_.get_array().astype(float), np.nan)
    height, width = shape
    n_columns = (whole.shape[1] + 1) // (width + 1)
    cut = [whole[r * (height + 1) :, c * (width + 1) :][:height, :width] for r, c in
           (divmod(i, n_columns) for i in range(n))]
    assert np.isfinite(whole).sum() == n * height * width  # nothing but images and the lines between them
    return np.array(cut)


def test_atoms_are_drawn_as_images_by_use(ax):
    X = np.random.default_rng(0).standard_normal((30, 12))
    factorizer = LowRankFactorizer(rank=5).fit(X)
    display = AtomsDisplay.from_estimator(factorizer, X, image_shape=(3, 4), ax=ax, name="noise")
    use = np.abs(factorizer.transform(X)).sum(axis=0)
    assert list(use[display.order]) == sorted(use, reverse=True)
    atoms = factorizer.decoder_.components[display.order]
    expected = atoms / np.abs(atoms).max(axis=1, keepdims=True)
    np.testing.assert_allclose(tiles(display, 5, (3, 4)), expected.reshape(5, 3, 4))
    assert "5 atoms: noise" in ax.get_title()
    assert display.image_.get_clim() == (-1, 1)
    display.plot(ax, n_atoms=2, n_columns=1)
    np.testing.assert_allclose(tiles(display, 2, (3, 4)), expected[:2].reshape(2, 3, 4))


def test_centroids_of_rows_are_atoms(ax):
    X = np.random.default_rng(0).uniform(0, 1, (40, 9))
    sharer = KMeansWeightSharer(4, vector_size=9, random_state=0).fit(X)
    display = AtomsDisplay.from_estimator(sharer, X, ax=ax)
    assert display.image_shape == (3, 3)
    centroids = sharer.cluster_centers_[display.order]
    np.testing.assert_allclose(tiles(display, 4, (3, 3)).reshape(4, 9), centroids / centroids.max(axis=1)[:, None])
    assert list(display.usage) == list(np.bincount(sharer.labels_[:, 0]))
    by_column = KMeansWeightSharer(3, vector_size=4, granularity="column", random_state=0).fit(X[:, :8])
    display = AtomsDisplay.from_estimator(by_column, X[:, :8], index=1, ax=ax)
    assert list(display.usage) == list(np.bincount(by_column.labels_[:, 1], minlength=3))


def test_reconstructions_are_drawn_under_the_originals(ax):
    X = np.random.default_rng(0).uniform(0, 5, (20, 6))
    estimators = {"two axes": PCA(2).fit(X), "4 values": KMeansWeightSharer(4).fit(X)}
    display = ReconstructionDisplay.from_estimator(estimators, X, image_shape=(2, 3), n_images=4, ax=ax)
    found = [e.inverse_transform(e.transform(X)) for e in estimators.values()]
    expected = np.vstack([X[:4], *(f[:4] for f in found)]).reshape(12, 2, 3)
    np.testing.assert_allclose(tiles(display, 12, (2, 3)), expected)
    for X_hat, (name, error), label in zip(found, display.errors.items(), ax.get_yticklabels()[1:]):
        assert error == pytest.approx(np.linalg.norm(X_hat - X) / np.linalg.norm(X))
        assert label.get_text().startswith(name)
    assert list(ax.get_yticks()) == [0.5, 3.5, 6.5]


def test_reconstructions_of_compressed_tensors(ax):
    X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    sharer = KMeansWeightSharer(3).fit(X)
    display = ReconstructionDisplay.from_compressed_tensors({"3": compressed_tensor(sharer, X)}, X, ax=ax)
    np.testing.assert_array_equal(display.reconstructions["3"], sharer.inverse_transform(sharer.labels_))
    assert display.errors["3"] == pytest.approx(np.sqrt(-sharer.score(X)), rel=1e-5)
    assert ReconstructionDisplay(np.zeros((1, 4)), {"same": np.zeros((1, 4))}).errors == {"same": 0.0}


class FirstTwo:
    """A map that keeps the first two columns."""

    def fit_transform(self, X):
        return X[:, :2]


def test_manifold_colours_rows_by_cluster(ax):
    X = np.random.default_rng(0).standard_normal((25, 6))
    sharer = KMeansWeightSharer(3, vector_size=6, random_state=0).fit(X)
    display = ManifoldDisplay.from_estimator(sharer, X, manifold=FirstTwo(), ax=ax, name="filters")
    np.testing.assert_array_equal(display.scatter_.get_offsets(), X[:, :2])
    np.testing.assert_array_equal(display.scatter_.get_array(), sharer.labels_[:, 0])
    assert ax.get_title() == "Map of filters by FirstTwo"


def test_manifold_colours_rows_by_main_atom(ax):
    X = np.random.default_rng(0).standard_normal((25, 6))
    factorizer = LowRankFactorizer(rank=3).fit(X)
    display = ManifoldDisplay.from_estimator(factorizer, X, manifold=FirstTwo(), ax=ax)
    codes = factorizer.transform(X)
    for row, label in zip(codes, display.labels):
        assert all(abs(row[label]) >= abs(c) for c in row)


def test_manifold_by_default_keeps_groups_together(ax):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12)
    X = 50.0 * labels[:, None] + rng.standard_normal((24, 5))
    display = ManifoldDisplay.from_labels(X, labels, ax=ax)
    middles = [display.embedding[labels == k].mean(axis=0) for k in (0, 1)]
    nearest = [np.argmin([np.linalg.norm(point - m) for m in middles]) for point in display.embedding]
    np.testing.assert_array_equal(nearest, labels)
    assert ManifoldDisplay.from_labels(X, ax=ax, manifold=FirstTwo()).colorbar_ is None


@pytest.mark.parametrize("n_points", [1, 3])
def test_figures_render_to_files(tmp_path, n_points, W):
    displays = [
        ElbowDisplay(np.arange(1, n_points + 1), np.linspace(1, 0.5, n_points), chosen=1, n_weights=100).plot(),
        CodebookDisplay(W[:n_points], [0.0] * n_points).plot(),
        RateDistortionDisplay(np.arange(1, n_points + 1), np.linspace(0, 1, n_points)).plot(),
        AtomsDisplay(np.zeros((n_points, 4))).plot(),
        ReconstructionDisplay(np.zeros((n_points, 4)), {"same": np.zeros((n_points, 4))}).plot(),
        ManifoldDisplay(np.zeros((n_points, 2)), np.arange(n_points)).plot(),
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
        (lambda: AtomsDisplay(np.ones((2, 6))), r"image_shape must be \(height, width\) with a product of 6"),
        (lambda: AtomsDisplay(np.ones((2, 4)), usage=[1]), "usage must have 2 values"),
        (lambda: AtomsDisplay(np.ones(4)), "atoms must be a non-empty 2-D"),
        (lambda: AtomsDisplay.from_estimator(KMeansWeightSharer(2).fit([[1.0, 2.0]])), "needs a fitted estimator with"),
        (lambda: ReconstructionDisplay(np.ones((2, 4)), {"a": np.ones((1, 4))}), "must have 2 rows, got 1"),
        (lambda: ReconstructionDisplay(np.ones((2, 4)), {"a": np.ones((2, 9))}), "must have 4 columns, got 9"),
        (lambda: ReconstructionDisplay(np.ones((2, 4)), {}, errors={"a": 0.0}), "errors must have the names"),
        (lambda: ManifoldDisplay(np.ones((3, 3))), "embedding must have 2 columns, got 3"),
        (lambda: ManifoldDisplay(np.ones((3, 2)), [0.5, 1.0, 2.0]), "labels must be 3 integers"),
        (lambda: ManifoldDisplay.from_labels(np.ones((2, 2))), "at least 3 rows, got 2"),
        (lambda: ManifoldDisplay.from_estimator(KMeansWeightSharer(2).fit([[1.0, 2.0]]), [[1.0, 2.0]]),
         "one integer code or several real ones"),
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
