"""What the bridge tells estimators of a layer."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from torch import nn

import skfactor
from skfactor import KMeansWeightSharer, SeparableFactorizer


@pytest.mark.parametrize("kind", ["spatial", "depthwise"])
def test_separable_factorisation_of_every_kind_of_layer(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 2)), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5))
    result = skfactor.compress(model, SeparableFactorizer(1, kind=kind), progress=False)
    shapes = {"0.weight": (3, 3, 2), "1.weight": (4, 3, 3), "3.weight": (24,)}
    for name, shape in shapes.items():
        X = dict(model.named_parameters())[name].detach().numpy().reshape(-1, int(np.prod(shape)))
        alone = SeparableFactorizer(1, kind=kind, kernel_shape=shape).fit(X)
        np.testing.assert_array_equal(result.tensors[name].to_matrix(), alone.inverse_transform(alone.transform(X)))
    assert not any("kernel_shape" in (record.estimator or "") for record in result.records)


def test_calibration_reaches_the_codes():
    """Codes that are quantised for the layer's output, not for themselves."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 32, 3)
    x = torch.rand(16, 8, 10, 10) @ torch.rand(10, 10)  # neighbouring positions are correlated
    pipeline = make_pipeline(SeparableFactorizer(2), KMeansWeightSharer(4))
    record = skfactor.compress(layer, pipeline, calibration=x, progress=False).records[0]
    factorized = skfactor.compress(layer, pipeline[0], calibration=x, progress=False)
    codes = factorized.tensors["weight"].codes
    shared = KMeansWeightSharer(4).fit(codes)
    X_hat = factorized.tensors["weight"].decoders[0].decode(shared.inverse_transform(shared.transform(codes)))
    E = torch.from_numpy(layer.weight.detach().numpy() - X_hat.reshape(32, 8, 3, 3))
    with torch.no_grad():
        apart = torch.conv2d(x, E).square().sum() / torch.conv2d(x, layer.weight).square().sum()
    assert record.output_error < float(apart)
