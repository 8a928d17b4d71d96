# SPDX-License-Identifier: BSD-3-Clause
"""What factorised layers cost to run: parameters, multiplications and latency of whole networks beside dense ones.

Every layer but the first is factorised with a share of its numbers left; `execute="auto"` then keeps the faster form of
each. Weights are random: they do not matter for the time. The time is the least of the repeats of the CPU time of one
thread, the three networks by turns, so that other work on the machine disturbs little.

    python latency.py                    # into results/latency_1t.json; --method NAME measures some rows again
    python latency.py --tiny
    python latency.py --docs FILE        # write the table into FILE, between its markers
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import RESULTS, environment
from torch import nn

import skfactor
from skfactor import LowRankFactorizer, SeparableFactorizer, TuckerFactorizer
from skfactor.bridge import count_macs

BEGIN, END = "<!-- latency -->", "<!-- end of latency -->"


class Block(nn.Module):
    """Residual block with the shortcut without parameters."""

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


def resnet(n):
    """ResNet of He et al. for CIFAR-10 with 6 n + 2 layers."""
    stages = [(16, 16, 1), *[(16, 16, 1)] * (n - 1), (16, 32, 2), *[(32, 32, 1)] * (n - 1), (32, 64, 2),
              *[(64, 64, 1)] * (n - 1)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         *(Block(*stage) for stage in stages), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(64, 10))


def vgg(widths=(32, 32, 0, 64, 64, 0, 128, 128, 128, 0, 256, 256, 256, 0, 256, 256, 256)):
    """VGG-16 with batch normalisation for CIFAR-10 at half its width; 0 is a pooling."""
    layers, c = [], 3
    for width in widths:
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        c = width or c
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


NETWORKS = {"ResNet-56": lambda: resnet(9), "VGG-16-BN, half width": vgg}
#: Shares of the numbers that are left; with Tucker-2 of the channels.
METHODS = {
    "low rank": ((0.5, 0.25, 0.125), lambda share, n, c: LowRankFactorizer(rank=share)),
    "Tucker-2": ((0.5, 0.25), lambda share, n, c: TuckerFactorizer(rank=(int(share * n), int(share * c)), max_iter=0)),
    "spatial": ((0.25,), lambda share, n, c: SeparableFactorizer(rank=share)),
}


def rules_for(model, method, share):
    """The method for every convolution but the first, low rank for linear layers."""
    rules = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            _, make = METHODS[method]
            rules[name] = make(share, layer.out_channels, layer.in_channels) if rules else None
        elif isinstance(layer, nn.Linear):
            rules[name] = LowRankFactorizer(rank=share)
    return rules


def cpu_times(models, x, repeats):
    """Least CPU time of one forward pass of each network, in seconds, by turns."""
    best = [math.inf] * len(models)
    with torch.no_grad():
        for model in models:
            model(x)
        for _ in range(repeats):
            for i, model in enumerate(models):
                start = time.process_time()
                model(x)
                best[i] = min(best[i], time.process_time() - start)
    return best


def measure(name, model, method, share, batches, repeats):
    """Rows, one for each batch size."""
    model.eval()
    rules = rules_for(model, method, share)
    factorized = skfactor.compress(model, rules, mode="factorized", progress=False)
    for batch in batches:
        x = torch.randn(batch, 3, 32, 32)
        auto = skfactor.compress(model, rules, mode="factorized", execute="auto", example_inputs=x, progress=False)
        seconds = cpu_times([model, factorized.model, auto.model], x, repeats)
        networks = {"dense": model, "factorized": factorized.model, "auto": auto.model}
        yield {
            "network": name, "method": method, "share": share, "batch": batch,
            "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in networks.items()},
            "macs_per_image": {k: count_macs(m, x[:1]) for k, m in networks.items()},
            "milliseconds": {k: 1e3 * s for k, s in zip(networks, seconds, strict=True)},
            "factorized_layers": sum(e.execution == "factorized" for e in factorized.executions),
            "factorized_layers_auto": sum(e.execution == "factorized" for e in auto.executions),
            "layers": len(factorized.executions),
        }


def table(found):
    """Markdown of all rows."""
    lines = ["| network, input | method | parameters | MACs | dense | factorised | auto | layers: factorised, auto |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in found["rows"]:
        parameters, macs, ms = row["parameters"], row["macs_per_image"], row["milliseconds"]
        lines.append(
            f"| {row['network']}, {row['batch']}x3x32x32 | {row['method']} {row['share']:g} "
            f"| {parameters['dense'] / parameters['factorized']:.1f}x | {macs['dense'] / macs['factorized']:.1f}x "
            f"| {ms['dense']:.1f} ms | {ms['factorized']:.1f} ms ({ms['dense'] / ms['factorized']:.2f}x) "
            f"| {ms['auto']:.1f} ms ({ms['dense'] / ms['auto']:.2f}x) "
            f"| {row['factorized_layers']}, {row['factorized_layers_auto']} of {row['layers']} |")
    e = found["environment"]
    return "\n".join([*lines, "", f"CPU time of one thread, {e['cpu']}, torch {e['versions']['torch']}, eager, "
                      "float32; least of the repeats. Parameters, MACs and times in brackets: dense over factorised; "
                      "parameters and MACs are those with all layers factorised.", *found["notes"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "latency_1t.json")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    parser.add_argument("--method", action="append", choices=METHODS, help="only these")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.docs:
        found = json.loads(args.output.read_text())
        head, _, rest = args.docs.read_text(encoding="utf-8").partition(BEGIN)
        args.docs.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    networks = {"ResNet-8": lambda: resnet(1)} if args.tiny else NETWORKS
    batches = (2,) if args.tiny else (1, 32)
    found = {"description": __doc__, "environment": environment(), "settings": {"threads": 1, "repeats": args.repeats},
             "notes": [], "rows": []}
    kept = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for name, make in networks.items():
        torch.manual_seed(0)
        model = make()
        for method in args.method or METHODS:
            for share in METHODS[method][0][: 1 if args.tiny else None]:
                for row in measure(name, model, method, share, batches, args.repeats):
                    print(json.dumps(row), flush=True)
                    found["rows"].append(row)
    done = set(map(_key, found["rows"]))
    found["rows"] += [row for row in kept if _key(row) not in done]
    found["rows"].sort(key=lambda row: (row["network"], row["batch"], row["method"], -row["share"]))
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def _key(row):
    return row["network"], row["method"], row["share"], row["batch"]


if __name__ == "__main__":
    main()
