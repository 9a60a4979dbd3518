"""Chain-of-Learngene: LInit at its ends and in between, the method, and mistakes in words."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import refuses, same_weights, succeeds
from test_model import SHAPES, small
from test_train import plan_of

import col
from col import between, default_alpha, learngene, linit, shape_of_size, speed_up, subset
from engine.errors import UserError
from engine.log import read_metrics
from engine.stage import Progress, Result
from expand import grow
from model import GPT, GPTConfig, all_params, load

ARCHITECTURES = ['gpt2', 'neox', 'llama', 'qwen3']  # of the chains


def shaped(architecture, heads, layers, seed=0):
    """A model of whole heads: 6 dimensions and 10 neurons for each."""
    widths = dict(n_embd=6 * heads, head_dim=8, n_mlp=10 * heads, vocab_size=31, block_size=16)
    shape = SHAPES[architecture] | widths | dict(n_layer=layers, n_head=heads)
    model = small(**shape | dict(n_kv_head=2 if architecture == 'qwen3' else heads))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


# ----------------------------------------------------------------------------------------------
# LInit


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_linit_at_its_ends_and_in_between(architecture):
    one, other = shaped(architecture, 4, 3), shaped(architecture, 8, 6, seed=1)
    config = shaped(architecture, 6, 5).config
    expanded, cut = grow(one, config, 'fpi', 'bert2bert'), subset(other, config)
    assert same_weights(linit(one, other, config, 1.0), expanded)
    assert same_weights(linit(one, other, config, 0.0), cut)
    assert same_weights(linit(one, other, one.config), one)
    assert same_weights(linit(one, other, other.config), other)


def test_linit_is_what_its_equation_says():
    """alpha times the small model, expanded, and 1 - alpha times the first part of the large."""
    one, other = shaped('llama', 2, 3), shaped('llama', 4, 6, seed=1)
    config = shaped('llama', 3, 5).config
    expanded, large = grow(one, config, 'fpi', 'bert2bert').state_dict(), other.state_dict()
    for name, made in linit(one, other, config, 0.3).state_dict().items():
        cut = large[name][tuple(map(slice, made.shape))]
        torch.testing.assert_close(made, 0.3 * expanded[name] + 0.7 * cut, rtol=1e-12, atol=1e-14)


def test_a_subset_keeps_first_layers_heads_and_dimensions():
    large = shaped('qwen3', 8, 4)  # 4 queries a key head
    config = replace(large.config, n_layer=2, n_head=4, n_embd=20, n_mlp=30)
    cut, state = subset(large, config).state_dict(), large.state_dict()
    q = state['blocks.1.attn.q.weight'].view(2, 4, 8, 48)[:, :2, :, :20]  # the first two of each
    assert torch.equal(cut['blocks.1.attn.q.weight'], q.reshape(32, 20))
    down = 'blocks.1.mlp.down.weight'
    assert torch.equal(cut[down], state[down][:20, :30]) and 'blocks.2.norm1.weight' not in cut


def test_alpha_is_the_papers():
    assert round(default_alpha(117, 345, 138), 1) == 0.9
    assert default_alpha(1, 2, 1) == 1 and default_alpha(1, 2, 2) == 0


def test_architectures_that_differ_and_shapes_outside():
    llama, gpt2 = shaped('llama', 4, 3), shaped('gpt2', 8, 6)
    with pytest.raises(UserError, match='norm = rms cannot be cut out of norm = layer'):
        linit(llama, gpt2, replace(llama.config, n_layer=4))
    with pytest.raises(UserError, match='n_layer = 9 cannot be cut out of n_layer = 6'):
        linit(llama, shaped('llama', 8, 6), replace(llama.config, n_layer=9))


def test_neighbours_and_shapes_of_the_papers_descendants():
    names = ('gpt2-xl', 'gpt2-large', 'gpt2-medium', 'gpt2')
    shapes = {name: GPTConfig.named(name) for name in names}
    for size, neighbour in (('138m', 'gpt2'), ('277m', 'gpt2'), ('537m', 'gpt2-medium')):
        assert between(shapes, GPTConfig.named(size))[0] == neighbour
        assert shape_of_size(shapes, 1e6 * int(size[:-1])) == GPTConfig.named(size)
    qwen = {name: GPTConfig.named(name) for name in ('qwen3-0.6b', 'qwen3-1.7b')}
    assert shape_of_size(qwen, 1.09e9).n_embd == GPTConfig.named('1.09b').n_embd
    with pytest.raises(UserError, match='no shape of 9B with whole heads'):
        shape_of_size(shapes, 9e9)


# ----------------------------------------------------------------------------------------------
# baselines


@pytest.mark.parametrize('first, kept', [(True, [1, 2, 3, 0, 0]), (False, [0, 0, 4, 5, 6])])
def test_earlier_learngenes_keep_three_layers_before_or_behind_random_ones(first, kept):
    ansnet = shaped('llama', 2, 6)
    wanted = replace(ansnet.config, n_layer=5)  # the size that five of its layers have
    made = learngene(ansnet, wanted, first)
    for block, source in zip(made.blocks, kept, strict=True):
        found = [i for i, b in enumerate(ansnet.blocks, 1) if same_weights(b, block)]
        assert found == ([source] if source else [])
    assert same_weights(made.wte, ansnet.wte) and same_weights(made.norm, ansnet.norm)


def test_baselines_of_the_paper_have_its_layers_and_sizes():
    """Table 9: 3, 5 and 7 layers; Table 11: HyperCloning at 645.40M and 2,423.26M."""
    names = 'auto-learngene,hypercloning-2x,hypercloning-4x'
    planned = plan_of('config/col_gpt2.py', f'--baselines={names}')
    sizes = {name: p.stage.config for name, p in planned.items()}
    layers = [sizes[f'{size}-auto-learngene'].n_layer for size in ('138m', '220m', '277m')]
    assert layers == [3, 5, 7]
    for times, params in ((2, 645.40), (4, 2423.26)):
        config = sizes[f'138m-hypercloning-{times}x']
        assert all_params(config) / 1e6 == pytest.approx(params, abs=0.005)


def test_hypercloning_computes_what_linit_gives_it():
    one, other = shaped('llama', 2, 3), shaped('llama', 4, 7, seed=1)
    config, x = replace(one.config, n_layer=7), torch.randint(31, (2, 10))
    wide = col.hypercloning(one, other, config, 2)
    assert (wide.config.n_layer, wide.config.n_embd) == (10, 24)
    deeper = grow(linit(one, other, config), replace(config, n_layer=10), 'fpi', 'bert2bert')
    torch.testing.assert_close(wide(x).logits, deeper(x).logits)


# ----------------------------------------------------------------------------------------------
# the method

TINY = 'train.py --method=col --ansnet=32x4 --chain=32x3,16x2 --desnets=32x2 --block_size=32'
TINY += ' --batch_size=4 --ansnet_tokens=1280 --tokens=640 --recovery_tokens=640'
TINY += ' --eval_tokens=512 --learning_rate=0.01 --log_interval=1 --eval_interval=2 --device=cpu'
ON_POLICY = ' --sft_data=signatures --sft_epochs=0.2 --distillation=minillm --samples=8 --answers=4'


@pytest.fixture
def planned(data_dir):
    """A function: the plan of such a chain, with more knobs."""
    return lambda *more: plan_of(*TINY.split()[1:], f'--data_dir={data_dir}', *more)


def test_a_descendant_costs_all_that_it_is_made_from(planned):
    found = planned('--baselines=random,single,kd,direct')
    cost = {name: p.result.flops for name, p in found.items()}
    before = {name: p.result.inherited_flops for name, p in found.items()}
    assert before['32x2-linit'] == pytest.approx(cost['ansnet'] + cost['32x3'] + cost['16x2'])
    assert before['32x2-single'] == before['32x2-linit']  # the smallest is taught by the others
    assert before['32x2-kd'] == pytest.approx(cost['ansnet']) and before['32x2-random'] == 0
    assert before['16x2-direct'] == pytest.approx(cost['ansnet'] + cost['32x3'])
    stepwise, direct = found['16x2'].stage, found['16x2-direct'].stage
    assert stepwise.origin == direct.origin  # they differ by their teacher alone (Table 3)
    assert (stepwise.teaching['teacher'], direct.teaching['teacher']) == ('32x3', 'ansnet')


def test_on_policy_distillation_costs_the_answers_too(planned):
    found = planned(*ON_POLICY.split(), '--distillation_batch_size=5')
    stage, result = found['16x2'].stage, found['16x2'].result
    assert stage.teaching['samples'] == 10  # 8 of them, in whole steps of its own
    X, X_teacher = stage.params, found['32x3'].stage.params
    text, answers, drawing = 6 * X, 6 * X + 2 * X_teacher, 2 * (X + X_teacher) / 4  # 4 epochs
    assert result.flops == pytest.approx((text + answers + drawing) * 640)


def test_the_speed_up_counts_steps_to_the_last_loss_of_random_initialisation():
    random = [(0, 6.0), (100, 3.0), (300, 2.5)]
    assert speed_up([(0, 4.0), (100, 2.5), (300, 2.0)], random) == '3.0x'
    assert speed_up([(0, 3.5), (100, 1.5), (300, 1.0)], random) == '6.0x'  # between evaluations
    assert speed_up([(0, 2.5), (100, 2.4)], random) == 'there at step 0'
    assert speed_up([(0, 4.0), (300, 2.6)], random) == 'never there'


def test_checkpoints_learn_by_the_reverse_divergence_and_kd_by_the_forward_one(planned, tmp_path):
    shape = dict(vocab_size=257, block_size=32)
    teacher, student = (GPT(GPTConfig.named(size, **shape)) for size in ('32x4', '32x3'))
    teacher.save(tmp_path / 'ansnet')
    found = planned('--baselines=kd', f'--out_dir={tmp_path}')
    x = torch.randint(257, (2, 16))
    q, p = (model(x).logits.log_softmax(-1) for model in (student, teacher))
    for name, a, b in (('32x3', q, p), ('32x2-kd', p, q)):
        loss, *_ = found[name].stage.objective(student, x, x, Progress(0, 1))
        assert loss.item() == pytest.approx((a.exp() * (a - b)).sum(-1).mean().item(), rel=1e-4)


def test_a_plan_of_a_public_chain_has_its_checkpoints_and_their_fine_tuning():
    found = plan_of('config/col_gpt2.py')
    assert 'ansnet' not in found  # it is given
    for size in ('gpt2-large', 'gpt2-medium', 'gpt2'):
        assert found[f'{size}-sft'].stage.origin.models == (f'openai-community/{size}',)
        assert found[size].stage.origin.models == (f'{size}-sft',)
    on_xsum = found['138m-linit-on-xsum']
    assert on_xsum.result.tokens == pytest.approx(10 * 204_045 * 512, rel=1e-3)


def test_a_bridge_is_tuned_on_as_many_answers_as_there_are_prompts_in_batches_of_eight():
    words = ['--ansnet=meta-llama/Meta-Llama-3-8B', '--ansnet_data=dolly_llama3']
    found = plan_of('config/col_gpt2.py', *words, '--bridge=openai-community/gpt2-xl')
    bridge, ansnet = found['bridge'], found['ansnet-sft']
    assert (bridge.knobs.batch_size, bridge.steps) == (8, 10 * 15_000 / 8)
    answers = 2 * ansnet.stage.params * 15_000 * 512
    learned = 6 * bridge.stage.params * bridge.result.tokens
    assert bridge.result.flops == pytest.approx(learned + answers)
    assert bridge.result.inherited_flops == ansnet.result.flops
    assert found['gpt2-large'].stage.teaching['teacher'] == 'bridge'


@pytest.fixture(scope='module')
def chain(data_dir, tmp_path_factory):
    """
    A chain of two with every baseline, fine-tuned, distilled on-policy, and one descendant in
    between.
    """
    out = tmp_path_factory.mktemp('col')
    line = f'{TINY} {ON_POLICY} --downstream=signatures --downstream_epochs=0.1'
    line += f' --baselines={",".join(col.BASELINES)},direct --data_dir={data_dir} --out_dir={out}'
    succeeds(line)
    return out


def test_everything_is_trained_and_reported(chain):
    names = {path.parent.name for path in chain.glob('*/result.json')}
    for start in ('linit', *col.BASELINES):
        assert {f'32x2-{start}', f'32x2-{start}-on-signatures'} <= names
    report = (chain / 'report.md').read_text()
    assert 'loss at step 0' in report and 'Rouge-L' in report and 'variance' in report
    assert any('score' in line for line in read_metrics(chain / '16x2'))
    starts = ('linit', 'single', 'random')
    first = [read_metrics(chain / f'32x2-{start}')[0]['val_loss'] for start in starts]
    assert max(first) == first[-1]  # a descendant begins better than random


def test_the_command_makes_any_size_between_two(chain, data_dir, tmp_path):
    printed = succeeds(f'col.py {chain} {tmp_path}/made --to=32x2')
    assert 'between 16x2 and 32x3' in printed
    command = re.search('python (evaluate.py .*)', printed)[1]
    out = succeeds(f'{command} --data_dir={data_dir} --kl_examples=0 --eval_tokens=512')
    assert re.findall(r'(\w+): validation loss', out) == ['made', '16x2', '32x3']
    one, other = load(chain / '16x2'), load(chain / '32x3')
    expected = linit(one, other, replace(other.config, n_layer=2))
    assert same_weights(load(tmp_path / 'made'), expected)
    params = 0.995 * all_params(expected.config)
    succeeds(f'col.py {chain} {tmp_path}/sized --params={params}')
    assert load(tmp_path / 'sized').config == expected.config
    refuses(f'col.py {chain} {tmp_path}/x --to=64x2', 'no shape of 64x2 with whole heads')
    refuses(f'col.py {data_dir} {tmp_path}/x --to=64x2', 'holds no chain')
    refuses(f'col.py {chain} {tmp_path}/x', '--to=SIZE,... or --params=NUMBER,...')


def test_descendants_without_recovery_are_what_they_start_from(data_dir, tmp_path):
    """Figure 3; and one below the chain is a part of its smallest model."""
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path} --desnets=32x2,16x1'
    line += ' --alphas=0.9 --baselines='
    succeeds(f'{line} --recovery_tokens=0 --eval_interval=0')
    one, other = load(tmp_path / '16x2'), load(tmp_path / '32x3')
    found, part = load(tmp_path / '32x2-linit'), load(tmp_path / '16x1-linit')
    assert same_weights(found, linit(one, other, found.config))
    nearer = load(tmp_path / '32x2-alpha-0.9')
    assert same_weights(nearer, linit(one, other, found.config, 0.9))
    assert same_weights(part, subset(one, part.config))
    result = Result.of(tmp_path / '32x2-linit')
    assert result.tokens == result.flops == 0
    assert [line['step'] for line in read_metrics(tmp_path / '32x2-linit')] == [0]
    refuses(f'{line}single', '16x1 lies below the chain')
