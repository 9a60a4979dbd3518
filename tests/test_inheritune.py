"""
Inheritune: how attentive a layer is, what is inherited from where, Algorithm 1's control flow and
costs, the baselines, plans of the paper's runs, and the command.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from test_model import SHAPES, small, tokens

import train
from configurator import configure
from data.corpus import open_corpus
from data.loader import validation_batches
from engine.errors import UserError
from engine.loss import evaluate
from engine.stage import Result
from inheritune import (
    Inheritune,
    alternate_layers,
    analyse,
    attention_maps,
    attention_rank,
    column_mass,
    evenness,
    half_width,
    half_width_config,
    inherit,
    inherit_more,
    lazy_layers,
    observe_attention,
    query_key_norms,
    stacked_layers,
    validation_samples,
)
from model import GPT, GPTConfig, load, rotations
from train import METHODS, Run, plan, stages_of

# ----------------------------------------------------------------------------------------------
# what a lazy layer is


@pytest.mark.parametrize(
    'attention, rank, mass',
    [
        (torch.full((50, 50), 1 / 50), 1, 45),
        (torch.eye(50), 45, 45),
        (torch.cat((torch.ones(50, 1), torch.zeros(50, 49)), 1), 1, 1),
        (torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), 2, 2),  # (9 + 4) / 14 = 93%
    ],
)
def test_rank_and_mass_of_closed_cases(attention, rank, mass):
    assert attention_rank(attention).item() == rank and column_mass(attention).item() == mass


@pytest.mark.parametrize('threshold', [0.5, 0.9, 0.999])
def test_rank_and_mass_are_the_fewest_that_hold_the_threshold(threshold):
    a = torch.randn(15, 20, 20, generator=torch.Generator().manual_seed(0)).softmax(-1).double()
    for matrix in a:
        for found, shares in (
            (attention_rank(matrix, threshold), torch.linalg.svdvals(matrix) ** 2),
            (column_mass(matrix, threshold), matrix.square().sum(0).sort(descending=True).values),
        ):
            held = [shares[:n].sum() / shares.sum() for n in range(21)]
            assert held[found - 1] < threshold <= held[found]


def test_uniform_attention_is_of_rank_one_only_where_every_position_sees_all():
    """Why evenness is looked at, too: rank 5 of 100 under the causal mask, 1 without."""
    causal = torch.ones(100, 100).tril() / torch.arange(1, 101)[:, None]
    assert attention_rank(causal) == 5 and column_mass(causal) == 30
    assert attention_rank(torch.full((100, 100), 0.01)) == 1
    assert evenness(causal).item() == pytest.approx(1) and evenness(torch.eye(100)).item() == 0


@pytest.mark.parametrize('shape', SHAPES)
def test_maps_are_those_the_model_uses(shape):
    model, x = small(**SHAPES[shape]), tokens(2, 16)
    maps = list(attention_maps(model, x))
    assert len(maps) == 3 and all(a.shape == (2, 4, 16, 16) for a in maps)
    rope = None if model.wpe is not None else rotations(model.config, torch.arange(16))
    stream = model.wte(x) if model.wpe is None else model.wte(x) + model.wpe.weight[:16]
    for a, block in zip(maps, model.blocks):
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 4, 16))
        assert (a.triu(1) == 0).all()
        _, _, v = block.attn.project(block.norm1(stream), rope)
        mixed = a.double() @ v.repeat_interleave(4 // v.shape[1], 1)
        ours = block.attn.o(mixed.transpose(1, 2).flatten(2))
        theirs = block.attn(block.norm1(stream), rope, None)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        stream = block(stream, rope, None)
    assert (next(attention_maps(model, x, causal=False)).triu(1) > 0).any()
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_lazy_layers_are_found_by_full_attention_and_uniform_heads_by_causal():
    model = small(init_std=0.3)
    with torch.no_grad():
        model.blocks[2].attn.q.weight.zero_()  # every query the same: uniform rows
    full, causal = analyse(model, tokens(6, 20), 'full'), analyse(model, tokens(6, 20))
    rank = full['rank k*, full attention']
    assert rank.shape == (3, 6) and (rank[2] == 1).all() and lazy_layers(rank) == [3]
    assert (full['mass m*, full attention'][2] == 18).all()  # uniform, not one column
    assert lazy_layers(causal['rank k*, causal attention']) == []
    assert (causal['share of uniform heads'].mean(1) == [0, 0, 1]).all()
    with torch.no_grad():  # one attentive head is enough
        model.blocks[2].attn.q.weight[:8].normal_(std=3)
    assert lazy_layers(analyse(model, tokens(6, 20), 'full')['rank k*, full attention']) == []


def test_norms_of_queries_and_keys_and_of_their_gradients_are_those_of_a_backward_pass():
    model, x = small(), tokens(3, 20)
    found = query_key_norms(model, x[:, :-1], x[:, 1:])
    model(x[:, :-1], x[:, 1:]).loss.backward()
    for layer, block in enumerate(model.blocks):
        for name in 'QK':
            weight = getattr(block.attn, name.lower()).weight
            assert found[f'|W_{name}|'][layer] == pytest.approx(weight.norm().item())
            assert found[f'|dL/dW_{name}|'][layer] == pytest.approx(weight.grad.norm().item())


def test_what_is_observed_leaves_the_model_and_the_random_state_alone(data_dir):
    model = small(vocab_size=257, block_size=32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    seen = observe_attention(Run(data_dir=str(data_dir)), model)['attention']
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    json.dumps(seen)  # it is a line of metrics.jsonl
    assert len(seen) == 7 and {len(values) for values in seen.values()} == {3}


# ----------------------------------------------------------------------------------------------
# inheriting


@pytest.mark.parametrize('shape', SHAPES)
def test_inherited_logits_are_those_of_the_truncated_reference(shape):
    reference = small(**SHAPES[shape])
    child = inherit(reference, 2)
    hidden = reference(tokens(), hidden_at=2).hidden
    expected = reference.norm(hidden) @ reference.head_weight.T
    torch.testing.assert_close(child(tokens()).logits, expected)
    assert child.config.n_layer == 2 and {p.dtype for p in child.parameters()} == {torch.float64}


def source_of(tensor, reference):
    """The name of the reference's tensor that this one is a copy of, or None."""
    for name, other in reference.state_dict().items():
        if other.shape == tensor.shape and torch.equal(other, tensor):
            return name


