"""
Inheritune: what is inherited from where, and Algorithm 1's control flow.
"""

import dataclasses

import pytest
import torch
from conftest import run_command
from test_model import SHAPES, small, tokens

import inheritune
import train
from data.corpus import open_corpus
from data.loader import validation_batches
from engine.errors import UserError
from engine.loss import evaluate
from engine.stage import Result
from inheritune import (
    BASELINES,
    Comparison,
    Inheritune,
    alternate_layers,
    given_reference,
    half_width,
    inherit,
    inherit_next,
    stacked_layers,
)
from model import GPT, GPTConfig, load
from train import Run, stages_of

# ----------------------------------------------------------------------------------------------
# inheriting


@pytest.mark.parametrize('shape', SHAPES)
def test_inherited_logits_are_those_of_the_truncated_reference(shape):
    reference = small(**SHAPES[shape])
    child = inherit(reference, 2)
    hidden = reference(tokens(), hidden_at=2).hidden
    torch.testing.assert_close(
        child(tokens()).logits, reference.norm(hidden) @ reference.head_weight.T
    )
    assert child.config.n_layer == 2 and {p.dtype for p in child.parameters()} == {torch.float64}


def source_of(tensor, reference):
    """The name of the reference's tensor that this one is a copy of, or None."""
    return next(
        (
            name
            for name, other in reference.state_dict().items()
            if other.shape == tensor.shape and torch.equal(other, tensor)
        ),
        None,
    )


@pytest.mark.parametrize(
    'parts', [('attention',), ('mlp',), ('attention', 'mlp'), ('attention', 'mlp', 'norms')]
)
def test_selected_parts_are_inherited_and_the_others_are_new(parts):
    reference = small(**SHAPES['gpt2'])
    for name, tensor in inherit(reference, 2, parts).state_dict().items():
        part = {'attn': 'attention', 'mlp': 'mlp', 'norm1': 'norms', 'norm2': 'norms'}.get(
            name.split('.')[2] if name.startswith('blocks') else ''
        )
        assert (source_of(tensor, reference) == name) == (part in parts or part is None), name


def test_chosen_layers_come_from_where_they_are_said_to():
    reference = small(n_layer=6)
    child = inherit(reference, 3, layers=[3, 4, 5])
    assert [source_of(child.blocks[i].attn.q.weight, reference) for i in range(3)] == [
        f'blocks.{i}.attn.q.weight' for i in (3, 4, 5)
    ]
    assert alternate_layers(24, 16) == [*range(0, 24, 2), 18, 19, 20, 21] and alternate_layers(
        24, 12
    ) == list(range(0, 24, 2))  # section 4


def test_growing_keeps_the_trained_layers_and_adds_the_references_next():
    reference, trained = small(n_layer=6), small(n_layer=2, init_std=0.1)
    child = inherit_next(reference, trained, 4)
    assert torch.equal(child.wte.weight, trained.wte.weight) and torch.equal(
        child.blocks[1].mlp.up.weight, trained.blocks[1].mlp.up.weight
    )
    assert torch.equal(child.blocks[3].mlp.up.weight, reference.blocks[3].mlp.up.weight)


def test_half_the_width_is_the_first_half_of_everything():
    reference = small(**SHAPES['gpt2'])
    child = half_width(reference)
    assert (child.config.n_embd, child.config.n_head, child.config.n_mlp, child.config.n_layer) == (
        16,
        2,
        20,
        3,
    )
    for name, tensor in child.state_dict().items():
        assert torch.equal(
            tensor, reference.state_dict()[name][tuple(slice(n) for n in tensor.shape)]
        ), name


# ----------------------------------------------------------------------------------------------
# Algorithm 1


