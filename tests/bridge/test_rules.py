"""Rules: precedence, what names reach, and the one clear line for each wrong rule."""
# SPDX-License-Identifier: BSD-3-Clause

import pytest
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skfactor import KMeansWeightSharer
from skfactor.bridge.layers import entries_of_module, entries_of_state_dict
from skfactor.bridge.rules import resolve_rules
from tests._nets import SmallCNN, TinyLM

A, B, C, D = (KMeansWeightSharer(n_clusters=k) for k in (2, 3, 4, 5))


def plan(rules, model=None):
    return resolve_rules(rules, entries_of_module(model or SmallCNN()).entries)


def test_one_estimator_takes_every_layer_and_nothing_else():
    decided = plan(A)
    assert list(decided.taken) == ["conv1.weight", "conv2.weight", "linear.weight"]
    assert "one dimension" in decided.skipped["bn1.weight"]
    assert "buffer" in decided.skipped["bn1.running_mean"]
    assert "int64" in decided.skipped["bn1.num_batches_tracked"]


def test_most_specific_rule_wins_whatever_the_order():
    rules = {"*": A, "Conv2d": B, "conv*": C, "conv2": D}
    for order in (list(rules), list(rules)[::-1]):
        taken = plan({k: rules[k] for k in order}, nn.ModuleDict({
            "conv1": nn.Conv2d(1, 2, 3), "conv2": nn.Conv2d(2, 2, 3), "other": nn.Conv2d(2, 2, 3),
            "fc": nn.Linear(2, 2)})).taken
        assert taken == {"conv1.weight": C, "conv2.weight": D, "other.weight": B, "fc.weight": A}


def test_patterns_go_in_the_order_given():
    assert plan({"c*1": A, "conv*": B, "*": C}).taken["conv1.weight"] is A
    assert plan({"conv1*": A, "conv*": B, "*": C}).taken == {
        "conv1.weight": A, "conv2.weight": B, "linear.weight": C}


def test_parameter_name_beats_module_name():
    assert plan({"conv?": A, "conv1.weight": B, "conv1.bias": C}).taken == {
        "conv1.weight": B, "conv1.bias": C, "conv2.weight": A}
    with pytest.raises(ValueError, match=r"rule 'conv1' is never used.*by 'conv1.weight'"):
        plan({"conv1": A, "conv1.weight": B, "*": C})


@pytest.mark.parametrize("key", [nn.Linear, "Linear"])
def test_type_rules_reach_subclasses_and_prefer_the_nearest(key):
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Special(2, 2))
    assert plan({key: A}, model).taken == {"0.weight": A, "1.weight": A}
    assert plan({key: A, Special: B}, model).taken == {"0.weight": A, "1.weight": B}


def test_none_leaves_a_layer_as_it_is():
    decided = plan({"conv1": None, "*": A})
    assert "conv1.weight" not in decided.taken
    assert decided.skipped["conv1.weight"] == "rule 'conv1' is None"


@pytest.mark.parametrize("key", ["bn1.weight", "bn1.bias", "*.bias", "bn1.running_mean", "bn?.weight"])
def test_vectors_and_buffers_only_by_name(key):
    taken = plan({key: B, "*": A}).taken
    assert B in taken.values()
    assert all(n.rpartition(".")[2] == key.rpartition(".")[2] for n, e in taken.items() if e is B)
    assert {n for n, e in taken.items() if e is A} == {"conv1.weight", "conv2.weight", "linear.weight"}


def test_glob_that_names_matrices_leaves_batch_normalisation_alone():
    assert "bn1.weight" not in plan({"*.weight": A}).taken
    assert "bn1.weight" not in plan({"*1*": A, "*": B}).taken


def test_bare_parameters_on_request():
    assert "position" not in plan(A, TinyLM()).taken
    assert "bare parameter" in plan(A, TinyLM()).skipped["position"]
    for key in ("position", "pos*", "parameters"):
        assert plan({key: B, "*": A}, TinyLM()).taken["position"] is B


def test_tied_tensor_is_reached_by_either_name_and_must_have_one_rule():
    for key in ("wte", "head", "head.weight", "Embedding"):
        assert plan({key: B, "*": A}, TinyLM()).taken["wte.weight"] is B
    assert plan({"wte": B, "head": B, "*": A}, TinyLM()).taken["wte.weight"] is B
    with pytest.raises(ValueError, match=r"differ for one tied tensor \(wte.weight, head.weight\)"):
        plan({"wte": B, "head": C, "*": A}, TinyLM())


@pytest.mark.parametrize(("key", "message"), [
    ("conv3", r"rule 'conv3' matches no layer; did you mean 'conv[12]'"),
    ("lnear", r"did you mean 'linear'"),
    ("Conv1d", r"matches no layer; did you mean 'Conv2d'"),
    (nn.Conv3d, r"rule Conv3d matches no layer; did you mean 'Conv2d'"),
    (nn.LSTM, r"the types here: Conv2d, Linear"),
    ("convolution*", r"rule 'convolution\*' matches no layer"),
    ("parameters", r"no parameter of two or more dimensions"),
    ("bn1", r"rule 'bn1' takes nothing.*bn1\.weight"),
    ("BatchNorm2d", r"takes nothing.*names it"),
    ("bn1.num_batches_tracked", r"takes nothing.*int64"),
])
def test_rule_that_matches_nothing_says_what_was_meant(key, message):
    with pytest.raises(ValueError, match=message) as error:
        plan({key: A, "*": B})
    assert "\n" not in str(error.value)


def test_container_name_suggests_the_pattern():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"did you mean 'body\.\*'"):
        plan({"body": A, "*": B}, model)


def test_shadowed_rules():
    with pytest.raises(ValueError, match=r"rule 'conv\*' is never used"):
        plan({"conv1": A, "conv2": B, "conv*": C})
    with pytest.raises(ValueError, match=r"rule 'Linear' is never used"):
        plan({"linear": A, "Linear": C, "*": B})
    plan({"conv*": A, "linear": B, "*": C})  # a default may be left over


def test_types_need_a_module():
    entries = entries_of_state_dict(SmallCNN().state_dict()).entries
    for key in ("Conv2d", nn.Conv2d):
        with pytest.raises(ValueError, match="by module type need the model itself"):
            resolve_rules({key: A, "*": B}, entries)
    assert list(resolve_rules(A, entries).taken) == ["conv1.weight", "conv2.weight", "linear.weight"]
    assert resolve_rules({"conv1": B, "*": A}, entries).taken["conv1.weight"] is B


@pytest.mark.parametrize("value", [16, "kmeans", object(), [A], StandardScaler, KMeansWeightSharer,
                                   Pipeline([("scale", "passthrough")])])
def test_values_that_are_no_compressor(value):
    for rules in (value, {"conv1": value, "*": A}):
        with pytest.raises(TypeError, match=r"must be an estimator of skfactor, a Pipeline of them, or None") as error:
            plan(rules)
        assert "\n" not in str(error.value)


def test_wrong_keys_and_empty_rules():
    with pytest.raises(ValueError, match="at least one rule"):
        plan({})
    with pytest.raises(TypeError, match="a rule's key must be"):
        plan({3: A})
    with pytest.raises(TypeError, match="got None"):
        plan(None)
    with pytest.raises(ValueError, match="nothing to compress"):
        plan(A, nn.BatchNorm2d(3))
