"""Growth of models and of folders; and the methods' budgets and stages."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command
from test_model import SHAPES, small, tokens

import expand
import train
from data.corpus import open_corpus
from data.loader import validation_batches
from engine.errors import UserError
from engine.loss import evaluate
from engine.stage import Result, describe
from expand import (
    Progressive,
    allocate_tokens,
    deepen,
    grow,
    saved_at_equal_loss,
    widen,
)
from model import GPT, GPTConfig, load
from train import Run, stages_of


def grown(model, **changes):
    return dataclasses.replace(model.config, **changes)


def double_width(config):
    return dataclasses.replace(
        config,
        n_head=2 * config.n_head,
        n_kv_head=2 * config.n_kv_head,
        n_embd=2 * config.n_embd,
        n_mlp=2 * config.n_mlp,
    )


# ----------------------------------------------------------------------------------------------
# width


@pytest.mark.parametrize(
    'old, new',
    [
        ((4, 2), (8, 2)),
        ((4, 2), (6, 3)),
        ((4, 2), (8, 4)),
        ((4, 1), (5, 1)),
        ((4, 2), (12, 4)),
        ((4, 4), (8, 4)),
    ],
)
def test_grouped_queries_keep_the_function(old, new):
    model = small(n_head=old[0], n_kv_head=old[1], head_dim=8)
    wide = widen(model, grown(model, n_head=new[0], n_kv_head=new[1]), 'fpi')
    torch.testing.assert_close(wide(tokens()).logits, model(tokens()).logits, atol=1e-10, rtol=0)


def test_queries_of_grouped_heads_as_the_docstring_says():
    shapes = (small(n_head=4, n_kv_head=kv, head_dim=8).config for kv in (2, 1))
    for shape, kv, heads in zip(shapes, (3, 2), ([0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1])):
        large = dataclasses.replace(shape, n_head=6, n_kv_head=kv)
        assert expand.query_heads(shape, large).tolist() == heads


@pytest.mark.parametrize('shape', ['llama', 'gpt2'])
@pytest.mark.parametrize('depth', ['stack', 'bert2bert'])
@pytest.mark.parametrize('width', ['fpi', 'aki'])
def test_fpi_and_aki_are_products_with_copy_matrices(shape, depth, width):
    """
    bert2BERT written otherwise: with E (D x d), whose row j is one where unit j copies, FPI is
    E W pinv(E), and AKI takes the rows beyond d from the layer above, widened by the same
    matrices. Neither scales the norms, or what a tied head reads.
    """
    model = small(**SHAPES[shape])
    old, config = model.state_dict(), grown(model, n_embd=48, n_head=6, n_kv_head=6, n_mlp=70)
    config = dataclasses.replace(config, n_layer=5)
    found = grow(model, config, width, depth).state_dict()

    def matrix(d, D, group=1):  # of whole heads, where units belong together
        rows = torch.arange(D // group) % (d // group)
        return torch.eye(d // group).double()[rows].kron(torch.eye(group).double())

    stream, heads, mlp = matrix(32, 48), matrix(32, 48, 8), matrix(40, 70)
    sides = {'q': (heads, stream), 'k': (heads, stream), 'v': (heads, stream)}
    sides |= {'o': (stream, heads), 'up': (mlp, stream), 'gate': (mlp, stream)}
    sides['down'] = stream, mlp
    layers = dict(stack=[0, 1, 2, 0, 1], bert2bert=[0, 1, 2, 1, 2])[depth]
    compared = 0
    for name in found:
        match = re.match(r'blocks\.(\d)\.(?:attn|mlp)\.(\w+)\.weight', name)
        place, kind = match.groups() if match else (None, None)
        if kind in sides:
            out, into = sides[kind]
            stem, source = name[name.index('.', 8) :], layers[int(place)]
            wide = out @ old[f'blocks.{source}{stem}'] @ torch.linalg.pinv(into)
            above = old.get(f'blocks.{source + 1}{stem}')
            if width == 'aki' and above is not None:
                wide[out.shape[1] :] = (out @ above @ torch.linalg.pinv(into))[out.shape[1] :]
            torch.testing.assert_close(found[name], wide, atol=1e-13, rtol=0)
            compared += 1
    assert compared == 5 * (len(sides) - (shape == 'gpt2'))


# ----------------------------------------------------------------------------------------------
# depth


def test_copied_layers_share_no_memory():
    deep = deepen(small(qk_norm=True), 6, 'stack')
    pointers = [p.data_ptr() for p in deep.parameters()]
    assert len(set(pointers)) == len(pointers)


# ----------------------------------------------------------------------------------------------
# both


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(n_embd=16, head_dim=8), 'n_embd 32 -> 16'),
        (dict(n_layer=2), 'n_layer 3 -> 2'),
        (dict(head_dim=16), 'head_dim 8 -> 16'),
        (dict(norm='layer'), 'norm rms -> layer'),
        (dict(vocab_size=60), 'vocab_size 61 -> 60'),
        (dict(tied=True), 'tied False -> True'),
    ],
)
def test_targets_that_cannot_be_reached_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        grow(small(), grown(small(), **changes))


def test_a_query_head_is_never_lost():
    model = small(n_head=8, n_kv_head=2, head_dim=8)
    with pytest.raises(
        UserError, match='lose query heads'
    ):  # the second group would keep 3 of its 4 queries
        widen(model, grown(model, n_head=9, n_kv_head=3), 'fpi')


def test_an_operator_of_ones_own_is_a_width_and_a_variant(data_dir, tmp_path):
    """The documents' example: registered by a config file, it is known wherever operators are."""
    text = (ROOT / 'docs' / 'progressive.md').read_text(encoding='utf-8')
    (example,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert example.strip() in (ROOT / 'config' / 'growth_tiny.py').read_text(encoding='utf-8')
    (tmp_path / 'own.py').write_text(example)
    common = f'--data_dir={data_dir}', '--toy=True', '--device=cpu'
    family = run_command(
        'train.py',
        tmp_path / 'own.py',
        '--method=progressive',
        '--width=half',
        f'--out_dir={tmp_path}/family',
        *common,
    )
    assert '(width half, depth stack, noise 0)' in family.stdout, family.stderr
    variants = run_command(
        'train.py',
        tmp_path / 'own.py',
        '--method=growth',
        '--widths=half',
        '--depths=stack',
        f'--out_dir={tmp_path}/variants',
        *common,
    )
    assert '| half+stack' in variants.stdout, variants.stderr
    exec(example, {})
    model = small()
    wide = widen(model, double_width(model.config), 'half')
    for name, old in model.state_dict().items():
        if old.ndim == 2 and name.startswith('blocks'):
            new = wide.state_dict()[name]
            assert torch.equal(new[: old.shape[0], : old.shape[1]], old)
            assert (new[old.shape[0] :].std() / old.std()).item() == pytest.approx(0.5, rel=0.15)


# ----------------------------------------------------------------------------------------------
# on disk


@pytest.mark.parametrize('shape', ['llama', 'grouped', 'one key head', 'gpt2', 'inheritune'])
def test_grown_models_open_in_transformers_with_the_same_logits(tmp_path, shape):
    transformers = pytest.importorskip('transformers')
    model = small(**SHAPES[shape]).float()
    model.save(tmp_path / 'small')
    target = dataclasses.replace(
        model.config,
        n_embd=48,
        n_head=6,
        n_kv_head=6 * model.config.n_kv_head // 4 or 1,
        n_mlp=70,
        n_layer=4,
    )
    grow(load(tmp_path / 'small'), target, noise=0.1).save(tmp_path / 'large')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'large', dtype=torch.float32
    ).eval()
    x = tokens()
    torch.testing.assert_close(
        theirs(x).logits, load(tmp_path / 'large')(x).logits, atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        theirs(x).logits, model(x).logits, atol=2e-4, rtol=0
    )  # lossless, in float32


