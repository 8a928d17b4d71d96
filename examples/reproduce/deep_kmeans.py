# SPDX-License-Identifier: BSD-3-Clause
"""Deep k-Means (arXiv:1806.09228): sharing the rows of kernels with and without re-training, at the same budget.

Four ways to the same number of clusters per layer: share the trained network; train on with the plain loss, then share;
train on under the un-relaxed penalty, then share; under the published spectral one. All see the same batches in the
same order. λ is chosen on training images that are held back from the re-training; test images are used once per row.

    python deep_kmeans.py --choose                    # λ of the un-relaxed penalty, into results/deep_kmeans.json
    python deep_kmeans.py                             # the rows
    python deep_kmeans.py --docs FILE                 # write the table into FILE, between its markers
    python deep_kmeans.py --network wrn-16-4 --clusters paper45 paper50 --device cuda --epochs 150 --images 19494 \
        --pretrain 200 --lam 0.001                    # the paper's network and clusters, sized for a GPU
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from networks import _cifar, _cropped, accuracy, data_folder, fresh, original, test_set
from safetensors.torch import load_file, save_file
from torch import nn

ARMS = ("share", "plain", "clusters", "spectral")
HELD_BACK = 2000
LAMBDAS = (0.1, 0.3, 1.0)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
#: Clusters of the 16 convolutions of WRN-16-4 and shares of the zero cluster, as the paper gives them.
PAPER_CLUSTERS = {
    "paper45": [144, 90, 80, 50, 30, 30, 100, 50, 10, 50, 50, 30, 7, 12, 7, 7],
    "paper50": [144, 90, 80, 50, 30, 30, 100, 50, 10, 50, 50, 7, 6, 12, 7, 7],
}
PAPER_ZEROS = {
    "paper45": [0, .3, .4, .5, .4, .4, .5, .5, .5, .5, .5, .6, .9, .5, .75, .9],
    "paper50": [0, .3, .4, .5, .4, .4, .5, .5, .5, .5, .5, .87, .9, .5, .75, .9],
}


class WideBlock(nn.Module):
    """Pre-activation block of a Wide ResNet (arXiv:1605.07146)."""

    def __init__(self, c_in, c_out, stride, dropout):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None
        self.dropout = dropout

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = F.dropout(F.relu(self.bn2(self.conv1(y))), self.dropout, self.training)
        return shortcut + self.conv2(y)


class WideResNet(nn.Module):
    """WRN-depth-width for CIFAR."""

    def __init__(self, depth, width, dropout=0.3):
        super().__init__()
        n, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks = [WideBlock(channels[s] if i == 0 else channels[s + 1], channels[s + 1], 2 if s and i == 0 else 1,
                            dropout) for s in range(3) for i in range(n)]
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.linear = nn.BatchNorm2d(channels[3]), nn.Linear(channels[3], 10)

    def forward(self, x):
        return self.linear(F.relu(self.bn(self.blocks(self.conv1(x)))).mean(dim=(2, 3)))


def make(network):
    """The network with random weights."""
    if network == "resnet20":
        return fresh("cifar10_resnet20")
    _, depth, width = network.split("-")
    return WideResNet(int(depth), int(width))


def train_images(folder):
    """Images and labels to train on, and those held back."""
    with np.load(folder / "cifar10_train.npz") as file:
        X, y = file["X"], file["y"]
    order = np.random.default_rng(0).permutation(len(X))
    return (X[order[HELD_BACK:]], y[order[HELD_BACK:]]), (X[order[:HELD_BACK]], y[order[:HELD_BACK]])


def batches(images, epoch, args):
    """One epoch of `args.images` images in crops and flips: the same for every arm."""
    X, y = images
    rng = np.random.default_rng([1, epoch])
    picked = rng.permutation(len(X))[: args.images]
    for part in np.array_split(picked, len(picked) // args.batch):
        x = _cifar(_cropped(X[part], rng)).to(args.device, memory_format=torch.channels_last)
        yield x, torch.from_numpy(y[part]).long().to(args.device)


def train(method, images, epochs, args, lr):
    """Plain SGD with a cosine schedule: a loop that a user may write."""
    method.model.train().to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(method.parameter_groups(lr), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (args.images // args.batch))
    for epoch in range(epochs):
        for x, y in batches(images, epoch, args):
            optimizer.zero_grad()
            loss = F.cross_entropy(method.model(x), y) + method.penalty()
            loss.backward()
            optimizer.step()
            method.after_step()
            schedule.step()
        method.after_epoch()
    method.model.eval()


def trained(folder, args):
    """The network that is compressed: ResNet-20 as it comes, a Wide ResNet trained here once."""
    if args.network == "resnet20":
        return original(folder, "cifar10_resnet20").to(args.device)
    path = args.cache / f"{args.network}.safetensors"
    model = make(args.network).to(args.device)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    from skfactor.bridge.training.base import TrainingMethod

    method = TrainingMethod()
    method.model = model
    train(method, train_images(folder)[0], args.pretrain, args, 0.1)
    args.cache.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def rules_of(model, clusters, lam, relaxation):
    """One regulariser for all convolutions, or the paper's list; the last layer stays as it is, as in the paper."""
    from skfactor import DeepKMeansRegularizer

    options = {"lam": lam, "relaxation": relaxation, "update_every": 5 if relaxation else 1, "random_state": 0}
    if clusters not in PAPER_CLUSTERS:
        return {"Conv2d": DeepKMeansRegularizer(int(clusters), **options)}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return {name: DeepKMeansRegularizer(k, zero_fraction=p, **options)
            for name, k, p in zip(names, PAPER_CLUSTERS[clusters], PAPER_ZEROS[clusters], strict=True)}


