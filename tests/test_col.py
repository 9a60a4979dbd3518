"""Chain-of-Learngene: LInit at its ends and in between, the method, and mistakes in words."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, train_tokenizer, write_corpus
from test_train import metrics

import col
import train
from col import between, default_alpha, earlier_learngene, linit, neighbours, shape_of_size, subset
from engine.errors import UserError
from engine.stage import Result
from expand import grow
from extras.chain_report import speed_up
from model import GPT, GPTConfig, load

FAMILIES = {  # small shapes of the chains' architectures
    'gpt2': dict(norm='layer', act='gelu', pos='learned', bias=True, tied=True),
    'pythia': dict(norm='layer', act='gelu_exact', rotary_fraction=0.5, parallel=True, bias=True),
    'llama': {},
    'qwen3': dict(qk_norm=True, tied=True),
}


def shaped(family, heads, layers, kv=None, seed=0):
    kv = kv or (2 if family == 'qwen3' else heads)
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            n_layer=layers,
            n_head=heads,
            n_kv_head=kv,
            n_embd=6 * heads,
            head_dim=8 if family in ('qwen3', 'pythia') else 6,
            n_mlp=10 * heads,
            vocab_size=31,
            block_size=16,
            init_std=0.2,
            **FAMILIES[family],
        )
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_linit_at_its_ends_and_in_between(family):
    small, large = shaped(family, 4, 3), shaped(family, 8, 6, seed=1)
    config = replace(
        small.config,
        n_layer=5,
        n_head=6,
        n_kv_head=2 if family == 'qwen3' else 6,
        n_embd=36,
        n_mlp=50,
    )
    expanded, cut = grow(small, config, 'fpi', 'bert2bert'), subset(large, config)
    assert same(linit(small, large, config, 1.0), expanded) and same(
        linit(small, large, config, 0.0), cut
    )
    for name, tensor in linit(small, large, config, 0.3).state_dict().items():
        torch.testing.assert_close(
            tensor, 0.3 * expanded.state_dict()[name] + 0.7 * cut.state_dict()[name]
        )
    assert same(linit(small, large, small.config), small) and same(
        linit(small, large, large.config), large
    )
    x = torch.randint(31, (2, 10))
    assert linit(small, large, config)(x).logits.isfinite().all()


@pytest.mark.parametrize('family', FAMILIES)
def test_below_the_chain_a_model_is_a_part_of_the_smallest(family):
    small, large = shaped(family, 6, 3), shaped(family, 8, 6, seed=1)
    kv = 2 if family == 'qwen3' else 4
    config = replace(small.config, n_layer=2, n_head=4, n_kv_head=kv, n_embd=24, n_mlp=40)
    shapes = {'small': small.config, 'large': large.config}
    assert between(shapes, config) == ('small', 'small', config)
    assert same(linit(small, small, config, 0.7), subset(small, config))
    with pytest.raises(UserError, match='outside the chain'):  # wider than one, flatter than both
        between(shapes, replace(config, n_embd=42))


def test_a_subset_keeps_first_layers_heads_and_dimensions():
    large = shaped('qwen3', 8, 4)  # 4 queries a key head
    config = replace(large.config, n_layer=2, n_head=4, n_embd=20, n_mlp=30)
    cut, state = subset(large, config).state_dict(), large.state_dict()
    q = (
        state['blocks.1.attn.q.weight'].view(2, 4, 8, 48)[:, :2, :, :20].reshape(32, 20)
    )  # of both groups the first two queries
    assert torch.equal(cut['blocks.1.attn.q.weight'], q) and torch.equal(
        cut['blocks.1.attn.k.weight'], state['blocks.1.attn.k.weight'][:, :20]
    )
    assert torch.equal(
        cut['blocks.0.attn.o.weight'],
        state['blocks.0.attn.o.weight'].view(48, 2, 4, 8)[:20, :, :2].reshape(20, 32),
    )
    assert torch.equal(
        cut['blocks.0.mlp.down.weight'], state['blocks.0.mlp.down.weight'][:20, :30]
    ) and torch.equal(cut['wte.weight'], state['wte.weight'][:, :20])
    assert torch.equal(
        cut['blocks.1.attn.q_norm.weight'], state['blocks.1.attn.q_norm.weight']
    ) and not any(k.startswith('blocks.2') for k in cut)


def test_a_subset_that_drops_only_layers_computes_with_the_rest():
    large = shaped('gpt2', 4, 5)
    x = torch.randint(31, (2, 10))
    h = large.residual_stream(x, layers=3)[0]
    torch.testing.assert_close(
        subset(large, replace(large.config, n_layer=3))(x).logits,
        torch.nn.functional.linear(large.norm(h), large.head_weight),
    )


def test_alpha_is_the_papers():
    assert round(default_alpha(117, 345, 138), 1) == 0.9
    exact = [
        GPTConfig.named(name).num_params(embedding=True, head=True)
        for name in ('gpt2', 'gpt2-medium', '138m')
    ]
    assert (
        round(default_alpha(*exact), 1) == 0.9
        and default_alpha(1, 2, 1) == 1
        and default_alpha(1, 2, 2) == 0
        and default_alpha(1, 2, 3) == 0
    )


def test_sizes_of_the_chains_and_their_descendants():
    shapes = {
        name: GPTConfig.named(name) for name in ('gpt2-xl', 'gpt2-large', 'gpt2-medium', 'gpt2')
    }
    found = {
        size: neighbours(shapes, GPTConfig.named(size))
        for size in ('138m', '220m', '277m', '380m', '537m')
    }
    assert set(map(found.get, ('138m', '220m', '277m'))) == {('gpt2', 'gpt2-medium')} and {
        found['380m'],
        found['537m'],
    } == {('gpt2-medium', 'gpt2-large')}


@pytest.mark.parametrize('which, kept', [('auto', [1, 2, 3, 0, 0]), ('van', [0, 0, 4, 5, 6])])
def test_earlier_learngenes_keep_three_layers_before_or_behind_random_ones(which, kept):
    ancestor = shaped('llama', 2, 6)
    made = earlier_learngene(ancestor, 5, which)
    for block, source in zip(made.blocks, kept):
        found = [i for i, b in enumerate(ancestor.blocks, 1) if same(b, block)]
        assert found == ([source] if source else [])
    assert same(made.wte, ancestor.wte) and same(made.norm, ancestor.norm)


def test_earlier_learngenes_of_gpt2_xl_have_the_papers_layers_and_sizes(tmp_path):
    """Table 9: 3, 5 and 7 layers, 174.28M, 235.76M and 297.24M parameters."""
    more = ['config/col_gpt2.py', '--baselines=auto-learngene', '--dry_run=True']
    run, method, _ = train.configure(more, train.Run, train.METHODS)
    sizes = {p.stage.name: p.stage.config for p in train.plan(run, method)}
    for size, layers, params in (('138m', 3, 174.28), ('220m', 5, 235.76), ('277m', 7, 297.24)):
        config = sizes[f'{size}-auto-learngene']
        found = config.num_params(embedding=True, head=True) / 1e6
        assert config.n_layer == layers and found == pytest.approx(params, rel=0.006)


# ----------------------------------------------------------------------------------------------
# the method


ON_POLICY = [
    '--sft_data=signatures',
    '--sft_epochs=0.2',
    '--distillation=minillm',
    '--samples=8',
    '--inner_epochs=2',
    '--score_examples=4',
]


def arguments(data_dir, out, *more):
    return [
        '--method=col',
        f'--data_dir={data_dir}',
        f'--out_dir={out}',
        '--ancestor_size=32x4',
        '--chain=32x2,16x2',
        '--descendants=16x2,32x2',
        '--block_size=32',
        '--batch_size=4',
        '--ancestor_tokens=1280',
        '--tokens=640',
        '--recovery_tokens=640',
        '--eval_tokens=512',
        '--learning_rate=0.01',
        '--log_interval=1',
        '--eval_interval=2',
        '--device=cpu',
        *more,
    ]


@pytest.fixture(scope='module')
def chain(data_dir, tmp_path_factory):
    """
    A chain of two with every baseline, fine-tuned, distilled on-policy, and one descendant in
    between.
    """
    out = tmp_path_factory.mktemp('col')
    train.main(
        [
            a
            for a in arguments(
                data_dir,
                out,
                *ON_POLICY,
                '--direct=True',
                f'--baselines={",".join(start for start in col.STARTS if start != "linit")}',
                '--downstream=signatures',
                '--downstream_epochs=0.1',
                '--bridge_answers=16',
            )
            if not a.startswith('--chain') and not a.startswith('--desc')
        ]
        + ['--chain=32x3,16x2', '--descendants=32x2']
    )
    return out


def test_a_descendant_costs_all_that_it_is_made_from(data_dir, tmp_path):
    more = ['--chain=32x3,16x2', '--descendants=32x2', '--baselines=random,kd', '--dry_run=True']
    run, method, _ = train.configure(arguments(data_dir, tmp_path, *more), train.Run, train.METHODS)
    planned = {p.stage.name: p.result for p in train.plan(run, method)}
    cost = {name: result.flops for name, result in planned.items()}
    ancestors = sum(cost[name] for name in cost if name.startswith('ancestor'))
    made = planned['32x2-linit']
    assert made.inherited_flops == pytest.approx(ancestors + cost['32x3'] + cost['16x2'])
    assert planned['32x2-kd'].inherited_flops == pytest.approx(ancestors)
    assert planned['32x2-random'].inherited_flops == 0


def test_batches_and_passes_are_those_of_each_kind_of_training(data_dir, tmp_path):
    more = ['--chain=32x3,16x2', '--descendants=32x2', '--downstream=signatures', '--dry_run=True']
    more += ['--recovery_tokens=640', '--recovery_epochs=2', '--recovery_batch_size=2']
    more += ['--downstream_batch_size=8', '--sft_data=signatures', '--sft_batch_size=1']
    run, method, _ = train.configure(arguments(data_dir, tmp_path, *more), train.Run, train.METHODS)
    planned = {p.stage.name: p for p in train.plan(run, method)}
    made = planned['32x2-linit']
    assert (made.result.tokens, made.knobs.unique_tokens, made.knobs.batch_size) == (1280, 640, 2)
    assert planned['32x2-linit-on-signatures'].knobs.batch_size == 8
    assert planned['ancestor-sft'].knobs.batch_size == 1


def test_alphas_are_tried_side_by_side(data_dir, tmp_path):
    more = ['--chain=32x3,16x2', '--descendants=32x2', '--alphas=0,0.9', '--alpha=0.5']
    argv = arguments(data_dir, tmp_path, *more, '--dry_run=True')
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    stages = {p.stage.name: p.stage.origin.settings for p in train.plan(run, method)}
    alphas = {name: how['alpha'] for name, how in stages.items() if 'alpha' in how}
    assert alphas == {'32x2-linit': 0.5, '32x2-alpha-0': 0.0, '32x2-alpha-0.9': 0.9}


def test_the_speed_up_counts_steps_to_the_last_loss_of_random_initialisation():
    random = [(0, 6.0), (100, 3.0), (300, 2.5)]
    assert speed_up([(0, 4.0), (100, 2.5), (300, 2.0)], random) == '3.0x'
    assert speed_up([(0, 3.5), (100, 1.5), (300, 1.0)], random) == '6.0x'  # between evaluations
    assert speed_up([(0, 2.5), (100, 2.4)], random) == 'there at step 0'
    assert speed_up([(0, 4.0), (300, 2.6)], random) == 'never there'


def test_stepwise_and_direct_distillation_have_one_start(data_dir, tmp_path):
    """They differ by their teacher alone (Table 3)."""
    more = ['--direct=True', '--chain=32x3,16x2', '--descendants=32x2', '--dry_run=True']
    run, method, _ = train.configure(arguments(data_dir, tmp_path, *more), train.Run, train.METHODS)
    planned = {p.stage.name: p for p in train.plan(run, method)}
    stages = {name: p.stage for name, p in planned.items()}
    stepwise, direct = stages['16x2'], stages['16x2-direct']
    assert planned['16x2-direct'].result.flops > 1.1 * planned['16x2'].result.flops
    assert stepwise.origin == direct.origin and stepwise.origin.models == ('32x3',)
    teachers = stepwise.teaching['teacher'], direct.teaching['teacher']
    assert teachers == ('32x3', 'ancestor')
    assert (
        direct.teaching['teacher_params'] > stepwise.teaching['teacher_params'] > 0
    )  # whose passes count


def test_a_plan_of_a_public_chain_has_its_checkpoints_and_their_fine_tuning():
    preset = str(ROOT / 'config' / 'col_gpt2.py')
    run, method, _ = train.configure([preset, '--dry_run=True'], train.Run, train.METHODS)
    stages = {planned.stage.name: planned.stage for planned in train.plan(run, method)}
    assert 'ancestor' not in stages  # it is given
    for size in ('gpt2-large', 'gpt2-medium', 'gpt2'):
        assert stages[f'{size}-sft'].origin.models == (f'openai-community/{size}',)
        assert stages[size].origin.models == (f'{size}-sft',)
    assert stages['gpt2-large'].teaching['teacher_params'] == stages['ancestor-sft'].params


def test_on_policy_distillation_costs_the_answers_too(data_dir, tmp_path):
    more = [*ON_POLICY, '--direct=True', '--chain=32x3,16x2', '--descendants=32x2']
    run, method, _ = train.configure(arguments(data_dir, tmp_path, *more), train.Run, train.METHODS)
    run.dry_run = True
    planned = {p.stage.name: p for p in train.plan(run, method)}
    stage, result = planned['16x2'].stage, planned['16x2'].result
    X, X_teacher = stage.params, planned['32x3'].stage.params
    text, answers, drawing = 6 * X, 6 * X + 2 * X_teacher, 2 * (X + X_teacher) / 2  # 2 epochs
    assert result.flops == pytest.approx((text + answers + drawing) * 640)


def test_descendants_without_recovery_are_what_they_start_from(data_dir, tmp_path):
    """Zero recovery tokens (Figure 3): LInit's weights, evaluated and saved, at no cost."""
    more = ['--chain=32x3,16x2', '--descendants=32x2', '--baselines=single,random']
    train.main(arguments(data_dir, tmp_path, *more, '--recovery_tokens=0', '--eval_interval=0'))
    small, large = load(tmp_path / '16x2'), load(tmp_path / '32x3')
    found = load(tmp_path / '32x2-linit')
    assert same(found, linit(small, large, found.config))
    results = {start: Result.of(tmp_path / f'32x2-{start}') for start in ('linit', 'random')}
    assert results['linit'].tokens == results['linit'].flops == 0
    assert [line['step'] for line in metrics(tmp_path / '32x2-linit')] == [0]
    assert results['linit'].val_loss != results['random'].val_loss
    report = (tmp_path / 'report.md').read_text()
    assert 'loss at step 0' in report and (tmp_path / 'report.png').is_file()


