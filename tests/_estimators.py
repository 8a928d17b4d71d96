"""The one list of estimators that scikit-learn's checks and the project's common checks run over."""
# SPDX-License-Identifier: BSD-3-Clause

from dataclasses import dataclass, field
from typing import Any

from skfactor import (
    AutoencoderCompressor,
    BlockTermFactorizer,
    CPDFilterPruner,
    DictionaryFactorizer,
    HierarchicalTuckerFactorizer,
    KMeansWeightSharer,
    LowRankFactorizer,
    MagnitudePruner,
    MantissaRounder,
    SeparableFactorizer,
    TensorTrainFactorizer,
    TuckerFactorizer,
    UniformQuantizer,
)


@dataclass(frozen=True)
class Case:
    """One configured estimator.

    budget : name and rising values of the parameter that buys accuracy with bytes
    full : parameters under which the reconstruction is exact, None where no parameters make it so
    sklearn : whether scikit-learn's suite applies (not where X must have the rows of fit, or a divisible width)
    optimal : whether the solver is globally optimal, so that more budget can never mean more error
    rounding : what "exact" may miss by, relative to the largest value: codes in floating point are rounded
    shrinks : whether codes are shrunk by their price, so that not even a constant matrix comes back exactly
    """

    estimator: Any
    budget: tuple[str, tuple] = ("n_clusters", (2, 4, 8, 16))
    full: dict | None = field(default_factory=lambda: {"n_clusters": 10_000})
    sklearn: bool = True
    optimal: bool = True
    rounding: float = 0.0
    shrinks: bool = False

    @property
    def id(self):
        return repr(self.estimator)


_ALL_ATOMS = {"code_solver": "omp", "n_nonzero_coefs": 100, "n_components": 32}

