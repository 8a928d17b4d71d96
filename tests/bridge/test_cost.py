"""Multiplications against formulas, latencies against a clock that the tests turn."""
# SPDX-License-Identifier: BSD-3-Clause

import time

import pytest
import torch
from torch import nn

import skfactor.bridge.latency as latency
from skfactor import LowRankFactorizer, compress
from skfactor.bridge.cost import count_macs, count_parameters, measure_cost
from skfactor.bridge.latency import LayerInputs, describe, example_batch, inputs_of_layers, latencies
from tests._nets import ResNet, TinyLM


def formula(model, *inputs):
    """Σ outputs x inputs of one output, of all convolutions and linear layers, by hooks."""
    total = []

    def add(module, args, output):
        per_output = module.weight[0].numel()
        total.append(output.numel() * per_output)

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return sum(total)


def test_macs_of_convolutions():
    x = torch.zeros(2, 3, 32, 32)
    model = ResNet(1).eval()
    assert count_macs(model, x) == formula(model, x)
    result = compress(model, LowRankFactorizer(rank=2), mode="factorized", progress=False)
    assert count_macs(result.model, x) == formula(result.model, x) < formula(model, x)
    depthwise = nn.Conv2d(8, 16, 3, groups=8)
    assert count_macs(depthwise, torch.zeros(1, 8, 5, 5)) == 16 * 9 * 3 * 3


@pytest.mark.parametrize("training", [False, True])
def test_macs_of_attention_are_not_lost(training):
    """Fused attention counts as nothing on a CPU, and so does the fast path of the encoder layer."""
    d, n, heads = 16, 6, 2
    layer = nn.TransformerEncoderLayer(d, heads, 32, batch_first=True, dropout=0.0).train(training)
    expected = n * (3 * d * d + d * d + 2 * d * 32) + 2 * n * n * d
    assert count_macs(layer, torch.zeros(1, n, d)) == expected
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(module.training == training for module in layer.modules())


def test_parameters_count_ties_once():
    model = TinyLM()
    assert count_parameters(model) == sum(p.numel() for n, p in model.named_parameters())


class Clock:
    """A clock that only moves when something runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def runs(self, *seconds):
        """A function that takes these times, one after the other, the last one for ever."""
        left = list(seconds)

        def function():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return function


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_latency_is_the_least_after_the_warm_up(clock):
    slow_start = clock.runs(9.0, 9.0, 1.0, 3.0, 2.0, 5.0, 4.0, 4.0)
    assert latencies([slow_start, clock.runs(7.0)], repeats=5) == [2.0, 7.0]


def test_fast_functions_run_in_a_loop(clock):
    calls = []
    fast = clock.runs(1e-6)
    (seconds,) = latencies([lambda: (calls.append(1), fast())], repeats=3, least_seconds=1e-3)
    assert seconds == pytest.approx(1e-6)
    assert 3 + 3 * 990 <= len(calls) <= 3 + 3 * 1010


def test_functions_take_turns(clock):
    order = []
    tick = clock.runs(1.0)
    latencies([lambda: (order.append("a"), tick()), lambda: (order.append("b"), tick())], repeats=3)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3


def test_work_of_others_does_not_choose(monkeypatch):
    """With one thread its own time decides: a wall clock that stands still for one layer only changes nothing."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cpu = torch.device("cpu")
    assert latency.quiet_clock(cpu) in (time.thread_time, time.perf_counter)
    thread = Clock()
    monkeypatch.setattr(latency, "quiet_clock", lambda device: thread)

    class Layer(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.takes = thread.runs(seconds)

        def forward(self, x):
            self.takes()

    kind = LayerInputs.of(torch.zeros(2, 3))
    assert latency.layer_latencies([Layer(0.5), Layer(0.25)], {kind: 3}) == [1.5, 0.75]
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert latency.quiet_clock(cpu) is time.perf_counter


def test_cost_of_two_networks(clock, monkeypatch):
    class Timed(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.linear = nn.Linear(4, 5)
            self.takes = clock.runs(seconds)

        def forward(self, x):
            self.takes()
            return self.linear(x)

    cost = measure_cost(Timed(0.5), Timed(0.25), ((torch.zeros(3, 4),), {}))
    assert (cost.seconds_before, cost.seconds_after) == (0.5, 0.25)
    assert (cost.parameters_before, cost.macs_before) == (25, 60)
    assert cost.inputs == ("3x4 float32",)
    assert cost.threads == torch.get_num_threads()
    assert "2.00x" in str(cost)
    assert f"{cost.threads} thread" in str(cost)


def test_inputs_of_layers():
    conv, table = nn.Conv2d(3, 4, 3), nn.Embedding(7, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table, self.idle = conv, table, nn.Linear(2, 2)

        def forward(self, x, tokens):
            self.table(tokens)
            return self.conv(x), self.conv(input=x), self.conv(x[:1])

    x = torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last)
    tokens = torch.tensor([[1, 6, 2]])
    net = Net()
    seen = inputs_of_layers(net, [conv, table, net.idle], ((x, tokens), {}))
    assert set(seen) == {conv, table}
    assert sorted((kind.shape, n) for kind, n in seen[conv].items()) == [((1, 3, 5, 6), 1), ((2, 3, 5, 6), 2)]
    for kind in seen[conv]:
        made = kind.tensor()
        assert (tuple(made.shape), made.dtype) == (kind.shape, kind.dtype)
        assert made.is_contiguous(memory_format=torch.channels_last)
    (kind,) = seen[table]
    assert torch.equal(kind.tensor(), tokens)
    expanded = LayerInputs.of(torch.zeros(3, 1).expand(3, 5)).tensor()
    assert expanded.shape == (3, 5)


def test_example_batch():
    model = nn.Linear(4, 2)
    x = torch.randn(200, 4)
    (got,), kwargs = example_batch(model, x, None, "it")
    assert torch.equal(got, x)  # not in pieces, as calibration runs it
    assert kwargs == {}
    assert example_batch(model, {"input": x}, None, "it")[1]["input"].shape == (200, 4)
    (first,), _ = example_batch(model, None, [(x[:7], torch.zeros(7)), x], "it")
    assert len(first) == 7
    (first,), _ = example_batch(model, None, x, "it")
    assert len(first) == 64
    assert describe(((x,), {"mask": x[0] > 0})) == ("200x4 float32", "4 bool")
    with pytest.raises(ValueError, match="it runs the network: give example_inputs"):
        example_batch(model, None, None, "it")
    assert latency.REPEATS >= 5