def run(folder, args, arm, clusters, lam, epochs, model=None):
    """Train one arm, of the trained network unless another is given; the method before its end."""
    from skfactor import DeepKMeansTraining

    model = trained(folder, args) if model is None else model
    relaxation = "spectral" if arm == "spectral" else None
    rules = rules_of(model, clusters, lam if arm in ("clusters", "spectral") else 0.0, relaxation)
    method = DeepKMeansTraining(model, rules, schedule="linear", growth=args.growth)
    if arm != "share":
        train(method, train_images(folder)[0], epochs, args, args.lr)
    return method


def measured(folder, args, method, held_back=False):
    """Bytes of the file, and accuracy of the network loaded from it (before: of the network that was shared)."""
    import skfactor

    if held_back:
        X, y = train_images(folder)[1]
        images, labels = _cifar(X), torch.from_numpy(y).long()
    else:
        images, labels = test_set(folder, "cifar10")
    with tempfile.TemporaryDirectory() as scratch:
        path = method.finish().save(os.path.join(scratch, "network.skf"))
        n_bytes = os.path.getsize(path)
        restored = skfactor.load_into(make(args.network), path).eval()
    return n_bytes, accuracy(restored, images, labels), accuracy(method.model.cpu().eval(), images, labels)


def choose(folder, args):
    """λ of the un-relaxed penalty by accuracy on the images held back, for each number of clusters."""
    for clusters in args.clusters:
        for lam in args.lambdas:
            key = (args.network, clusters, lam)
            if any((c["network"], c["clusters"], c["lam"]) == key for c in read(args.json)["chosen_on"]):
                continue
            start = time.process_time()
            method = run(folder, args, "clusters", clusters, lam, args.choose_epochs)
            n_bytes, after, before = measured(folder, args, method, held_back=True)
            add(args, "chosen_on", {"network": args.network, "clusters": clusters, "lam": lam, "bytes": n_bytes,
                                    "epochs": args.choose_epochs, "held_back_accuracy": round(after, 2),
                                    "held_back_before_sharing": round(before, 2),
                                    "cpu_seconds": round(time.process_time() - start, 1)})


def chosen_lambda(args, clusters):
    """λ with the best accuracy on the images held back."""
    if args.lam is not None:
        return args.lam
    tried = [c for c in read(args.json)["chosen_on"] if (c["network"], c["clusters"]) == (args.network, clusters)]
    if not tried:
        raise SystemExit(f"no λ chosen for {args.network} with {clusters} clusters: run --choose first or give --lam")
    return max(tried, key=lambda c: c["held_back_accuracy"])["lam"]


