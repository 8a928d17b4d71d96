# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-20 on CIFAR-10 in 1/24 of its bytes: shared weights that are trained, with the bits of the file in the loss.

It starts from `skfactor.allocate` (batch normalisation folded, rows balanced, one step for each layer) and trains what
that stores, four epochs on 19,494 training images, in the user's own loop:

* every weight is a step times a code; the codes follow values of the weights' own, straight-through, and a code that is
  dear (by the code lengths of its layer) is taken only where it is worth its bits;
* batch normalisation works as in training, from the original's weights and biases; at the end it is folded again, into
  the one factor and one bias of a channel that the file of `allocate` has too;
* the loss is the divergence from the original network's predictions (temperature 4, crops and flips; no labels);
* a penalty on the magnitude of the codes, dearer where a filter and its channel are nearly empty as the context coder
  has it, is steered so that the codes, really encoded, have the size wanted.

2,000 training images, drawn at random, are held back to see how it goes; test images are used once, at the end. Rates
are first guesses: they were not chosen by any of these.

    python resnet20_trained_sharing.py --work FOLDER --minutes 9     # repeat until it says that it is done
    python resnet20_trained_sharing.py --work FOLDER --measure       # file and accuracy, into results/
    python resnet20_trained_sharing.py --docs FILE                   # write the table into FILE
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import networks
import numpy as np
import torch
import torch.nn.functional as F
from networks import data_folder, fresh, original, test_set, weights_path

import skfactor
from skfactor.bridge.training.checkpoint import load_state, save_state
from skfactor.codec import context

NAME = "cifar10_resnet20"
BUDGET, TARGET, VECTOR_BYTES = "24x", 45_300, 2_700  # bytes of the file, and what of it are no codes, about
EPOCHS, BATCH, TEMPERATURE, HELD_BACK = 4, 128, 4.0, 2000
STATISTICS = 20  # batches from which means and variances of the normalisations are taken
LR_CODES, LR_REST, LR_STEPS = 4e-3, 1e-3, 1e-3  # codes in units of the step, steps in units of themselves
PRICE = 0.05  # of a bit, in units of the squared step, when a code is chosen
FIRST_TAU = 2e-6  # weight of the penalty; steered from then on
MARKS = "<!-- resnet20: begin -->", "<!-- resnet20: end -->"


