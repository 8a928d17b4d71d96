"""The smallest LeNet-300-100 and LeNet-5: MNIST networks trained for the bytes of their file.

    python examples/reproduce/smallest_lenets.py --data mnist.npz --net 300      # or --net 5

Networks of few units are trained from scratch with `EntropyTraining` on slightly distorted images, then put into
the full-size LeNet, whose other units are zero, and saved. 5,000 of the 60,000 training images are kept for validation:
prices of bytes were chosen on them, and so is the seed that counts. The 10,000 test images are only reported.

Every finished run is kept, so an interrupted table goes on where it stopped; the augmented images can be kept too
(--cache). Results: results/lenets/*.skf and results/smallest_lenets_*.json, printed as a table with published rows.
"""
# SPDX-License-Identifier: BSD-3-Clause

import argparse
import ctypes
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import skfactor
from skfactor.bridge.training.entropy import EntropyTraining

RESULTS = Path(__file__).parent / "results"
N_VARIANTS, N_VALIDATION = 8, 5000
N_JUDGED = 10_000  # training images that judge a network together with the validation images
PUBLISHED = {
    "300": [("Deep Compression", 40, 1.58), ("soft weight-sharing", 64, 1.94),
            ("sparse variational dropout", 113, 1.8)],
    "5": [("Deep Compression", 39, 0.74), ("soft weight-sharing", 162, 0.97), ("Bayesian compression", 771, 1.0),
          ("MIRACLE", 1110, 0.96), ("MIRACLE", 555, 0.69)],
}
# name: (limit in bytes, size that the price aims at, widths, first price of a bit in 1/N nats, group weight,
# epochs, part of images as they are, not distorted). A file ends up some per cent below its aim: late steps are small.
POINTS = {
    "300": {"3554": (3554, 3620, (56, 32), 0.20, 1.0, 40, 0.75), "4443": (4443, 4530, (64, 40), 0.09, 0.4, 160, 0.6),
            "7109": (7109, 7250, (64, 40), 0.03, 0.4, 200, 0.4)},
    "5": {"1550": (1550, 1590, (6, 12, 40), 0.40, 1.5, 50, 0.75),
          "3107": (3107, 3180, (6, 12, 40), 0.08, 0.6, 120, 0.6)},
}
RAMP, LAST = 0.2, 0.3  # parts of the epochs: while the price grows; whose networks are looked at for the best


# --- networks ---------------------------------------------------------------------------------------


class LeNet300(nn.Module):
    """784-300-100-10 on pixels / 256; other widths for training, on those pixels that are not always black."""

    def __init__(self, widths=(300, 100), n_pixels=784):
        super().__init__()
        self.ip1 = nn.Linear(n_pixels, widths[0])
        self.ip2 = nn.Linear(widths[0], widths[1])
        self.ip3 = nn.Linear(widths[1], 10)

    def forward(self, x):
        return self.ip3(torch.relu(self.ip2(torch.relu(self.ip1(x)))))


class LeNet5(nn.Module):
    """Caffe's LeNet-5 on pixels / 256: 20 and 50 filters, 500 units."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.ip1, self.ip2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x.reshape(-1, 1, 28, 28)), 2)
        x = F.max_pool2d(self.conv2(x), 2).flatten(1)
        return self.ip2(torch.relu(self.ip1(x)))


def _compiled():
    """The library of conv_pool.c, or None where there is no C compiler."""
    source = Path(__file__).parent / "conv_pool.c"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "conv_pool.so"
        try:
            subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", target, source], check=True)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no C compiler ({error}): the convolutions take torch's own layers, about six times slower")
            return None


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class ConvPool(torch.autograd.Function):
    """5x5 convolution without bias and 2x2 max-pool of (images, channels, h, h)."""

    compiled = None

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        (n, c, h, _), o = x.shape, len(weight)
        m = (h - 4) // 2
        out, which = torch.empty(n, o, m, m), torch.empty(n, o, m, m, dtype=torch.uint8)
        ConvPool.compiled.conv_pool_forward(_pointer(x), _pointer(weight), n, o, c, h, _pointer(out), _pointer(which))
        ctx.save_for_backward(x, weight, which)
        ctx.needs_x = x.requires_grad
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, which = ctx.saved_tensors
        (n, c, h, _), o = x.shape, len(weight)
        of_weight = torch.zeros(o, c, 5, 8)
        of_x = torch.zeros_like(x) if ctx.needs_x else None
        ConvPool.compiled.conv_pool_backward(_pointer(grad.contiguous()), _pointer(which), _pointer(x),
                                             _pointer(weight), n, o, c, h, _pointer(of_weight), _pointer(of_x))
        return of_x, of_weight[..., :5]


def conv_pool(x, weight):
    """By conv_pool.c where it could be compiled: few channels are what torch's convolutions are slow at."""
    return ConvPool.apply(x, weight) if ConvPool.compiled else F.max_pool2d(F.conv2d(x, weight), 2)