def rows(folder, args):
    """Every arm at every number of clusters."""
    images, labels = test_set(folder, "cifar10")
    known = {}
    base = accuracy(trained(folder, args).cpu().eval(), images, labels)
    float32 = sum(4 * t.numel() for t in make(args.network).state_dict().values() if t.is_floating_point())
    for arm in args.arms:
        for clusters in args.clusters:
            if any(_key(r) == (args.network, clusters, arm) for r in read(args.json)["rows"]):
                continue
            lam = chosen_lambda(args, clusters) if arm in ("clusters", "spectral") else 0.0
            start = time.process_time()
            # the plain loss knows no clusters, and the spectral penalty is the same for any number from 3 on
            if (arm, lam) in known:
                method = run(folder, args, "share", clusters, lam, 0, known[arm, lam])
            else:
                method = run(folder, args, arm, clusters, lam, args.epochs)
            known = {(arm, lam): method.model} if arm in ("plain", "spectral") else {}
            n_bytes, after, before = measured(folder, args, method)
            add(args, "rows", {"network": args.network, "clusters": clusters, "arm": arm, "lam": lam,
                               "epochs": 0 if arm == "share" else args.epochs, "images_per_epoch": args.images,
                               "bytes": n_bytes, "ratio": round(float32 / n_bytes, 2),
                               "accuracy_trained": round(base, 2), "accuracy_before_sharing": round(before, 2),
                               "accuracy_after": round(after, 2), "points_lost": round(base - after, 2),
                               "test_images": len(labels), "cpu_seconds": round(time.process_time() - start, 1)})


def read(path):
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "chosen_on": []}


def add(args, part, row):
    found = read(args.json)
    found[part].append(row)
    found["machine"] = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0],
                        "device": args.device, "threads": torch.get_num_threads()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(row), flush=True)


def _key(row):
    return row["network"], row["clusters"], row["arm"]


def table(found):
    """Markdown table of all rows."""
    names = {"share": "none (\"WR\" row)", "plain": "plain loss", "clusters": "un-relaxed penalty",
             "spectral": "published spectral penalty"}
    lines = ["| network | clusters | re-training | λ | images seen | bytes | smaller | accuracy before sharing | after "
             "| lost |", "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    clusters = [r["clusters"] for r in found]
    order = sorted(found, key=lambda r: (r["network"], clusters.index(r["clusters"]), ARMS.index(r["arm"])))
    for r in order:
        lines.append(f"| {r['network']} | {r['clusters']} | {names[r['arm']]} | {r['lam'] or ''} "
                     f"| {r['epochs'] * r['images_per_epoch']:,} | {r['bytes']:,} | {r['ratio']:.1f}x "
                     f"| {r['accuracy_before_sharing']:.2f} | {r['accuracy_after']:.2f} | {r['points_lost']:.2f} |")
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "deep_kmeans.json", type=Path)
    parser.add_argument("--network", default="resnet20", help="resnet20 (trained already) or wrn-DEPTH-WIDTH")
    parser.add_argument("--clusters", nargs="*", default=["32", "16"], help="per layer; or paper45, paper50")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=4096, help="images of one epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--growth", type=float, default=1.0, help="λ of epoch e is λ (1 + growth e)")
    parser.add_argument("--lam", type=float, help="instead of the λ chosen")
    parser.add_argument("--choose", action="store_true", help="choose λ on images held back")
    parser.add_argument("--lambdas", nargs="*", type=float, default=LAMBDAS)
    parser.add_argument("--choose-epochs", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=10, help="epochs from scratch of a Wide ResNet")
    parser.add_argument("--cache", type=Path, default=Path("trained"), help="folder of Wide ResNets trained here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.docs:
        text = args.docs.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        shown = table(read(args.json)["rows"])
        args.docs.write_text(f"{head}{BEGIN}\n{shown}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    (choose if args.choose else rows)(data_folder(args.data), args)


if __name__ == "__main__":
    main()
