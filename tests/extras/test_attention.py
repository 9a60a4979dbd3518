"""How attentive layers are: measures on closed cases, kinds of lazy heads, over training."""

import json

import pytest
import torch
from conftest import run_command
from test_configurator import result
from test_model import SHAPES, small, tokens

import train
from data.corpus import open_corpus
from engine.errors import UserError
from extras.attention import (
    analyse,
    attention_maps,
    attention_rank,
    column_mass,
    evenness,
    head_habits,
    initial_model,
    kinds_of_laziness,
    lazy_layers,
    losses_without,
    model_at_start,
    moved,
    observe_attention,
    observed_panels,
    predict_n,
    query_key_gradients,
    sink,
    validation_samples,
)
from extras.lazy_layers import LazyLayers
from inheritune import inherit
from model import GPT, GPTConfig, load

# ----------------------------------------------------------------------------------------------
# measures


@pytest.mark.parametrize(
    'attention, rank, mass',
    [
        (torch.full((50, 50), 1 / 50), 1, 45),
        (torch.eye(50), 45, 45),
        (torch.cat((torch.ones(50, 1), torch.zeros(50, 49)), 1), 1, 1),
        (torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), 2, 2),
    ],
)  # (9 + 4) / 14 = 93%
def test_rank_and_mass_of_closed_cases(attention, rank, mass):
    assert attention_rank(attention).item() == rank and column_mass(attention).item() == mass


def test_rank_against_singular_values_and_mass_against_a_loop():
    a = torch.randn(3, 5, 20, 20, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for threshold in (0.5, 0.9, 0.999):
        ranks, masses = attention_rank(a, threshold), column_mass(a, threshold)
        for i in range(3):
            for j in range(5):
                energy = torch.linalg.svdvals(a[i, j].double()).square()
                assert ranks[i, j] == next(
                    k for k in range(1, 21) if energy[:k].sum() >= threshold * energy.sum() - 1e-12
                )
                columns = a[i, j].double().square().sum(0).sort(descending=True).values
                assert masses[i, j] == next(
                    m
                    for m in range(1, 21)
                    if columns[:m].sum() >= threshold * columns.sum() - 1e-12
                )


def test_a_band_has_its_share_of_columns():
    band = torch.eye(40) + torch.eye(40).roll(1, 1)
    assert column_mass(band).item() == 36 and attention_rank(band).item() < 36


@pytest.mark.parametrize('shape', SHAPES)
def test_maps_are_those_the_model_uses(shape):
    model, x = small(**SHAPES[shape]), tokens(2, 16)
    maps = list(attention_maps(model, x))
    assert len(maps) == 3 and all(a.shape == (2, 4, 16, 16) for a in maps)
    for a in maps:
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 4, 16))
        assert (a.triu(1) == 0).all()
    block, h = (
        model.blocks[0],
        model.wte(x) if model.wpe is None else model.wte(x) + model.wpe.weight[:16],
    )
    h = block.norm1(h)
    v = block.attn.v(h).view(2, 16, -1, 8 if shape != 'qwen3' else 12).transpose(1, 2)
    mixed = maps[0].double() @ v.repeat_interleave(4 // v.shape[1], 1)
    rope = None if model.wpe is not None else (model.cos[:16], model.sin[:16])
    torch.testing.assert_close(
        block.attn.o(mixed.transpose(1, 2).flatten(2)), block.attn(h, rope, None), atol=1e-6, rtol=0
    )
    assert (next(attention_maps(model, x, causal=False)).triu(1) > 0).any()


def test_lazy_layers_are_found():
    model = small()
    with torch.no_grad():
        model.blocks[2].attn.q.weight.zero_()  # every query the same: uniform rows
    rank, mass = analyse(model, tokens(6, 20), causal=False, batch_size=4)
    assert rank.shape == mass.shape == (3, 6, 4) and (rank[2] == 1).all() and (mass[2] == 18).all()
    assert lazy_layers(rank) == [3]
    rank[2, :, 1] = 7  # one attentive head is enough
    assert lazy_layers(rank) == []


def test_kinds_of_lazy_heads_of_closed_cases():
    T = 64
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    first = torch.zeros(T, T)
    first[:, 0] = 1
    itself = torch.eye(T)
    assert evenness(even).item() == pytest.approx(1)
    assert evenness(first).item() == evenness(itself).item() == 0
    assert sink(first).item() == 1 and sink(itself).item() == 0
    assert sink(even).item() == pytest.approx(sum(1 / t for t in range(2, T + 1)) / (T - 1))
    assert moved(even, even).item() == 0 and moved(first, itself).item() == 1
    halves = (first + itself) / 2
    assert moved(first, halves).item() == pytest.approx(0.5)


def test_uniform_attention_is_lazy_only_where_every_position_sees_all():
    """Why more than rank one is looked for: 5 of 100 under the causal mask, 1 without."""
    causal = torch.ones(100, 100).tril() / torch.arange(1, 101)[:, None]
    assert attention_rank(causal) == 5 and column_mass(causal) == 30
    assert attention_rank(torch.full((100, 100), 0.01)) == 1


def test_a_head_without_queries_is_uniform_and_one_that_is_untrained_has_not_moved():
    initial, model = small(init_std=0.3), small(init_std=0.3)
    with torch.no_grad():
        model.blocks[1].attn.q.weight[8:16] = 0  # the second head of four
        model.blocks[2].attn.k.weight *= -3
    habits = head_habits(model, tokens(5, 24), initial, batch_size=2)
    assert habits['moved'][0].max() == 0 and habits['moved'][2].min() > 0.1
    assert habits['evenness'][1, 1] == pytest.approx(1)
    kinds = kinds_of_laziness(habits)
    assert kinds['uniform'][1].tolist() == [False, True, False, False]
    assert kinds['as initialised'][0].all() and not kinds['as initialised'][2].any()
    assert 'as initialised' not in kinds_of_laziness(head_habits(model, tokens(5, 24)))


def test_the_number_of_layers_is_predicted_from_lazy_heads_and_from_truncation():
    kinds = dict(uniform=torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [1, 1]], dtype=torch.bool))
    kinds['sink'] = torch.zeros(5, 2, dtype=torch.bool)
    kinds['sink'][3, 1] = True  # the fourth layer's heads are lazy in two ways
    above = [5.0, 3.0, 2.35, 2.2, 2.1]
    assert predict_n(kinds, above, 2.0) == dict(attentive=3, truncated=3)
    assert predict_n(dict(uniform=torch.ones(5, 2, dtype=torch.bool)), above, 2.0)['attentive'] == 0
    assert predict_n(kinds, [5.0, 4.0, 3.0, 2.9, 2.8], 2.0)['truncated'] == 5


