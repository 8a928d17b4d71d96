# SPDX-License-Identifier: BSD-3-Clause
"""Hidden units of the MLPs of `transformers`' networks; skipped where the package is absent."""

import os

import pytest
import torch

import skfactor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=60, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}


def bert():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                     vocab_size=60, num_labels=3)
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.arange(12).reshape(2, 6)}


def vit():
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                    image_size=16, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.mark.parametrize("make", [gpt2, bert, vit])
def test_mlp_units(make, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    groups = skfactor.filter_groups(model, inputs)
    assert len(groups) >= 2
    hidden = [g for g in groups if len(g.layers) == 1 and len(g.units) in (48, 128)]
    assert len(hidden) == 2
    filters = {}
    for group in hidden:
        filters |= group.filters(range(0, len(group.units), 3))
    pruned = skfactor.remove_filters(model, filters, inputs)
    hooks = []
    for layer, indices in filters.items():  # the activation is 0 at 0, so the units can be masked at their source
        module = model.get_submodule(layer)
        hooks.append(module.register_forward_hook(
            lambda m, a, y, i=tuple(indices): y.index_fill(-1, torch.tensor(i), 0)))
    with torch.no_grad():
        expected, found = model(**inputs).logits, pruned.model(**inputs).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    for hook in hooks:
        hook.remove()
    fresh = skfactor.load_into(make()[0].eval(), pruned.save(tmp_path / "a.skf"))
    with torch.no_grad():
        assert torch.equal(fresh(**inputs).logits, found)