@pytest.mark.parametrize('parts', [('attention',), ('attention', 'norms'), ('attention', 'mlp')])
def test_selected_parts_are_inherited_and_the_others_are_new(parts):
    reference = small(**SHAPES['gpt2'])
    kinds = dict(attn='attention', mlp='mlp', norm1='norms', norm2='norms')
    for name, tensor in inherit(reference, 2, parts).state_dict().items():
        part = kinds[name.split('.')[2]] if name.startswith('blocks') else None
        assert (source_of(tensor, reference) == name) == (part in parts or part is None), name


def layers_of(model, reference):
    """The layers of the reference that a model's are copies of."""
    names = [source_of(block.mlp.up.weight, reference) for block in model.blocks]
    return [int(name.split('.')[1]) for name in names]


def test_chosen_layers_come_from_where_they_are_said_to():
    reference = small(n_layer=6)
    assert layers_of(inherit(reference, 3, layers=[3, 4, 5]), reference) == [3, 4, 5]
    assert alternate_layers(24, 16) == [*range(0, 24, 2), 18, 19, 20, 21]  # section 4
    assert alternate_layers(24, 12) == list(range(0, 24, 2)) and alternate_layers(2, 2) == [0, 0]
    assert stacked_layers(9, 5) == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match='a reference of 3 layers has no layer 4'):
        inherit(small(), 4)


