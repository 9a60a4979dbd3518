"""Mixtures of two models: units in any order compute the same, and the wanted ones are found."""

import pytest
import torch
from test_col import FAMILIES, shaped

from col import linit
from extras.mixing import (
    best_matching,
    fit_alphas,
    fitted_model,
    mix,
    most_important,
    permute_units,
)


def shuffled(model):
    """The model with the units of every layer in another order."""
    counts = dict(mlp=model.config.n_mlp, attn=model.config.n_kv_head)
    layers = range(model.config.n_layer)
    orders = {(i, part): torch.arange(n).roll(1) for i in layers for part, n in counts.items()}
    return permute_units(model, orders)


@pytest.mark.parametrize('family', FAMILIES)
def test_units_in_another_order_compute_the_same(family):
    model, x = shaped(family, 4, 2), torch.randint(31, (2, 9))
    other = shuffled(model)
    assert not torch.equal(model.blocks[1].mlp.up.weight, other.blocks[1].mlp.up.weight)
    assert not torch.equal(model.blocks[0].attn.q.weight, other.blocks[0].attn.q.weight)
    assert torch.allclose(model(x).logits, other(x).logits, atol=1e-12)


@pytest.mark.parametrize('family', FAMILIES)
def test_units_that_were_shuffled_find_their_counterparts(family):
    model = shaped(family, 4, 2)
    other = shuffled(model)
    found = permute_units(other, best_matching(other, model))
    for a, b in zip(model.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


def test_units_of_a_smaller_model_are_found_in_a_larger_one():
    """The first units of a larger model, somewhere among all of its units."""
    large = shaped('llama', 4, 3)
    small = linit(large, large, shaped('llama', 2, 2).config, alpha=0.0)
    hidden = shuffled(large)
    found = permute_units(hidden, best_matching(hidden, small))
    cut = linit(found, found, small.config, alpha=0.0)
    for a, b in zip(small.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_most_important_units_come_first():
    model = shaped('llama', 4, 2)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[:, 7] *= 10
        model.blocks[1].attn.v.weight[12:18] *= 10  # the third of four heads
    orders = most_important(model, model.config)
    assert orders[0, 'mlp'][0] == 7 and orders[1, 'attn'][0] == 2
    assert torch.equal(
        permute_units(model, orders).blocks[0].mlp.up.weight[0], model.blocks[0].mlp.up.weight[7]
    )


def test_fitted_alphas_leave_out_what_harms():
    """One layer of the larger model is noise: the smaller one has it to itself, and only that."""
    torch.manual_seed(0)
    grown = shaped('llama', 4, 3).float()
    cut = shaped('llama', 4, 3).float()
    with torch.no_grad():
        for p in cut.blocks[1].parameters():
            p.mul_(3 * torch.randn_like(p))
    x = torch.randint(31, (200, 4, 17))
    batches = [(row[:, :-1], grown(row[:, :-1]).logits.argmax(-1)) for row in x]  # grown is right
    alphas = fit_alphas(grown, cut, batches, start=0.5)
    assert alphas.shape == (4,) and alphas[1] > 0.8
    assert torch.equal(alphas[[0, 2, 3]], torch.full((3,), 0.5))  # there they are the same
    model, half = fitted_model(grown, cut, batches), linit(grown, cut, grown.config, alpha=0.5)
    assert model(*batches[0]).loss < half(*batches[0]).loss
    halves = mix(grown, cut, torch.full((4,), 0.5)).values()
    assert all(torch.equal(p, q) for p, q in zip(half.parameters(), halves))


def test_models_of_lower_precision_are_matched_and_mixed():
    model = shaped('llama', 4, 2).bfloat16()
    other = shuffled(model)
    found = permute_units(other, best_matching(other, shaped('llama', 4, 2)))
    assert torch.equal(found.blocks[1].mlp.down.weight, model.blocks[1].mlp.down.weight)
    x = torch.randint(31, (2, 4, 17))
    made = fitted_model(model, other, [(row[:, :-1], row[:, 1:]) for row in x])
    assert made.blocks[0].attn.q.weight.dtype == torch.bfloat16