CASES = [
    Case(KMeansWeightSharer()),
    Case(KMeansWeightSharer(n_clusters=5, certify=True)),
    Case(KMeansWeightSharer(n_clusters=4, granularity="column")),
    Case(KMeansWeightSharer(n_clusters=4, granularity="row"), sklearn=False),
    Case(KMeansWeightSharer(n_clusters=4, granularity="group", group_size=3), sklearn=False),
    Case(KMeansWeightSharer(preserve_zeros=True), optimal=False),
    Case(KMeansWeightSharer(entropy_weight=0.01), full={"n_clusters": 10_000, "entropy_weight": 0.0}, optimal=False),
    Case(KMeansWeightSharer(init="linear"), optimal=False),
    Case(KMeansWeightSharer(init="density"), optimal=False),
    Case(KMeansWeightSharer(init="random", random_state=0), optimal=False),
    Case(KMeansWeightSharer(n_clusters=6, vector_size=2, random_state=0), sklearn=False, optimal=False),
    Case(KMeansWeightSharer(n_clusters=6, vector_size=8, random_state=0), sklearn=False, optimal=False),
    Case(KMeansWeightSharer(n_clusters=3, vector_size=2, granularity="row", random_state=0),
         sklearn=False, optimal=False),
    Case(UniformQuantizer(), budget=("step", (1.0, 0.5, 0.25, 0.1)), full=None, optimal=False),
    Case(UniformQuantizer(entropy_weight=0.0), budget=("step", (1.0, 0.5, 0.25, 0.1)), full=None, optimal=False),
    Case(MantissaRounder(), budget=("n_bits", (1, 2, 4, 8)), full={"n_bits": 53}),
    Case(LowRankFactorizer(rank=4), budget=("rank", (1, 2, 4, 8)), full={"rank": None}, rounding=1e-6),
    Case(LowRankFactorizer(energy=0.9), budget=("energy", (0.3, 0.5, 0.8, 0.95)), full={"energy": 1.0}, rounding=1e-6),
    Case(MagnitudePruner(), ("amount", (0.9, 0.7, 0.5, 0.2)), {"amount": 0.0}, shrinks=True),
    Case(MagnitudePruner(granularity="row"), ("amount", (0.9, 0.7, 0.5, 0.2)), {"amount": 0.0}, shrinks=True),
    Case(MagnitudePruner(granularity="column"), ("amount", (0.9, 0.7, 0.5, 0.2)), {"amount": 0.0}, shrinks=True),
    Case(MagnitudePruner(pattern="2:4"), ("pattern", ("1:4", "2:4", "3:4")), {"pattern": "4:4"}, shrinks=True),
    Case(SeparableFactorizer(rank=4), budget=("rank", (1, 2, 4, 8)), full={"rank": 100}, rounding=1e-6),
    Case(SeparableFactorizer(rank=3, kernel_shape=(2, 4, 2)), budget=("rank", (1, 2, 4, 8)), full={"rank": 100},
         rounding=1e-6, sklearn=False),
    Case(SeparableFactorizer(rank=2, kernel_shape=(4, 2, 2), kind="depthwise"), budget=("rank", (1, 2, 3, 4)),
         full={"rank": 100}, rounding=1e-6, sklearn=False),
    Case(AutoencoderCompressor((16,), 3, max_iter=50, random_state=0), budget=("latent_dim", (1, 2, 4, 8)), full=None,
         optimal=False),
    Case(AutoencoderCompressor((), 3, activation="identity", max_iter=20, random_state=0),
         budget=("latent_dim", (1, 2, 4, 8)), full=None),
    Case(AutoencoderCompressor((12, 8), 2, vector_size=8, activation="tanh", batch_size=4, max_iter=30, device="cpu",
                               random_state=0),
         budget=("latent_dim", (1, 2, 4)), full=None, sklearn=False, optimal=False),
    Case(AutoencoderCompressor((8,), 2, activation="logistic", early_stopping=True, max_iter=20, random_state=0),
         budget=("latent_dim", (1, 8)), full=None, sklearn=False, optimal=False),
    Case(TuckerFactorizer(rank=4), budget=("rank", (1, 2, 4, 8)), full={"rank": None}, rounding=1e-6),
    Case(TuckerFactorizer(energy=0.9, modes="full"), budget=("energy", (0.3, 0.5, 0.8, 0.95)), full={"energy": 1.0},
         rounding=1e-6),
    Case(TensorTrainFactorizer(rank=3), budget=("rank", (1, 2, 3, 4)), full={"rank": None}, rounding=1e-6),
    Case(TensorTrainFactorizer(tol=0.5), budget=("tol", (0.9, 0.7, 0.5, 0.1)), full={"tol": 0.0}, rounding=1e-6),
    Case(BlockTermFactorizer(n_blocks=2, rank=2, max_iter=20), budget=("n_blocks", (1, 2, 3, 4)),
         full={"n_blocks": 1, "rank": None}, rounding=1e-6),
    Case(HierarchicalTuckerFactorizer(rank=3), budget=("rank", (1, 2, 3, 4)), full={"rank": None}, rounding=1e-6),
    Case(HierarchicalTuckerFactorizer(rank=0.4), budget=("rank", (0.1, 0.2, 0.4, 0.8)),
         full={"rank": None}, rounding=1e-6),
    Case(DictionaryFactorizer(8, random_state=0), budget=("alpha", (4.0, 2.0, 1.0, 0.1)), full=_ALL_ATOMS,
         rounding=1e-6, optimal=False, shrinks=True),
    Case(DictionaryFactorizer(5, alpha=0.3, alpha_unit="max", random_state=0), budget=("n_components", (2, 4, 8, 16)),
         full=_ALL_ATOMS, rounding=1e-6, optimal=False, shrinks=True),
    Case(DictionaryFactorizer(6, alpha=0.05, loss="root", random_state=0), budget=("alpha", (0.5, 0.1, 0.01)),
         full=None, optimal=False, shrinks=True),
    Case(DictionaryFactorizer(6, code_solver="omp", n_nonzero_coefs=2, random_state=0),
         budget=("n_nonzero_coefs", (1, 2, 4)), full=_ALL_ATOMS, rounding=1e-6, optimal=False),
    Case(DictionaryFactorizer(6, positive_code=True, positive_dict=True, random_state=0),
         budget=("alpha", (4.0, 2.0, 1.0, 0.1)), full=None, optimal=False, shrinks=True),
    Case(DictionaryFactorizer(6, batch_size=4, max_iter=20, random_state=0), budget=("alpha", (4.0, 2.0, 1.0, 0.1)),
         full=None, sklearn=False, optimal=False, shrinks=True),
    Case(DictionaryFactorizer(6, vector_size=4, random_state=0), budget=("alpha", (4.0, 2.0, 1.0, 0.1)),
         full={**_ALL_ATOMS, "n_components": 12}, rounding=1e-6, sklearn=False, optimal=False, shrinks=True),
    Case(CPDFilterPruner(), budget=("n_filters", (2, 4, 8, 12)), full={}),
    Case(CPDFilterPruner(rank=2, kernel_shape=(4, 2, 2)), budget=("rank", (1, 2, 3, 4)), full={"rank": None},
         rounding=1e-6, sklearn=False),
    Case(CPDFilterPruner(rank="auto", kernel_shape=(2, 8)), budget=("target_error", (0.5, 0.2, 0.01)),
         full={"target_error": 0.0}, rounding=1e-6, sklearn=False),
    Case(CPDFilterPruner(rank=2, kernel_shape=(2, 2, 2, 2), prune_ratio=0.5, criterion="principal_angles"),
         budget=("n_filters", (2, 6, 12)), full={"prune_ratio": 0.0, "rank": None}, rounding=1e-6, sklearn=False,
         optimal=False, shrinks=True),
]