def test_growing_on_the_command_line(tmp_path):
    GPT(GPTConfig.named('32x2', vocab_size=61, block_size=24)).save(tmp_path / 'small')
    process = run_command(
        'expand.py',
        tmp_path / 'small',
        tmp_path / 'large',
        '--to=48x4',
        '--width=lossless',
        '--depth=interleave',
    )
    assert process.returncode == 0 and load(tmp_path / 'large').config == GPTConfig.named(
        '48x4', vocab_size=61, block_size=24
    ), process.stderr
    for arguments, word in (
        ([], 'SOURCE TARGET'),
        ([tmp_path / 'small', tmp_path / 'x', '--to=16x2'], 'n_head 2 -> 1 is smaller'),
        ([tmp_path / 'no', tmp_path / 'x', '--to=exp'], 'config.json'),
        ([tmp_path / 'small', tmp_path / 'x', '--layers=1-3'], '--layers=1-3: FIRST-LAST'),
        ([tmp_path / 'small', tmp_path / 'x', '--layers=two'], '--layers=two: FIRST-LAST'),
        ([tmp_path / 'small', tmp_path / 'x', '--layers=1-2,2-1'], 'FIRST-LAST'),
        ([tmp_path / 'small', tmp_path / 'x', '--to=160000x160'], 'allocate memory'),
    ):
        process = run_command('expand.py', *arguments)
        assert (
            process.returncode == 2 and word in process.stderr and process.stderr.count('\n') == 1
        ), process.stderr