class NarrowLeNet5(nn.Module):
    """LeNet-5 of few filters, fast on one core. Biases of the convolutions would only add to that of `ip1`."""

    def __init__(self, widths):
        super().__init__()
        a, b, hidden = widths
        self.conv1, self.conv2 = nn.Conv2d(1, a, 5, bias=False), nn.Conv2d(a, b, 5, bias=False)
        self.ip1, self.ip2 = nn.Linear(16 * b, hidden), nn.Linear(hidden, 10)

    def forward(self, x):
        x = conv_pool(x.view(-1, 1, 28, 28), self.conv1.weight)
        return self.ip2(torch.relu(self.ip1(conv_pool(x, self.conv2.weight).flatten(1))))


def initialise(model):
    """He's start, biases at zero; what inputs of mostly black pixels need is a little more."""
    for name, p in model.named_parameters():
        gain = {"ip1": 1.5 if isinstance(model, LeNet300) else 1.0, "conv2": 0.7}.get(name.split(".")[0], 1.0)
        nn.init.zeros_(p) if p.dim() < 2 else nn.init.normal_(p, std=gain * math.sqrt(2 / p[0].numel()))


def in_full_size(narrow, steps, pixels=None):
    """The LeNet whose first units are those of the narrow network and whose others are zero, and its file's content.

    Steps are rounded to bfloat16: two bytes instead of four in the file.
    """
    full = LeNet300() if isinstance(narrow, LeNet300) else LeNet5()
    rounded = {n: float(torch.tensor(step).bfloat16()) for n, step in steps.items()}
    state = {n: (value / steps[n]).round() * rounded[n] for n, value in narrow.state_dict().items() if n in steps}
    steps = rounded
    with torch.no_grad():
        for name, p in full.named_parameters():
            p.zero_()
            if name not in state:
                continue
            value = state[name]
            if name == "ip1.weight" and pixels is not None:
                p[: len(value), pixels] = value
            else:
                p[tuple(slice(k) for k in value.shape)] = value
    rules = {n: skfactor.UniformQuantizer(steps.get(n, 1.0), unit="absolute", entropy_weight=0.0) if p.any() else None
             for n, p in full.named_parameters()}  # zeros alone take fewer bytes without a quantiser
    return skfactor.compress(full, rules, progress=False)


# --- images -----------------------------------------------------------------------------------------


def distorted(x, generator):
    """Rotated by up to 10 degrees, scaled and sheared by up to 10 %, shifted by up to 1.5 pixels, bent by about 0.8."""
    n = len(x)

    def r():
        return torch.rand(n, generator=generator) * 2 - 1

    angle, sx, sy, shear = r() * 10 * np.pi / 180, 1 + r() * 0.1, 1 + r() * 0.1, r() * 0.1
    ca, sa = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([ca * sx, -sa * sy + shear, r() * 1.5 / 14], 1),
                         torch.stack([sa * sx, ca * sy, r() * 1.5 / 14], 1)], 1)
    grid = F.affine_grid(theta, (n, 1, 28, 28), align_corners=False)
    axis = torch.arange(-9, 10).float()
    kernel = torch.exp(-(axis**2) / (2 * 4.0**2))
    kernel = kernel / kernel.sum()
    field = torch.rand(n * 2, 1, 28, 28, generator=generator) * 2 - 1
    field = F.conv2d(field, kernel.view(1, 1, 1, -1), padding=(0, 9))
    field = F.conv2d(field, kernel.view(1, 1, -1, 1), padding=(9, 0))
    bend = (field / field.std()).view(n, 2, 28, 28).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid + bend * 0.8 / 14, align_corners=False)


