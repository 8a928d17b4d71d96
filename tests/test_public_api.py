"""The public names are a promise: adding one means adding it here."""
# SPDX-License-Identifier: BSD-3-Clause

import inspect

import pytest

import skfactor

PUBLIC = {
    "AutoencoderCompressor",
    "BaseCompressor",
    "BlockTermFactorizer",
    "CPDFilterPruner",
    "Calibration",
    "CompressionResult",
    "CompressionSearchCV",
    "CoupledCPDFactorizer",
    "DeepKMeansRegularizer",
    "DeepKMeansTraining",
    "DictionaryFactorizer",
    "EntropyTraining",
    "FormatError",
    "GradualPruning",
    "HierarchicalTuckerFactorizer",
    "KMeansWeightSharer",
    "LayerError",
    "LowRankFactorizer",
    "MagnitudePruner",
    "MantissaRounder",
    "PrunedNetwork",
    "Report",
    "SeparableFactorizer",
    "SkfactorError",
    "SoftSharingTraining",
    "SoftWeightSharer",
    "TensorTrainFactorizer",
    "TrainedSharing",
    "TrainingMethod",
    "TuckerFactorizer",
    "UniformQuantizer",
    "__version__",
    "allocate",
    "choose_formats",
    "compare",
    "compress",
    "compress_file",
    "decompress_file",
    "filter_groups",
    "finetune",
    "load",
    "load_into",
    "prune_filters",
    "register_layer",
    "remove_filters",
    "sensitivity",
}


def test_names():
    assert set(skfactor.__all__) == PUBLIC
    assert set(dir(skfactor)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_name_resolves_and_is_documented(name):
    thing = getattr(skfactor, name)
    assert inspect.getdoc(thing)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'KMeanSharer'"):
        skfactor.KMeanSharer  # noqa: B018


def test_version_is_the_package_metadata():
    metadata = pytest.importorskip("importlib.metadata")
    try:
        installed = metadata.version("skfactor")
    except metadata.PackageNotFoundError:
        pytest.skip("skfactor runs from its folder, not installed")
    assert installed == skfactor.__version__