@pytest.mark.parametrize('shape', ['gpt2', 'qwen3'])
def test_copies_can_keep_their_attention_where_the_layers_number_scales_it(shape):
    scaled = dict(n_layer=6, attn_scale_by_layer=True, init_std=0.2)
    model = small(**SHAPES[shape] | scaled).double()
    raw = inherit(model, 2, layers=[0, 5])
    kept = inherit(model, 2, layers=[0, 5], rescale=True)
    assert torch.equal(raw.blocks[1].attn.q.weight, model.blocks[5].attn.q.weight)
    alone = inherit(model, 6)
    alone.blocks = torch.nn.ModuleList([alone.blocks[0], alone.blocks[5]])
    x = tokens()
    torch.testing.assert_close(kept(x).logits, alone(x).logits, rtol=0, atol=1e-12)
    assert (raw(x).logits - alone(x).logits).abs().max() > 1e-3


def test_half_the_width_is_the_first_half_of_everything():
    reference = small(**SHAPES['gpt2'])
    child, old = half_width(reference), reference.state_dict()
    shape = child.config
    assert (shape.n_embd, shape.n_head, shape.n_mlp, shape.n_layer) == (16, 2, 20, 3)
    for name, tensor in child.state_dict().items():
        assert torch.equal(tensor, old[name][tuple(map(slice, tensor.shape))]), name
    xl = half_width_config(GPTConfig.named('gpt2-xl'))  # 12 of 25 heads, four times their width
    assert (xl.n_head, xl.n_embd, xl.n_mlp) == (12, 768, 3072)


# ----------------------------------------------------------------------------------------------
# Algorithm 1


def planned(losses, seeds=1, **knobs):
    """The stages, and the report, when stage i ends with losses[i], the last from then on."""
    made, scratch = [], tempfile.TemporaryDirectory()
    folder = Path(scratch.name)

    def pretend(stage):
        made.append(stage)
        loss = losses[min(len(made), len(losses)) - 1]
        (folder / stage.name).mkdir()
        (folder / stage.name / 'metrics.jsonl').write_text('{"step": 0}\n')
        return Result(
            stage.name,
            str(folder / stage.name),
            n_params=stage.config.num_params(),
            params=stage.params,
            tokens=int(stage.tokens),
            flops=6 * stage.params * stage.tokens,
            val_loss=loss,
            position=int(stage.position + stage.tokens),
            labels=stage.labels,
            before=stage.before,
        )

    method, run = Inheritune(**knobs), Run(block_size=128, data_dir='nowhere', seeds=seeds)
    with scratch:
        results = [result for _, result in stages_of(method, run, pretend)]
        return made, method.summary(results)


def test_it_stops_as_soon_as_the_reference_is_matched():
    stages, blocks = planned([1.5, 1.5])
    assert [s.name for s in stages] == ['reference', '4-layers']
    assert blocks[0].startswith('4-layers matches the reference in round 1 (1.5000 against 1.5000)')
    # of the layers half, of the whole less: both have embeddings, positions and the head
    assert '46% fewer parameters, 50% without embeddings and head' in blocks[0]


@pytest.mark.parametrize('regrow', ['restart', 'continue'])
def test_it_grows_by_two_until_it_matches_and_all_rounds_count(regrow):
    stages, blocks = planned([1.5, 1.7, 1.6, 1.4], regrow=regrow)
    assert [s.name for s in stages] == ['reference', '4-layers', '6-layers', '8-layers']
    assert 'in round 3' in blocks[0]
    last = stages[-1]
    assert last.parent.name == ('6-layers' if regrow == 'continue' else 'reference')
    assert (getattr(last.model, 'func', None) is inherit_more) == (regrow == 'continue')
    cost = [6 * s.params * s.tokens for s in stages]
    assert sum(last.before.values()) == pytest.approx(sum(cost[:3]))
    assert blocks[1][-1]['with all ancestors'] == pytest.approx(sum(cost))


