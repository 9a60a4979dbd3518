"""Chain-of-Learngene: LInit at its ends and in between, the method, and mistakes in words."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, train_tokenizer, write_corpus
from test_train import metrics

import col
import evaluate
import train
from col import between, default_alpha, learngene, linit, shape_of_size, speed_up, subset
from engine.errors import UserError
from engine.stage import Progress, Result
from expand import grow
from model import GPT, GPTConfig, all_params, load

FAMILIES = {  # small shapes of the chains' architectures
    'gpt2': dict(norm='layer', act='gelu', pos='learned', bias=True, tied=True),
    'pythia': dict(norm='layer', act='gelu_exact', rotary_fraction=2 / 3, parallel=True, bias=True),
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
            head_dim=8 if family == 'qwen3' else 6,
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
    assert same(linit(small, large, small.config), small) and same(
        linit(small, large, large.config), large
    )
    x = torch.randint(31, (2, 10))
    assert linit(small, large, config)(x).logits.isfinite().all()


def test_linit_is_what_its_equation_says():
    """Tensor by tensor, written anew: 3 layers of 2 heads and 6 of 4, to 5 of 3 at alpha 0.3."""
    small, large = shaped('llama', 2, 3), shaped('llama', 4, 6, seed=1)
    config = replace(small.config, n_layer=5, n_head=3, n_kv_head=3, n_embd=18, n_mlp=30)
    sizes = dict(wte=('', 'C'), lm_head=('', 'c'), norm=('C',), norm1=('C',), norm2=('C',))
    sizes |= dict(q=('H', 'c'), k=('H', 'c'), v=('H', 'c'), o=('C', 'h'))
    sizes |= dict(gate=('M', 'c'), up=('M', 'c'), down=('C', 'm'))
    old, new = dict(C=12, H=12, M=20), dict(C=18, H=18, M=30)
    layers = [0, 1, 2, 1, 2]  # the last two again
    for name, made in linit(small, large, config, 0.3).state_dict().items():
        part = cut = large.state_dict()[name]
        if name.startswith('blocks.'):
            _, layer, rest = name.split('.', 2)
            part = small.state_dict()[f'blocks.{layers[int(layer)]}.{rest}']
        else:
            part = small.state_dict()[name]
        for dim, unit in enumerate(sizes[name.split('.')[-2]]):
            if unit:
                source = torch.arange(new[unit.upper()]) % old[unit.upper()]
                copies = torch.bincount(source)[source] if unit.islower() else torch.ones(1)
                shape = [-1] + [1] * (part.ndim - 1 - dim)
                part = part.index_select(dim, source) / copies.view(shape)
                cut = cut.narrow(dim, 0, len(source))
        torch.testing.assert_close(made, 0.3 * part + 0.7 * cut, rtol=1e-12, atol=1e-14)


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


def test_alpha_is_the_papers():
    assert round(default_alpha(117, 345, 138), 1) == 0.9
    exact = [
        GPTConfig.named(name).num_params(embedding=True, head=True)
        for name in ('gpt2', 'gpt2-medium', '138m')
    ]
    assert round(default_alpha(*exact), 1) == 0.9
    assert default_alpha(1, 2, 1) == 1 and default_alpha(1, 2, 2) == 0


def test_neighbours_of_the_papers_descendants():
    names = ('gpt2-xl', 'gpt2-large', 'gpt2-medium', 'gpt2')
    shapes = {name: GPTConfig.named(name) for name in names}
    for size in ('138m', '220m', '277m'):
        assert between(shapes, GPTConfig.named(size))[:2] == ('gpt2', 'gpt2-medium')
    for size in ('380m', '537m'):
        assert between(shapes, GPTConfig.named(size))[:2] == ('gpt2-medium', 'gpt2-large')


@pytest.mark.parametrize('first, kept', [(True, [1, 2, 3, 0, 0]), (False, [0, 0, 4, 5, 6])])
def test_earlier_learngenes_keep_three_layers_before_or_behind_random_ones(first, kept):
    ansnet = shaped('llama', 2, 6)
    wanted = replace(ansnet.config, n_layer=5)  # the size that five of its layers have
    made = learngene(ansnet, wanted, first)
    assert made.config == wanted
    for block, source in zip(made.blocks, kept):
        found = [i for i, b in enumerate(ansnet.blocks, 1) if same(b, block)]
        assert found == ([source] if source else [])
    assert same(made.wte, ansnet.wte) and same(made.norm, ansnet.norm)


def test_baselines_of_the_paper_have_its_layers_and_sizes():
    """Table 9: 3, 5 and 7 layers; Table 11: HyperCloning at 645.40M and 2,423.26M."""
    names = 'auto-learngene,hypercloning-2x,hypercloning-4x'
    planned = plan(str(ROOT / 'config' / 'col_gpt2.py'), f'--baselines={names}')
    sizes = {name: p.stage.config for name, p in planned.items()}
    for size, layers, params in (('138m', 3, 174.28), ('220m', 5, 235.76), ('277m', 7, 297.24)):
        config = sizes[f'{size}-auto-learngene']
        assert config.n_layer == layers and all_params(config) / 1e6 == pytest.approx(params, 0.006)
    for times, width, params in ((2, 1536, 645.40), (4, 3072, 2423.26)):
        config = sizes[f'138m-hypercloning-{times}x']
        assert (config.n_layer, config.n_embd) == (20, width)
        assert all_params(config) / 1e6 == pytest.approx(params, abs=0.005)


def test_hypercloning_computes_what_linit_gives_it():
    small, large = shaped('llama', 2, 3), shaped('llama', 4, 7, seed=1)
    config = replace(small.config, n_layer=7)
    wide = col.hypercloning(small, large, config, 2)
    assert (wide.config.n_layer, wide.config.n_embd) == (10, 24)
    x = torch.randint(31, (2, 10))
    deeper = grow(linit(small, large, config), replace(config, n_layer=10), 'fpi', 'bert2bert')
    torch.testing.assert_close(wide(x).logits, deeper(x).logits)


# ----------------------------------------------------------------------------------------------
# the method


ON_POLICY = [
    '--sft_data=signatures',
    '--sft_epochs=0.2',
    '--distillation=minillm',
    '--samples=8',
    '--answers=4',
]


def arguments(data_dir, out, *more):
    return [
        '--method=col',
        f'--data_dir={data_dir}',
        f'--out_dir={out}',
        '--ansnet=32x4',
        '--chain=32x3,16x2',
        '--desnets=32x2',
        '--block_size=32',
        '--batch_size=4',
        '--ansnet_tokens=1280',
        '--tokens=640',
        '--recovery_tokens=640',
        '--eval_tokens=512',
        '--learning_rate=0.01',
        '--log_interval=1',
        '--eval_interval=2',
        '--device=cpu',
        *more,
    ]


def plan(*argv):
    """{stage: Planned} of a run."""
    run, method, _ = train.configure([*argv, '--dry_run=True'], train.Run, train.METHODS)
    return {planned.stage.name: planned for planned in train.plan(run, method)}


@pytest.fixture(scope='module')
def chain(data_dir, tmp_path_factory):
    """
    A chain of two with every baseline, fine-tuned, distilled on-policy, and one descendant in
    between.
    """
    out = tmp_path_factory.mktemp('col')
    more = [*ON_POLICY, f'--baselines={",".join(col.BASELINES)},direct', '--downstream=signatures']
    train.main(arguments(data_dir, out, *more, '--downstream_epochs=0.1'))
    return out


@pytest.fixture(scope='module')
def planned(data_dir):
    """The plan of such a chain, on text."""
    return plan(*arguments(data_dir, 'nowhere', '--baselines=random,single,kd,direct'))


def test_a_descendant_costs_all_that_it_is_made_from(planned):
    cost = {name: p.result.flops for name, p in planned.items()}
    before = {name: p.result.inherited_flops for name, p in planned.items()}
    assert before['32x2-linit'] == pytest.approx(cost['ansnet'] + cost['32x3'] + cost['16x2'])
    assert before['32x2-single'] == before['32x2-linit']  # the smallest is taught by the others
    assert before['32x2-kd'] == pytest.approx(cost['ansnet']) and before['32x2-random'] == 0
    assert before['16x2-direct'] == pytest.approx(cost['ansnet'] + cost['32x3'])


def test_batches_and_passes_are_those_of_each_kind_of_training(data_dir, tmp_path):
    more = ['--recovery_epochs=2', '--downstream=signatures', '--downstream_batch_size=8']
    more += ['--sft_data=signatures', '--distillation_batch_size=2', '--tuning_learning_rate=0.02']
    found = plan(*arguments(data_dir, tmp_path, *more))
    made = found['32x2-linit']
    assert (made.result.tokens, made.knobs.unique_tokens, made.knobs.batch_size) == (1280, 640, 4)
    batches = {'32x2-linit-on-signatures': 8, 'ansnet-sft': 4, '16x2': 2}
    assert {name: found[name].knobs.batch_size for name in batches} == batches
    assert {found[name].knobs.learning_rate for name in batches} == {0.02}
    assert made.knobs.learning_rate == 0.01


def test_several_alphas_and_recoveries_are_tried_side_by_side(data_dir, tmp_path):
    more = ['--alphas=0,0.9', '--recovery_tokens=0,640,1e6', '--baselines=random']
    found = plan(*arguments(data_dir, tmp_path, *more))
    tokens = {name: p.result.tokens for name, p in found.items() if name.startswith('32x2')}
    for start in ('linit', 'alpha-0', 'alpha-0.9', 'random'):
        budgets = [tokens.pop(f'32x2-{start}-{budget}') for budget in ('0', '640', '1M')]
        assert budgets == [0, 640, pytest.approx(1e6, rel=1e-3)]
    assert not tokens


def test_the_speed_up_counts_steps_to_the_last_loss_of_random_initialisation():
    random = [(0, 6.0), (100, 3.0), (300, 2.5)]
    assert speed_up([(0, 4.0), (100, 2.5), (300, 2.0)], random) == '3.0x'
    assert speed_up([(0, 3.5), (100, 1.5), (300, 1.0)], random) == '6.0x'  # between evaluations
    assert speed_up([(0, 2.5), (100, 2.4)], random) == 'there at step 0'
    assert speed_up([(0, 4.0), (300, 2.6)], random) == 'never there'


def test_stepwise_and_direct_distillation_have_one_start(planned):
    """They differ by their teacher alone (Table 3)."""
    stepwise, direct = planned['16x2'].stage, planned['16x2-direct'].stage
    assert planned['16x2-direct'].result.flops > 1.1 * planned['16x2'].result.flops
    assert stepwise.origin == direct.origin and stepwise.origin.models == ('32x3',)
    assert (stepwise.teaching['teacher'], direct.teaching['teacher']) == ('32x3', 'ansnet')
    assert direct.teaching['teacher_params'] > stepwise.teaching['teacher_params'] > 0


def test_checkpoints_learn_by_the_reverse_divergence_and_kd_by_the_forward_one(data_dir, tmp_path):
    shape = dict(vocab_size=257, block_size=32)
    teacher, student = (GPT(GPTConfig.named(size, **shape)) for size in ('32x4', '32x3'))
    teacher.save(tmp_path / 'ansnet')
    found = plan(*arguments(data_dir, tmp_path, '--baselines=kd'))
    x = torch.randint(257, (2, 16))
    q, p = (model(x).logits.log_softmax(-1) for model in (student, teacher))
    for name, a, b in (('32x3', q, p), ('32x2-kd', p, q)):
        loss, *_ = found[name].stage.objective(student, x, x, Progress(0, 1))
        assert loss.item() == pytest.approx((a.exp() * (a - b)).sum(-1).mean().item(), rel=1e-4)


def test_a_plan_of_a_public_chain_has_its_checkpoints_and_their_fine_tuning():
    found = plan(str(ROOT / 'config' / 'col_gpt2.py'))
    assert 'ansnet' not in found  # it is given
    for size in ('gpt2-large', 'gpt2-medium', 'gpt2'):
        assert found[f'{size}-sft'].stage.origin.models == (f'openai-community/{size}',)
        assert found[size].stage.origin.models == (f'{size}-sft',)
    taught = found['gpt2-large'].stage.teaching
    assert taught['teacher_params'] == found['ansnet-sft'].stage.params
    on_xsum = found['138m-linit-on-xsum']
    assert on_xsum.result.tokens == pytest.approx(10 * 204_045 * 512, rel=1e-3)
    assert on_xsum.knobs.batch_size == 16 and found['gpt2'].knobs.batch_size == 64
    made = plan(str(ROOT / 'config' / 'col_qwen3.py'))['1.09b-linit'].stage
    assert all_params(made.config) == pytest.approx(1.09e9, rel=0.01)  # in Qwen3's vocabulary


def test_a_bridge_is_tuned_on_as_many_answers_as_there_are_prompts_in_batches_of_eight():
    words = ['--ansnet=meta-llama/Meta-Llama-3-8B', '--ansnet_data=dolly_llama3']
    words += ['--bridge=openai-community/gpt2-xl', str(ROOT / 'config' / 'col_gpt2.py')]
    found = plan(*words)
    bridge, ansnet = found['bridge'], found['ansnet-sft']
    assert (bridge.knobs.batch_size, bridge.steps) == (8, 10 * 15_000 / 8)
    assert bridge.stage.config.n_layer == 48 and ansnet.stage.config.n_layer == 32
    answers = 2 * ansnet.stage.params * 15_000 * 512
    learned = 6 * bridge.stage.params * bridge.result.tokens
    assert bridge.result.flops == pytest.approx(learned + answers)
    assert bridge.result.inherited_flops == ansnet.result.flops
    assert found['gpt2-large'].stage.teaching['teacher'] == 'bridge'


def test_on_policy_distillation_costs_the_answers_too(data_dir, tmp_path):
    found = plan(*arguments(data_dir, tmp_path, *ON_POLICY, '--distillation_batch_size=5'))
    assert found['16x2'].stage.teaching['samples'] == 10  # 8 of them, in whole steps of its own
    stage, result = found['16x2'].stage, found['16x2'].result
    X, X_teacher = stage.params, found['32x3'].stage.params
    text, answers, drawing = 6 * X, 6 * X + 2 * X_teacher, 2 * (X + X_teacher) / 4  # 4 epochs
    assert result.flops == pytest.approx((text + answers + drawing) * 640)


def test_descendants_without_recovery_are_what_they_start_from(data_dir, tmp_path):
    """Zero recovery tokens (Figure 3): LInit's weights, evaluated and saved, at no cost."""
    more = ['--baselines=single,random', '--recovery_tokens=0', '--eval_interval=0']
    train.main(arguments(data_dir, tmp_path, *more))
    small, large = load(tmp_path / '16x2'), load(tmp_path / '32x3')
    found = load(tmp_path / '32x2-linit')
    assert same(found, linit(small, large, found.config))
    results = {start: Result.of(tmp_path / f'32x2-{start}') for start in ('linit', 'random')}
    assert results['linit'].tokens == results['linit'].flops == 0
    assert [line['step'] for line in metrics(tmp_path / '32x2-linit')] == [0]
    assert results['linit'].val_loss != results['random'].val_loss