def test_slices_of_layers_and_training_the_new_ones_alone(data_dir, tmp_path):
    """Depth up-scaling, and LLaMA-Pro: the expression that expand.py prints freezes the rest."""
    model = GPT(GPTConfig.named('16x3', vocab_size=257, block_size=32))
    model.save(tmp_path / 'small', 'bytes')
    small, cut, pro = (str(tmp_path / name) for name in ('small', 'cut', 'pro'))
    assert run_command('expand.py', small, cut, '--layers=2-3,1-1').returncode == 0
    state, old = load(cut).state_dict(), model.state_dict()
    assert load(cut).config.n_layer == 3
    for place, source in enumerate((1, 2, 0)):
        name = 'blocks.{}.attn.q.weight'
        assert torch.equal(state[name.format(place)], old[name.format(source)])
    process = run_command('expand.py', small, pro, '--to=16x5')
    (expression,) = re.findall(r"--freeze='(.*)'", process.stdout)
    before, out = load(pro).state_dict(), tmp_path / 'out'
    how = ['train.py', f'--init_from={pro}', f'--freeze={expression}', f'--data_dir={data_dir}']
    how += ['--block_size=16', '--tokens=1280', '--eval_tokens=512', f'--out_dir={out}']
    stopped = run_command(*how, '--max_minutes=1e-9')
    assert stopped.returncode == 75, stopped.stderr
    assert run_command(*how).returncode == 0  # goes on with the optimizer of what is trained
    for name, after in load(out / 'pro-continued').state_dict().items():
        new = re.match(r'blocks\.(2|4)\.', name)
        assert torch.equal(after, before[name]) == (new is None), name
    for freeze, word in (('.', 'leaves nothing to train'), ('(', 'freeze=(: ')):
        failed = run_command(*how, f'--freeze={freeze}', f'--out_dir={tmp_path}/no{freeze}')
        assert failed.returncode == 2 and word in failed.stderr and failed.stderr.count('\n') == 1


# ----------------------------------------------------------------------------------------------
# the method


@pytest.mark.parametrize('factor', [1, 2])
def test_token_allocation_gives_the_papers_tables(factor):
    scratch = [factor * t for t in (20e9, 40e9, 80e9, 160e9)]
    assert allocate_tokens([1e9, 2e9, 4e9, 8e9], scratch) == [
        factor * t for t in (20e9, 30e9, 60e9, 120e9)
    ]  # Tables 7 and 8