def test_everything_is_trained_and_reported(chain):
    names = {p.parent.name for p in chain.glob('*/result.json')}
    assert {
        'ancestor',
        'ancestor-sft',
        '32x3',
        '16x2',
        '16x2-direct',
        '32x2-linit',
        '32x2-linit-on-signatures',
    } <= names
    assert {f'32x2-{start}' for start in col.STARTS} <= names
    report = (chain / 'report.md').read_text()
    assert all(f'|{kind}|' in report.replace(' ', '') for kind in col.STARTS)
    assert 'loss at step 0' in report and 'Rouge-L' in report
    assert json.loads((chain / 'chain.json').read_text()) == {
        'ancestor': 'ancestor-sft',
        '32x3': '32x3',
        '16x2': '16x2',
    }
    assert (
        load(chain / '32x2-hypercloning').config.n_embd == 64
        and load(chain / '32x2-auto-learngene').config.n_layer == 3
    )
    scores = [m['score'] for m in metrics(chain / '16x2') if 'score' in m]
    assert scores and not (chain / '16x2' / 'best').exists() and not list(chain.glob('*/rollout-*'))


def test_a_descendant_begins_better_than_random(chain):
    first = {
        kind: metrics(chain / f'32x2-{kind}')[0]['val_loss']
        for kind in ('linit', 'random', 'single')
    }
    assert first['linit'] < first['random'] and first['single'] < first['random']


