"""
Inheritune: how attentive a layer is, what is inherited from where, Algorithm 1's control flow and
costs, the baselines, plans of the paper's runs, and the command.
"""

import numpy as np
import pytest
import torch
from conftest import refuses, succeeds
from test_model import SHAPES, small, tokens
from test_train import plan_of

from data.corpus import open_corpus
from data.loader import validation_batches
from engine.errors import UserError
from engine.log import read_metrics
from engine.loss import evaluate
from engine.stage import Result
from inheritune import (
    Inheritune,
    alternate_layers,
    analyse,
    attention_maps,
    attention_rank,
    column_mass,
    half_width,
    half_width_config,
    inherit,
    inherit_more,
    lazy_layers,
    query_key_norms,
    stacked_layers,
    validation_samples,
)
from model import GPT, GPTConfig, load
from train import Run, stages_of

# ----------------------------------------------------------------------------------------------
# what a lazy layer is


@pytest.mark.parametrize(
    'attention, rank, mass',
    [
        (torch.full((50, 50), 1 / 50), 1, 45),
        (torch.cat((torch.ones(50, 1), torch.zeros(50, 49)), 1), 1, 1),
        (torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), 2, 2),  # (9 + 4) / 14 = 93%
        (torch.ones(100, 100).tril() / torch.arange(1, 101)[:, None], 5, 30),  # uniform, masked
    ],
)
def test_rank_and_mass_of_closed_cases(attention, rank, mass):
    assert attention_rank(attention).item() == rank and column_mass(attention).item() == mass


