"""
Growth: exact where it is said to be, on shapes drawn at random; where what comes from; folders;
and the methods' budgets and stages.
"""

import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, call, refuses, succeeds, write_lines
from test_model import SHAPES, small, tokens

from engine.errors import UserError
from engine.stage import Result, describe
from expand import (
    DEPTH,
    Progressive,
    allocate_tokens,
    check_growth,
    exp,
    grow,
    identity,
    query_heads,
    repeated,
    saved_at_equal_loss,
    stk4,
    widen,
)
from model import GPT, GPTConfig, load
from train import Run, stages_of


def draw(seed):
    """A random model, and a larger shape that it can be grown to: every width by its own ratio."""
    rng = random.Random(seed)
    while True:
        kv, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
        sizes = dict(n_layer=rng.randint(1, 3), n_head=kv * group, n_kv_head=kv, n_mlp=7 + kv)
        sizes |= dict(n_embd=rng.choice([8, 12, 15]), head_dim=rng.choice([4, 8]))
        model = small(**rng.choice([*SHAPES.values()]) | sizes)
        c, new_kv = model.config, rng.choice([kv, kv + 1, 2 * kv, 3 * kv])
        target = replace(
            c,
            n_kv_head=new_kv,
            n_head=new_kv * rng.choice([group, group + 1, 2 * group]),
            n_embd=c.n_embd + rng.randint(0, 2 * c.n_embd),
            n_mlp=c.n_mlp + rng.randint(0, 2 * c.n_mlp),
            n_layer=c.n_layer + rng.randint(0, 3),
            vocab_size=rng.choice([61, 64]),
        )
        try:
            check_growth(c, target, 'lossless', 'identity')
        except UserError:  # some query head would be lost: another draw
            continue
        return model, target


def error(model, grown):
    return (grown(tokens()).logits[..., :61] - model(tokens()).logits).abs().max().item()


