# SPDX-License-Identifier: BSD-3-Clause
"""How much faster networks run with half of their filters removed, and with `execute="auto"` after a CP decomposition.

Dense and smaller network run by turns on the same batch of 64 images; the figure is the ratio of their least times over
the turns (what disturbs makes a time longer, never shorter), beside the ratio of their multiplications; the median of
the turns' ratios and its quartiles are given too. Networks run as they were trained; folded: batch
normalisation folded into the convolutions (by torch's own function, for both alike), channels last; and compiled:
`torch.compile` with frozen weights, which fuses what is between the convolutions (needs a C++ compiler). Each dense
network is also timed against itself: what noise does to a ratio. Weights are random; they do not matter.
One thread: its CPU time. Two threads: the wall's.

    python pruned_latency.py --threads 1             # rows that results/pruned_latency.json lacks
    python pruned_latency.py --threads 2
    python pruned_latency.py --docs FILE             # write the tables into FILE, between their markers
"""

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, environment
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import skfactor
from skfactor.bridge import count_macs
from skfactor.bridge.batchnorm import normalisation_after

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproduce"))
from networks import fresh

BATCH, TURNS = 64, 15
INSIDE, ALL = "half inside the blocks", "half of every layer"
#: network, what is removed
PRUNED = [("cifar10_resnet20", INSIDE), ("cifar10_resnet20", ALL), ("cifar10_resnet56", INSIDE),
          ("cifar10_resnet56", ALL), ("cifar10_vgg16", ALL)]
FORMS = ("as trained", "folded", "compiled")
#: network, name, estimator of its convolutions but the first
FACTORISED = [("cifar10_resnet56", f"CP, R = {rank}", skfactor.CPDFilterPruner(rank=rank)) for rank in (1, 2, 4)]
FACTORISED += [("cifar10_resnet56", "coupled CP, 50%", skfactor.CoupledCPDFactorizer(0.5)),
               ("cifar10_vgg16", "CP, R = 2", skfactor.CPDFilterPruner(rank=2))]
NAMES = {"cifar10_resnet20": "ResNet-20", "cifar10_resnet56": "ResNet-56", "cifar10_vgg16": "VGG-16-BN"}


def folded(model, x):
    """A copy with folded normalisations and channels last."""
    model = copy.deepcopy(model)
    paths = {module: path for path, module in model.named_modules()}
    convolutions = [m for m in paths if isinstance(m, nn.Conv2d)]
    for conv, norm in normalisation_after(model, convolutions, (x[:1],), {}).items():
        model.set_submodule(paths[conv], fuse_conv_bn_eval(conv, norm))
        model.set_submodule(paths[norm], nn.Identity())
    return model.to(memory_format=torch.channels_last)


def compiled(model, x):
    """The network compiled, its weights frozen, after the runs in which that happens."""
    torch._inductor.config.freezing = True
    model = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last))
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model