@pytest.mark.parametrize('shape', ['llama', 'qwen3', 'neox', 'gpt2', 'inheritune'])
def test_maps_are_those_of_transformers(shape, tmp_path):
    transformers = pytest.importorskip('transformers')
    model, x = small(**SHAPES[shape]).float(), tokens(2, 16)
    model.save(tmp_path)
    how = dict(attn_implementation='eager')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    expected = theirs(x, output_attentions=True).attentions
    for found, wanted in zip(attention_maps(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (next(attention_maps(model, x, causal=False)).triu(1) > 0).any()


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


def test_norms_of_queries_and_keys_and_of_their_gradients_are_those_of_a_backward_pass():
    model, x = small(), tokens(3, 20)
    found = query_key_norms(model, x[:, :-1], x[:, 1:])
    model(x[:, :-1], x[:, 1:]).loss.backward()
    for layer, block in enumerate(model.blocks):
        weight = block.attn.k.weight
        assert found['|W_K|'][layer] == pytest.approx(weight.norm().item())
        assert found['|dL/dW_K|'][layer] == pytest.approx(weight.grad.norm().item())


# ----------------------------------------------------------------------------------------------
# inheriting


@pytest.mark.parametrize('shape', SHAPES)
def test_inherited_logits_are_those_of_the_truncated_reference(shape):
    reference = small(**SHAPES[shape])
    child = inherit(reference, 2)
    hidden = reference(tokens(), hidden_at=2).hidden
    expected = reference.norm(hidden) @ reference.head_weight.T
    torch.testing.assert_close(child(tokens()).logits, expected)
    assert child.config.n_layer == 2


def source_of(tensor, reference):
    """The name of the reference's tensor that this one is a copy of, or None."""
    for name, other in reference.state_dict().items():
        if other.shape == tensor.shape and torch.equal(other, tensor):
            return name


def layers_of(model, reference):
    """The layers of the reference that a model's are copies of."""
    names = [source_of(block.mlp.up.weight, reference) for block in model.blocks]
    return [int(name.split('.')[1]) for name in names]


@pytest.mark.parametrize('parts', [('attention',), ('attention', 'norms'), ('attention', 'mlp')])
def test_selected_parts_are_inherited_and_the_others_are_new(parts):
    reference = small(**SHAPES['gpt2'])
    kinds = dict(attn='attention', mlp='mlp', norm1='norms', norm2='norms')
    for name, tensor in inherit(reference, 2, parts).state_dict().items():
        part = kinds[name.split('.')[2]] if name.startswith('blocks') else None
        assert (source_of(tensor, reference) == name) == (part in parts or part is None), name


def test_chosen_layers_come_from_where_they_are_said_to():
    reference = small(n_layer=6)
    assert layers_of(inherit(reference, 3, layers=[3, 4, 5]), reference) == [3, 4, 5]
    assert alternate_layers(24, 16) == [*range(0, 24, 2), 18, 19, 20, 21]  # section 4
    assert alternate_layers(24, 12) == list(range(0, 24, 2)) and alternate_layers(2, 2) == [0, 0]
    assert stacked_layers(9, 5) == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match='a reference of 3 layers has no layer 4'):
        inherit(small(), 4)


def test_half_the_width_is_the_first_half_of_everything():
    reference = small(**SHAPES['gpt2'])
    child, old = half_width(reference), reference.state_dict()
    shape = child.config
    assert (shape.n_embd, shape.n_head, shape.n_mlp, shape.n_layer) == (16, 2, 20, 3)
    for name, tensor in child.state_dict().items():
        assert torch.equal(tensor, old[name][tuple(map(slice, tensor.shape))]), name
    xl = half_width_config(GPTConfig.named('gpt2-xl'))  # 12 of 25 heads, four times their width
    assert (xl.n_head, xl.n_embd, xl.n_mlp) == (12, 768, 3072)


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


# ----------------------------------------------------------------------------------------------
# Algorithm 1


@pytest.fixture
def planned(tmp_path):
    """A function: (stages, report) when stage i ends with losses[i], the last from then on."""

    def plan(losses, seeds=1, **knobs):
        made = []

        def pretend(stage):
            made.append(stage)
            loss, folder = losses[min(len(made), len(losses)) - 1], tmp_path / stage.name
            folder.mkdir(exist_ok=True)
            (folder / 'metrics.jsonl').write_text('{"step": 0}\n')
            found = dict(flops=6 * stage.params * stage.tokens, val_loss=loss, labels=stage.labels)
            found |= dict(tokens=int(stage.tokens), position=int(stage.position + stage.tokens))
            found |= dict(n_params=stage.config.num_params(), params=stage.params)
            return Result(stage.name, str(folder), before=stage.before, **found)

        method, run = Inheritune(**knobs), Run(block_size=128, data_dir='nowhere', seeds=seeds)
        results = [result for _, result in stages_of(method, run, pretend)]
        return made, method.summary(results)

    return plan


def test_it_stops_as_soon_as_the_reference_is_matched(planned):
    stages, blocks = planned([1.5, 1.5])
    assert [stage.name for stage in stages] == ['reference', '4-layers']
    assert blocks[0].startswith('4-layers matches the reference in round 1 (1.5000 against 1.5000)')
    # of the layers half, of the whole less: both have embeddings, positions and the head
    assert '46% fewer parameters, 50% without embeddings and head' in blocks[0]


@pytest.mark.parametrize('regrow', ['restart', 'continue'])
def test_it_grows_by_two_until_it_matches_and_all_rounds_count(planned, regrow):
    stages, blocks = planned([1.5, 1.7, 1.6, 1.4], regrow=regrow)
    assert [stage.name for stage in stages] == ['reference', '4-layers', '6-layers', '8-layers']
    assert 'in round 3' in blocks[0]
    last = stages[-1]
    assert last.parent.name == ('6-layers' if regrow == 'continue' else 'reference')
    assert (getattr(last.model, 'func', None) is inherit_more) == (regrow == 'continue')
    cost = [6 * stage.params * stage.tokens for stage in stages]
    assert sum(last.before.values()) == pytest.approx(sum(cost[:3]))
    assert blocks[1][-1]['with all ancestors'] == pytest.approx(sum(cost))


def test_it_gives_up_at_the_references_size_or_where_it_is_told_to(planned):
    stages, blocks = planned([1.5, 2.0])
    assert [s.config.n_layer for s in stages] == [8, 4, 6, 8] and 'does not match' in blocks[0]
    assert [s.config.n_layer for s in planned([1.5, 2.0], n=3, max_n=3)[0]] == [8, 3]


def test_every_seed_has_a_reference_and_baselines_of_its_own(planned):
    losses = [1.5, 1.7, 1.4, 1.6, 1.5, 1.3, 1.6]
    stages, blocks = planned(losses, max_n=4, baselines=('random',), seeds=2)
    names = ['reference', '4-layers', 'random-4', 'reference-s1', '4-layers-s1', 'random-4-s1']
    assert [s.name for s in stages] == names and stages[4].parent.name == 'reference-s1'
    assert 'does not match' in blocks[0] and '4-layers-s1 matches' in blocks[1]
    against_reference = {record['variant']: record for record in blocks[2]}
    assert against_reference['4-layers']['against reference'] == pytest.approx((0.2 - 0.1) / 2)


def test_a_given_reference_is_measured_as_the_children_are(data_dir, tmp_path):
    """On this run's data and context; its cost, and where its data ended, are known."""
    line = f'train.py --data_dir={data_dir} --out_dir={tmp_path}'
    succeeds(f'{line}/one --size=16x2 --tokens=512 --eval_tokens=512 --block_size=64')
    name = tmp_path / 'one' / '16x2'
    line += f'/run --method=inheritune --reference={name} --tokens=320 --grow_by=1'
    succeeds(f'{line} --block_size=16 --eval_tokens=256 --batch_size=4 --baselines=distillation')
    found, stored = Result.of(tmp_path / 'run' / 'reference'), Result.of(name)
    batches = validation_batches(open_corpus('pydocs', data_dir).val, 16, 8, 256)
    assert found.val_loss == pytest.approx(evaluate(load(name), batches), abs=1e-6)
    assert found.val_loss != stored.val_loss and found.tokens == 0
    assert found.total_flops == stored.flops > 0 and found.position == stored.position
    assert load(tmp_path / 'run' / '1-layers').config.n_layer == 1


# ----------------------------------------------------------------------------------------------
# what the child is compared with

EVERY = 'random random-2x last-layers stacking hybrid-stacking half-width distillation distilbert'


def test_baselines_have_the_papers_budgets_and_read_what_the_child_reads(planned):
    budgets = dict(tokens=1e6, child_tokens=2e5, distillation_tokens=1e5)
    stages, _ = planned([1.5, 1.4], baselines=tuple(EVERY.split()), **budgets)
    tokens = {s.name: s.tokens for s in stages}
    assert tokens.pop('reference') == 1e6 and tokens.pop('random-2x-4') == 4e5
    assert tokens.pop('distillation-4') == tokens.pop('distilbert-4') == 1e5
    names = '4-layers random-4 last-layers-4 stacking-2 stacking-4 hybrid-stacking-4 half-width-8'
    assert list(tokens) == names.split() and set(tokens.values()) == {2e5}
    begin = {s.name: s.position for s in stages}
    assert begin.pop('reference') == begin.pop('random-2x-4') == begin.pop('stacking-2') == 0
    assert set(begin.values()) == {1e6}
    by_name = {s.name: s for s in stages}
    assert by_name['stacking-4'].parent.name == 'stacking-2'
    assert by_name['distillation-4'].model is None and by_name['distilbert-4'].model
    taught, reference = by_name['distillation-4'], by_name['reference']
    assert sum(taught.before.values()) == 6e6 * reference.params  # its teacher's cost
    assert taught.objective and taught.teaching['alpha'] == 0.6
    assert by_name['random-4'].parent is None and by_name['random-4'].before == {}


def test_baselines_start_from_the_layers_and_parts_they_name(tmp_path):
    shape = dict(vocab_size=257, block_size=128)
    reference, half = small(n_layer=8, **shape), small(n_layer=2, init_std=0.1, **shape)
    reference.save(tmp_path / 'reference')
    half.save(tmp_path / 'half')
    given = Result('reference', str(tmp_path / 'reference'))

    def start(name):
        stages = Inheritune().baseline(name, Run(), given, reference.config, 4)
        stage = next(stages)
        if name == 'stacking':
            stage = stages.send(Result('half', str(tmp_path / 'half')))
        return stage.model()

    assert layers_of(start('last-layers'), reference) == [4, 5, 6, 7]
    assert layers_of(start('hybrid-stacking'), reference) == [0, 1, 0, 1]
    assert layers_of(start('distilbert'), reference) == [0, 2, 4, 6]
    assert layers_of(start('stacking'), half) == [0, 1, 0, 1]
    block, old = start('mlp+norms').blocks[1], reference.blocks[1]  # Table 3
    same = [
        torch.equal(getattr(b, a).weight, getattr(o, a).weight)
        for b, o, a in (
            (block.mlp, old.mlp, 'up'),
            (block, old, 'norm1'),
            (block.attn, old.attn, 'q'),
        )
    ]
    assert same == [True, True, False]


# ----------------------------------------------------------------------------------------------
# plans of the paper's runs, the report and the command


def test_a_plan_grows_to_the_papers_depth_where_the_baselines_are():
    rows = plan_of('config/inheritune_gpt2_medium.py')
    children = ['12-layers', '14-layers', '16-layers']
    assert [name for name in rows if name.endswith('layers')] == children
    shape = rows['half-width-24'].stage.config  # Table 10's, with all layers
    assert (shape.n_embd, shape.n_head) == (512, 8)
    assert shape.attn_scale_by_layer and not shape.bias
    spent = rows['16-layers'].result.total_flops
    assert spent == pytest.approx(sum(rows[name].result.flops for name in ['reference', *children]))


def test_a_run_with_seeds_reports_losses_costs_and_attention(data_dir, tmp_path):
    line = f'train.py config/inheritune_tiny.py --toy --data_dir={data_dir} --out_dir={tmp_path}'
    succeeds(f'{line} --seeds=2 --eval_interval=2 --baselines=random,half-width')
    report = (tmp_path / 'report.md').read_text()
    assert 'against 5-layers' in report and 'lazy.png' in report
    lines, model = read_metrics(tmp_path / '5-layers'), load(tmp_path / '5-layers')
    assert [line['step'] for line in lines if 'attention' in line] == [0, 2, 4]
    samples = validation_samples(open_corpus('pydocs', data_dir), 8, model)[:, :-1]
    name = 'rank k*, causal attention'
    expected = analyse(model, samples)[name].mean(1)
    np.testing.assert_allclose(lines[-1]['attention'][name], expected)


def test_command_line(data_dir, tmp_path):
    model = GPT(GPTConfig.named('16x3', vocab_size=257, block_size=40, init_std=1.0))
    torch.nn.init.zeros_(model.blocks[2].attn.q.weight)  # it looks at everything alike
    model.save(tmp_path / 'model', 'bytes')
    line = f'inheritune.py {tmp_path}/model'
    found = succeeds(f'{line} --samples=6 --data_dir={data_dir} --out={tmp_path}/attention')
    assert 'by causal attention: none' in found and 'by full attention: [3]' in found
    assert (tmp_path / 'attention' / 'model' / 'attention_maps.png').stat().st_size > 1000
    for knob, layers in (('n=2', [0, 1]), ('layers=1,3', [0, 2])):
        succeeds(f'{line} {tmp_path}/{knob} --{knob}')
        assert layers_of(load(tmp_path / knob), model) == layers
        assert (tmp_path / knob / 'tokenizer.json').is_file()
    refuses('inheritune.py', 'usage: inheritune.py FOLDER')
    refuses(f'inheritune.py {tmp_path}/no', 'config.json')
    refuses(f'{line} {tmp_path}/child', 'n_layer must be between')
    refuses(f'{line} {tmp_path}/child --n=4', 'has no layer 4')
