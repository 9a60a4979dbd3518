"""The loop, its presets and plans; any way to batch gives the same numbers."""

import json
import math
import re

import pytest
import torch
from conftest import (
    ROOT,
    call,
    refuses,
    run_command,
    run_processes,
    same_weights,
    succeeds,
)

import train
from data.corpus import open_corpus
from data.loader import validation_batches
from engine.log import read_metrics
from engine.loss import evaluate
from engine.optimizer import learning_rate, make_optimizer
from engine.parallel import find_hardware
from engine.stage import Result, Stage, next_token
from model import GPT, GPTConfig, load
from train import METHODS, Run

TINY = 'train.py --size=16x2 --block_size=16 --batch_size=4 --tokens=1280 --eval_tokens=512'
TINY += ' --log_interval=2 --learning_rate=0.01 --device=cpu'  # 20 steps
METHOD_OF_PRESETS = 'Progressive|Scaling laws|Late-to-Early|Inheritune|Chain-of-Learngene|papers'


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """(the command of a run, its folder)"""
    out = tmp_path_factory.mktemp('runs')
    line = f'{TINY} --data_dir={data_dir} --out_dir={out}'
    succeeds(line)
    return line, out / '16x2'


# ----------------------------------------------------------------------------------------------
# parts


def rates(steps, **knobs):
    run = Run(**dict(learning_rate=1.0, warmup=10, min_lr_fraction=0.1) | knobs)
    return [learning_rate(step, steps, run) for step in range(steps)]