def planned(losses, seeds=1, **knobs):
    """The stages when stage i ends with losses[i] (the last one from then on)."""
    made = []

    def pretend(stage):
        made.append(stage)
        loss = losses[min(len(made), len(losses)) - 1]
        return Result(
            labels=stage.labels,
            name=stage.name,
            folder=stage.name,
            n_params=stage.config.num_params(),
            params=stage.params,
            tokens=int(stage.tokens),
            flops=6 * stage.params * stage.tokens,
            before=stage.before,
            val_loss=loss,
            bits_per_byte=loss,
            position=0,
            seconds=0.0,
        )

    method, run = Inheritune(**knobs), Run(block_size=128, data_dir='nowhere', seeds=seeds)
    results = [result for _, result in stages_of(method, run, pretend)]
    return made, method.summary(results)


def test_it_stops_as_soon_as_the_reference_is_matched():
    stages, text = planned([1.5, 1.5])
    assert (
        [s.name for s in stages] == ['reference', '4-layers']
        and '4-layers matches the reference' in text[0]
        and '50% fewer parameters' in text[0]
    )


def test_it_grows_by_two_until_it_matches():
    stages, text = planned([1.5, 1.7, 1.6, 1.4], regrow='continue')
    assert [s.name for s in stages] == ['reference', '4-layers', '6-layers', '8-layers'] and [
        s.origin.models for s in stages
    ][2] == ('4-layers',)
    assert stages[3].parent.name == '6-layers' and sum(stages[3].before.values()) == sum(
        6 * s.params * s.tokens for s in stages[:3]
    )


def test_it_gives_up_at_the_references_size():
    stages, text = planned([1.5, 2.0])
    assert [s.config.n_layer for s in stages] == [8, 4, 6, 8] and 'does not match' in text[0]
    assert len(planned([1.5, 2.0], max_rounds=1)[0]) == 2
    assert planned([1.5, 2.0])[0][2].parent.name == 'reference'  # section 4, step 4


def test_baselines_have_the_papers_budgets():
    stages, _ = planned(
        [1.5, 1.4],
        baselines=(
            'random',
            'random-2x',
            'last-layers',
            'stacking',
            'hybrid-stacking',
            'half-width',
            'distillation',
            'distilbert',
        ),
    )
    by_name = {s.name: s for s in stages}
    assert set(by_name) == {
        'reference',
        '4-layers',
        'random-4',
        'random-2x-4',
        'last-layers-4',
        'stacking-2',
        'stacking-4',
        'hybrid-stacking-4',
        'half-width',
        'distillation-4',
        'distilbert-4',
    }
    assert (
        by_name['random-2x-4'].tokens == 2 * by_name['random-4'].tokens
        and by_name['stacking-4'].parent.name == 'stacking-2'
    )
    assert (
        by_name['distillation-4'].model is None
        and by_name['distillation-4'].objective
        and by_name['distilbert-4'].model
        and by_name['random-4'].parent is None
    )


def test_baselines_start_from_the_layers_they_name(data_dir, tmp_path):
    reference = small(n_layer=8, vocab_size=257, block_size=128)
    reference.save(tmp_path / 'reference')
    small(n_layer=2, vocab_size=257, block_size=128, init_std=0.1).save(tmp_path / 'stacking-2')
    given, found = Result('reference', str(tmp_path / 'reference')), {}
    run = Run(block_size=128, data_dir=str(data_dir))
    compared = Comparison(Inheritune(), run, reference.config, given, 4)
    for name in ('last-layers', 'hybrid-stacking', 'distilbert'):
        model = next(BASELINES[name](compared)).model()
        found[name] = [source_of(block.mlp.up.weight, reference) for block in model.blocks]
    expected = {
        'last-layers': (4, 5, 6, 7),
        'hybrid-stacking': (0, 1, 0, 1),
        'distilbert': (0, 2, 4, 6),
    }
    assert found == {
        name: [f'blocks.{i}.mlp.up.weight' for i in layers] for name, layers in expected.items()
    }
    stages = BASELINES['stacking'](compared)
    next(stages)
    stacked = stages.send(dataclasses.replace(given, folder=str(tmp_path / 'stacking-2'))).model()
    assert (
        torch.equal(stacked.blocks[0].attn.q.weight, stacked.blocks[2].attn.q.weight)
        and stacked.config.n_layer == 4
    )