def test_gradients_of_queries_and_keys_are_those_of_a_backward_pass():
    model, x = small(), tokens(3, 20)
    queries, keys = query_key_gradients(model, x[:, :-1], x[:, 1:])
    model(x[:, :-1], x[:, 1:]).loss.backward()
    for layer, block in enumerate(model.blocks):
        assert queries[layer] == pytest.approx(block.attn.q.weight.grad.norm().item(), rel=1e-5)
        assert keys[layer] == pytest.approx(block.attn.k.weight.grad.norm().item(), rel=1e-5)


def test_what_is_observed_leaves_the_model_and_the_random_state_alone():
    model, x = small(), tokens(3, 20)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    seen = observe_attention(x, seed=0)(model)['attention']
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    json.dumps(seen)  # it is a line of metrics.jsonl
    assert {len(values) for values in seen.values()} == {3}
    assert len(seen['rank'][0]) == 4 and len(seen['moved'][0]) == 4


def test_samples_are_of_the_validation_split(data_dir):
    samples = validation_samples('pydocs', data_dir, 3, 10)
    text = open_corpus('pydocs', data_dir).val
    assert samples.shape == (3, 11) and samples[0].tolist() == text[:11].tolist()


def test_a_run_observes_its_heads_from_the_start_to_the_end(data_dir, tmp_path):
    """In step with the losses, and a stopped run observes what one that was not stopped does."""
    knobs = ['--method=lazy_layers', '--width=16', '--depths=2,1', '--tokens=1280', '--seeds=1']
    knobs += [f'--data_dir={data_dir}', '--block_size=32', '--batch_size=4', '--eval_tokens=512']
    knobs += ['--eval_interval=5', '--device=cpu']
    train.main([*knobs, f'--out_dir={tmp_path}/run'])
    folder = tmp_path / 'run' / '2-learned-by-layer-0'
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'attention' in line] == [0, 5, 10]
    assert lines[0]['attention']['moved'] == [[0.0], [0.0]]
    model = load(folder)
    samples = validation_samples('pydocs', data_dir, 8, 32)
    rank, _ = analyse(model, samples[:, :-1])
    last = torch.tensor(lines[-1]['attention']['rank'], dtype=torch.float64)
    torch.testing.assert_close(last, rank.double().mean(1))
    start = model_at_start(folder, model.config)
    same = initial_model(model.config, 1337)
    assert torch.equal(start.blocks[1].attn.q.weight, same.blocks[1].attn.q.weight)
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert 'by-layer instead of none' in report and 'learned instead of rope' in report
    assert (tmp_path / 'run' / 'lazy.png').stat().st_size > 1000