def test_the_command_makes_any_size_between_two(chain, tmp_path, capsys):
    col.main([str(chain), str(tmp_path / 'made'), '--to=32x2'])
    assert 'between 16x2 and 32x3' in capsys.readouterr().out
    made = linit(
        load(chain / '16x2'), load(chain / '32x3'), replace(load(chain / '32x3').config, n_layer=2)
    )
    assert (
        same(load(tmp_path / 'made'), made)
        and json.loads((tmp_path / 'made' / 'config.json').read_text())['nanofamily_tokenizer']
        == 'bytes'
    )
    with pytest.raises(UserError, match='lie outside the chain: ancestor-sft'):
        col.main([str(chain), str(tmp_path / 'other'), '--to=64x2'])
    with pytest.raises(UserError, match='holds no chain'):
        col.main([str(tmp_path), str(tmp_path / 'other'), '--to=64x2'])


@pytest.mark.parametrize('family', ['gpt2', 'pythia', 'llama'])
def test_on_disk_it_is_what_it_is_in_memory_for_every_layout(family, tmp_path):
    small, large = shaped(family, 2, 2), shaped(family, 4, 4, seed=1)
    small.save(tmp_path / 'chain' / 'a')
    large.save(tmp_path / 'chain' / 'b')
    col.main([str(tmp_path / 'chain'), str(tmp_path / 'made'), '--to=18x3', '--alpha=0.3'])
    made, sizes = load(tmp_path / 'made'), dict(n_embd=18, n_layer=3, n_head=3, n_kv_head=3)
    assert made.config == replace(small.config, n_mlp=30, **sizes)
    assert same(made, linit(small, large, made.config, 0.3))


