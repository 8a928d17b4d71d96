# SPDX-License-Identifier: BSD-3-Clause
"""Accuracy of the real networks from their tensors: He's CIFAR ResNets (option A) and Caffe's LeNets, in torch."""

import numpy as np
from datasets import networks_folder


def accuracy(name, tensors):
    """Share of the test images that the network `name` with these tensors classifies correctly."""
    import torch

    tensors = {k: torch.from_numpy(np.array(v, dtype=np.float32)) for k, v in tensors.items()}
    images, labels, forward = _problem(name)
    with torch.no_grad():
        found = [forward(tensors, images[i : i + 500]).argmax(1) for i in range(0, len(images), 500)]
    return float((torch.cat(found) == labels).float().mean())


def _problem(name):
    import torch

    folder = networks_folder()
    if name.startswith("mnist"):
        with np.load(folder / "mnist.npz") as file:
            images, labels = torch.from_numpy(file["X_test"])[:, None] / 256, torch.from_numpy(file["y_test"]).long()
        return images, labels, _lenet5 if "lenet5" in name else _lenet300
    with np.load(folder / "cifar10_test.npz") as file:
        images, labels = torch.from_numpy(file["X"]).permute(0, 3, 1, 2) / 255, torch.from_numpy(file["y"]).long()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (images - mean) / std, labels, _resnet


def _resnet(p, x):
    from torch.nn import functional as F

    def conv_norm(x, conv, norm, stride=1):
        y = F.conv2d(x, p[f"{conv}.weight"], stride=stride, padding=1)
        statistics = (p[f"{norm}.{s}"] for s in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *statistics)

    x = F.relu(conv_norm(x, "conv1", "bn1"))
    for layer in ("layer1", "layer2", "layer3"):
        block = 0
        while f"{layer}.{block}.conv1.weight" in p:
            b = f"{layer}.{block}"
            stride = 2 if block == 0 and layer != "layer1" else 1
            y = conv_norm(F.relu(conv_norm(x, f"{b}.conv1", f"{b}.bn1", stride)), f"{b}.conv2", f"{b}.bn2")
            pad = (y.shape[1] - x.shape[1]) // 2
            x = F.relu(y + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, pad, pad)))
            block += 1
    return F.linear(x.mean((2, 3)), p["linear.weight"], p["linear.bias"])


def _lenet5(p, x):
    from torch.nn import functional as F

    x = F.max_pool2d(F.conv2d(x, p["conv1.weight"], p["conv1.bias"]), 2)
    x = F.max_pool2d(F.conv2d(x, p["conv2.weight"], p["conv2.bias"]), 2)
    x = F.relu(F.linear(x.flatten(1), p["ip1.weight"], p["ip1.bias"]))
    return F.linear(x, p["ip2.weight"], p["ip2.bias"])


def _lenet300(p, x):
    from torch.nn import functional as F

    x = F.relu(F.linear(x.flatten(1), p["ip1.weight"], p["ip1.bias"]))
    x = F.relu(F.linear(x, p["ip2.weight"], p["ip2.bias"]))
    return F.linear(x, p["ip3.weight"], p["ip3.bias"])
