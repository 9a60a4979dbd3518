"""How attentive layers are: measures on closed cases, uniform heads, over training."""

import json

import pytest
import torch
from conftest import run_command
from test_configurator import result
from test_model import SHAPES, small, tokens

import train
from data.corpus import open_corpus
from extras.attention import (
    analyse,
    attention_maps,
    attention_rank,
    column_mass,
    evenness,
    lazy_layers,
    mean_evenness,
    observe_attention,
    observed_panels,
    query_key_gradients,
    validation_samples,
)
from model import GPT, GPTConfig, load, rotations

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
    rope = None if model.wpe is not None else rotations(model.config, torch.arange(16))
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


def test_uniform_attention_is_lazy_only_where_every_position_sees_all():
    """Why evenness is looked at, too: rank 5 of 100 under the causal mask, 1 without."""
    causal = torch.ones(100, 100).tril() / torch.arange(1, 101)[:, None]
    assert attention_rank(causal) == 5 and column_mass(causal) == 30
    assert attention_rank(torch.full((100, 100), 0.01)) == 1
    assert evenness(causal).item() == pytest.approx(1) and evenness(torch.eye(100)).item() == 0


def test_a_head_without_queries_is_uniform():
    model, x = small(init_std=0.3), tokens(5, 24)
    with torch.no_grad():
        model.blocks[1].attn.q.weight[8:16] = 0  # the second head of four
    even = mean_evenness(model, x, batch_size=2)
    assert even[1, 1] == pytest.approx(1) and even[1, [0, 2, 3]].max() < 1
    expected = torch.stack([evenness(a).double().mean(0) for a in attention_maps(model, x)])
    torch.testing.assert_close(even, expected)


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
    seen = observe_attention(x)(model)['attention']
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    json.dumps(seen)  # it is a line of metrics.jsonl
    assert {len(values) for values in seen.values()} == {3}
    assert len(seen['rank'][0]) == 4 and len(seen['evenness'][0]) == 4


def test_samples_are_of_the_validation_split(data_dir):
    samples = validation_samples('pydocs', data_dir, 3, 10)
    text = open_corpus('pydocs', data_dir).val
    assert samples.shape == (3, 11) and samples[0].tolist() == text[:11].tolist()


def test_a_run_observes_its_heads_from_the_start_to_the_end(data_dir, tmp_path):
    """In step with the losses, and a stopped run observes what one that was not stopped does."""
    knobs = ['--method=inheritune', '--size=gpt2-16x2', '--tokens=1280', '--max_rounds=1']
    knobs += [f'--data_dir={data_dir}', '--block_size=32', '--batch_size=4', '--eval_tokens=512']
    knobs += ['--eval_interval=5', '--device=cpu', '--observe_attention=True']
    train.main([*knobs, f'--out_dir={tmp_path}/run'])
    folder = tmp_path / 'run' / 'reference'
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'attention' in line] == [0, 5, 10]
    model = load(folder)
    samples = validation_samples('pydocs', data_dir, 8, 32)
    rank, _ = analyse(model, samples[:, :-1])
    last = torch.tensor(lines[-1]['attention']['rank'], dtype=torch.float64)
    torch.testing.assert_close(last, rank.double().mean(1))
    assert (tmp_path / 'run' / 'lazy.png').stat().st_size > 1000


def test_seeds_that_observed_at_different_steps_meet_where_they_can(tmp_path):
    for seed, steps in enumerate(((0, 5, 10), (0, 10))):
        (tmp_path / str(seed)).mkdir()
        seen = dict(rank=[[1.0]], mass=[[1.0]], evenness=[[1.0]])
        seen |= dict(gradient_q=[1.0], gradient_k=[1.0])
        lines = [json.dumps(dict(step=step, attention=seen)) for step in steps]
        (tmp_path / str(seed) / 'metrics.jsonl').write_text('\n'.join(lines))
    results = [result(tmp_path / str(seed)) for seed in (0, 1)]
    _, uniform, _ = observed_panels(dict(reference=results))
    assert uniform.lines[0].x == [0, 10] and uniform.lines[0].y == [1, 1]


def test_sequences_may_be_as_long_as_the_model_reads(data_dir, tmp_path):
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=16)).save(tmp_path / 'model', 'bytes')
    options = ['--samples=2', '--length=16', '--device=cpu', f'--data_dir={data_dir}']
    process = run_command('inheritune.py', tmp_path / 'model', *options, f'--out={tmp_path}/out')
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'out' / 'attention_maps.png').is_file()