def test_the_shapes_of_the_papers_sizes_are_found_by_their_parameters():
    chain = {name: GPTConfig.named(name) for name in ('gpt2', 'gpt2-medium', 'gpt2-large')}
    for name in ('138m', '220m', '277m', '380m', '537m'):
        assert shape_of_size(chain, 1e6 * int(name[:-1])) == GPTConfig.named(name)
    found = shape_of_size(chain, 209_494_272)  # not 768x24, which has exactly so many
    assert (found.n_embd, found.n_layer) == (896, 17)
    qwen = {name: GPTConfig.named(name) for name in ('qwen3-0.6b', 'qwen3-1.7b')}
    assert shape_of_size(qwen, 1.09e9).n_embd == GPTConfig.named('1.09b').n_embd
    few = dict(vocab_size=257, block_size=16)
    tiny = {name: GPTConfig.named(name, **few) for name in ('48x2', '64x4')}
    wanted = GPTConfig.named('64x3', **few)
    found = shape_of_size(tiny, wanted.num_params(embedding=True, head=True))
    assert found.num_params() == pytest.approx(wanted.num_params(), rel=0.1)
    with pytest.raises(UserError, match='no shape of 1B .*1280x36 .774M'):
        shape_of_size(chain, 1e9)


def test_a_size_is_made_by_its_number_of_parameters(tmp_path):
    for name, heads in (('a', 2), ('b', 4)):
        shaped('gpt2', heads, heads).save(tmp_path / 'chain' / name)
    wanted = shaped('gpt2', 3, 3).config
    params = 0.995 * wanted.num_params(embedding=True, head=True)
    col.main([str(tmp_path / 'chain'), str(tmp_path / 'made'), f'--params={params}'])
    assert load(tmp_path / 'made').config == wanted
    with pytest.raises(UserError, match='--to=SIZE,... or --params=NUMBER,...'):
        col.main([str(tmp_path / 'chain'), str(tmp_path / 'other')])