class NearestWorthItsBits(torch.autograd.Function):
    """The code a that minimises (u - a)² + PRICE bits(a), among the two around u and zero; straight-through."""

    @staticmethod
    def forward(ctx, u, bits):
        reach = (bits.numel() - 1) // 2
        code = cost = None
        for a in (u.floor(), u.floor() + 1, torch.zeros_like(u)):
            a = a.clamp(-reach, reach)
            c = (u - a) ** 2 + PRICE * bits[(a + reach).long()]
            code, cost = (a, c) if code is None else (torch.where(c < cost, a, code), torch.minimum(c, cost))
        return code

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Student:
    """Codes, steps and biases of a network that `allocate` has compressed."""

    def __init__(self, teacher, start_file, steps):
        self.net = fresh(NAME)
        skfactor.load_into(self.net, start_file)
        self.net.requires_grad_(False).to(memory_format=torch.channels_last)  # a sixth faster
        self.names, self.steps = list(steps), steps
        self.start = {k: (self.net.get_parameter(k) / steps[k]).round() for k in self.names}
        #: values of the weights' own, in steps: those of the original within the codes that allocate chose
        self.own = {k: (self.start[k] + (self._original(teacher, k) / steps[k] - self.start[k]).clamp(-0.4, 0.4))
                    for k in self.names}
        #: logarithm of the step relative to its start, where no normalisation follows
        self.scale = {"linear.weight": torch.tensor(0.0)}
        self.rest = self._normalised_as(teacher) | {"linear.bias": self.net.linear.bias.clone()}
        for values in (self.own, self.scale, self.rest):
            for value in values.values():
                value.requires_grad_()
        self.bits = {}
        self.update_bits()

    def _original(self, teacher, name):
        """A weight of the original network with its normalisation folded in and its rows balanced."""
        weight = teacher.get_parameter(name).double()
        if name == "linear.weight":
            return weight.float()
        norm = name.replace("conv", "bn").removesuffix(".weight")
        old, new = teacher.get_submodule(norm), self.net.get_submodule(norm)
        factor = old.weight.double() / (old.running_var.double() + old.eps).sqrt() / new.weight.double()
        return (weight * factor[:, None, None, None]).float()

    def _normalised_as(self, teacher):
        """Weights and biases of the original's normalisations; what was folded in is divided out again."""
        found = {}
        for name, norm in self.norms():
            old = teacher.get_submodule(name)
            found[f"{name}.weight"] = old.weight.abs() * norm.weight.sign()
            found[f"{name}.bias"] = old.bias.clone()
        return found

    def norms(self):
        return [(k, m) for k, m in self.net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]

    @torch.no_grad()
    def estimate_statistics(self, batches):
        """Means and variances of the normalisations anew, over all batches alike."""
        for _, norm in self.norms():
            norm.reset_running_stats()
            norm.momentum = None
        self.net.train()
        for x in batches:
            self(x)
        self.net.eval()

    @torch.no_grad()
    def update_bits(self):
        """Length of every code by how often its layer uses it, of either sign alike."""
        for k in self.names:
            reach = int(self.own[k].abs().max().round()) + 2
            if k in self.bits:
                known = (self.bits[k].numel() - 1) // 2
                more = max(reach - known, 0)
                bits = F.pad(self.bits[k], (more, more), value=float(self.bits[k].max()) + 1) if more else self.bits[k]
                self.bits[k] = _lengths(NearestWorthItsBits.apply(self.own[k], bits), reach)
            else:
                bits = _lengths(self.start[k], reach)
                other = NearestWorthItsBits.apply(self.own[k], bits) != self.start[k]
                self.own[k][other] = self.start[k][other]
                self.bits[k] = _lengths(NearestWorthItsBits.apply(self.own[k], bits), reach)

    def codes(self):
        return {k: NearestWorthItsBits.apply(self.own[k], self.bits[k]) for k in self.names}

    def step(self, name):
        return self.steps[name] * self.scale[name].exp() if name in self.scale else self.steps[name]

    def __call__(self, x):
        weights = {k: self.step(k) * code for k, code in self.codes().items()}
        return torch.func.functional_call(self.net, self.rest | weights, (x,))

    def penalty(self):
        """About the bits of the codes: magnitudes, each times what one more costs at the local scale s."""
        total = 0.0
        for u in self.own.values():
            a = u.detach().abs()
            if a.dim() == 4:
                row, channel, kernel = (a.mean(d, keepdim=True) for d in ((1, 2, 3), (0, 2, 3), (2, 3)))
            else:
                row, channel, kernel = a.mean(1, keepdim=True), a.mean(0, keepdim=True), a
            s = (0.5 * row * channel / a.mean() + 0.5 * kernel).clamp_min(0.02)
            total = total + (u.abs() * torch.log2(1 + 1 / s)).sum()
        return total

    @torch.no_grad()
    def encoded_bytes(self):
        """Bytes of all codes through the context coder, as a file has them."""
        total = 0
        for name, code in self.codes().items():
            code = code.reshape(len(code), -1).numpy().astype(int)
            low = code.min()
            total += len(context.encode((code - low).astype(np.uint16), int(code.max() - low + 1), int(-low),
                                        1 if name == "linear.weight" else 9))
        return total

    def state(self):
        return {"own": self.own, "scale": self.scale, "rest": self.rest, "bits": self.bits,
                "statistics": dict(self.net.named_buffers())}

    @torch.no_grad()
    def load(self, state):
        for mine, its in ((self.own, state["own"]), (self.scale, state["scale"]), (self.rest, state["rest"])):
            for k, value in mine.items():
                value.copy_(its[k])
        self.bits = dict(state["bits"])
        self.net.load_state_dict(state["statistics"], strict=False)

    @torch.no_grad()
    def result(self, allocation_rules):
        """What is stored: the rules of `allocate` with the steps that were learned."""
        net = fresh(NAME)
        net.load_state_dict(self.net.state_dict())
        rules = dict(allocation_rules)
        for k, code in self.codes().items():
            step = float(self.step(k))
            net.get_parameter(k).copy_(code.double() * step)
            rules[k] = skfactor.UniformQuantizer(step, unit="absolute", entropy_weight=0.0)
        for k, value in self.rest.items():
            net.get_parameter(k).copy_(value)
        self._fold(net)
        return skfactor.compress(net, rules, progress=False)


    def _fold(self, net):
        """Statistics of the normalisations into their weights and biases, as `allocate` leaves them."""
        for name, norm in self.norms():
            new = net.get_submodule(name)
            factor = new.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            new.bias.copy_(new.bias.double() - factor * norm.running_mean.double())
            new.weight.copy_(factor)
            new.running_mean.zero_()
            new.running_var.fill_(1 - norm.eps)