def test_it_gives_up_at_the_references_size_or_where_it_is_told_to():
    stages, blocks = planned([1.5, 2.0])
    assert [s.config.n_layer for s in stages] == [8, 4, 6, 8] and 'does not match' in blocks[0]
    assert [s.config.n_layer for s in planned([1.5, 2.0], max_n=7)[0]] == [8, 4, 6]
    assert [s.config.n_layer for s in planned([1.5, 2.0], n=3, max_n=3)[0]] == [8, 3]


def test_growing_keeps_the_trained_layers_and_adds_the_references_next(tmp_path):
    reference, trained = small(n_layer=6), small(n_layer=2, init_std=0.1)
    results = []
    for name, model in (('reference', reference), ('trained', trained)):
        model.save(tmp_path / name)
        results.append(Result(name, str(tmp_path / name)))
    child = inherit_more(*results, 4)
    assert layers_of(inherit(child, 2), trained) == [0, 1]
    assert torch.equal(child.wte.weight, trained.wte.weight)
    assert source_of(child.blocks[3].mlp.up.weight, reference) == 'blocks.3.mlp.up.weight'


@pytest.mark.parametrize(
    'knobs, words',
    [
        (dict(size='64x5'), 'half of 5 layers is not a whole number: --n=LAYERS says how many'),
        (dict(n=9), 'n=9: the reference has 8 layers'),
        (dict(reference='nowhere'), 'nowhere is not a folder'),
        (dict(size='16x2', baselines=('stacking',)), 'stacking needs a child of two layers'),
        (dict(size='16x2', baselines=('half-width',)), 'n_head must be between 1'),
    ],
)
def test_what_cannot_be_is_refused(knobs, words):
    with pytest.raises(UserError, match=words):
        planned([1.0], **knobs)


def test_a_given_reference_is_measured_as_the_children_are(data_dir, tmp_path):
    """On this run's data and context; its cost, and where its data ended, are known."""
    knobs = ['--size=16x2', '--tokens=512', f'--data_dir={data_dir}', '--eval_tokens=512']
    train.main([*knobs, '--block_size=64', f'--out_dir={tmp_path}/one'])
    name = tmp_path / 'one' / '16x2'
    knobs = ['--method=inheritune', f'--reference={name}', '--tokens=320', '--grow_by=1']
    knobs += [f'--data_dir={data_dir}', '--block_size=16', '--eval_tokens=256', '--batch_size=4']
    train.main([*knobs, '--baselines=distillation', f'--out_dir={tmp_path}/run'])
    found, stored = Result.of(tmp_path / 'run' / 'reference'), Result.of(name)
    batches = validation_batches(open_corpus('pydocs', data_dir).val, 16, 8, 256)
    assert found.val_loss == pytest.approx(evaluate(load(name), batches), abs=1e-6)
    assert found.val_loss != stored.val_loss and found.tokens == 0
    assert found.total_flops == stored.flops > 0 and found.position == stored.position
    assert load(tmp_path / 'run' / '1-layers').config.n_layer == 1
    assert '1-layers matches the reference' in (tmp_path / 'run' / 'report.md').read_text()


# ----------------------------------------------------------------------------------------------
# what the child is compared with

EVERY = 'random random-2x last-layers stacking hybrid-stacking half-width distillation distilbert'


def test_baselines_have_the_papers_budgets_and_read_what_the_child_reads():
    budgets = dict(tokens=1e6, child_tokens=2e5, distillation_tokens=1e5)
    stages, _ = planned([1.5, 1.4], baselines=tuple(EVERY.split()), **budgets)
    tokens = {s.name: s.tokens for s in stages}
    assert tokens.pop('reference') == 1e6 and tokens.pop('random-2x-4') == 4e5
    assert tokens.pop('distillation-4') == tokens.pop('distilbert-4') == 1e5
    assert set(tokens.values()) == {2e5} and list(tokens) == (
        '4-layers random-4 last-layers-4 stacking-2 stacking-4 hybrid-stacking-4 half-width-8'
    ).split(' ')
    begin = {s.name: s.position for s in stages}
    assert begin.pop('reference') == begin.pop('random-2x-4') == begin.pop('stacking-2') == 0
    assert set(begin.values()) == {1e6}
    by_name = {s.name: s for s in stages}
    assert by_name['stacking-4'].parent.name == 'stacking-2'
    assert by_name['distillation-4'].model is None and by_name['distilbert-4'].model
    for name in ('distillation-4', 'distilbert-4'):  # its teacher is part of its cost
        taught, reference = by_name[name], by_name['reference']
        assert taught.objective and sum(taught.before.values()) == 6e6 * reference.params
        teaching = dict(alpha=0.6, temperature=1.0, teacher_params=reference.params)
        assert taught.teaching.items() >= teaching.items()
    assert by_name['random-4'].parent is None and by_name['random-4'].before == {}