def test_everything_is_trained_and_reported(chain):
    names = {p.parent.name for p in chain.glob('*/result.json')}
    assert {'ansnet', 'ansnet-sft', '32x3', '16x2', '16x2-direct', '32x2-linit'} <= names
    for start in ('linit', *col.BASELINES):
        assert {f'32x2-{start}', f'32x2-{start}-on-signatures'} <= names
    report = (chain / 'report.md').read_text()
    assert 'loss at step 0' in report and 'Rouge-L' in report and 'variance' in report
    folders = json.loads((chain / 'chain.json').read_text())
    assert folders == {'ansnet': 'ansnet-sft', '32x3': '32x3', '16x2': '16x2'}
    assert load(chain / '32x2-hypercloning-2x').config.n_embd == 64
    assert load(chain / '32x2-auto-learngene').config.n_layer == 3
    scores = [m['score'] for m in metrics(chain / '16x2') if 'score' in m]
    assert scores and not (chain / '16x2' / 'best').exists()


def test_a_descendant_begins_better_than_random(chain):
    first = {
        kind: metrics(chain / f'32x2-{kind}')[0]['val_loss']
        for kind in ('linit', 'random', 'single')
    }
    assert first['linit'] < first['random'] and first['single'] < first['random']


def test_the_command_makes_any_size_between_two(chain, data_dir, tmp_path, capsys):
    col.main([str(chain), str(tmp_path / 'made'), '--to=32x2'])
    printed = capsys.readouterr().out
    assert 'between 16x2 and 32x3' in printed
    command = re.search('python evaluate.py (.*)', printed)[1].split()
    evaluate.main([*command, f'--data_dir={data_dir}', '--kl_examples=0', '--eval_tokens=512'])
    losses = re.findall(r'(\S+): validation loss \S+$', capsys.readouterr().out, re.MULTILINE)
    assert [Path(name).name for name in losses] == ['made', '16x2', '32x3']
    small, large = load(chain / '16x2'), load(chain / '32x3')
    made = linit(small, large, replace(large.config, n_layer=2))
    assert same(load(tmp_path / 'made'), made)
    config = json.loads((tmp_path / 'made' / 'config.json').read_text())
    assert config['nanofamily_tokenizer'] == 'bytes'
    with pytest.raises(UserError, match='no shape of 64x2 with whole heads'):
        col.main([str(chain), str(tmp_path / 'other'), '--to=64x2'])
    with pytest.raises(UserError, match='holds no chain'):
        col.main([str(tmp_path), str(tmp_path / 'other'), '--to=64x2'])


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
    with pytest.raises(UserError, match='no shape of 1B with whole heads'):
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
    assert shape_of_size(tiny, '96x4').n_head == 6


