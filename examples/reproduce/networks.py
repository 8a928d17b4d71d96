# SPDX-License-Identifier: BSD-3-Clause
"""The real networks that the reproductions use, their images, and their accuracy."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

NETWORKS = ("cifar10_resnet20", "cifar10_resnet56", "mnist_lenet300100_original", "mnist_lenet5_original")


def data_folder(given=None):
    """Folder of images and `weights/`: the one given, $SKFACTOR_DATA, or `shared/data` beside the checkout."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    for folder in (given, os.environ.get("SKFACTOR_DATA"), beside):
        if folder and (Path(folder) / "weights").is_dir():
            return Path(folder)
    raise SystemExit("data not found: give --data FOLDER or set SKFACTOR_DATA")


class Block(nn.Module):
    """Residual block with the shortcut without parameters (option A)."""

    def __init__(self, c_in, c_mid, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        before = (c_out - c_in) // 2
        self.stride, self.pad = stride, (before, c_out - c_in - before)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """ResNet of He et al. (arXiv:1512.03385) for CIFAR with n blocks per stage: 20 layers for n = 3, 56 for n = 9.

    `widths` are the channels of the first convolution and of the stages, `mids` those inside each block.
    """

    def __init__(self, n, widths=(16, 16, 32, 64), mids=None):
        super().__init__()
        mids = iter(mids or [c for c in widths[1:] for _ in range(n)])
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:]), 1):
            first = Block(c_in, next(mids), c_out, 1 if i == 1 else 2)
            rest = (Block(c_out, next(mids), c_out, 1) for _ in range(n - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


class VGG(nn.Module):
    """VGG-16 with batch normalisation for CIFAR as NORTON has it: 13 convolutions, one hidden layer of 512."""

    POOLED = (2, 4, 7, 10)

    def __init__(self, widths=(64, 64, 128, 128, 256, 256, 256, *[512] * 6)):
        super().__init__()
        layers, c_in = [], 3
        for i, c_out in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if i in self.POOLED else []
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(c_in, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True),
                                        nn.Linear(512, 10))

    def forward(self, x):
        return self.classifier(F.avg_pool2d(self.features(x), 2).flatten(1))


class DenseLayer(nn.Module):
    """Normalisation, convolution, and its output put behind the input."""

    def __init__(self, c_in, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat((x, self.conv1(F.relu(self.bn1(x)))), 1)


class Transition(nn.Module):
    """Normalisation, 1 x 1 convolution and pooling between two dense blocks."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-40 (arXiv:1608.06993) for CIFAR: growth 12, no bottleneck, transitions that keep the channels.

    `growths` are the channels that each of the 36 layers adds, `transitions` the channels behind the two transitions.
    """

    def __init__(self, growths=(12,) * 36, transitions=None):
        super().__init__()
        n, c = len(growths) // 3, 24
        self.conv1 = nn.Conv2d(3, c, 3, padding=1, bias=False)
        for i in range(3):
            layers = []
            for growth in growths[n * i : n * (i + 1)]:
                layers.append(DenseLayer(c, growth))
                c += growth
            setattr(self, f"dense{i + 1}", nn.Sequential(*layers))
            if i < 2:
                c_out = transitions[i] if transitions else c
                setattr(self, f"trans{i + 1}", Transition(c, c_out))
                c = c_out
        self.bn, self.fc = nn.BatchNorm2d(c), nn.Linear(c, 10)

    def forward(self, x):
        x = self.trans2(self.dense2(self.trans1(self.dense1(self.conv1(x)))))
        return self.fc(F.relu(self.bn(self.dense3(x))).mean(dim=(2, 3)))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.ip1, self.ip2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        return self.ip2(F.relu(self.ip1(x.flatten(1))))


class LeNet300(nn.Module):
    """LeNet-300-100."""

    def __init__(self):
        super().__init__()
        self.ip1, self.ip2, self.ip3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x):
        return self.ip3(F.relu(self.ip2(F.relu(self.ip1(x.flatten(1))))))


_MAKE = {"cifar10_resnet8": lambda: ResNet(1), "cifar10_resnet20": lambda: ResNet(3),
         "cifar10_resnet56": lambda: ResNet(9), "cifar10_vgg16": VGG, "cifar10_densenet40": DenseNet,
         "mnist_lenet300100_original": LeNet300, "mnist_lenet5_original": LeNet5}


def fresh(name):
    """The network `name` with random weights, in eval mode."""
    return _MAKE[name]().eval()


def weights_path(folder, name):
    return folder / "weights" / f"{name}.safetensors"


def original(folder, name):
    """The trained network; batch counters, which the file may lack and inference does not use, stay zero."""
    model = fresh(name)
    missing, unexpected = model.load_state_dict(load_file(weights_path(folder, name)), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return model


def test_set(folder, name):
    """(images, labels): the 3,000 lossless CIFAR-10 test images, or the MNIST test set."""
    if name.startswith("mnist"):
        with np.load(folder / "mnist.npz") as file:
            return _mnist(file["X_test"]), torch.from_numpy(file["y_test"]).long()
    with np.load(folder / "cifar10_test.npz") as file:
        return _cifar(file["X"]), torch.from_numpy(file["y"]).long()


def calibration_images(folder, name, n, seed, views=1):
    """Batches of `n` training images without labels: those of CIFAR-10 in `views` crops and flips, as in training."""
    rng = np.random.default_rng(seed)
    if name.startswith("mnist"):
        with np.load(folder / "mnist.npz") as file:
            return [_mnist(file["X_train"][rng.permutation(len(file["X_train"]))[:n]])]
    with np.load(folder / "cifar10_train.npz") as file:
        X = file["X"]
    X = X[rng.permutation(len(X))[:n]]
    return [_cifar(_cropped(X, rng)) for _ in range(views)]


def held_back_images(folder, n, seed=0):
    """(images, labels): the last `n` CIFAR-10 training images in the order whose first ones calibrate; no crops."""
    with np.load(folder / "cifar10_train.npz") as file:
        X, y = file["X"], file["y"]
    picked = np.random.default_rng(seed).permutation(len(X))[-n:]
    return _cifar(X[picked]), torch.from_numpy(y[picked]).long()


def _cropped(X, rng):
    """Every image flipped or not, and shifted by up to four pixels."""
    n = len(X)
    X = np.where((rng.random(n) < 0.5)[:, None, None, None], X[:, :, ::-1], X)
    padded = np.pad(X, ((0, 0), (4, 4), (4, 4), (0, 0)))
    top, left = rng.integers(0, 9, (2, n))
    return np.stack([p[i : i + 32, j : j + 32] for p, i, j in zip(padded, top, left, strict=True)])


def _mnist(X):
    return torch.from_numpy(X)[:, None].float() / 256


def _cifar(X):
    x = torch.from_numpy(np.ascontiguousarray(X)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return ((x - mean) / std).contiguous()


@torch.no_grad()
def accuracy(model, images, labels):
    """Percentage of the images that are classified correctly, in float32."""
    found = torch.cat([model(x).argmax(1) for x in images.split(100)])
    return 100 * float((found == labels).float().mean())