def test_a_width_between_two_of_a_chain_has_whole_heads(tmp_path):
    for name, heads in (('a', 2), ('b', 4)):
        shaped('llama', heads, heads).save(tmp_path / 'chain' / name)
    for to in ('20x3', '18x9'):  # heads of 6: neither 20 wide, nor as deep as 9
        with pytest.raises(UserError, match=f'no shape of {to} with whole heads'):
            col.main([str(tmp_path / 'chain'), str(tmp_path / 'made'), f'--to={to}'])
    tiny = {name: GPTConfig.named(name) for name in ('64x2', '128x6')}
    assert shape_of_size(tiny, '96x4').n_head == 6 and shape_of_size(tiny, '32x1').n_layer == 1


def test_a_chain_that_was_interrupted_goes_on_to_the_same(chain, data_dir, tmp_path):
    stops = 0
    common = [*ON_POLICY, '--chain=32x3', '--descendants=', '--baselines=']
    while not (tmp_path / 'run' / '32x3' / 'result.json').exists():
        try:
            train.main(arguments(data_dir, tmp_path / 'run', *common, '--max_minutes=1e-9'))
        except SystemExit:
            stops += 1
        assert stops < 90
    assert stops > 20 and same(load(tmp_path / 'run' / '32x3'), load(chain / '32x3'))