def test_learning_rates():
    cosine = rates(110)
    assert cosine[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and cosine[10] == 1
    assert cosine[60] == pytest.approx(0.55) and 0.1 < cosine[-1] < 0.102
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    wsd = rates(100, schedule='wsd', decay_fraction=0.2)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.55) and wsd[99] == pytest.approx(0.145)
    constant = rates(100, schedule='constant', warmup=0.05)  # as a fraction
    assert constant[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(constant[5:]) == {1.0}


def test_weight_decay_is_for_matrices_only():
    model = GPT(Run(data_dir='nowhere').model_config('16x2'))
    decayed, others = make_optimizer(model, Run()).param_groups
    assert decayed['weight_decay'] == 0.1 and {p.ndim for p in decayed['params']} == {2}
    assert others['weight_decay'] == 0.0 and {p.ndim for p in others['params']} == {1}


# ----------------------------------------------------------------------------------------------
# a run


def test_a_run_learns_and_its_folder_explains_it(whole, data_dir):
    folder = whole[1]
    result, lines = Result.of(folder), read_metrics(folder)
    assert [m['step'] for m in lines] == list(range(2, 21, 2))
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.5
    assert result.tokens == result.position == 1280
    assert result.flops == 6 * result.params * 1280 == lines[-1]['flops']
    assert {'loss', 'lr', 'grad_norm', 'tokens', 'flops', 'tokens_per_second'} <= lines[0].keys()
    stage = json.loads((folder / 'stage.json').read_text())
    assert stage['block_size'] == 16 and stage['torch'] == torch.__version__
    assert stage['command'][0] == 'train.py'
    names = 'checksums.json config.json metrics.jsonl model.safetensors result.json stage.json'
    names += ' tokenizer.json tokenizer_config.json'
    assert sorted(path.name for path in folder.iterdir()) == names.split()
    batches = validation_batches(open_corpus('pydocs', data_dir).val, 16, 4, 512)
    assert result.val_loss == pytest.approx(evaluate(load(folder), batches), abs=1e-6)


def test_the_same_command_again_trains_nothing_and_another_is_refused(whole):
    line, folder = whole
    before = (folder / 'model.safetensors').stat().st_mtime_ns
    assert 'finished before' in succeeds(line)
    assert (folder / 'model.safetensors').stat().st_mtime_ns == before
    refuses(f'{line} --learning_rate=0.5', 'learning_rate was 0.01, now 0.5')


def test_targets_count_alike_in_any_micro_batch_on_any_number_of_processes(data_dir, tmp_path):
    """Answers are of different lengths: each target weighs the same, however they are batched."""
    line = f'{TINY} --data_dir={data_dir} --data=signatures --block_size=64 --log_interval=1'
    found = []
    for size, processes in ((4, 1), (2, 1), (1, 2)):
        out = tmp_path / str(size)
        more = f'--micro_batch_size={size} --out_dir={out}'
        run = succeeds if processes == 1 else lambda line: run_processes(2, line)
        run(f'{line} {more}')
        found.append([(m['loss'], m['grad_norm']) for m in read_metrics(out / '16x2')])
    for other in found[1:]:
        assert other == [pytest.approx(pair, rel=1e-4) for pair in found[0]]


def test_trained_weights_are_trained_on_gently_unless_a_rate_is_given(whole, data_dir, tmp_path):
    line = f'train.py --data_dir={data_dir} --block_size=16 --eval_tokens=512 --batch_size=4'
    line += f' --log_interval=1 --tokens=640 --init_from={whole[1]} --out_dir={tmp_path}'
    for more, rate in (('/a', 1e-4), ('/b --learning_rate=1e-9', 1e-9)):
        assert 'weights of' in succeeds(line + more)
        folder = tmp_path / more[1] / '16x2-continued'
        assert max(m['lr'] for m in read_metrics(folder)) == pytest.approx(rate, rel=0.05)
    assert Result.of(folder).val_loss == pytest.approx(Result.of(whole[1]).val_loss, abs=1e-5)
    succeeds(f'{line}/toy --toy')
    assert load(tmp_path / 'toy' / '64x4').config.n_embd == 16  # of its own shape


def test_gradients_are_clipped(data_dir, tmp_path):
    """So hard here that AdamW does not move."""
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path} --grad_clip=1e-20 --weight_decay=0'
    succeeds(f'{line} --eval_interval=19')
    first, last = (m['val_loss'] for m in read_metrics(tmp_path / '16x2') if 'val_loss' in m)
    assert first == pytest.approx(last, abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(
    data_dir, tmp_path, monkeypatch
):
    def explode(model, x, y, progress):
        loss, count, scalars = next_token(model, x, y, progress)
        return loss * (math.inf if progress.step > 10 else 1), count, scalars

    monkeypatch.setattr(train, 'next_token', explode)
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path} --save_minutes=1e-9'
    assert re.search('16x2: loss inf .* at step 1[1-9]', call(line).stderr)
    states = sorted(path.name for path in (tmp_path / '16x2').glob('state-*'))
    assert states == ['state-000000010', 'state-000000011']
    assert not (tmp_path / '16x2' / 'model.safetensors').exists()


def test_the_trained_model_of_the_highest_score_is_kept(data_dir, tmp_path):
    """Not the one that a stage begins with, and not the last."""
    scores = iter([3.0, 2.0, 1.0])  # at steps 0, 5 and 10
    config = GPTConfig.named('16x1', vocab_size=257, block_size=16)
    stage = Stage('s', config, 640, 1.0, observe=lambda model: dict(score=next(scores)))
    run = Run(out_dir=str(tmp_path), data_dir=str(data_dir), batch_size=4, device='cpu')
    run.eval_interval = run.keep_every = 5
    train.train_stage(stage, run, find_hardware(run))
    assert same_weights(tmp_path / 's', tmp_path / 's' / 'step-5')


def test_max_minutes_ends_with_code_75_and_the_same_command_goes_on(data_dir, tmp_path):
    line = 'train.py --method=progressive --sizes=16x2,32x2 --scratch_tokens=320,640'
    line += f' --block_size=16 --eval_tokens=64 --device=cpu --data_dir={data_dir} --out_dir='
    stops = 0
    while (code := call(f'{line}{tmp_path}/a --max_minutes=1e-9').returncode) == 75 and stops < 40:
        stops += 1  # a step, or a stage, at a time
    succeeds(f'{line}{tmp_path}/b')
    assert (
        code == 0 and stops > 5 and same_weights(tmp_path / 'a' / '32x2', tmp_path / 'b' / '32x2')
    )