def test_the_family_costs_what_its_largest_member_costs():
    params, scratch = [3e6, 5e6, 11e6], [6e7, 1e8, 3e8]
    assert sum(x * t for x, t in zip(params, allocate_tokens(params, scratch))) == pytest.approx(
        params[-1] * scratch[-1]
    )


def test_sizes_too_close_for_the_budget_are_refused():
    with pytest.raises(UserError, match='nothing is left'):
        allocate_tokens([1e9, 1.01e9], [40e9, 20e9])


def planned(schedule='cosine', **knobs):
    """The stages of a Progressive run that trains nothing."""

    def pretend(stage):
        found = dict(tokens=int(stage.tokens), flops=6 * stage.params * stage.tokens)
        found['position'] = int(stage.tokens) + (stage.parent.position if stage.parent else 0)
        return Result(stage.name, stage.name, 1, before=stage.before, labels=stage.labels, **found)

    run = Run(data='pydocs', block_size=128, schedule=schedule)
    return list(stages_of(Progressive(**knobs), run, pretend))


def test_under_wsd_a_family_grows_from_a_trunk_and_every_member_is_a_branch():
    sizes = ('32x2', '48x2', '64x2', '64x4')
    stages = planned(schedule='wsd')
    names = [stage.name for stage, _ in stages]
    assert names == ['32x2-trunk', '32x2', '48x2-trunk', '48x2', '64x2-trunk', '64x2', '64x4']
    found = {stage.name: (stage, result) for stage, result in stages}
    for size, before in zip(sizes, (None, *sizes)):
        stage, result = found[size]
        if size != '64x4':  # from which nothing grows
            assert stage.parent.name == f'{size}-trunk' and stage.knobs['decay_fraction'] == 1
            stage, trunk = found[f'{size}-trunk']
            assert stage.knobs['schedule'] == 'constant' and not trunk.baseline_flops
            assert result.tokens == pytest.approx(0.1 * (result.tokens + trunk.tokens), rel=0.02)
        if before:
            assert stage.parent.name == f'{before}-trunk'
    members = [found[size][1] for size in sizes]  # Eq. 4 counts the branches, too
    spent = sum(result.flops for _, result in stages)
    assert members[-1].total_flops == spent and members[1].total_flops == sum(
        found[name][1].flops for name in names[:4]
    )
    assert members[-1].total_flops == pytest.approx(planned()[-1][1].total_flops, rel=1e-3)
    for schedule in ('cosine', 'wsd'):
        last = planned(schedule='wsd', last_schedule=schedule)[-1][0]
        assert last.name == '64x4' and last.knobs['schedule'] == schedule


def test_a_trunk_is_compared_with_the_better_of_two_schedules(tmp_path):
    """Paired by seed; the schedule with the lower mean, not whichever was lucky."""
    how = dict(schedule='wsd', compare='independent', shares=(1, 1, 1, 0.5))
    names = [stage.name for stage, _ in planned(**how)[7:]]
    assert names[:2] == ['independent-32x2-wsd', 'independent-48x2-wsd'] and len(names) == 8
    assert names[-1] == 'independent-64x4-cosine'

    def result(loss, seed, **labels):
        labels = dict(size='a', seed=seed) | labels
        return curve(tmp_path / f'{loss}-{seed}', [9.0, loss], labels, val_loss=loss)

    results = [result(1.0, 0), result(1.2, 1), result(7.0, 0, trunk=True)]
    results += [result(1.1, 0, independent='wsd'), result(1.5, 1, independent='wsd')]
    results += [result(1.2, 0, independent='cosine'), result(1.3, 1, independent='cosine')]
    ((record,),) = Progressive().summary(results)
    assert record['schedule'] == 'cosine' and record['val loss'] == pytest.approx(1.1)
    assert record['against alone'] == pytest.approx(-0.15)
    half = 12.706 * 0.05
    assert record['95% interval'] == f'{-0.15 - half:+.3f} to {-0.15 + half:+.3f}'


