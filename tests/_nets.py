"""Small networks for tests, and the definitions that the real weights fit."""
# SPDX-License-Identifier: BSD-3-Clause

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Residual block with the parameter-free shortcut (option A of He et al.)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """CIFAR ResNet with n blocks per stage: n = 3 is ResNet-20, n = 9 is ResNet-56."""

    def __init__(self, n=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(c_in, c_out, n, stride):
        return nn.Sequential(Block(c_in, c_out, stride), *(Block(c_out, c_out, 1) for _ in range(n - 1)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


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


class Conv1D(nn.Module):
    """The Linear of GPT-2, weight (n_in, n_out); known by its class name and `nf`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


class TinyLM(nn.Module):
    """A language model of GPT-2's make: Conv1D, a bare parameter, and the output layer tied to the embedding."""

    def __init__(self, vocabulary=50, d=16, length=12):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, d, padding_idx=0)
        self.position = nn.Parameter(torch.randn(length, d) * 0.02)
        self.fc, self.proj = Conv1D(2 * d, d), Conv1D(d, 2 * d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(x + self.proj(F.relu(self.fc(x)))))


class SmallCNN(nn.Module):
    """Convolution, batch normalisation, linear: fast, with every kind of tensor."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        return self.linear(F.relu(self.conv2(F.relu(self.bn1(self.conv1(x))))).mean(dim=(2, 3)))