def test_seeds_are_runs_of_all_that_is_not_shared(data_dir, tmp_path):
    line = 'train.py --method=let --size=16x2 --teacher_size=16x1 --variants=baseline,let'
    succeeds(f'{line} --seeds=2 --toy --data_dir={data_dir} --out_dir={tmp_path}')
    names = {path.parent.name for path in tmp_path.glob('*/result.json')}
    assert names == {'teacher', 'baseline', 'let', 'baseline-s1', 'let-s1'}
    first, second = (Result.of(tmp_path / name) for name in ('let', 'let-s1'))
    assert first.val_loss != second.val_loss and first.before.keys() == second.before.keys()
    assert 'against baseline' in (tmp_path / 'report.md').read_text()


@pytest.mark.parametrize(
    'knobs, words',
    [
        ('--device=tpu', 'device .?tpu'),
        ('--schedule=linear', 'schedule must be one of cosine, wsd, constant'),
        ('--data=pydocs:x', 'WEIGHT'),
        ('--data=openwebtext', 'data/prepare.py openwebtext'),
        ('--data=dolly', 'prepare.py dolly  first'),
        ('--val_data=nope', 'nope is not prepared'),
        ('--init_from=nowhere', 'nowhere is not a folder'),
        ('--size=16y2', 'no size'),
        ('--batch_size=0', 'batch_size must be a whole number, at least 1'),
        ('--beta1=2', 'between 0 and 1'),
        ('--tokens=1e15', 'take about .* days on this CPU'),
        ('--tokens=1e308', 'would never end'),
        # of methods
        ('--method=progressive --sizes=64x4,32x2', 'n_layer 4 -> 2 is smaller'),
        ('--method=progressive --sizes=', 'sizes is empty'),
        ('--method=progressive --batch_sizes=1,2', 'batch_sizes has 2 values for 4 sizes'),
        ('--method=progressive --width=fpj', 'did you mean fpi'),
        ('--method=progressive --depth=stuck', 'depth must be one of stack'),
        ('--method=progressive --sizes=32x2,gpt2', 'cannot grow'),
        ('--method=inheritune --size=64x5', 'half of 5 layers is not a whole number: --n=LAYERS'),
        ('--method=inheritune --n=9', 'n=9: the reference has 8 layers'),
        ('--method=inheritune --reference=nowhere', 'nowhere is not a folder'),
        ('--method=inheritune --size=16x2 --baselines=stacking', 'needs a child of two layers'),
        ('--method=inheritune --size=16x2 --baselines=half-width', 'n_head must be between 1'),
        ('--method=let --pairing=L1F9', 'the target has 4 layers'),
        ('--method=let --variants=let,pairing=sinus', "no pairing 'sinus'"),
        ('--method=let --variants=lett', 'did you mean let'),
        ('--method=let --variants=let,size=64x4', "no knob 'size'"),
        ('--method=let --variants=baseline,lambda0=3', "no knob 'lambda0'"),
        ('--method=let --alignment=dot', 'alignment must be one of cosine'),
        ('--method=let --lambda0=-1', 'lambda0 must be a number, at least 0'),
        ('--method=let --teacher=nowhere', 'nowhere is not a folder'),
        ('--method=let --variants=', "no variant ''"),
        ('--method=col --desnets=128x2', 'lies outside the chain'),
        ('--method=col --distillation=minillm', '--sft_data=NAME'),
        ('--method=col --baselines=rand', "baselines must be .*random.* not 'rand'"),
        ('--method=col --alphas=2', 'alphas'),
        ('--method=col --sft_data=pydocs', 'is a set of text'),
        ('--method=sweep --reuse=stk3', 'reuse must be a list, .* of one of cpt, exp, stk2, stk4'),
        ('--method=sweep --variants=replay', '--second_data=NAME'),
        ('--method=sweep --warmup=0.01', 'warmup is a number of steps'),
        ('--method=sweep --first=0', 'first must be'),
        ('--method=posttrain --models=a/16x1,a/16x1', 'needs different --models'),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, knobs, words):
    refuses(f'train.py --data_dir={data_dir} --out_dir={tmp_path} {knobs}', words)
    assert not list(tmp_path.rglob('stage.json'))


def test_batches_and_contexts_that_do_not_fit_are_refused(whole, data_dir, tmp_path):
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path}'
    words = 'reads 16 tokens at most: --block_size=16'
    refuses(f'{line} --init_from={whole[1]} --block_size=64', words)
    refuses(f'{line} --micro_batch_size=3', 'cannot be divided')