@pytest.mark.parametrize(
    'more, word',
    [
        (['--desnets=64x2'], 'lies outside the chain'),
        (['--chain=16x2,32x3'], 'n_layer = 3 cannot be cut out of n_layer = 2'),
        (['--distillation=minillm'], '--sft_data=NAME'),
        (['--baselines=seqkd'], '--sft_data=NAME'),
        (['--bridge=a/32x4'], '--sft_data=NAME'),
        (['--baselines=rand'], "baselines must be .*random.* not 'rand'"),
        (['--alphas=2'], 'alphas'),
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
    with pytest.raises(UserError, match='signatures was not prepared with the tokenizer of'):
        train.main(arguments(tmp_path / 'data', tmp_path / 'run', '--sft_data=signatures'))


def test_architectures_that_differ_and_shapes_outside():
    llama, gpt2 = shaped('llama', 4, 3), shaped('gpt2', 8, 6)
    with pytest.raises(UserError, match='norm = rms cannot be cut out of norm = layer'):
        linit(llama, gpt2, replace(llama.config, n_layer=4))
    with pytest.raises(UserError, match='n_layer = 9 cannot be cut out of n_layer = 6'):
        linit(llama, shaped('llama', 8, 6), replace(llama.config, n_layer=9))


def test_a_descendant_below_the_chain_is_a_part_of_its_smallest_model(data_dir, tmp_path):
    words = [str(ROOT / 'config' / 'col_gpt2.py'), '--desnets=51.47m', '--baselines=random']
    assert plan(*words)['51.47m-linit'].stage.origin.models == ('gpt2', 'gpt2')
    with pytest.raises(UserError, match='51.47m lies below the chain'):
        plan(*words, '--baselines=single')
    more = ['--desnets=16x1', '--baselines=', '--recovery_tokens=0']
    train.main(arguments(data_dir, tmp_path, *more))
    made = load(tmp_path / '16x1-linit')
    assert same(made, subset(load(tmp_path / '16x2'), made.config))
