"""Growth: what is exact is exact, what comes from where, what is refused; and the method's budget."""
import dataclasses

import pytest
import torch

from configurator import Result, UserError
from expand import Progressive, allocate_tokens, deepen, grow, layer_map, widen
from test_model import SHAPES, small, tokens
from train import Run, stages_of


def grown(model, **changes):
    return dataclasses.replace(model.config, **changes)


def double_width(config):
    return dataclasses.replace(config, n_head=2 * config.n_head, n_kv_head=2 * config.n_kv_head, n_embd=2 * config.n_embd, n_mlp=2 * config.n_mlp)


# --------------------------------------------------------------------------------------------------------------------- width

@pytest.mark.parametrize('shape', SHAPES)
def test_doubling_every_unit_keeps_the_function(shape):
    model = small(**SHAPES[shape])
    wide = widen(model, double_width(model.config), 'fpi')
    torch.testing.assert_close(wide(tokens()).logits, model(tokens()).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize('changes', [dict(n_mlp=57), dict(n_head=5), dict(n_head=7, n_kv_head=7, n_mlp=99)])
def test_any_number_of_neurons_and_heads_keeps_the_function(changes):
    model = small()
    if 'n_kv_head' not in changes:
        changes = {**changes, 'n_kv_head': changes.get('n_head', 4)}
    wide = widen(model, grown(model, **changes), 'fpi')
    torch.testing.assert_close(wide(tokens()).logits, model(tokens()).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize('old, new', [((4, 2), (8, 2)), ((4, 2), (6, 3)), ((4, 2), (8, 4)), ((4, 1), (5, 1)), ((4, 2), (12, 4)), ((4, 4), (8, 4))])
def test_grouped_queries_keep_the_function(old, new):
    model = small(n_head=old[0], n_kv_head=old[1], head_dim=8)
    wide = widen(model, grown(model, n_head=new[0], n_kv_head=new[1]), 'fpi')
    torch.testing.assert_close(wide(tokens()).logits, model(tokens()).logits, atol=1e-10, rtol=0)


def test_a_fractional_residual_width_is_near_but_not_exact():
    """RMSNorm's mean square counts the duplicated dimensions twice: known, and why lossless operators exist."""
    model = small()
    wide = widen(model, grown(model, n_embd=40, head_dim=8), 'fpi')
    error = (wide(tokens()).logits - model(tokens()).logits).abs().max()
    assert 1e-3 < error < model(tokens()).logits.abs().max()


def test_aki_takes_new_rows_from_the_layer_above_and_fpi_from_the_same():
    model = small()
    target = grown(model, n_mlp=50)
    fpi, aki, old = (m.state_dict() for m in (widen(model, target, 'fpi'), widen(model, target, 'aki'), model))
    for layer in range(3):
        up, above = f'blocks.{layer}.mlp.up.weight', f'blocks.{min(layer + 1, 2)}.mlp.up.weight'   # the top layer has none above
        assert torch.equal(fpi[up][40:], old[up][:10]) and torch.equal(aki[up][40:], old[above][:10])
        assert torch.equal(fpi[up][:40], old[up]) and torch.equal(aki[up][:40], old[up])
        assert torch.equal(aki[f'blocks.{layer}.mlp.down.weight'], fpi[f'blocks.{layer}.mlp.down.weight'])   # its rows do not grow here


def test_aki_in_full_differs_from_fpi_only_in_new_rows_of_linear_layers():
    model = small(**SHAPES['gpt2'])
    target = double_width(model.config)
    fpi, aki = (widen(model, target, method).state_dict() for method in ('fpi', 'aki'))
    for name in fpi:
        same = torch.equal(fpi[name], aki[name])
        linear = name.startswith('blocks.') and 'norm' not in name and not name.startswith('blocks.2.')
        assert same != linear, name
        assert torch.equal(fpi[name][:len(fpi[name]) // 2], aki[name][:len(fpi[name]) // 2])


# --------------------------------------------------------------------------------------------------------------------- depth

def test_layer_maps():
    assert layer_map(3, 6) == [0, 1, 2, 0, 1, 2] and layer_map(3, 5) == [0, 1, 2, 0, 1]
    assert layer_map(18, 22, 'bert2bert') == [*range(18), 14, 15, 16, 17]
    assert layer_map(2, 7, 'bert2bert') == [0, 1, 0, 1, 0, 1, 1]


def test_stacking_twice_is_stacking_fourfold():
    model = small()
    twice, once = deepen(deepen(model, 6), 12), deepen(model, 12)
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), once.state_dict().values(), strict=True))
    assert torch.equal(once.state_dict()['blocks.10.attn.q.weight'], model.state_dict()['blocks.1.attn.q.weight'])


def test_copied_layers_share_no_memory():
    deep = deepen(small(), 6)
    pointers = [p.data_ptr() for p in deep.parameters()]
    assert len(set(pointers)) == len(pointers)


# --------------------------------------------------------------------------------------------------------------------- both

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('width', ['fpi', 'aki'])
def test_a_grown_model_is_complete_trainable_and_of_the_dtype_it_was(shape, width):
    model = small(**SHAPES[shape]).float()
    target = dataclasses.replace(double_width(model.config), n_layer=5)
    big = grow(model, target, width, 'bert2bert')
    assert big.config == target and {p.dtype for p in big.parameters()} == {torch.float32}
    big(tokens(), tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in big.parameters())


def test_growing_to_the_same_size_changes_nothing():
    model = small()
    same = grow(model, model.config)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize('changes, words', [
    (dict(n_embd=16, head_dim=8), 'n_embd 32 -> 16'), (dict(n_layer=2), 'n_layer 3 -> 2'), (dict(head_dim=16), 'head_dim 8 -> 16'), (dict(norm='layer'), 'norm rms -> layer'),
    (dict(vocab_size=99), 'vocab_size 61 -> 99'), (dict(tied=True), 'tied False -> True')])
def test_targets_that_cannot_be_reached_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        grow(small(), grown(small(), **changes))


def test_a_query_head_is_never_lost():
    model = small(n_head=8, n_kv_head=2, head_dim=8)
    with pytest.raises(UserError, match='lose query heads'):   # the second group would keep 3 of its 4 queries
        widen(model, grown(model, n_head=9, n_kv_head=3), 'fpi')


@pytest.mark.parametrize('call', [lambda m: grow(m, m.config, width='akj'), lambda m: grow(m, m.config, depth='stak')])
def test_unknown_operators_name_the_nearest(call):
    with pytest.raises(UserError, match='did you mean (aki|stack)'):
        call(small())


# --------------------------------------------------------------------------------------------------------------------- the method

@pytest.mark.parametrize('factor', [1, 2])
def test_token_allocation_gives_the_papers_tables(factor):
    scratch = [factor * t for t in (20e9, 40e9, 80e9, 160e9)]
    assert allocate_tokens([1e9, 2e9, 4e9, 8e9], scratch) == [factor * t for t in (20e9, 30e9, 60e9, 120e9)]   # Tables 7 and 8


def test_the_family_costs_what_its_largest_member_costs():
    params, scratch = [3e6, 5e6, 11e6], [6e7, 1e8, 3e8]
    assert sum(x * t for x, t in zip(params, allocate_tokens(params, scratch))) == pytest.approx(params[-1] * scratch[-1])


def test_sizes_too_close_for_the_budget_are_refused():
    with pytest.raises(UserError, match='nothing is left'):
        allocate_tokens([1e9, 1.01e9], [40e9, 20e9])


def planned(**knobs):
    """The stages of a Progressive run that trains nothing."""
    def pretend(stage):
        return Result(stage.name, stage.name, 1, stage.params, int(stage.tokens), 6 * stage.params * stage.tokens, stage.inherited_flops, stage.baseline_flops,
                      1.0, 1.0, int(stage.tokens) + (stage.parent.position if stage.parent else 0), 0.0)
    return list(stages_of(Progressive(**knobs), Run(data='pydocs', block_size=128), pretend))


def test_stages_of_the_tiny_family():
    stages = planned(compare='independent')
    assert [s.name for s, _ in stages] == ['32x2', '48x2', '64x2', '64x4', 'independent-48x2', 'independent-64x2', 'independent-64x4']
    assert [s.start for s, _ in stages][:4] == ['random initialisation', '32x2 + aki', '48x2 + aki', '64x2 + stack']
    largest, alone = stages[3][1], stages[6][1]
    assert largest.total_flops == pytest.approx(alone.flops) and largest.baseline_flops > 1.2 * largest.total_flops
    assert stages[3][0].parent.position == sum(r.tokens for _, r in stages[:3])   # the data goes on from size to size


def test_independent_training_at_its_own_learning_rate_starts_with_the_smallest():
    stages = planned(compare='independent', independent_learning_rates=(1e-3,) * 4, learning_rates=(4e-3,) * 4)
    assert [s.name for s, _ in stages][4] == 'independent-32x2' and stages[4][0].knobs['learning_rate'] == 1e-3


@pytest.mark.parametrize('knobs, words', [
    (dict(sizes=('64x4', '32x2')), 'ascending'), (dict(sizes=()), 'ascending'), (dict(batch_sizes=(1, 2)), 'batch_sizes has 2 values for 4 sizes'),
    (dict(compare='baseline'), 'independent'), (dict(width='fpj'), 'did you mean fpi'), (dict(depth='stuck'), 'did you mean stack'), (dict(sizes=('32x2', 'gpt2')), 'cannot grow')])
def test_mistakes_are_found_before_anything_is_trained(knobs, words):
    with pytest.raises(UserError, match=words):
        planned(**knobs)