def images(data, cache=None):
    """(pool of training images and their distortions, labels, validation images, labels, test images, labels)."""
    with np.load(data) as d:
        X, y, X_test, y_test = d["X_train"], d["y_train"], d["X_test"], d["y_test"]
    order = np.random.RandomState(0).permutation(len(X))
    held, used = np.sort(order[:N_VALIDATION]), np.sort(order[N_VALIDATION:])
    path = Path(cache) / "pool.npy" if cache else None
    if path is not None and path.exists():
        pool = np.load(path, mmap_mode="r")
    else:
        generator = torch.Generator().manual_seed(0)
        pool = np.empty((N_VARIANTS, len(used), 784), np.uint8)
        pool[0] = X[used].reshape(-1, 784)
        for k in range(1, N_VARIANTS):
            for s in range(0, len(used), 1000):
                x = torch.from_numpy(X[used[s : s + 1000]]).float()[:, None]
                pool[k, s : s + 1000] = distorted(x, generator).round().clamp(0, 255).byte().reshape(-1, 784).numpy()
        if path is not None:
            np.save(path, pool)

    def pixels(a):
        return torch.from_numpy(a.reshape(-1, 784)).float() / 256

    return (pool, torch.from_numpy(y[used]).long(), pixels(X[held]), torch.from_numpy(y[held]).long(),
            pixels(X_test), torch.from_numpy(y_test).long())


@torch.no_grad()
def error_of(model, X, y):
    """Wrong answers in per cent."""
    wrong = sum(int((model(X[i : i + 1000]).argmax(1) != y[i : i + 1000]).sum()) for i in range(0, len(y), 1000))
    return 100.0 * wrong / len(y)


# --- training ---------------------------------------------------------------------------------------


