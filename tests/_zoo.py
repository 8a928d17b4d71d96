"""Networks of the usual makes, narrow, with normalisation statistics as a trained network has them."""
# SPDX-License-Identifier: BSD-3-Clause

import torch
import torch.nn.functional as F
from _nets import LeNet5, ResNet
from torch import nn


class VGG(nn.Module):
    """VGG-16 with batch normalisation for 32 x 32 images, `width` times as wide."""

    def __init__(self, width=0.125):
        super().__init__()
        layers, c = [], 3
        for n in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            if not n:
                layers.append(nn.MaxPool2d(2))
                continue
            n = round(n * width)
            layers += [nn.Conv2d(c, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(inplace=True)]
            c = n
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(4 * c, c), nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, 10))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class LambdaBlock(nn.Module):
    """Residual block whose shortcut is a function in a module of its own."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            pad = c_out // 4
            self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad), "constant", 0))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class LambdaResNet(nn.Module):
    def __init__(self, n=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.layers = nn.Sequential(*(LambdaBlock(a if i == 0 else b, b, s if i == 0 else 1)
                                      for a, b, s in stages for i in range(n)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


class ProjectedBlock(nn.Module):
    """Residual block whose shortcut is a convolution where shapes differ; `groups` makes it ResNeXt's."""

    def __init__(self, c_in, c, c_out, stride, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        w = width
        self.conv1, self.bn1 = nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        stages = ((w, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2))
        self.blocks = nn.Sequential(*(BasicBlock(a if i == 0 else b, b, s if i == 0 else 1)
                                      for a, b, s in stages for i in range(2)))
        self.linear = nn.Linear(8 * w, 10)

    def forward(self, x):
        x = F.avg_pool2d(self.blocks(F.relu(self.bn1(self.conv1(x)))), 4)
        return self.linear(torch.flatten(x, 1))


class ResNeXt(nn.Module):
    """Blocks are (c_in, width of the grouped convolution, c_out, stride, groups)."""

    def __init__(self, blocks=((16, 16, 32, 1, 4), (32, 16, 32, 1, 4), (32, 32, 64, 2, 8))):
        super().__init__()
        first, last = blocks[0][0], blocks[-1][2]
        self.conv1, self.bn1 = nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first)
        self.blocks = nn.Sequential(*(ProjectedBlock(*block) for block in blocks))
        self.linear = nn.Linear(last, 10)

    def forward(self, x):
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class PreActivation(nn.Module):
    """Block of a wide ResNet: normalisation and activation come first."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(0.3)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride != 1 or c_in != c_out else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.dropout(F.relu(self.bn2(self.conv1(y))))) + shortcut


class WideResNet(nn.Module):
    """Blocks are (c_in, c_out, stride)."""

    def __init__(self, blocks=((8, 16, 1), (16, 16, 1), (16, 32, 2))):
        super().__init__()
        self.conv1 = nn.Conv2d(3, blocks[0][0], 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*(PreActivation(*block) for block in blocks))
        self.bn, self.linear = nn.BatchNorm2d(blocks[-1][1]), nn.Linear(blocks[-1][1], 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.bn(self.blocks(self.conv1(x)))), 1)
        return self.linear(x.flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, k, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class DenseNet(nn.Module):
    """DenseNet without bottlenecks: n layers a block, growth k (n = 12, k = 12 is DenseNet-40)."""

    def __init__(self, n=3, k=6):
        super().__init__()
        c = 2 * k
        layers = [nn.Conv2d(3, c, 3, padding=1, bias=False)]
        for block in range(3):
            for _ in range(n):
                layers.append(DenseLayer(c, k))
                c += k
            if block < 2:
                layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 1, bias=False), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(c), nn.ReLU())
        self.linear = nn.Linear(c, 10)

    def forward(self, x):
        return self.linear(self.features(x).mean((2, 3)))


class MobileNetV1(nn.Module):
    """Separable convolutions of (channels, stride)."""

    def __init__(self, c=8, stages=((16, 1), (24, 2), (24, 1), (32, 2))):
        super().__init__()
        layers = [nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        for n, stride in stages:
            layers += [nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
                       nn.Conv2d(c, n, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
            c = n
        self.features, self.linear = nn.Sequential(*layers), nn.Linear(c, 10)

    def forward(self, x):
        x = F.avg_pool2d(self.features(x), 2)
        return self.linear(x.view(x.size(0), -1).reshape(x.size(0), -1, 16).mean(2))


class InvertedResidual(nn.Module):
    def __init__(self, c_in, c_out, expansion, stride):
        super().__init__()
        c = c_in * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU6(inplace=True),
            nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU6(inplace=True),
            nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.add = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.conv(x) if self.add else self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals of (expansion, channels, stride)."""

    def __init__(self, c=8, stages=((3, 8, 1), (3, 12, 2), (3, 12, 1)), last=40):
        super().__init__()
        layers = [nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU6()]
        for expansion, n, stride in stages:
            layers.append(InvertedResidual(c, n, expansion, stride))
            c = n
        self.features = nn.Sequential(*layers, nn.Conv2d(c, last, 1), nn.Hardswish())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, 10))

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).reshape(x.shape[0], -1))