def test_baselines_start_from_the_layers_and_parts_they_name(data_dir, tmp_path):
    reference = small(n_layer=8, vocab_size=257, block_size=128, init_std=0.1)
    with torch.no_grad():
        for block in reference.blocks:
            block.norm1.weight.fill_(2.0)
    reference.save(tmp_path / 'reference')
    half = small(n_layer=2, vocab_size=257, block_size=128, init_std=0.2)
    half.save(tmp_path / 'half')
    given = Result('reference', str(tmp_path / 'reference'))

    def start(name, **knobs):
        stages = Inheritune(**knobs).baseline(name, Run(), given, reference.config, 4)
        stage = next(stages)
        if name == 'stacking':
            stage = stages.send(Result('half', str(tmp_path / 'half')))
        return stage.model()

    assert layers_of(start('last-layers'), reference) == [4, 5, 6, 7]
    assert layers_of(start('hybrid-stacking'), reference) == [0, 1, 0, 1]
    assert layers_of(start('distilbert'), reference) == [0, 2, 4, 6]
    assert layers_of(start('stacking'), half) == [0, 1, 0, 1]
    half, whole = start('half-width').wte.weight, reference.wte.weight
    assert torch.equal(half, whole[:, : half.shape[1]]) and 2 * half.shape[1] == whole.shape[1]
    for name in ('attention+norms', 'mlp+norms', 'attention+mlp'):  # Table 3
        block, old = start(name).blocks[1], reference.blocks[1]
        same = dict(attention=block.attn.q.weight.equal(old.attn.q.weight))
        same |= dict(mlp=block.mlp.up.weight.equal(old.mlp.up.weight))
        same |= dict(norms=block.norm1.weight.equal(old.norm1.weight))
        assert [part for part, kept in same.items() if kept] == name.split('+')


def test_every_seed_has_a_reference_and_baselines_of_its_own():
    losses = [1.5, 1.7, 1.4, 1.6, 1.5, 1.3, 1.6]
    stages, blocks = planned(losses, max_n=4, baselines=('random',), seeds=2)
    names = ['reference', '4-layers', 'random-4', 'reference-s1', '4-layers-s1', 'random-4-s1']
    assert [s.name for s in stages] == names and stages[4].parent.name == 'reference-s1'
    assert 'does not match' in blocks[0] and '4-layers-s1 matches' in blocks[1]
    against_reference, against_child = ({r['variant']: r for r in b} for b in blocks[2:4])
    assert against_reference['4-layers']['against reference'] == pytest.approx((0.2 - 0.1) / 2)
    assert against_child['random-4']['against 4-layers'] == pytest.approx((-0.3 - 0.2) / 2)
    assert against_child['random-4']['95% interval'] == '-0.885 to +0.385'


# ----------------------------------------------------------------------------------------------
# plans of the paper's runs


def plan_of(preset, *knobs):
    """{stage: its row of the plan} of a preset, asking no network."""
    run, method, _ = configure([f'config/{preset}.py', *knobs], Run, METHODS)
    return {row.stage.name: row for row in plan(run, method)}