@pytest.mark.parametrize(
    'more, word',
    [
        (['--descendants=64x2'], 'lie outside the chain'),
        (['--start=nothing'], 'start must be one of public, subset, random'),
        (['--distillation=minillm'], '--sft_data=NAME'),
        (['--baselines=seqkd'], '--sft_data=NAME'),
        (['--baselines=rand'], "baselines must be .*random.* not 'rand'"),
        (['--start=public', '--public=a'], 'public has 1 checkpoints for a chain of 2'),
        (['--alpha=2'], 'alpha'),
        (['--sft_data=pydocs'], 'is a set of text'),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        train.main(arguments(data_dir, tmp_path, *more))
    assert not list(tmp_path.rglob('stage.json'))


def test_a_supervised_set_of_another_vocabulary_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir / 'signatures', tmp_path / 'data' / 'signatures')
    text = torch.arange(5000) % 300
    write_corpus(tmp_path / 'data' / 'pydocs', text, text, vocab_size=300)
    train_tokenizer('byte-level', tmp_path / 'bpe', 300)
    shutil.copy(tmp_path / 'bpe' / 'tokenizer.json', tmp_path / 'data' / 'pydocs')
    with pytest.raises(UserError, match='signatures was prepared with the tokenizer bytes, pydocs'):
        train.main(arguments(tmp_path / 'data', tmp_path / 'run', '--sft_data=signatures'))


def test_architectures_that_differ_and_shapes_outside():
    llama, gpt2 = shaped('llama', 4, 3), shaped('gpt2', 8, 6)
    with pytest.raises(UserError, match="mixed architectures: norm is 'rms' and 'layer'"):
        linit(llama, gpt2, replace(llama.config, n_layer=4))
    with pytest.raises(UserError, match='n_layer = 9 is outside the chain'):
        linit(llama, shaped('llama', 8, 6), replace(llama.config, n_layer=9))


def test_a_descendant_below_the_chain_is_a_part_of_its_smallest_model():
    words = [str(ROOT / 'config' / 'col_gpt2.py'), '--descendants=51.47m', '--dry_run=True']
    run, method, _ = train.configure([*words, '--baselines=random'], train.Run, train.METHODS)
    stages = {p.stage.name: p.stage for p in train.plan(run, method)}
    assert stages['51.47m-linit'].origin.kind == 'subset'
    run, method, _ = train.configure([*words, '--baselines=single'], train.Run, train.METHODS)
    with pytest.raises(UserError, match='51.47m lies below the chain'):
        train.plan(run, method)
