# SPDX-License-Identifier: BSD-3-Clause
"""NORTON's CIFAR-10 tables (VGG-16-BN, ResNet-56, DenseNet-40), row by row, beside skfactor at the same cost.

A row is a rank and the share of filters removed from each layer, recomputed from the published scripts. `--method
authors` decomposes and selects as the published code does (`norton_authors.py`); `--method ours` prunes by norm
with a refit, and decomposes layer after layer, from unlabelled training images. Then both are fine-tuned by the same
recipe; of several learning rates each takes the one that is best on held-back training images after half an epoch.
The last state of training counts, not the best on test images. (The structure of r56-73 was changed after a first run
had been seen on them: docs/norton.md.)

    python norton_cifar10.py --rows r56-37 r56-73             # ResNet-56 from its real weights, minutes on a CPU
    python norton_cifar10.py --scale gpu --rows vgg-74        # the published recipe; trains the baseline first
    python norton_cifar10.py --scale gpu --baseline FILE ...  # a baseline of your own (.safetensors)
    python norton_cifar10.py --latency                        # measure the latencies of all rows again
    python norton_cifar10.py --docs FILE                      # write the table into FILE, between its markers

With --scale gpu VGG-16-BN and DenseNet-40 are trained on the complete CIFAR-10 of `cifar10_jpeg.npz` and tested on its
test images; ResNet-56 has real weights, and is trained and tested on the lossless images.
"""

import argparse
import copy
import io
import json
import os
import platform
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import norton_authors
import numpy as np
import torch
import torch.nn.functional as F
from networks import _cifar, accuracy, calibration_images, data_folder, fresh, original, test_set
from norton_authors import CPConv2d, rates, smaller, with_cp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import skfactor
from skfactor.bridge import FactorizedLayer, count_macs
from skfactor.bridge.calibrate import evaluation
from skfactor.bridge.latency import latencies, quiet_clock

VGG, R56, D40 = "cifar10_vgg16", "cifar10_resnet56", "cifar10_densenet40"
#: Published accuracy of the networks before compression.
PUBLISHED_BASELINES = {VGG: 93.96, R56: 93.26, D40: 94.81}
N_CALIBRATION, MAX_VECTORS = 512, 65536
#: Images that run twice for every layer, when layers are fitted one after the other.
N_IN_ORDER = 128
_KNOWN = {}


@dataclass(frozen=True)
class Row:
    """One published row: how it is made, and its figures (top-1, millions of MACs and of parameters)."""

    network: str
    rank: int
    removed: str
    top1: float
    mmacs: float
    mparams: float
    note: str = ""


#: Rows of the published tables and of the repository's README.
ROWS = {
    "vgg-126": Row(VGG, 8, "[0.21]*7+[0.75]*5", 94.45, 126.49, 2.58),
    "vgg-102": Row(VGG, 8, "[0.3]*7+[0.75]*5", 94.16, 101.91, 2.34),
    "vgg-74": Row(VGG, 2, "", 94.11, 74.14, 3.60),
    "vgg-38": Row(VGG, 1, "", 93.84, 37.68, 1.94),
    "vgg-14": Row(VGG, 1, "[0.3]*7+[0.75]*5", 92.54, 13.54, 0.24,
                  "no released configuration gives both figures; this one has the MACs, and 0.53 M parameters"),
    "vgg-5": Row(VGG, 1, "[0.6]*6+[0.8]*7", 90.32, 4.58, 0.14),
    "r56-93": Row(R56, 7, "[0.]+[0.18]*29", 94.46, 93.34, 0.58),
    "r56-73": Row(R56, 7, "[0.]+[0.12]*2+[0.4]*27", 94.00, 73.22, 0.44),
    "r56-37": Row(R56, 2, "", 93.81, 37.52, 0.21),
    "r56-14": Row(R56, 1, "[0.]+[0.18]*29", 91.62, 14.47, 0.08),
    "d40-214": Row(D40, 8, "[0.]+[0.08]*6+[0.09]*6+[0.08]*26", 94.86, 213.58, 0.74),
    "d40-168": Row(D40, 8, "[0.]+[0.2]*12+[0.]+[0.2]*12+[0.]+[0.2]*12", 94.67, 168.23, 0.58),
}