@pytest.mark.parametrize(
    'knobs, words',
    [
        (dict(size='64x5'), 'half of 5 layers is not a whole number: say how many, --n=2'),
        (dict(n=9), 'n=9: the reference has 8 layers'),
        (dict(reference='nowhere'), 'nowhere is not a folder'),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(knobs, words):
    with pytest.raises(UserError, match=words):
        planned([1.0], **knobs)


def test_a_reference_of_another_vocabulary_is_refused(data_dir, tmp_path):
    import train

    small().save(tmp_path / 'one')
    knobs = ['--method=inheritune', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/run']
    with pytest.raises(UserError, match='has 196 tokens for which the model, of 61, has no'):
        train.main([*knobs, f'--reference={tmp_path}/one'])
    with pytest.raises(UserError, match='4 layers cannot be inherited from a reference of 3'):
        inherit(small(), 4)
    with pytest.raises(UserError, match='is not defined'):
        half_width(small(n_kv_head=2))


def test_a_given_reference_starts_the_children(data_dir, tmp_path):
    import train

    common = [
        f'--data_dir={data_dir}',
        '--block_size=16',
        '--eval_tokens=512',
        '--batch_size=4',
        '--device=cpu',
    ]
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=16)).save(tmp_path / 'public')
    train.main(
        [
            *common,
            f'--out_dir={tmp_path}/run',
            '--method=inheritune',
            f'--reference={tmp_path}/public',
            '--tokens=320',
            '--grow_by=1',
            '--baselines=distillation',
        ]
    )
    assert {p.parent.name for p in (tmp_path / 'run').glob('*/result.json')} == {
        '1-layers',
        'distillation-1',
    }
    assert '1-layers matches the reference' in (tmp_path / 'run' / 'report.md').read_text()


def test_command_line(data_dir, tmp_path):
    GPT(dataclasses.replace(GPTConfig.named('16x2', vocab_size=257), block_size=40)).save(
        tmp_path / 'model'
    )
    process = run_command(
        'inheritune.py',
        tmp_path / 'model',
        f'--data_dir={data_dir}',
        '--samples=6',
        '--length=40',
        f'--out={tmp_path}/attention',
    )
    assert process.returncode == 0 and 'lazy layers' in process.stdout, process.stderr
    assert all(
        (tmp_path / 'attention' / name).stat().st_size > 100
        for name in ('attention.md', 'attention.png', 'attention_maps.png')
    )
    for arguments, word in (
        ([], 'usage: inheritune.py FOLDER'),
        ([tmp_path / 'model', '--length=41'], 'at most 40 tokens'),
        ([tmp_path / 'no'], 'config.json'),
        ([tmp_path / 'model', tmp_path / 'child'], 'which layers?'),
        ([tmp_path / 'model', tmp_path / 'child', '--n=3'], 'from a reference of 2'),
        ([tmp_path / 'model', tmp_path / 'model', '--n=1'], 'model exists'),
    ):
        process = run_command('inheritune.py', *arguments, f'--data_dir={data_dir}')
        assert (
            process.returncode == 2 and word in process.stderr and process.stderr.count('\n') == 1
        ), process.stderr


def test_a_child_is_made_from_the_command_line(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('16x3', vocab_size=257, block_size=40))
    model.save(tmp_path / 'model', 'bytes')
    for knob, layers in (('--n=2', [0, 1]), ('--layers=1,3', [0, 2])):
        child = tmp_path / knob.strip('-')
        process = run_command('inheritune.py', tmp_path / 'model', child, knob)
        assert process.returncode == 0, process.stderr
        made = load(child).state_dict()
        for i, layer in enumerate(layers):
            old = model.state_dict()[f'blocks.{layer}.mlp.up.weight']
            assert torch.equal(made[f'blocks.{i}.mlp.up.weight'], old)
        assert (child / 'tokenizer.json').is_file()


def test_the_loss_to_match_is_measured_as_the_childrens_is(data_dir, tmp_path, monkeypatch):
    """Not the one in its result.json, of whatever context and data it had; and only once."""
    knobs = ['--size=16x2', '--tokens=512', f'--data_dir={data_dir}']
    train.main([*knobs, '--block_size=64', '--eval_tokens=512', f'--out_dir={tmp_path}/run'])
    name = str(tmp_path / 'run' / '16x2')
    how = dict(data_dir=str(data_dir), out_dir=str(tmp_path / 'new'), eval_tokens=256)
    run = Run(block_size=16, **how)
    found = given_reference(name, run)
    model, corpus = load(name), open_corpus('pydocs', data_dir)
    expected = evaluate(model, validation_batches(corpus.val, 16, 8, 256))
    stored = Result.of(name)
    assert found.val_loss == pytest.approx(expected, abs=1e-6) != stored.val_loss
    assert found.flops == stored.flops > 0
    monkeypatch.setattr(inheritune, 'evaluate', None)  # measured already
    assert given_reference(name, run).val_loss == found.val_loss
    with pytest.raises(TypeError):
        given_reference(name, Run(block_size=8, **how))


def test_stacked_layers_are_copied_as_they_are():
    """Also where attention logits are divided by the layer's number, as the paper copies them."""
    model = small(attn_scale_by_layer=True)
    stacked = inherit(model, 6, layers=stacked_layers(3, 6))
    assert torch.equal(stacked.blocks[4].attn.q.weight, model.blocks[1].attn.q.weight)
    assert stacked_layers(2, 5) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize('shape', ['gpt2', 'qwen3'])
def test_copies_can_keep_their_attention_where_the_layers_number_scales_it(shape):
    model = small(
        **SHAPES[shape] | dict(n_layer=6, attn_scale_by_layer=True, init_std=0.2)
    ).double()
    raw = inherit(model, 2, layers=[0, 5])
    kept = inherit(model, 2, layers=[0, 5], rescale=True)
    alone = inherit(model, 6)
    alone.blocks = torch.nn.ModuleList([alone.blocks[0], alone.blocks[5]])
    x = tokens()
    torch.testing.assert_close(kept(x).logits, alone(x).logits, rtol=0, atol=1e-12)
    assert (raw(x).logits - alone(x).logits).abs().max() > 1e-3


def test_a_child_regrows_with_the_parts_it_inherited():
    reference, smaller = small(n_layer=4), small(n_layer=2)
    child = inherit_next(reference, smaller, 4, ('attention',))
    assert torch.equal(child.blocks[3].attn.q.weight, reference.blocks[3].attn.q.weight)
    assert not torch.equal(child.blocks[3].mlp.up.weight, reference.blocks[3].mlp.up.weight)


def test_budgets_of_children_and_of_distilled_ones():
    budgets = dict(tokens=1e6, child_tokens=1e5, distillation_tokens=5e4)
    stages, _ = planned([1.5, 1.4], baselines=('random-2x', 'distillation'), **budgets)
    assert {s.name: s.tokens for s in stages} == {
        'reference': 1e6,
        '4-layers': 1e5,
        'random-2x-4': 2e5,
        'distillation-4': 5e4,
    }


def test_shapes_without_a_baseline_are_refused_before_anything_is_trained():
    with pytest.raises(UserError, match='stacking needs a child of two layers'):
        planned([1.0], size='16x2', baselines=('stacking',))
    with pytest.raises(UserError, match='half the width of 1 heads'):
        planned([1.0], size='16x2', baselines=('half-width',))
    assert alternate_layers(2, 2) == [0, 0] and alternate_layers(24, 16)[-4:] == [18, 19, 20, 21]


def test_every_seed_has_a_reference_and_baselines_of_its_own():
    stages, blocks = planned(
        [1.5, 1.7, 1.4, 1.6, 1.5, 1.3, 1.6], max_rounds=1, baselines=('random',), seeds=2
    )
    assert [(s.name, s.knobs['seed']) for s in stages] == [
        ('reference', 1337),
        ('4-layers', 1337),
        ('random-4', 1337),
        ('reference-s1', 1338),
        ('4-layers-s1', 1338),
        ('random-4-s1', 1338),
    ]
    assert stages[4].parent.name == 'reference-s1'
    assert 'does not match' in blocks[0] and '4-layers-s1 matches' in blocks[1]
    records = {record['variant']: record for record in blocks[2]}
    assert records['4-layers']['against reference'] == pytest.approx((0.2 - 0.1) / 2)
    assert records['random-4']['against 4-layers'] == pytest.approx((-0.3 - 0.2) / 2)
    assert records['random-4']['its 95% interval'] == '-0.885 to +0.385'
    assert records['4-layers']['with all ancestors'] == pytest.approx(
        sum(6 * s.params * s.tokens for s in stages[:2])
    )


def test_children_of_other_depths_are_trained_whether_one_matched_or_not():
    stages, _ = planned([1.5, 1.4], n=3, depths=(2, 3, 6))
    assert [s.name for s in stages] == ['reference', '3-layers', '2-layers', '6-layers']
    stages, _ = planned([1.5, 1.7, 1.7, 1.4], depths=(2, 6, 7))  # 6 was a round
    assert [s.config.n_layer for s in stages] == [8, 4, 6, 8, 2, 7]


def test_sub_modules_are_inherited_alone_and_in_pairs(data_dir, tmp_path):
    """Table 3: the parts that are named, and no other."""
    torch.manual_seed(0)
    reference = small(n_layer=4, init_std=0.1)
    with torch.no_grad():
        for block in reference.blocks:
            block.norm1.weight.fill_(2.0)
    reference.save(tmp_path / 'reference')
    given = Result('reference', str(tmp_path / 'reference'))
    compared = Comparison(Inheritune(), Run(), reference.config, given, 2)
    found = {}
    for stage in BASELINES['sub-modules'](compared):
        block, old = stage.model().blocks[1], reference.blocks[1]
        pairs = dict(attention=(block.attn.q, old.attn.q), mlp=(block.mlp.up, old.mlp.up))
        pairs['norms'] = block.norm1, old.norm1
        kept = [name for name, (ours, theirs) in pairs.items() if ours.weight.equal(theirs.weight)]
        found[stage.name] = kept
    names = ('attention', 'mlp', 'norms', 'attention+mlp', 'attention+norms', 'mlp+norms')
    assert found == {f'{name}-2': name.split('+') for name in names}


def test_a_run_with_seeds_reports_losses_costs_and_lazy_heads(data_dir, tmp_path):
    knobs = ['config/inheritune_tiny.py', '--toy=True', f'--data_dir={data_dir}']
    knobs += ['--seeds=2', '--eval_interval=2', '--baselines=random,half-width', '--depths=2']
    train.main([*knobs, f'--out_dir={tmp_path}/run'])
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert 'against 5-layers' in report and 'its 95% interval' in report
    for picture in ('losses.png', 'lazy.png'):
        assert (tmp_path / 'run' / picture).stat().st_size > 1000 and picture in report
    lines = (tmp_path / 'run' / '5-layers' / 'metrics.jsonl').read_text()
    assert '"attention"' in lines


def test_a_given_reference_is_planned_in_its_own_shape(data_dir, tmp_path):
    """Deeper than the default size: n is a number of its layers, not of the default's."""
    GPT(GPTConfig.named('16x12', vocab_size=257, block_size=16)).save(tmp_path / 'deep', 'bytes')
    knobs = ['--method=inheritune', f'--reference={tmp_path}/deep', '--n=10', '--tokens=64']
    knobs += [f'--data_dir={data_dir}', '--block_size=16', '--eval_tokens=64', '--batch_size=2']
    train.main([*knobs, '--max_rounds=1', '--device=cpu', f'--out_dir={tmp_path}/run'])
    assert load(tmp_path / 'run' / '10-layers').config.n_layer == 10