def curve(folder, losses, labels, **more):
    """A Result with a training curve of ten FLOPs a step."""
    folder.mkdir()
    lines = [dict(step=i, flops=10.0 * (i + 1), loss=loss) for i, loss in enumerate(losses)]
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    return Result(folder.name, str(folder), labels=labels, flops=10.0 * len(losses), **more)


def test_the_compute_saved_at_equal_loss_is_read_from_the_curves(tmp_path):
    alone = dict(size='b', independent='cosine', baseline_flops=200.0)
    alone = curve(tmp_path / 'alone', [5.0, 4.0, 3.0, 2.5], alone, val_loss=2.5)
    how = dict(labels=dict(baseline_flops=200.0), before={'a': 60.0})
    member = curve(tmp_path / 'b', [4.0, 3.0, 2.0, 1.0], val_loss=1.0, **how)
    # between its second and third line
    assert saved_at_equal_loss(member, alone) == pytest.approx(1 - (60 + 25) / 200)
    noisy = curve(tmp_path / 'noisy', [4.0, 2.0, 3.0, 2.0], val_loss=1.0, **how)  # for good
    assert saved_at_equal_loss(noisy, alone) == pytest.approx(1 - (60 + 35) / 200)
    worse = curve(tmp_path / 'worse', [4.0, 3.0, 2.0, 1.0], val_loss=2.6, **how)
    assert saved_at_equal_loss(worse, alone) is None


def test_shares_are_of_the_tokens_from_scratch():
    shares = [1, 0.5, 0.25, 2]
    scratch = [stage.tokens for stage, _ in planned(compare='independent')[4:]]
    found = [stage.tokens for stage, _ in planned(shares=shares)]
    assert found[1:] == pytest.approx([share * t for share, t in zip(shares[1:], scratch)])
    with pytest.raises(UserError, match='shares has 2 values for 4 sizes'):
        planned(shares=(1.0, 0.5))


def test_the_largest_gets_what_a_budget_leaves():
    stages = planned(shares=(1, 1, 0.95), budget=0.6, schedule='wsd')
    spent = sum(result.flops for _, result in stages)
    assert spent == pytest.approx(0.6 * stages[-1][1].baseline_flops, rel=1e-5)
    (_, last), total = planned(budget=0.9)[-1], stages[-1][1].baseline_flops
    assert last.total_flops == pytest.approx(0.9 * total, rel=1e-5)  # the smaller ones: whole
    with pytest.raises(UserError, match='leaves nothing'):
        planned(shares=(1, 1, 0.95), budget=0.1)
    with pytest.raises(UserError, match='shares has 4 values'):
        planned(shares=(1, 1, 1, 1), budget=0.6)


def test_stages_of_the_tiny_family():
    stages = planned(compare='independent')
    assert [s.name for s, _ in stages] == [
        '32x2',
        '48x2',
        '64x2',
        '64x4',
        'independent-48x2',
        'independent-64x2',
        'independent-64x4',
    ]
    assert [describe(s) for s, _ in stages][:4] == [
        '2 layers of width 32, random initialisation',
        '2 layers of width 48, growth of 32x2 (width aki, depth stack, noise 0)',
        '2 layers of width 64, growth of 48x2 (width aki, depth stack, noise 0)',
        '4 layers of width 64, growth of 64x2 (width aki, depth stack, noise 0)',
    ]
    largest, alone = stages[3][1], stages[6][1]
    assert (
        largest.total_flops == pytest.approx(alone.flops)
        and largest.baseline_flops > 1.2 * largest.total_flops
    )
    assert stages[3][0].parent.position == sum(
        r.tokens for _, r in stages[:3]
    )  # the data goes on from size to size