@dataclass(frozen=True)
class Scale:
    """How long the fine-tuning is, and on what: `epochs` of so many `batches`, or of all images.

    `rates` are the learning rates to choose from; with `distilled` the original network is the teacher.
    """

    batch_size: int
    rates: tuple[float, ...] = ()
    epochs: int = 0
    batches: int = 0
    warmup: float = 0.0
    weight_decay: float = 5e-4
    distilled: bool = True


#: The published recipe, and shorter ones with the original network as teacher: alike for both methods.
SCALES = {"none": Scale(128),                                               # compressed only
          "tiny": Scale(8, (0.01, 0.001), epochs=1, batches=2),
          "minutes": Scale(128, (0.02,), epochs=1, batches=24, warmup=0.2),                # 3,072 images
          "cpu": Scale(128, (0.001, 0.005, 0.02, 0.08), epochs=2, warmup=0.3),  # twice the lossless images
          "gpu": Scale(256, (0.05,), epochs=400, warmup=5, distilled=False)}
N_HELD_BACK = 2000


# ------------------------------------------------------------------------------------------------------------- costs
def counted(model, count="conv_linear"):
    """MACs of one image: of convolutions and linear layers, or "published".

    The counter behind the tables (ptflops) adds two for every output of a batch normalisation, one for every output of
    a ReLU and one for every input of a pooling.
    """
    image = torch.zeros(1, 3, 32, 32)
    macs = count_macs(model, image)
    if count == "conv_linear":
        return macs
    with evaluation(model), _Elementwise() as others:
        model(image)
    return macs + others.total


class _Elementwise(TorchDispatchMode):
    """Operations that ptflops counts beside convolutions and linear layers."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        if "batch_norm" in name:
            self.total += 2 * result[0].numel()
        elif name in ("relu", "relu_"):
            self.total += result.numel()
        elif "pool" in name or name == "mean":
            self.total += args[0].numel()
        return result


def structure(row):
    """The published network of a row, with random weights."""
    return with_cp(smaller(row.network, rates(row.removed) if row.removed else []), row.rank)


def file_bytes(model):
    """Bytes of the file in which skfactor stores this network losslessly."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = skfactor.compress(model, {"*": None}, progress=False).save(os.path.join(folder, "network.skf"))
        return os.path.getsize(path)