def by_turns(first, second, threads):
    """Ratio of the least times of two functions, quartiles of the ratios of the turns, and the least times."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = np.empty((TURNS, 2))
    with torch.no_grad():
        for function in (first, second):
            function()
        for turn in range(TURNS):
            for i, function in enumerate((first, second)):
                start = clock()
                function()
                times[turn, i] = clock() - start
    least, ratios = times.min(axis=0), np.percentile(times[:, 0] / times[:, 1], (25, 50, 75))
    return {"faster": round(float(least[0] / least[1]), 3), "ratio": [round(float(r), 3) for r in ratios],
            "ms": [round(1e3 * float(t), 1) for t in least]}


def pruned(model, removed, x):
    """Every second filter of all layers, or of the first layers of the blocks, removed."""
    filters = {}
    for group in skfactor.filter_groups(model, x):
        if removed == ALL or all(layer.endswith("conv1") and "." in layer for layer in group.layers):
            filters |= group.filters(range(0, len(group.units), 2))
    return skfactor.remove_filters(model, filters, x).model


def measure_pruned(network, removed, form, threads):
    torch.manual_seed(0)
    model, x = fresh(network).eval(), torch.randn(BATCH, 3, 32, 32)
    small = pruned(model, removed, x[:2])
    macs = count_macs(model, x[:1]) / count_macs(small, x[:1])
    if form != "as trained":
        x, prepare = x.to(memory_format=torch.channels_last), folded if form == "folded" else compiled
        with torch.no_grad():
            outputs = small(x[:4])
            model, small = prepare(model, x), prepare(small, x)
            torch.testing.assert_close(small(x)[:4], outputs, rtol=1e-3, atol=1e-3)
    row = by_turns(lambda: model(x), lambda: small(x), threads)
    return {"kind": "pruned", "network": network, "what": removed, "form": form, "threads": threads,
            "macs_ratio": round(macs, 3), **row, "share": round(row["faster"] / macs, 3),
            "noise": by_turns(lambda: model(x), lambda: model(x), threads)}


def measure_factorised(network, name, estimator, threads):
    torch.manual_seed(0)
    model, x = fresh(network).eval(), torch.randn(BATCH, 3, 32, 32)
    first = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = skfactor.compress(model, {first: None, "Conv2d": estimator, "*": None}, mode="factorized",
                                   execute="auto", example_inputs=x, progress=False)
    small = result.model
    row = by_turns(lambda: model(x), lambda: small(x), threads)
    kept = [e.execution for e in result.executions]
    return {"kind": "factorised", "network": network, "what": name, "threads": threads, **row,
            "macs_ratio": round(count_macs(model, x[:1]) / count_macs(small, x[:1]), 3),
            "layers": {e: kept.count(e) for e in sorted(set(kept))},
            "noise": by_turns(lambda: model(x), lambda: model(x), threads)}


def pruned_table(rows):
    """Markdown."""
    lines = ["| network, removed | run | threads | MACs, times less | faster | share of that | median of the turns "
             "(quartiles) | dense against itself: least, quartiles |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for r in rows:
        low, middle, high = r["ratio"]
        lines.append(f"| {NAMES[r['network']]}, {r['what']} | {r['form']} | {r['threads']} | {r['macs_ratio']:.2f} "
                     f"| {r['faster']:.2f} | {r['share']:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {_noise(r)} |")
    return "\n".join(lines)


def _noise(row):
    low, _, high = row["noise"]["ratio"]
    return f"{row['noise']['faster']:.2f}, {low:.2f} to {high:.2f}"


def factorised_table(rows):
    """Markdown."""
    lines = ["| network, format | threads | layers as kept | faster | median of the turns (quartiles) "
             "| dense against itself: least, quartiles |", "|---|--:|---|--:|--:|--:|"]
    for r in rows:
        low, middle, high = r["ratio"]
        kept = ", ".join(f"{n} {form}" for form, n in r["layers"].items())
        lines.append(f"| {NAMES[r['network']]}, {r['what']} | {r['threads']} | {kept} "
                     f"| {r['faster']:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {_noise(r)} |")
    return "\n".join(lines)


TABLES = {"pruned": pruned_table, "factorised": factorised_table}


def write_tables(path, rows):
    """Put each table between its markers, where the file has them."""
    text = path.read_text(encoding="utf-8")
    for kind, table in TABLES.items():
        begin, end = f"<!-- {kind} latency: begin -->", f"<!-- {kind} latency: end -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}\n{table([r for r in rows if r['kind'] == kind])}\n{end}{rest.partition(end)[2]}"
    path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=RESULTS / "pruned_latency.json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the tables")
    parser.add_argument("--networks", nargs="*", default=list(NAMES), choices=list(NAMES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    if args.docs:
        write_tables(args.docs, rows)
        return
    key = lambda r: (r["kind"], r["network"], r["what"], r.get("form"), r["threads"])  # noqa: E731
    jobs = {("pruned", network, what, form, args.threads): (measure_pruned, network, what, form)
            for network, what in PRUNED for form in args.forms}
    jobs |= {("factorised", network, name, None, args.threads): (measure_factorised, network, name, estimator)
             for network, name, estimator in FACTORISED}
    for job, (measure, *given) in jobs.items():
        if job[0] in args.kinds and job[1] in args.networks and job not in map(key, rows):
            rows.append(measure(*given, args.threads))
            print(json.dumps(rows[-1]), flush=True)
            args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