def _lengths(codes, reach):
    counts = torch.bincount((codes + reach).long().reshape(-1), minlength=2 * reach + 1).double() + 0.3
    counts = (counts + counts.flip(0)) / 2
    return -(counts / counts.sum()).log2().float()


def divergence(student, teacher, temperature=1.0):
    return temperature**2 * F.kl_div((student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1),
                                     log_target=True, reduction="batchmean")


def training_images(folder):
    """Images to train on, and images and labels that are held back: the file is in the order of the classes."""
    with np.load(folder / "cifar10_train.npz") as file:
        X, y = file["X"], file["y"]
    order = np.random.default_rng(0).permutation(len(X))
    held = order[-HELD_BACK:]
    return X[order[:-HELD_BACK]], X[held], torch.from_numpy(y[held]).long()


def start(folder, work, teacher):
    """The network to begin with: `allocate` on 512 training images, once."""
    path, steps = work / "start.skf", work / "start.json"
    if not steps.exists():
        rng = np.random.default_rng(0)
        X, _, _ = training_images(folder)
        images = networks._cifar(networks._cropped(X[rng.permutation(len(X))[:512]], rng))
        calibration = skfactor.Calibration([images], fold_batch_norm=True, balance_rows=True, max_vectors=4096)
        allocation = skfactor.allocate(teacher, budget=BUDGET, calibration=calibration, progress=False)
        allocation.result.save(path)
        steps.write_text(json.dumps({k: r.step for k, r in allocation.rules.items() if hasattr(r, "step")}))
    return path, json.loads(steps.read_text())


def statistics_images(X):
    rng = np.random.default_rng(1)
    for picked in rng.permutation(len(X))[: STATISTICS * BATCH].reshape(STATISTICS, BATCH):
        yield networks._cifar(networks._cropped(X[picked], rng))


def held_back_score(student, teacher, images, labels):
    """On training images that take no part: what settings were chosen by."""
    with torch.no_grad():
        z, t = (torch.cat([net(x) for x in images.split(500)]) for net in (student, teacher))
    return {"divergence": round(float(divergence(z, t)), 4),
            "agreement": round(100 * float((z.argmax(1) == t.argmax(1)).float().mean()), 2),
            "accuracy": round(100 * float((z.argmax(1) == labels).float().mean()), 2)}