def test_a_plan_grows_to_the_papers_depth_where_the_baselines_are():
    rows = plan_of('inheritune_gpt2_medium')
    children = ['12-layers', '14-layers', '16-layers']
    assert [name for name in rows if name.endswith('layers')] == children
    assert rows['random-16'].stage.config.n_layer == 16
    shape = rows['half-width-24'].stage.config  # Table 10's, with all layers
    assert (shape.n_embd, shape.n_head) == (512, 8)
    assert shape.attn_scale_by_layer and not shape.bias
    spent = rows['16-layers'].result.total_flops
    assert spent == pytest.approx(sum(rows[name].result.flops for name in ['reference', *children]))


def test_a_plan_knows_the_shape_of_a_public_reference():
    large = plan_of('inheritune_gpt2_medium', '--reference=owner/gpt2-large', '--n=20')
    assert large['20-layers'].stage.config.n_embd == 1280
    assert plan_of('inheritune_openllama_7b')['7-layers'].steps == 381_470
    config = plan_of('inheritune_openllama')['13-layers'].stage.config
    assert config.num_params(embedding=True, head=True) == pytest.approx(1.816e9, rel=1e-3)


# ----------------------------------------------------------------------------------------------
# the report and the command


def test_a_run_with_seeds_reports_losses_costs_and_attention(data_dir, tmp_path):
    knobs = ['config/inheritune_tiny.py', '--toy=True', f'--data_dir={data_dir}']
    knobs += ['--seeds=2', '--eval_interval=2', '--baselines=random,half-width']
    train.main([*knobs, f'--out_dir={tmp_path}/run'])
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert 'against 5-layers' in report and 'with all ancestors' in report
    for picture in ('losses.png', 'lazy.png', 'gradients.png'):
        assert (tmp_path / 'run' / picture).stat().st_size > 1000 and picture in report
    lines = (tmp_path / 'run' / '5-layers' / 'metrics.jsonl').read_text().splitlines()
    steps = [line['step'] for line in map(json.loads, lines) if 'attention' in line]
    assert steps == [0, 2, 4]
    seen = json.loads(lines[-1])['attention']
    model = load(tmp_path / 'run' / '5-layers')
    samples = validation_samples(open_corpus('pydocs', data_dir), 8, model)[:, :-1]
    rank = analyse(model, samples)['rank k*, causal attention'].mean(1)
    np.testing.assert_allclose(seen['rank k*, causal attention'], rank)


def test_command_line(data_dir, tmp_path):
    model = GPT(GPTConfig.named('16x3', vocab_size=257, block_size=40, init_std=1.0))
    torch.nn.init.zeros_(model.blocks[2].attn.q.weight)  # it looks at everything alike
    model.save(tmp_path / 'model', 'bytes')
    knobs = [f'--data_dir={data_dir}', f'--out={tmp_path}/attention']
    process = run_command('inheritune.py', tmp_path / 'model', '--samples=6', *knobs)
    assert process.returncode == 0, process.stderr
    assert 'by causal attention: none' in process.stdout
    assert 'by full attention: [3]' in process.stdout
    for name in ('attention.md', 'attention.png', 'attention_maps.png'):
        assert (tmp_path / 'attention' / 'model' / name).stat().st_size > 100
    for knob, layers in (('--n=2', [0, 1]), ('--layers=1,3', [0, 2])):
        child = tmp_path / knob.strip('-')
        process = run_command('inheritune.py', tmp_path / 'model', child, knob)
        assert process.returncode == 0, process.stderr
        assert layers_of(load(child), model) == layers and (child / 'tokenizer.json').is_file()
    for arguments, word in (
        ([], 'usage: inheritune.py FOLDER'),
        ([tmp_path / 'no'], 'config.json'),
        ([tmp_path / 'model', tmp_path / 'child'], 'n_layer must be between'),
        ([tmp_path / 'model', tmp_path / 'child', '--n=4'], 'has no layer 4'),
        ([tmp_path / 'model', tmp_path / 'model', '--n=1'], 'model exists'),
    ):
        process = run_command('inheritune.py', *arguments, f'--data_dir={data_dir}')
        assert process.returncode == 2 and word in process.stderr, process.stderr
        assert process.stderr.count('\n') == 1