# ----------------------------------------------------------------------------------------------
# presets and plans

PRESETS = sorted((ROOT / 'config').glob('[!_]*.py'))
PRESETS = [path for path in PRESETS if not path.name.startswith('tasks_')]  # of evaluate.py
AS_PROGRAMS = 'progressive_tiny inheritune_tiny let_tiny col_tiny scaling_tiny'.split()


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.stem)
def test_every_preset_says_where_it_comes_from_plans_and_runs_at_toy_size(
    preset, data_dir, tmp_path
):
    assert re.match(rf'# (.|\n)*?({METHOD_OF_PRESETS})', preset.read_text().split('\n\n')[0])
    assert 'FLOPs' in succeeds(f'train.py {preset} --dry_run --data_dir=nowhere')
    line = f'train.py {preset} --toy --seeds=1 --data=pydocs'
    run = run_command if preset.stem in AS_PROGRAMS else call
    assert run(f'{line} --data_dir={data_dir} --out_dir={tmp_path}').returncode == 0
    results = [Result.of(path.parent) for path in tmp_path.glob('*/result.json')]
    assert results and all(math.isfinite(result.val_loss) for result in results)
    assert (tmp_path / 'report.png').is_file()


def plan_of(*arguments):
    """{stage: Planned} of a run that asks no network."""
    run, method, _ = train.configure([*arguments, '--dry_run=True'], Run, METHODS)
    return {planned.stage.name: planned for planned in train.plan(run, method)}


def test_the_8b_family_has_the_papers_tokens_and_saves_a_quarter():
    results = [p.result for p in plan_of('config/progressive_8b.py').values()]
    assert [r.tokens for r in results] == pytest.approx([40e9, 60e9, 120e9, 240e9], rel=1e-3)
    nominal = [6 * x * r.tokens for x, r in zip((1e9, 2e9, 4e9, 8e9), results)]  # as the paper
    assert sum(nominal) == pytest.approx(15.36e21, rel=1e-3)
    alone = plan_of('--size=8b', '--tokens=240e9', '--data=fineweb_edu')['8b']
    assert results[-1].params == alone.stage.params  # one rule for X
    out = succeeds('train.py config/progressive_8b.py --dry_run --data_dir=nowhere')
    assert 'the family: 15.9ZFLOPs; every size from scratch: 21.2ZFLOPs; saved: 24.7%' in out
    assert '40,691' in out and 'not prepared yet: fineweb_edu' in out  # steps: Table 6
    assert 'growth of 4b (width aki' in out and 'GPU-hours' in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_plan_has_the_tokens_that_are_trained(data_dir):
    knobs = '--size=16x2 --block_size=16 --batch_size=1000000 --tokens=2000'
    out = succeeds(f'train.py {knobs} --dry_run --data_dir={data_dir}')
    assert '|    16M |     1 |' in out and 'minutes on this CPU' in out
    assert 'passes over them' in out


def test_the_method_in_the_readme_runs_as_it_is_printed(data_dir, tmp_path):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    snippet = re.search(r'```python\n(from expand import grow_stage.*?)```', readme, re.DOTALL)[1]
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    marker = '\nMETHODS = {\n'
    assert source.count(marker) == 1  # as a reader would: pasted above METHODS, with an entry
    copy, out = tmp_path / 'train.py', tmp_path / 'run'
    copy.write_text(source.replace(marker, f"\n{snippet}\n{marker}    'twice': Twice,\n"))
    line = f'{copy} --method=twice --toy --data_dir={data_dir} --out_dir={out}'
    process = run_command(line, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr
    assert load(out / 'second').config.n_layer == 2 * load(out / 'first').config.n_layer