def train(folder, work, minutes):
    """Go on until the time is over or the training is done; returns whether it is."""
    teacher = original(folder, NAME).requires_grad_(False).to(memory_format=torch.channels_last)
    student = Student(teacher, *start(folder, work, teacher))
    X, held, held_labels = training_images(folder)
    held = networks._cifar(held)
    optimizer = torch.optim.Adam([{"params": list(v.values()), "lr": lr} for v, lr in (
        (student.own, LR_CODES), (student.rest, LR_REST), (student.scale, LR_STEPS))])
    rates = [group["lr"] for group in optimizer.param_groups]
    per_epoch = len(X) // BATCH
    total = per_epoch * EPOCHS
    rng, order = np.random.default_rng(0), None
    path, run = work / "state.pt", {"step": 0, "tau": FIRST_TAU, "first": student.encoded_bytes(), "epochs": []}
    run["bytes"] = run["first"]
    if path.exists():
        state = load_state(path)
        run, order = state["run"], state["order"].numpy()
        student.load(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = json.loads(state["rng"])
    begin = time.perf_counter()
    while run["step"] < total:
        place = run["step"] % per_epoch
        if place == 0:
            order = rng.permutation(len(X))
        x = networks._cifar(networks._cropped(X[order[place * BATCH : (place + 1) * BATCH]], rng))
        x = x.contiguous(memory_format=torch.channels_last)
        factor = rate_factor(run["step"], per_epoch)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        with torch.no_grad():
            target = teacher(x)
        student.net.train()
        loss = divergence(student(x), target, TEMPERATURE) + run["tau"] * student.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run["step"] += 1
        if run["step"] % 10 == 0:
            student.update_bits()
        if run["step"] % 40 == 0:
            steer(run, student, min(1, run["step"] / (0.5 * total)))
        if run["step"] % per_epoch == 0:
            student.estimate_statistics(statistics_images(X))
            run["epochs"].append({"epoch": run["step"] // per_epoch, "code_bytes": student.encoded_bytes()}
                                 | held_back_score(student, teacher, held, held_labels))
            print(run["epochs"][-1], flush=True)
        if time.perf_counter() - begin > 60 * minutes or run["step"] % per_epoch == 0:
            save_state(path, {"run": run, "student": student.state(), "optimizer": optimizer.state_dict(),
                              "order": torch.from_numpy(order), "rng": json.dumps(rng.bit_generator.state)})
        if time.perf_counter() - begin > 60 * minutes:
            print(f"{run['step']} of {total} steps; run it again", flush=True)
            return run["step"] == total
    print("done", flush=True)
    return True


def rate_factor(step, per_epoch):
    """Warm-up over a tenth of an epoch, then a cosine down to zero."""
    return 0.5 * (1 + math.cos(math.pi * step / (EPOCHS * per_epoch))) * min(1, (step + 1) / (0.1 * per_epoch))


def steer(run, student, part):
    """Weight of the penalty such that the size follows a line from the first size to the one wanted."""
    n_bytes = student.encoded_bytes()
    goal = (1 - part) * run["first"] + part * (TARGET - VECTOR_BYTES)
    change = 2 * math.log(n_bytes / goal) + 4 * math.log(n_bytes / run["bytes"])
    run["tau"] *= math.exp(min(0.5, max(-0.5, change)))
    run["bytes"] = n_bytes


def files(folder, work, teacher):
    """(what, path) of the three networks that are compared, written into `work` and read back later."""
    path, steps = start(folder, work, teacher)
    yield "allocate, not trained", path
    vectors = [k for k, v in teacher.state_dict().items() if v.dim() == 1 and len(v.unique()) > 1]
    rules = dict.fromkeys(vectors, skfactor.MantissaRounder(8))
    student = Student(teacher, path, steps)
    student.estimate_statistics(statistics_images(training_images(folder)[0]))
    yield "the same codes, statistics estimated anew", student.result(rules).save(work / "statistics.skf")
    student.load(load_state(work / "state.pt")["student"])
    yield "trained sharing", student.result(rules).save(work / "resnet20.skf")


@torch.no_grad()
def right_ones(net, images, labels):
    """Which images are classified correctly."""
    return torch.cat([net(x).argmax(1) for x in images.split(100)]) == labels


def measure(folder, work):
    """Load every file into a fresh network, and classify the test images with it and with the original."""
    teacher = original(folder, NAME).requires_grad_(False)
    images, labels = test_set(folder, NAME)
    n_before = os.path.getsize(weights_path(folder, NAME))
    before = right_ones(teacher, images, labels)
    rows = []
    for what, path in files(folder, work, teacher):
        after = right_ones(skfactor.load_into(fresh(NAME), path), images, labels)
        n_bytes, share = os.path.getsize(path), [100 * float(r.double().mean()) for r in (before, after)]
        rows.append({"network": NAME, "method": what, "bytes": n_bytes, "float32_file": n_before,
                     "ratio": round(n_before / n_bytes, 2), "accuracy_before": round(share[0], 2),
                     "accuracy_after": round(share[1], 2), "points_lost": round(share[0] - share[1], 2),
                     "only_original_right": int((before & ~after).sum()),
                     "only_compressed_right": int((~before & after).sum()), "test_images": len(labels)})
    run = load_state(work / "state.pt")["run"]
    per_epoch = len(training_images(folder)[0]) // BATCH
    return {"rows": rows, "epochs": run["epochs"], "steps": run["step"],
            "epochs_trained": round(run["step"] / per_epoch, 2),
            "machine": {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}}


def table(found):
    lines = ["| network | bytes | smaller | accuracy before | after | lost | right only before / after |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {r['network']}, {r['method']} | {r['bytes']:,} | {r['ratio']:.2f}x | {r['accuracy_before']:.2f} "
              f"| {r['accuracy_after']:.2f} | {r['points_lost']:.2f} | {r['only_original_right']} / "
              f"{r['only_compressed_right']} |" for r in found["rows"]]
    return "\n".join(lines)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with weights/ and the images (default: $SKFACTOR_DATA)")
    parser.add_argument("--work", type=Path, help="folder for the state of the training")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; exit status 75 if not done")
    parser.add_argument("--measure", action="store_true", help="write and measure what is there, done or not")
    parser.add_argument("--json", default=here / "results" / "resnet20_trained_sharing.json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.docs:
        text = args.docs.read_text(encoding="utf-8")
        head, _, rest = text.partition(MARKS[0])
        shown = table(json.loads(args.json.read_text()))
        args.docs.write_text(f"{head}{MARKS[0]}\n{shown}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
        return
    folder = data_folder(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    done = args.measure or train(folder, args.work, args.minutes)
    if not done:
        sys.exit(75)
    found = measure(folder, args.work)
    print(json.dumps(found, indent=1))
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