def test_one_value_of_a_suspect_has_no_effect_to_show(data_dir, tmp_path):
    """And without evaluations on the way, the heads are still seen before training."""
    knobs = ['--method=lazy_layers', '--width=16', '--depths=1', '--positions=rope', '--seeds=1']
    knobs += [f'--data_dir={data_dir}', '--block_size=32', '--batch_size=4', '--eval_tokens=512']
    train.main([*knobs, '--tokens=1280', '--device=cpu', f'--out_dir={tmp_path}/run'])
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert 'by-layer instead of none' in report and 'depth' not in report
    lines = (tmp_path / 'run' / '1-rope-none-0' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines if '"attention"' in line] == [0, 10]
    with pytest.raises(UserError, match='needs depths'):
        train.main([*knobs, '--depths=', f'--out_dir={tmp_path}/none'])


def test_seeds_that_observed_at_different_steps_meet_where_they_can(tmp_path):
    for seed, steps in enumerate(((0, 5, 10), (0, 10))):
        (tmp_path / str(seed)).mkdir()
        seen = dict(rank=[[1.0]], mass=[[1.0]], sink=[[0.0]], evenness=[[1.0]])
        seen |= dict(gradient_q=[1.0], gradient_k=[1.0])
        lines = [json.dumps(dict(step=step, attention=seen)) for step in steps]
        (tmp_path / str(seed) / 'metrics.jsonl').write_text('\n'.join(lines))
    results = [result(tmp_path / str(seed)) for seed in (0, 1)]
    _, lazy, _ = observed_panels(dict(reference=results))
    assert lazy.lines[0].x == [0, 10]


def test_effects_are_differences_with_all_else_equal(tmp_path):
    method = LazyLayers(depths=(4, 2), positions=('learned', 'rope'), scaling=('by-layer', 'none'))
    results, measured = [], {}
    for seed, noise in enumerate((0.1, 0.2, 0.3)):
        for depth in (4, 2):
            for positions in ('learned', 'rope'):
                for scaling in ('by-layer', 'none'):
                    labels = dict(depth=depth, positions=positions, scaling=scaling, seed=seed)
                    name = f'{depth}-{positions}-{scaling}-{seed}'
                    results.append(result(tmp_path, name=name, labels=labels))
                    value = depth + 10 * (scaling == 'none') + noise * (positions == 'rope')
                    measured[name] = dict(uniform=value)
    effects = {r['suspect']: r['uniform'] for r in method.effects(results, measured)}
    assert effects['scaling'] == '-10.000 (-10.000 to -10.000)'
    assert effects['depth'] == '+2.000 (+2.000 to +2.000)'
    assert effects['positions'] == '-0.200 (-0.448 to +0.048)'


def test_what_a_layer_is_worth_is_the_loss_of_the_model_without_it():
    model, x = small(), tokens(3, 20)
    alone, above = losses_without(model, x)
    for layer in range(3):
        kept = [i for i in range(3) if i != layer]
        child = inherit(model, 2, layers=kept)
        assert alone[layer] == pytest.approx(child(x[:, :-1], x[:, 1:]).loss.item(), abs=1e-6)
        if layer:
            child = inherit(model, layer)
            assert above[layer] == pytest.approx(child(x[:, :-1], x[:, 1:]).loss.item(), abs=1e-6)


def test_sequences_may_be_as_long_as_the_model_reads(data_dir, tmp_path):
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=16)).save(tmp_path / 'model', 'bytes')
    options = ['--samples=2', '--length=16', '--device=cpu', f'--data_dir={data_dir}']
    process = run_command('inheritune.py', tmp_path / 'model', *options, f'--out={tmp_path}/out')
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'out' / 'attention_maps.png').is_file()