class Fire(nn.Module):
    def __init__(self, c_in, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Fire modules of (squeezed, expanded) channels; 0 is a pooling."""

    def __init__(self, c=12, fires=((4, 8), (4, 8), 0, (6, 12))):
        super().__init__()
        layers = [nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
        for fire in fires:
            layers.append(Fire(c, *fire) if fire else nn.MaxPool2d(3, 2))
            c = 2 * fire[1] if fire else c
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(c, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return torch.flatten(self.classifier(self.features(x)), 1)


class UNet(nn.Module):
    """Encoder and decoder with transposed convolutions and skip connections."""

    def __init__(self, w=4):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 2 * w, 3, padding=1), nn.Conv2d(2 * w, 4 * w, 3, padding=1)
        self.middle = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.up1, self.fuse1 = nn.ConvTranspose2d(4 * w, 3 * w, 2, 2), nn.Conv2d(7 * w, 3 * w, 3, padding=1)
        self.up2, self.fuse2 = nn.ConvTranspose2d(3 * w, 2 * w, 2, 2, bias=False), nn.Conv2d(4 * w, 2 * w, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3 * w), nn.Conv2d(2 * w, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        c = F.relu(self.middle(F.max_pool2d(b, 2)))
        y = F.relu(self.norm(self.fuse1(torch.cat([self.up1(c), b], 1))))
        return self.head(F.relu(self.fuse2(torch.cat([self.up2(y), a], dim=1))))


class SqueezeExcite(nn.Module):
    """Channel attention, a learned scale per channel, PReLU, a gate, and bilinear upsampling."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act = nn.Conv2d(3, 12, 3, 2, 1, padding_mode="reflect"), nn.PReLU(12)
        self.fc1, self.fc2 = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.scale = nn.Parameter(torch.rand(1, 12, 1, 1) + 0.5)
        self.gates = nn.Conv2d(12, 16, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.conv2 = nn.Conv2d(8, 6, 3, padding="same", dilation=2)
        self.norm, self.head = nn.GroupNorm(8, 8), nn.Linear(6, 4)

    def forward(self, x):
        x = self.act(self.conv1(x))
        s = F.adaptive_avg_pool2d(x, 1)
        x = x * torch.sigmoid(self.fc2(F.silu(self.fc1(s)))) * self.scale
        a, b = self.gates(x).chunk(2, dim=1)
        x = self.norm(a * torch.sigmoid(b))
        x = F.interpolate(self.conv2(x), scale_factor=2, mode="bilinear")
        return self.head(x.permute(0, 2, 3, 1).mean((1, 2)))


class Conv1dNet(nn.Module):
    """A network for series: Conv1d, an own LayerNorm-free MLP over the last axis, numbers written into its views."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 8, 5, stride=2), nn.Conv1d(8, 6, 3, groups=2)
        self.fc1, self.fc2 = nn.Linear(6 * 12, 20), nn.Linear(20, 3)

    def forward(self, x):
        x = F.leaky_relu(self.conv2(F.relu(self.conv1(x))), 0.1)
        return self.fc2(torch.tanh(self.fc1(x.view(-1, 6 * 12))))


class Conv3dNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.up = nn.Conv3d(1, 6, 3, padding=1), nn.ConvTranspose3d(6, 6, 2, 2, groups=3)
        self.norm, self.conv2 = nn.BatchNorm3d(6), nn.Conv3d(6, 4, (1, 3, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.norm(self.up(F.elu(self.conv1(x))))))).amax((2, 3, 4)))


#: Name -> (constructor, shape of one input).
ZOO = {
    "LeNet-5": (LeNet5, (1, 28, 28)),
    "VGG-16-BN": (VGG, (3, 32, 32)),
    "ResNet-8": (lambda: ResNet(1), (3, 16, 16)),
    "ResNet-8 lambda": (LambdaResNet, (3, 16, 16)),
    "ResNet-18": (ResNet18, (3, 32, 32)),
    "ResNeXt": (ResNeXt, (3, 8, 8)),
    "WRN": (WideResNet, (3, 8, 8)),
    "DenseNet": (DenseNet, (3, 8, 8)),
    "MobileNetV1": (MobileNetV1, (3, 32, 32)),
    "MobileNetV2": (MobileNetV2, (3, 8, 8)),
    "SqueezeNet": (SqueezeNet, (3, 16, 16)),
    "U-Net": (UNet, (3, 16, 16)),
    "SE": (SqueezeExcite, (3, 12, 12)),
    "Conv1d": (Conv1dNet, (2, 31)),
    "Conv3d": (Conv3dNet, (1, 4, 6, 6)),
}

_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), *[(512, 1)] * 6, *[(1024, 1)] * 2)
_V2 = ((1, 16, 1), *[(6, 24, 1)] * 2, (6, 32, 2), *[(6, 32, 1)] * 2, (6, 64, 2), *[(6, 64, 1)] * 3, *[(6, 96, 1)] * 3,
       (6, 160, 2), *[(6, 160, 1)] * 2, (6, 320, 1))
_FIRES = ((16, 64), (16, 64), 0, (32, 128), (32, 128), 0, (48, 192), (48, 192), (64, 256), (64, 256))
_NEXT = ((64, 128, 256, 1, 8), *[(256, 128, 256, 1, 8)] * 2, (256, 256, 512, 2, 8), *[(512, 256, 512, 1, 8)] * 2,
         (512, 512, 1024, 2, 8), *[(1024, 512, 1024, 1, 8)] * 2)
_WIDE = ((16, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))

#: Networks of their full width and depth, for images of 32 x 32.
FULL = {
    "VGG-16-BN": lambda: VGG(1), "ResNet-20": lambda: ResNet(3), "ResNet-56": lambda: ResNet(9),
    "ResNet-18": lambda: ResNet18(64), "ResNeXt-29": lambda: ResNeXt(_NEXT), "WRN-16-4": lambda: WideResNet(_WIDE),
    "DenseNet-40": lambda: DenseNet(12, 12), "MobileNetV1": lambda: MobileNetV1(32, _V1),
    "MobileNetV2": lambda: MobileNetV2(32, _V2, 1280), "SqueezeNet": lambda: SqueezeNet(64, _FIRES),
    "U-Net": lambda: UNet(32),
}


def trained_alike(model, seed=0):
    """The network in eval mode with random normalisations, so that no channel is like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (2 / max(1, parameter[0].numel())) ** 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_(0, 0.3, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def build(name, seed=0):
    """A network of the zoo and a batch of inputs."""
    make, shape = ZOO[name]
    generator = torch.Generator().manual_seed(seed)
    state = torch.get_rng_state()
    model = trained_alike(make(), seed)
    torch.set_rng_state(state)
    return model, torch.randn(2, *shape, generator=generator)
