"""`finetune`: the loop does what its formulas say, is deterministic, and goes on where it was interrupted."""
# SPDX-License-Identifier: BSD-3-Clause

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skfactor
from skfactor import FormatError, KMeansWeightSharer, MagnitudePruner, TrainedSharing
from skfactor.bridge.training.checkpoint import load_state, save_state
from skfactor.bridge.training.finetune import _Schedule
from tests._nets import SmallCNN
from tests.bridge.training._runs import files_of_two_runs


class Dropped(nn.Module):
    """Draws from torch's global random numbers in training."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.body(x))))


def network(seed=0):
    torch.manual_seed(seed)
    return Dropped()


def data(n=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 6, generator=generator)
    return X, (X[:, 0] > 0).long() + (X[:, 1] > 0.5)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def sharing():
    return TrainedSharing(network(), {"*": KMeansWeightSharer(4)}, reassign_every=2)


def test_the_loop_is_plain_sgd():
    """Against a loop written out, full batches: momentum, decay, warm-up and cosine from torch and the formula."""
    model, (X, y) = nn.Linear(6, 3), data()
    tuned = skfactor.finetune(model, [(X, y)], epochs=5, lr=0.2, momentum=0.8, weight_decay=0.01, warmup_epochs=2,
                              label_smoothing=0.1)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.8, weight_decay=0.01)
    for epoch in range(5):
        t = epoch + 0.5
        optimizer.param_groups[0]["lr"] = 0.2 * (t / 2 if t < 2 else (1 + math.cos(math.pi * (t - 2) / 3)) / 2)
        optimizer.zero_grad()
        loss = F.cross_entropy(other(X), y, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        assert tuned.history[epoch]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(tuned.model.weight, other.weight)


def test_the_schedule_ends_at_zero():
    schedule = _Schedule([1.0], 10, 2)
    assert [schedule.factor(t) for t in (0, 1, 2, 6)] == pytest.approx([0, 0.5, 1, 0.5])
    assert schedule.factor(10) == pytest.approx(0, abs=1e-12)


def test_distillation_is_its_formula():
    (X, y), model, teacher = data(), nn.Linear(6, 3), nn.Linear(6, 3)
    T, w = 3.0, 0.7
    tuned = skfactor.finetune(model, [(X, y)], epochs=1, teacher=teacher, distillation=w, temperature=T)
    p, q = (teacher(X) / T).softmax(1), (model(X) / T).softmax(1)
    expected = (1 - w) * F.cross_entropy(model(X), y) + w * T**2 * (p * (p / q).log()).sum(1).mean()
    assert tuned.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_needs_no_labels():
    X, _ = data()
    teacher = network(1)
    before = copy.deepcopy(teacher)
    tuned = skfactor.finetune(network(2), X, epochs=30, lr=0.1, teacher=teacher, distillation=1.0, batch_size=10)
    losses = [record["loss"] for record in tuned.history]
    assert losses[-1] < losses[0] / 2
    assert same(teacher, before)
    assert teacher.training
    with pytest.raises(ValueError, match="without labels need a teacher"):
        skfactor.finetune(network(), X, epochs=1)


def test_a_copy_is_trained_and_random_numbers_stay():
    model, before = network(), network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.body.eval()
    tuned = skfactor.finetune(model, data(), epochs=2)
    assert torch.equal(torch.rand(3), expected)
    assert same(model, before)
    assert not same(tuned.model, before)
    assert not tuned.model.body.training
    assert tuned.model.head.training


@pytest.mark.parametrize("make", [network, sharing])
def test_one_random_state_one_result(make):
    ends = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed * 100)  # whatever the global state is
        model = make()
        torch.manual_seed(len(ends))
        ends.append(skfactor.finetune(model, data(), epochs=3, lr=0.1, batch_size=8, random_state=seed).model)
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_two_runs_give_identical_files(tmp_path):
    first, second = files_of_two_runs(sharing, data(), tmp_path, epochs=3, lr=0.1, batch_size=8)
    assert first == second


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
@pytest.mark.parametrize("make", [network, sharing])
def test_an_interrupted_run_goes_on_to_the_same_result(make, optimizer, tmp_path):
    path = tmp_path / "state.pt"
    options = {"epochs": 5, "lr": 0.05, "batch_size": 8, "warmup_epochs": 1.5, "random_state": 7,
               "optimizer": optimizer}
    whole_model = make()
    whole = skfactor.finetune(whole_model, data(), **options)
    count = 0

    def interrupt(x, generator):
        nonlocal count
        count += 1
        if count == 19:  # in the middle of the third epoch
            raise Interrupted
        return x

    with pytest.raises(Interrupted):
        skfactor.finetune(make(), data(), augment=interrupt, checkpoint=path, **options)
    resumed_model = make()
    resumed = skfactor.finetune(resumed_model, data(), checkpoint=path, **options)
    assert resumed.history == whole.history
    assert same(resumed.model, whole.model)
    if make is sharing:
        ends = [m.finish().save(tmp_path / n).read_bytes() for m, n in ((whole_model, "a"), (resumed_model, "b"))]
        assert ends[0] == ends[1]
    # a finished run is only read
    again = skfactor.finetune(make(), data(), checkpoint=path, **options)
    assert same(again.model, whole.model)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    skfactor.finetune(network(), data(), epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="made with other settings: epochs 1, now 2; resume=False"):
        skfactor.finetune(network(), data(), epochs=2, checkpoint=path)
    method = sharing()
    before = copy.deepcopy(method.model)
    with pytest.raises(ValueError, match="is of another network or method"):
        skfactor.finetune(method, data(), epochs=1, checkpoint=path)
    assert same(method.model, before)
    assert len(skfactor.finetune(network(), data(), epochs=2, checkpoint=path, resume=False).history) == 2
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="is no checkpoint, or is damaged"):
        skfactor.finetune(network(), data(), epochs=2, checkpoint=path)


def test_checkpoints_hold_no_objects(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] must be a tensor or a plain value .* got Linear"):
        save_state(tmp_path / "x.pt", {"a": [1, nn.Linear(1, 1)]})
    assert not list(tmp_path.iterdir())
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pt")
    with pytest.raises(FormatError, match="no checkpoint"):
        load_state(tmp_path / "pickle.pt")


def test_zeros_are_kept_on_request():
    pruned = skfactor.compress(network(), MagnitudePruner(0.7), progress=False).model
    zeros = pruned.body.weight == 0
    kept = skfactor.finetune(pruned, data(), epochs=2, lr=0.1, keep_zeros=True).model
    assert torch.equal(kept.body.weight == 0, zeros)
    assert not (skfactor.finetune(pruned, data(), epochs=2, lr=0.1).model.body.weight == 0).any()


def test_factorised_networks_stay_factorised():
    result = skfactor.compress(network(), {"body": skfactor.LowRankFactorizer(2), "*": None}, mode="factorized",
                               progress=False)
    tuned = skfactor.finetune(result.model, data(), epochs=2, lr=0.1).model
    assert torch.linalg.matrix_rank(tuned.body.weight) == 2
    assert not torch.equal(tuned.body.weight, result.model.body.weight)


def test_statistics_can_be_frozen():
    generator = torch.Generator().manual_seed(0)
    images, y = torch.randn(20, 3, 8, 8, generator=generator), torch.arange(20) % 5
    model = SmallCNN()
    frozen = skfactor.finetune(model, (images, y), epochs=1, batch_size=5, freeze_batch_norm=True).model
    assert torch.equal(frozen.bn1.running_mean, model.bn1.running_mean)
    assert not torch.equal(frozen.bn1.weight, model.bn1.weight)
    free = skfactor.finetune(model, (images, y), epochs=1, batch_size=5).model
    assert not torch.equal(free.bn1.running_mean, model.bn1.running_mean)


def test_channels_last_changes_the_layout_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))
    X, y = torch.randn(40, 3, 6, 6), torch.arange(40) % 2
    seen = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        if isinstance(module, nn.Conv2d) else None)
    plain, last = (skfactor.finetune(model, (X, y), epochs=2, lr=0.1, batch_size=20, channels_last=choice,
                                     progress=False) for choice in (False, True))
    hook.remove()
    assert seen == [False] * 4 + [True] * 4
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous()
    for a, b in zip(plain.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_hooks_see_what_they_are_promised():
    seen, scores = [], []

    def validate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        scores.append(float(model(data()[0]).square().mean()))
        return scores[-1]

    def augment(x, generator):
        assert isinstance(generator, torch.Generator)
        return x + 0.1 * torch.randn(x.shape, generator=generator)

    tuned = skfactor.finetune(network(), data(), epochs=3, batch_size=16, augment=augment, validate=validate,
                              callback=seen.append)
    assert [r["score"] for r in tuned.history] == scores
    assert seen == tuned.history
    assert [r["epoch"] for r in seen] == [1, 2, 3]


def test_loaders_of_all_kinds():
    X, y = data(20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=7, shuffle=True)
    torch.manual_seed(1)
    a = skfactor.finetune(network(), loader, epochs=2).model
    torch.manual_seed(2)
    assert same(a, skfactor.finetune(network(), loader, epochs=2).model)  # its shuffling is seeded too
    skfactor.finetune(network(), [((X,), y), ({"x": X}, y)], epochs=1)

    class Endless:
        def __iter__(self):
            return iter([(X, y)])

    assert len(skfactor.finetune(network(), Endless(), epochs=2).history) == 2
    # 21 samples in batches of 10: the last one alone would stop a batch normalisation
    assert len(skfactor.finetune(SmallCNN(), (torch.randn(21, 3, 6, 6), torch.arange(21) % 5), epochs=1,
                                 batch_size=10).history) == 1


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: skfactor.finetune(3, data()), TypeError, "must be a torch.nn.Module or a TrainingMethod, got int"),
    (lambda: skfactor.finetune(network(), 3), TypeError, "iterable of .x, y. .* got int"),
    (lambda: skfactor.finetune(network(), iter([data()])), TypeError, "can be iterated every epoch"),
    (lambda: skfactor.finetune(network(), []), ValueError, "no batches"),
    (lambda: skfactor.finetune(network(), (data()[0], data(49)[1])), ValueError, "equally many, got .50, 49."),
    (lambda: skfactor.finetune(network(), data(), epochs=-1), ValueError, "epochs must be"),
    (lambda: skfactor.finetune(network(), data(), lr=0.0), ValueError, "lr must be positive"),
    (lambda: skfactor.finetune(network(), data(), distillation=1.5), ValueError, "distillation must be in"),
    (lambda: skfactor.finetune(network(), data(), amp=True), ValueError, "amp is for CUDA, got a network on cpu"),
    (lambda: skfactor.finetune(sharing(), data(), keep_zeros=True), ValueError, "keep_zeros is for modules"),
    (lambda: skfactor.finetune(network(), data(), lr=1e30, epochs=4), ValueError, "the loss is (nan|inf) in epoch"),
])
def test_errors_are_clear(call, error, message):
    with pytest.raises(error, match=message):
        call()