def seconds_of(models, batch):
    """Seconds of one forward pass of each network, side by side."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return latencies([lambda m=m: m(x) for m in models], repeats=5, clock=quiet_clock(x.device))


# ----------------------------------------------------------------------------------------------------------- methods
def by_authors(model, row, folder, seed):
    """Decomposed and pruned as published."""
    small = norton_authors.decomposed(model, row.network, row.rank, np.random.default_rng(seed))
    return norton_authors.pruned(small, row.network, row.rank, rates(row.removed)) if row.removed else small


def by_us(model, row, folder, seed):
    """Pruned by norm with a refit, then decomposed layer after layer, from unlabelled training images.

    A ResNet loses channels inside its blocks only, so many per stage as fill the row's MACs and parameters. A rank of 7
    or more saves next to nothing beside the pruning, so such rows are not decomposed, and the layers behind the removed
    channels are refitted at once.
    """
    images = calibration_images(folder, row.network, N_CALIBRATION, 0)[0]
    is_resnet = row.network.startswith("cifar10_resnet")
    pruned_only = bool(row.removed) and row.rank >= 7 and is_resnet
    if row.removed:
        amounts = inner_channels(row) if is_resnet else published_amounts(row)
        model = skfactor.prune_filters(model, amounts, sequential=not pruned_only, progress=False,
                                       calibration=skfactor.Calibration(images, max_vectors=MAX_VECTORS)).model
    if pruned_only:
        return model
    rules = {name: skfactor.CPDFilterPruner(rank=row.rank) for name, _ in norton_authors.convolutions(model)}
    calibration = skfactor.Calibration(images[:N_IN_ORDER], sequential=True, max_vectors=MAX_VECTORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return skfactor.compress(model, rules | {"*": None}, calibration=calibration, mode="factorized",
                                 progress=False).model


def published_amounts(row):
    """Number of filters to remove from every layer, as in the published row."""
    before, after = fresh(row.network), smaller(row.network, rates(row.removed))
    kept = {p: m.out_channels for p, m in after.named_modules() if isinstance(m, nn.Conv2d)}
    return {p: m.out_channels - kept[p] for p, m in before.named_modules()
            if isinstance(m, nn.Conv2d) and m.out_channels > kept[p]}


def inner_channels(row):
    """Channels to remove inside the blocks of each stage of ResNet-56, by the budgets of the row's network.

    Of all numbers of channels that use 97 % or more of the row's MACs and parameters, those whose scarcest stage keeps
    the largest share; of such, the next.
    """
    if row.rank < 7:
        share = rates(row.removed)[-1]
        return {f"layer{i + 1}.*.conv1": c - int(c * (1 - share)) for i, c in enumerate((16, 32, 64))}
    theirs, best = structure(row), ([], None)
    limits = np.array([counted(theirs), sum(p.numel() for p in theirs.parameters())])
    for kept in product(range(1, 17), range(1, 33), range(1, 65)):
        used = _cost_of_inner(kept) / limits
        if (used <= 1).all() and (used >= 0.97).all():
            best = max(best, (sorted(k / width for k, width in zip(kept, (16, 32, 64))), kept))
    return {f"layer{i + 1}.*.conv1": width - kept for i, (width, kept) in enumerate(zip((16, 32, 64), best[1]))}


def _cost_of_inner(kept, n=9):
    """(MACs, parameters) of a ResNet with so many channels inside the n blocks of its three stages."""
    macs, params = 16 * 27 * 1024 + 640, 16 * 27 + 2 * 16 + 650
    for c_in, c_out, k, pixels in zip((16, 16, 32), (16, 32, 64), kept, (1024, 256, 64), strict=True):
        weights = 9 * k * (c_in + c_out + 2 * (n - 1) * c_out)
        macs, params = macs + weights * pixels, params + weights + 2 * n * (k + c_out)
    return macs, params


METHODS = {"authors": by_authors, "ours": by_us}


def compressed(model, row, method, seed, folder, path):
    """The network before any training, and the CPU seconds it took: made once, and kept for other scales."""
    if path.exists():
        return torch.load(path, weights_only=False)
    start = time.process_time()
    small = METHODS[method](model, row, folder, seed)
    found = small, time.process_time() - start
    torch.save(found, path)
    return found


# ---------------------------------------------------------------------------------------------------------- training
class Composed(nn.Module):
    """A factorised convolution that runs as one dense convolution, its weight composed of the factors in every step.

    The same function and the gradients of the same factors; on a CPU several times faster than the chain.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def composed(model, on):
    """Switch every factorised convolution to one dense convolution and back, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, CPConv2d):
            module.composed = on
        elif isinstance(module, Composed) and not on:
            model.set_submodule(path, module.layer)
        elif isinstance(module, FactorizedLayer) and on and isinstance(module[0], nn.Conv2d):
            model.set_submodule(path, Composed(module))
    return model


class Draws:
    """So many batches of random training images, cropped and flipped, every time it is iterated."""

    def __init__(self, X, y, batch_size, batches):
        self.X, self.y, self.batch_size, self.batches = X, y, batch_size, batches

    def __len__(self):
        return self.batches

    def __iter__(self):
        order = torch.randperm(len(self.X))
        for i in range(self.batches):
            picked = order[torch.arange(i * self.batch_size, (i + 1) * self.batch_size) % len(order)]
            yield crops(self.X[picked]), self.y[picked]


def crops(x):
    """Each image flipped or not, and shifted by up to four pixels, zeros around it."""
    n = len(x)
    x = torch.where((torch.rand(n, device=x.device) < 0.5)[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n, 1, 1), device=x.device)
    rows, columns = top + torch.arange(32, device=x.device)[:, None], left + torch.arange(32, device=x.device)
    return padded[torch.arange(n, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def tuned(model, train, scale, rate, seed, checkpoint=None, teacher=None):
    """The network after the fine-tuning of a scale, and what each epoch gave."""
    X, y = train
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not scale.epochs:
        return model, []
    result = skfactor.finetune(
        composed(model, place.type == "cpu"),
        Draws(X.to(place), y.to(place), scale.batch_size, _batches(scale, len(X))), epochs=scale.epochs, lr=rate,
        teacher=teacher if scale.distilled else None, distillation=0.9, weight_decay=scale.weight_decay,
        random_state=seed, warmup_epochs=scale.warmup, checkpoint=checkpoint, progress=False, device=place,
        amp=place.type == "cuda", channels_last=True, callback=lambda record: print(json.dumps(record), flush=True))
    composed(model, False)
    return composed(result.model.cpu().eval(), False).to(memory_format=torch.contiguous_format), result.history


def _batches(scale, n_images):
    return scale.batches or n_images // scale.batch_size


def chosen_rate(small, train, held_back, scale, name, method, args, teacher):
    """Of the rates of a scale the one that is best on held-back images after half an epoch; chosen once."""
    if len(scale.rates) < 2:
        return scale.rates[0] if scale.rates else 0.0
    everything = _read(args.json)
    same = lambda c: (c["row"], c["method"], c["scale"]) == (name, method, args.scale)  # noqa: E731
    choice = next(filter(same, everything.get("chosen", [])), {"held_back": {}})
    missing = [rate for rate in scale.rates if str(rate) not in choice["held_back"]]
    if missing:
        short = replace(scale, epochs=1, batches=max(_batches(scale, len(train[0])) // 2, 1))
        found = dict(choice["held_back"])
        for rate in missing:
            model, _ = tuned(copy.deepcopy(small), train, short, rate, 0, teacher=teacher)
            found[str(rate)] = round(accuracy(composed(model, True), *held_back), 2)
            print(json.dumps({"row": name, "method": method, "rate": rate, "held_back": found[str(rate)]}), flush=True)
        choice = {"row": name, "method": method, "scale": args.scale, "batches": short.batches, "held_back": found,
                  "rate": float(max(found, key=found.get))}
        everything = _read(args.json)  # again: another run may have added rows meanwhile
        everything["chosen"] = [c for c in everything.get("chosen", []) if not same(c)] + [choice]
        _write(args.json, everything, args.threads)
    return choice["rate"]


def lossless(folder):
    """Lossless CIFAR-10 training images, normalised, and their labels: those to train on, those held back."""
    with np.load(folder / "cifar10_train.npz") as file:
        X, y = _cifar(file["X"]), torch.from_numpy(file["y"]).long()
    order = np.random.default_rng(0).permutation(len(X))  # its first images calibrate
    return (X[order[:-N_HELD_BACK]], y[order[:-N_HELD_BACK]]), (X[order[-N_HELD_BACK:]], y[order[-N_HELD_BACK:]])


def jpeg(folder, part):
    """The complete CIFAR-10 as JPEG: "train" or "test"."""
    from PIL import Image

    with np.load(folder / "cifar10_jpeg.npz") as file:
        data, offsets, y = file[f"{part}_jpeg"].tobytes(), file[f"{part}_off"], file[f"y_{part}"]
    X = np.stack([np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in zip(offsets[:-1], offsets[1:])])
    return _cifar(X), torch.from_numpy(y).long()


def baseline(network, folder, given, scale, seed, scratch):
    """The network to compress: from a file, from the real weights, or trained here."""
    if given or (folder / "weights" / f"{network}.safetensors").exists():
        if not given:
            return original(folder, network)
        model = fresh(network)
        model.load_state_dict(load_file(given), strict=False)
        return model
    if not torch.cuda.is_available():
        raise SystemExit(f"{network} has no trained weights here: give --baseline, or train it on a GPU (--scale gpu)")
    torch.manual_seed(seed)
    model, _ = tuned(fresh(network), jpeg(folder, "train"), scale, scale.rates[0], seed, scratch / f"{network}.ckpt")
    save_file(model.state_dict(), scratch / f"{network}.safetensors")
    return model


# ------------------------------------------------------------------------------------------------------- measurement
def measure(name, method, seed, folder, scale, args):
    """One row of the table: compress, fine-tune, count."""
    row = ROWS[name]
    real = (folder / "weights" / f"{row.network}.safetensors").exists()
    train, held_back = lossless(folder) if real else (jpeg(folder, "train"), None)
    test = test_set(folder, row.network) if real else jpeg(folder, "test")
    model = baseline(row.network, folder, args.baseline, scale, seed, args.scratch)
    start = seed if method == "authors" else 0  # theirs starts at random, ours has one result
    small, seconds = compressed(model, row, method, start, folder, args.scratch / f"{name}-{method}-{start}.pt")
    untrained = accuracy(composed(small, True), *test)
    composed(small, False)
    print(json.dumps({"row": name, "method": method, "top1_untrained": untrained, "seconds": seconds}), flush=True)
    rate = chosen_rate(small, train, held_back, scale, name, method, args, model)
    start = time.process_time()
    checkpoint = args.scratch / f"{name}-{method}-{seed}-{args.scale}.ckpt"
    small, history = tuned(small, train, scale, rate, seed, checkpoint, model)
    training = time.process_time() - start
    final = accuracy(composed(small, True), *test) if history else untrained
    composed(small, False)
    return {"row": name, "network": row.network, "method": method, "seed": seed, "scale": args.scale,
            "top1_before": round(_accuracy_before(model, row.network, test), 2), "top1_untrained": round(untrained, 2),
            "top1": round(final, 2), "test_images": len(test[1]), "epochs": scale.epochs,
            "images_seen": scale.epochs * _batches(scale, len(train[1])) * scale.batch_size,
            "train_images": len(train[1]), "lr": rate, "distilled": scale.distilled and bool(history),
            "batch_size": scale.batch_size, "losses": [round(h["loss"], 4) for h in history],
            "cpu_seconds_compress": round(seconds, 1),
            "cpu_seconds_training": round(training, 1)} | costs(model, small, args.json, name, method)


def _accuracy_before(model, network, test):
    """Accuracy of the original, once per network and process."""
    if network not in _KNOWN:
        _KNOWN[network] = accuracy(model, *test)
    return _KNOWN[network]


def costs(model, small, path, name, method):
    """MACs by both countings, parameters, bytes of the file, and latency beside the original, measured for one seed."""
    known = next((r for r in _read(path)["rows"] if (r["row"], r["method"]) == (name, method)), None)
    ms = {key: known[key] for key in ("ms_batch1", "ms_batch64")} if known else latency(model, small)
    macs = {f"macs_{c}": counted(small, c) for c in ("conv_linear", "published")}
    return macs | {"parameters": sum(p.numel() for p in small.parameters()), "file_bytes": file_bytes(small),
                   "file_bytes_before": file_bytes(model)} | ms


def latency(model, small):
    """Milliseconds of both networks, by turns, for batches of 1 and 64."""
    return {f"ms_batch{n}": [round(1e3 * s, 2) for s in seconds_of((model, small), n)] for n in (1, 64)}


def measure_latencies(folder, args):
    """The latencies of all rows that were fine-tuned here, again."""
    found = _read(args.json)
    for name, method in {(r["row"], r["method"]) for r in found["rows"]}:
        model = baseline(ROWS[name].network, folder, args.baseline, SCALES["none"], 0, args.scratch)
        small, _ = torch.load(args.scratch / f"{name}-{method}-0.pt", weights_only=False)
        ms = latency(model, small)
        print(name, method, ms, flush=True)
        for r in found["rows"]:
            if (r["row"], r["method"]) == (name, method):
                r |= ms
    _write(args.json, found, args.threads)


def table(rows):
    """Markdown table: published figures, and ours where they were measured."""
    lines = ["| network | row | published: top-1 (before), M MACs, M parameters | method | seeds | images seen "
             "| top-1 before | not trained | fine-tuned | M MACs | M parameters | file, kB | batch 1, ms "
             "| batch 64, ms |",
             "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name, row in ROWS.items():
        published = f"{row.top1:.2f} ({PUBLISHED_BASELINES[row.network]:.2f}), {row.mmacs}, {row.mparams}"
        groups = {}
        for r in rows:
            if r["row"] == name:
                groups.setdefault((r["method"], r["images_seen"]), []).append(r)
        for (method, seen), group in sorted(groups.items()):
            first = group[0]
            lines.append(f"| {row.network} | {name} | {published} | {method} | {len(group)} | {seen:,} "
                         f"| {first['top1_before']:.2f} | {_spread(group, 'top1_untrained')} "
                         f"| {_spread(group, 'top1')} "
                         f"| {first['macs_published'] / 1e6:.2f} | {first['parameters'] / 1e6:.3f} "
                         f"| {first['file_bytes'] / 1e3:.0f} of {first['file_bytes_before'] / 1e3:.0f} "
                         f"| {first['ms_batch1'][1]:.1f} of {first['ms_batch1'][0]:.1f} "
                         f"| {first['ms_batch64'][1]:.0f} of {first['ms_batch64'][0]:.0f} |")
        if not groups:
            lines.append(f"| {row.network} | {name} | {published} | not run | | | | | | | | | | |")
    return "\n".join(lines)


def rates_table(chosen):
    """Markdown: accuracy on held-back images by learning rate, the chosen one in bold."""
    rates = sorted({float(rate) for c in chosen for rate in c["held_back"]})
    lines = ["| row | method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
             "|---|---|" + "--:|" * len(rates)]
    for c in sorted(chosen, key=lambda c: (c["row"], c["method"])):
        cells = (f"{c['held_back'][str(rate)]:.2f}" if str(rate) in c["held_back"] else "" for rate in rates)
        cells = (f"**{cell}**" if rate == c["rate"] else cell for rate, cell in zip(rates, cells, strict=True))
        lines.append(f"| {c['row']} | {c['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(group, key):
    values = [r[key] for r in group]
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def _read(path):
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def _write(path, found, threads):
    """Rows, what of the tables was not run, and the machine."""
    found["not_run"] = [n for n in ROWS if n not in {r["row"] for r in found["rows"]}]
    found["not_fine_tuned"] = [n for n in ROWS if n not in {r["row"] for r in found["rows"] if r["images_seen"]}]
    found["machine"] = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0],
                        "threads": threads}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _key(row):
    return row["row"], row["method"], row["seed"], row["scale"]


def main(argv=None):
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--json", default=here / "results" / "norton_cifar10.json", type=Path)
    parser.add_argument("--rows", nargs="*", default=["r56-37", "r56-73"], choices=list(ROWS))
    parser.add_argument("--method", nargs="*", default=["ours", "authors"], choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--scale", default="cpu", choices=list(SCALES))
    parser.add_argument("--baseline", type=Path, help="trained network (.safetensors), instead of the one of the data")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()),
                        help="folder for compressed networks and checkpoints, from which a later run goes on")
    parser.add_argument("--latency", action="store_true", help="only measure the latencies of the known rows again")
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.docs:
        text, found = args.docs.read_text(encoding="utf-8"), _read(args.json)
        for name, shown in (("norton", table(found["rows"])), ("norton rates", rates_table(found.get("chosen", [])))):
            head, begin, rest = text.partition(f"<!-- {name}: begin -->")
            _, end, tail = rest.partition(f"<!-- {name}: end -->")
            text = f"{head}{begin}\n{shown}\n{end}{tail}" if begin else text
        args.docs.write_text(text, encoding="utf-8")
        return
    folder = data_folder(args.data)
    if args.latency:
        measure_latencies(folder, args)
        return
    _write(args.json, _read(args.json), args.threads)
    if not args.baseline:
        _KNOWN.update({r["network"]: r["top1_before"] for r in _read(args.json)["rows"]})
    for seed in args.seeds:
        for name in args.rows:
            for method in args.method:
                if (name, method, seed, args.scale) in map(_key, _read(args.json)["rows"]):
                    continue
                row = measure(name, method, seed, folder, SCALES[args.scale], args)
                print(json.dumps(row), flush=True)
                found = _read(args.json)  # again: another run may have added rows meanwhile
                found["rows"].append(row)
                _write(args.json, found, args.threads)


if __name__ == "__main__":
    main()
