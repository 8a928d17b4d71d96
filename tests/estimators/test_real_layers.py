"""`input_gram` on real layers of ResNet-56: the output error on images that were held back is lower with it."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skfactor import (
    DictionaryFactorizer,
    KMeansWeightSharer,
    LowRankFactorizer,
    MagnitudePruner,
    SeparableFactorizer,
    UniformQuantizer,
)
from tests._data import data_dir, needs_data, real_weights
from tests._nets import ResNet

from ._outputs import output_errors

LAYERS = ["layer1.4.conv1", "layer2.4.conv2", "layer3.0.conv1"]


@pytest.fixture(scope="module")
def moments():
    """Layer -> second moments of its inputs for 64 images and for 64 others."""
    net = ResNet(9).eval()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in real_weights("cifar10_resnet56").items()}, strict=False)
    found = {name: [] for name in LAYERS}

    def remember(name, layer, x):
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).double()
        columns = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        found[name].append((columns.T @ columns / len(columns)).numpy())

    for name in LAYERS:
        layer = net.get_submodule(name)
        layer.register_forward_pre_hook(lambda layer, args, name=name: remember(name, layer, args[0]))
    images = np.load(data_dir() / "cifar10_train.npz")["X"]
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        for start in (0, 5000):
            x = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2) / 255
            net((x - mean) / std)
    return found


@needs_data
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("estimator", [
    lambda shape: LowRankFactorizer(0.5),
    lambda shape: SeparableFactorizer(0.5, kernel_shape=shape),
    lambda shape: SeparableFactorizer(0.5, kernel_shape=shape, kind="depthwise"),
    lambda shape: MagnitudePruner(0.8),
    lambda shape: MagnitudePruner(pattern="2:4"),
    lambda shape: MagnitudePruner(0.3, granularity="column"),
    lambda shape: DictionaryFactorizer(16, vector_size=9, random_state=0),
    lambda shape: DictionaryFactorizer(16, vector_size=9, code_solver="omp", n_nonzero_coefs=2, random_state=0),
    lambda shape: KMeansWeightSharer(8),
    lambda shape: KMeansWeightSharer(32, vector_size=9, random_state=0),
    lambda shape: UniformQuantizer(),
], ids=["low rank", "spatial", "depthwise", "pruned", "2:4", "columns", "dictionary", "matching pursuit", "shared",
        "shared kernels", "uniform"])
def test_held_back_images(moments, estimator, layer):
    W = real_weights("cifar10_resnet56")[f"{layer}.weight"]
    X = W.reshape(len(W), -1)
    seen, held_back = moments[layer]
    plain, output = estimator(W.shape[1:]).fit(X), estimator(W.shape[1:]).fit(X, input_gram=seen)
    before, after = output_errors((plain, output), X, [held_back])
    assert after < before