def larger(config, **changes):
    """The config at another width of its own ratio, or with other changes."""
    wider = dict(n_embd=48, n_head=6, n_kv_head=6 * config.n_kv_head // 4 or 1, n_mlp=70)
    return replace(config, **wider | changes)


# ----------------------------------------------------------------------------------------------
# width


@pytest.mark.parametrize('noise', [0.0, 0.3])
def test_lossless_and_identity_keep_the_function_for_any_shape(noise):
    for seed in range(100):
        model, target = draw(seed)
        grown = grow(model, target, 'lossless', 'identity', noise, seed)
        assert error(model, grown) < 1e-10, (seed, target)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('width', ['fpi', 'clone'])
@pytest.mark.parametrize('noise', [0.0, 0.3])
def test_whole_copies_keep_the_function(shape, width, noise):
    model = small(**SHAPES[shape])
    sizes = {name: 2 * getattr(model.config, name) for name in ('n_embd', 'n_mlp', 'n_head')}
    target = replace(model.config, n_kv_head=2 * model.config.n_kv_head, **sizes)
    assert error(model, grow(model, target, width, 'identity', noise)) < 1e-10


@pytest.mark.parametrize('norm', ['rms', 'layer'])
def test_plain_duplication_at_a_fraction_is_not_exact(norm):
    """The control: outlier dimensions weigh twice in the norm; that is what `lossless` mends."""
    model = small(norm=norm)
    with torch.no_grad():
        model.wte.weight[:, :2] *= 10
    target = replace(model.config, n_embd=40, head_dim=8)
    assert error(model, grow(model, target, 'fpi')) > 0.05
    assert error(model, grow(model, target, 'lossless')) < 1e-10


def test_queries_of_grouped_heads_as_the_docstring_says():
    shape = small(n_kv_head=1, head_dim=8).config
    found = query_heads(shape, replace(shape, n_head=6, n_kv_head=2))
    assert found.tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize('depth', ['stack', 'bert2bert'])
@pytest.mark.parametrize('width', ['fpi', 'aki'])
def test_fpi_and_aki_are_products_with_copy_matrices(depth, width):
    """
    bert2BERT written otherwise: with E (D x d), whose row j is one where unit j copies, FPI is
    E W pinv(E), and AKI takes the rows beyond d from the layer above, widened by the same
    matrices. Neither scales the norms, or what a tied head reads.
    """
    model = small()
    old, config = model.state_dict(), larger(model.config, n_layer=5)
    found = grow(model, config, width, depth).state_dict()

    def matrix(d, D, group=1):  # of whole heads, where units belong together
        rows = torch.arange(D // group) % (d // group)
        return torch.eye(d // group).double()[rows].kron(torch.eye(group).double())

    units = dict(C=matrix(32, 48), H=matrix(32, 48, 8), M=matrix(40, 70))
    sides = {'attn.q': 'HC', 'attn.k': 'HC', 'attn.v': 'HC', 'attn.o': 'CH'}
    sides |= {'mlp.up': 'MC', 'mlp.gate': 'MC', 'mlp.down': 'CM'}
    for place, source in enumerate(dict(stack=[0, 1, 2, 0, 1], bert2bert=[0, 1, 2, 1, 2])[depth]):
        for name, (out, into) in sides.items():
            rows, columns = units[out], torch.linalg.pinv(units[into])
            wide = rows @ old[f'blocks.{source}.{name}.weight'] @ columns
            above = old.get(f'blocks.{source + 1}.{name}.weight')
            if width == 'aki' and above is not None:
                wide[rows.shape[1] :] = (rows @ above @ columns)[rows.shape[1] :]
            made = found[f'blocks.{place}.{name}.weight']
            torch.testing.assert_close(made, wide, atol=1e-13, rtol=0)


@pytest.mark.parametrize('width', ['fpi', 'lossless', 'clone'])
def test_copies_stay_copies_without_noise_and_part_with_it(width):
    """Copies of a unit have gradients of copies, and any optimizer treats them alike."""
    model, x = small(), tokens()
    target = replace(model.config, n_head=8, n_kv_head=8, n_embd=64, n_mlp=80)
    for noise in (0.0, 0.3):
        big = grow(model, target, width, noise=noise)
        big(x, x.roll(-1, 1)).loss.backward()
        layer = big.blocks[0]
        for grad in (layer.mlp.up.weight.grad, layer.attn.v.weight.grad, big.wte.weight.grad.T):
            assert torch.allclose(*grad.chunk(2), rtol=0, atol=1e-12) == (noise == 0)


# ----------------------------------------------------------------------------------------------
# depth


def test_layer_maps():
    stack, bert2bert, interleave = (DEPTH[name] for name in ('stack', 'bert2bert', 'interleave'))
    assert stack(3, 5) == [0, 1, 2, 0, 1]
    assert bert2bert(2, 7) == [0, 1, 0, 1, 0, 1, 1]
    assert interleave(18, 22) == sorted([*range(18), 2, 6, 11, 15])
    assert repeated(identity(27, 33)) == [5, 10, 16, 21, 27, 32]
    for depth in DEPTH.values():
        for old, new in ((1, 7), (3, 4), (5, 12)):
            assert len(depth(old, new)) == new and {*depth(old, new)} == {*range(old)}


@pytest.mark.parametrize('shape', ['llama', 'neox', 'gpt2'])
def test_identity_layers_are_exact_to_the_bit(shape):
    model = small(**SHAPES[shape])
    deep = grow(model, replace(model.config, n_layer=5), depth='identity')
    assert torch.equal(deep(tokens()).logits, model(tokens()).logits)


# ----------------------------------------------------------------------------------------------
# both


def test_vocabulary_padding_keeps_the_old_logits_and_adds_the_mean():
    model = small()
    padded = grow(model, replace(model.config, vocab_size=64))
    assert error(model, padded) < 1e-12
    torch.testing.assert_close(padded.wte.weight[61:], model.wte.weight.mean(0).expand(3, -1))


def test_noise_depends_on_the_seed_alone():
    model = small()
    target = replace(model.config, n_mlp=80)
    one, two, other = (
        grow(model, target, 'fpi', noise=0.1, seed=seed).blocks[0].mlp.down.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    'changes, width, words',
    [
        (dict(n_embd=16, head_dim=8), 'aki', 'n_embd 32 -> 16'),
        (dict(head_dim=16), 'aki', 'head_dim 8 -> 16'),
        (dict(norm='layer'), 'aki', 'norm rms -> layer'),
        (dict(n_mlp=50), 'clone', 'clone needs whole multiples, not n_mlp 40 -> 50'),
        (dict(n_head=9, n_kv_head=3), 'fpi', 'lose query heads'),  # one keeps 3 of its 4
    ],
)
def test_targets_that_cannot_be_reached_are_refused_by_name(changes, width, words):
    model = small(n_head=8, n_kv_head=2, head_dim=8)
    with pytest.raises(UserError, match=words):
        grow(model, replace(model.config, **changes), width)


def test_an_operator_of_ones_own_is_a_width_and_a_variant(data_dir, tmp_path):
    """The documents' example: registered by a config file, it is known wherever operators are."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    example = re.search(r'```python\n(import torch.*?)```', text, re.DOTALL)[1]
    assert example.strip() in (ROOT / 'config' / 'growth_tiny.py').read_text(encoding='utf-8')
    (tmp_path / 'own.py').write_text(example)
    line = f'train.py {tmp_path}/own.py --toy --data_dir={data_dir} --out_dir={tmp_path}'
    family = succeeds(f'{line}/family --method=progressive --width=half')
    assert '(width half, depth stack, noise 0)' in family
    variants = succeeds(f'{line}/variants --method=growth --widths=half --depths=stack')
    assert '| half+stack' in variants and '| random ' in variants
    assert (tmp_path / 'variants' / 'growth.png').stat().st_size > 5000
    model = small()
    wide = widen(model, larger(model.config), 'half').state_dict()
    old, new = model.blocks[0].attn.q.weight, wide['blocks.0.attn.q.weight']
    assert torch.equal(new[:32, :32], old)
    assert (new[32:].std() / old.std()).item() == pytest.approx(0.5, rel=0.15)


# ----------------------------------------------------------------------------------------------
# on disk


def test_growing_on_the_command_line(tmp_path):
    GPT(GPTConfig.named('32x2', vocab_size=61, block_size=24)).save(tmp_path / 'small')
    small = f'expand.py {tmp_path}/small {tmp_path}'
    succeeds(f'{small}/large --to=48x4 --width=lossless --depth=interleave')
    assert load(tmp_path / 'large').config == GPTConfig.named('48x4', vocab_size=61, block_size=24)
    refuses('expand.py', 'SOURCE TARGET')
    refuses(f'{small}/x --to=16x2', 'n_head 2 -> 1 is smaller')
    refuses(f'expand.py {tmp_path}/no {tmp_path}/x --to=exp', 'config.json')
    for layers in ('1-3', 'two', '1-2,2-1'):
        refuses(f'{small}/x --layers={layers}', 'FIRST-LAST')


def test_slices_of_layers_and_training_the_new_ones_alone(data_dir, tmp_path):
    """Depth up-scaling, and LLaMA-Pro: the expression that expand.py prints freezes the rest."""
    model = GPT(GPTConfig.named('16x3', vocab_size=257, block_size=32))
    model.save(tmp_path / 'small', 'bytes')
    succeeds(f'expand.py {tmp_path}/small {tmp_path}/cut --layers=2-3,1-1')
    cut = load(tmp_path / 'cut').blocks
    for block, source in zip(cut, (1, 2, 0), strict=True):
        assert torch.equal(block.attn.q.weight, model.blocks[source].attn.q.weight)
    printed = succeeds(f'expand.py {tmp_path}/small {tmp_path}/pro --to=16x5')
    (expression,) = re.findall(r"--freeze='(.*)'", printed)
    before = load(tmp_path / 'pro').state_dict()
    line = f'train.py --init_from={tmp_path}/pro --data_dir={data_dir} --block_size=16'
    line += f' --tokens=1280 --eval_tokens=512 --out_dir={tmp_path}'
    frozen = f"{line}/out --freeze='{expression}'"
    assert call(f'{frozen} --max_minutes=1e-9').returncode == 75
    succeeds(frozen)  # goes on with the optimizer of what is trained
    for name, after in load(tmp_path / 'out' / 'pro-continued').state_dict().items():
        new = re.match(r'blocks\.(2|4)\.', name)
        assert torch.equal(after, before[name]) == (new is None), name
    refuses(f'{line}/no --freeze=.', 'leaves nothing to train')


# ----------------------------------------------------------------------------------------------
# the method


def test_shapes_of_model_reuse():
    base = GPTConfig.named('0.1b')
    assert exp(base).n_embd == 880 and stk4(base).n_layer == 60


def test_tokens_of_a_family():
    """Tables 7 and 8; the family costs what its largest member costs."""
    scratch = [20e9, 40e9, 80e9, 160e9]
    assert allocate_tokens([1e9, 2e9, 4e9, 8e9], scratch) == [20e9, 30e9, 60e9, 120e9]
    params, scratch = [3e6, 5e6, 11e6], [6e7, 1e8, 3e8]
    spent = sum(x * t for x, t in zip(params, allocate_tokens(params, scratch)))
    assert spent == pytest.approx(params[-1] * scratch[-1])
    with pytest.raises(UserError, match='nothing is left'):  # sizes too close for the budget
        allocate_tokens([1e9, 1.01e9], [40e9, 20e9])


def planned(schedule='cosine', **knobs):
    """[(stage, result)] of a Progressive run that trains nothing."""

    def pretend(stage):
        found = dict(tokens=int(stage.tokens), flops=6 * stage.params * stage.tokens)
        found['position'] = int(stage.tokens) + (stage.parent.position if stage.parent else 0)
        return Result(stage.name, stage.name, 1, before=stage.before, labels=stage.labels, **found)

    run = Run(data='pydocs', block_size=128, schedule=schedule)
    return list(stages_of(Progressive(**knobs), run, pretend))


def test_stages_of_the_tiny_family():
    stages = planned(compare='independent')
    names = '32x2 48x2 64x2 64x4 independent-48x2 independent-64x2 independent-64x4'
    assert [stage.name for stage, _ in stages] == names.split()
    assert [describe(stage) for stage, _ in stages][::3][:2] == [
        '2 layers of width 32, random initialisation',
        '4 layers of width 64, growth of 64x2 (width aki, depth stack, noise 0)',
    ]
    largest, alone = stages[3][1], stages[6][1]
    assert largest.total_flops == pytest.approx(alone.flops)
    assert largest.baseline_flops > 1.2 * largest.total_flops
    read = sum(result.tokens for _, result in stages[:3])
    assert stages[3][0].parent.position == read  # the data goes on from size to size


def test_under_wsd_a_family_grows_from_a_trunk_and_every_member_is_a_branch():
    sizes, stages = ('32x2', '48x2', '64x2', '64x4'), planned(schedule='wsd')
    names = [stage.name for stage, _ in stages]
    assert names == ['32x2-trunk', '32x2', '48x2-trunk', '48x2', '64x2-trunk', '64x2', '64x4']
    found = {stage.name: (stage, result) for stage, result in stages}
    for size, before in zip(sizes, (None, *sizes)):
        stage, result = found[size]
        if size != '64x4':  # from which nothing grows
            assert stage.parent.name == f'{size}-trunk' and stage.knobs['decay_fraction'] == 1
            stage, trunk = found[f'{size}-trunk']
            assert stage.knobs['schedule'] == 'constant'
            assert result.tokens == pytest.approx(0.1 * (result.tokens + trunk.tokens), rel=0.02)
        if before:
            assert stage.parent.name == f'{before}-trunk'
    spent = sum(result.flops for _, result in stages)  # Eq. 4 counts the branches, too
    assert found['64x4'][1].total_flops == spent
    assert spent == pytest.approx(planned()[-1][1].total_flops, rel=1e-3)


def test_a_trunk_is_compared_with_the_better_of_two_schedules(tmp_path):
    """Paired by seed; the schedule with the lower mean, not whichever was lucky."""

    def result(loss, seed, **labels):
        labels = dict(size='a', seed=seed) | labels
        return curve(tmp_path / f'{loss}-{seed}', [9.0, loss], labels, val_loss=loss)

    results = [result(1.0, 0), result(1.2, 1), result(7.0, 0, trunk=True)]
    results += [result(1.1, 0, independent='wsd'), result(1.5, 1, independent='wsd')]
    results += [result(1.2, 0, independent='cosine'), result(1.3, 1, independent='cosine')]
    ((record,),) = Progressive().summary(results)
    assert record['schedule'] == 'cosine' and record['val loss'] == pytest.approx(1.1)
    assert record['against alone'] == pytest.approx(-0.15)


def curve(folder, losses, labels, **more):
    """A Result with a training curve of ten FLOPs a step."""
    folder.mkdir()
    lines = [dict(step=i, flops=10.0 * (i + 1), loss=loss) for i, loss in enumerate(losses)]
    write_lines(folder / 'metrics.jsonl', lines)
    return Result(folder.name, str(folder), labels=labels, flops=10.0 * len(losses), **more)


def test_the_compute_saved_at_equal_loss_is_read_from_the_curves(tmp_path):
    alone = dict(size='b', independent='cosine', baseline_flops=200.0)
    alone = curve(tmp_path / 'alone', [5.0, 4.0, 3.0, 2.5], alone, val_loss=2.5)
    how = dict(labels=dict(baseline_flops=200.0), before={'a': 60.0})
    member = curve(tmp_path / 'b', [4.0, 3.0, 2.0, 1.0], val_loss=1.0, **how)
    # between its second and third line
    assert saved_at_equal_loss(member, alone) == pytest.approx(1 - (60 + 25) / 200)
    worse = curve(tmp_path / 'worse', [4.0, 3.0, 2.0, 1.0], val_loss=2.6, **how)
    assert saved_at_equal_loss(worse, alone) is None


def test_shares_and_budgets():
    """Shares are of the tokens from scratch; the largest gets what a budget leaves."""
    shares = [1, 0.5, 0.25, 2]
    scratch = [stage.tokens for stage, _ in planned(compare='independent')[4:]]
    found = [stage.tokens for stage, _ in planned(shares=shares)]
    assert found[1:] == pytest.approx([share * t for share, t in zip(shares[1:], scratch)])
    stages = planned(shares=(1, 1, 0.95), budget=0.6, schedule='wsd')
    spent = sum(result.flops for _, result in stages)
    assert spent == pytest.approx(0.6 * stages[-1][1].baseline_flops, rel=1e-5)
    with pytest.raises(UserError, match='shares has 2 values for 4 sizes'):
        planned(shares=(1.0, 0.5))
    with pytest.raises(UserError, match='leaves nothing'):
        planned(shares=(1, 1, 0.95), budget=0.1)