def train(model, pool, labels, settings, seed, size_of, keep=None, *, lr=6e-3, batch=400):
    """Adam with a cosine schedule. Returns the method.

    The price of a byte grows over the first epochs; then, every other epoch, it follows the size of the file: dearer
    above the aim, cheaper below. Codes on the edge between two values jump to and fro until the end: `keep` sees every
    network of the last epochs, and may keep the best.
    """
    _, aim, _, price, group, epochs, plain = settings
    n = len(labels)
    method = EntropyTraining(model)
    optimizer = torch.optim.Adam(method.parameter_groups(lr), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / (epochs * (n // batch)))))
    rng = np.random.RandomState(1000 + seed)
    for epoch in range(epochs):
        variant = np.where(rng.rand(n) < plain, 0, rng.randint(1, N_VARIANTS, n))
        order = rng.permutation(n)
        for b in range(n // batch):
            grown = min(1.0, (epoch + b * batch / n) / (RAMP * epochs))
            method.rate_weight, method.group_weight = 8 * price * grown / n, group * grown / n
            some = order[b * batch : (b + 1) * batch]
            x = torch.from_numpy(pool[variant[some], some]).float().div_(256)
            loss = F.cross_entropy(method.model(x), labels[some]) + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
            schedule.step()
        method.after_epoch()
        late = epoch >= (1 - LAST) * epochs
        if late or (epoch + 1 >= RAMP * epochs and epoch % 2):
            size = size_of(method)
            price *= min(1.25, max(0.8, (size / aim) ** (0.35 if late else 0.7)))
            if late and keep:
                keep(method, size)
    return method


def run(net, point, seed, data, folder):
    """One network: train, put into full size, save, measure the file that was written."""
    settings = POINTS[net][point]
    limit, _, widths, _, _, epochs, _ = settings
    pool, labels, X_val, y_val, X_test, y_test = data
    torch.manual_seed(seed)
    start = time.process_time()
    pixels = None
    if net == "300":
        pixels = np.flatnonzero(np.asarray(pool[0], np.float32).mean(0) > 1.0)
        pool = pool[:, :, pixels]
        model = LeNet300(widths, len(pixels))
    else:
        model = NarrowLeNet5(widths)
    initialise(model)
    path = folder / f"lenet{net}_{point}_seed{seed}.skf"
    log = []

    def size_of(method):
        in_full_size(method.finish().model, method.steps(), pixels).save(path)
        log.append(path.stat().st_size)
        return log[-1]

    shown = slice(None) if pixels is None else pixels
    judges = [(X_val[:, shown], y_val), (torch.from_numpy(pool[0, :N_JUDGED]).float() / 256, labels[:N_JUDGED])]
    best = (True, math.inf, b"")

    def keep(method, size):
        nonlocal best
        narrow = method.finish().model
        best = min(best, (size > limit, sum(error_of(narrow, X, y) for X, y in judges), path.read_bytes()))

    train(model, pool, labels, settings, seed, size_of, keep)
    path.write_bytes(best[2])
    n_bytes = len(best[2])
    fresh = skfactor.load_into(LeNet300() if net == "300" else LeNet5(), path)
    n_params = sum(p.numel() for p in fresh.parameters())
    return {"net": net, "point": point, "seed": seed, "limit": limit, "widths": widths, "epochs": epochs,
            "bytes": n_bytes, "ratio": round(4 * n_params / n_bytes, 1),
            "validation_error": round(error_of(fresh, X_val, y_val), 3),
            "test_error": round(error_of(fresh, X_test, y_test), 3), "file": path.name,
            "nonzero": sum(int((p != 0).sum()) for p in fresh.parameters()),
            "cpu_seconds": round(time.process_time() - start), "sizes": log}


# --- table ------------------------------------------------------------------------------------------


def table(net, rows):
    """Lines of the table: published rows, then ours; the seed was chosen by its validation error."""
    lines = ["| network | bytes | ratio | test error | mean of seeds (spread) |", "|---|---|---|---|---|"]
    lines += [f"| {name} (published) | | {ratio}x | {error} % | |" for name, ratio, error in PUBLISHED[net]]
    for point in POINTS[net]:
        of_point = [r for r in rows if r["point"] == point]
        if not of_point:
            continue
        best = chosen(of_point)
        errors, sizes = [r["test_error"] for r in of_point], [r["bytes"] for r in of_point]
        lines.append(f"| skfactor, aim {best['limit']:,} bytes | {best['bytes']:,} | {best['ratio']}x "
                     f"| {best['test_error']:.2f} % | {np.mean(errors):.2f} % ({min(errors):.2f}-{max(errors):.2f}), "
                     f"{np.mean(sizes):,.0f} bytes ({min(sizes):,}-{max(sizes):,}), {len(errors)} seeds |")
    return lines


def chosen(rows):
    """Of the runs within the limit (of all, if none is) the one with the lowest validation error."""
    within = [r for r in rows if r["bytes"] <= r["limit"]] or rows
    return min(within, key=lambda r: (r["validation_error"], r["bytes"]))


def write_tables(page):
    """Put the tables of both networks into a page, each between its markers."""
    text = page.read_text()
    for net in POINTS:
        out = RESULTS / f"smallest_lenets_{net}.json"
        if not out.exists():
            continue
        begin, end = f"<!-- {net}: begin -->", f"<!-- {net}: end -->"
        before, rest = text.split(begin)
        lines = table(net, json.loads(out.read_text())["rows"])
        text = before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    page.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist.npz", help="X_train, y_train, X_test, y_test as uint8")
    parser.add_argument("--net", choices=["300", "5"], default="300")
    parser.add_argument("--points", nargs="*", help="some of the points only")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cache", help="folder that keeps the distorted images")
    parser.add_argument("--docs", help="only write the tables of the finished runs into this page, between its markers")
    args = parser.parse_args()
    if args.docs:
        write_tables(Path(args.docs))
        return
    torch.set_num_threads(1)
    ConvPool.compiled = _compiled()
    folder = RESULTS / "lenets"
    folder.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"smallest_lenets_{args.net}.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    data = images(args.data, args.cache)
    for seed in args.seeds:
        for point in args.points or POINTS[args.net]:
            if any(r["point"] == point and r["seed"] == seed for r in rows):
                continue
            rows.append(run(args.net, point, seed, data, folder))
            print(json.dumps(rows[-1]), flush=True)
            out.write_text(json.dumps({"rows": rows, "table": table(args.net, rows)}, indent=1) + "\n")
    print("\n".join(table(args.net, rows)))


if __name__ == "__main__":
    main()