@pytest.mark.parametrize(
    'knobs, words',
    [
        (dict(sizes=('64x4', '32x2')), 'n_layer 4 -> 2 is smaller'),
        (dict(sizes=()), 'sizes is empty'),
        (dict(batch_sizes=(1, 2)), 'batch_sizes has 2 values for 4 sizes'),
        (dict(width='fpj'), 'did you mean fpi'),
        (dict(depth='stuck'), 'did you mean stack'),
        (dict(sizes=('32x2', 'gpt2')), 'cannot grow'),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(knobs, words):
    with pytest.raises(UserError, match=words):
        planned(**knobs)


def test_sizes_relative_to_the_one_before():
    stages = planned(sizes=('32x2', 'exp', 'stk2'), width='fpi')
    assert [s.name for s, _ in stages] == ['32x2', '32x2-exp', '32x2-exp-stk2']
    exp, stk2 = stages[1][0].config, stages[2][0].config
    assert (exp.n_embd, exp.n_head, exp.n_mlp, exp.n_layer) == (48, 3, 132, 2) and (
        stk2.n_embd,
        stk2.n_layer,
    ) == (48, 4)
    width = GPTConfig.named('0.1b')
    assert expand.exp(width).n_embd == 880 and expand.stk4(width).n_layer == 60


def test_the_random_control_inherits_nothing_on_the_same_tokens():
    grown, control = planned(), planned(width='random')
    assert [s.tokens for s, _ in grown] == [s.tokens for s, _ in control]
    assert all(s.parent is None and s.model is None for s, _ in control)


def test_comparison_of_operators_ranks_them(data_dir, tmp_path, capsys):
    train.main(
        [
            f'--data_dir={data_dir}',
            f'--out_dir={tmp_path}',
            '--method=growth',
            '--base=16x2',
            '--target=32x4',
            '--base_tokens=640',
            '--tokens=320',
            '--seeds=2',
            '--widths=fpi',
            '--depths=stack,identity',
            '--against=fpi+stack',
            '--block_size=16',
            '--batch_size=4',
            '--eval_tokens=512',
            '--device=cpu',
        ]
    )
    text = capsys.readouterr().out.split('against fpi+stack')[1]
    ranked = {line.split('|')[1].strip() for line in text.splitlines()[2:5]}
    assert ranked == {'random', 'fpi+stack', 'fpi+identity'}
    assert len(list(tmp_path.glob('*/result.json'))) == 8
    assert (tmp_path / 'growth.png').stat().st_size > 5000


def test_a_trained_base_grows_by_every_operator(data_dir, tmp_path, capsys):
    """A base that exists: its shape, its tokenizer, and a curve from step 0 for every variant."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=48, head_dim=24, n_mlp=60)
    base = GPT(GPTConfig(**shape, vocab_size=257, block_size=32, tied=True))
    base.save(tmp_path / 'base', 'bytes')
    knobs = [
        '--method=growth',
        f'--base_model={tmp_path}/base',
        '--target=96x3',
        '--tokens=640',
        '--seeds=1',
        '--block_size=16',
        '--batch_size=4',
        '--eval_tokens=512',
        '--eval_interval=4',
        '--learning_rate=1e-4',
        f'--data_dir={data_dir}',
    ]
    train.main([*knobs, f'--out_dir={tmp_path}/run'])
    text = capsys.readouterr().out
    assert 'at step 0' in text and (tmp_path / 'run' / 'growth.png').stat().st_size > 5000
    found = Result.of(tmp_path / 'run' / 'lossless+identity')
    grown = load(found.folder)
    assert grown.config.n_embd == 96 and grown.config.n_head == 4 and grown.config.head_dim == 24
    first = json.loads((Path(found.folder) / 'metrics.jsonl').read_text().splitlines()[0])
    batches = validation_batches(open_corpus('pydocs', data_dir).val, 16, 8, 512)
    assert first['val_loss'] == pytest.approx(evaluate(load(tmp_path / 'base'), batches), abs=1e-6)
