"""
The loop: the same numbers at any number of processes, after any interruption, for every preset;
and plans that cost nothing.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command, run_processes

import train
from data.corpus import open_corpus
from engine.errors import UserError
from engine.optimizer import learning_rate, make_optimizer
from engine.parallel import find_hardware
from engine.stage import Result, Stage, next_token
from model import GPT, GPTConfig, load
from train import METHODS, Run

TINY = [
    '--size=16x2',
    '--block_size=16',
    '--batch_size=4',
    '--tokens=1280',
    '--eval_tokens=512',
    '--log_interval=2',
    '--learning_rate=0.01',
    '--device=cpu',
]  # 20 steps
FAMILY = [
    '--method=progressive',
    '--sizes=16x2,32x2',
    '--scratch_tokens=640,1280',
    '--block_size=16',
    '--eval_tokens=512',
    '--device=cpu',
]


def arguments(data_dir, out_dir, *more):
    return [f'--data_dir={data_dir}', f'--out_dir={out_dir}', *TINY, *more]


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def weights(folder):
    return load(folder).state_dict()


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(weights(one).values(), weights(other).values(), strict=True)
    )


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp('runs') / 'whole'
    train.main(arguments(data_dir, out))
    return out


# ----------------------------------------------------------------------------------------------
# parts


def knobs(**changes):
    return Run(**{**dict(learning_rate=1.0, warmup=10, min_lr_fraction=0.1), **changes})


def test_cosine_schedule():
    rates = [learning_rate(step, 110, knobs()) for step in range(110)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and max(rates) == 1.0
    assert (
        rates[60] == pytest.approx(0.55)
        and 0.1 < rates[-1] < 0.102
        and rates[10:] == sorted(rates[10:], reverse=True)
    )


def test_wsd_schedule_is_constant_then_linear():
    rates = [
        learning_rate(step, 100, knobs(schedule='wsd', decay_fraction=0.2)) for step in range(100)
    ]
    assert (
        rates[10:81] == [1.0] * 71
        and rates[90] == pytest.approx(0.55)
        and rates[99] == pytest.approx(0.145)
    )


def test_constant_schedule_with_warmup_as_a_fraction():
    rates = [
        learning_rate(step, 100, knobs(schedule='constant', warmup=0.05)) for step in range(100)
    ]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(rates[5:]) == {1.0}


def test_weight_decay_is_for_matrices_only():
    model = GPT(Run(data_dir='nowhere').model_config('16x2'))
    decayed, others = make_optimizer(model, Run()).param_groups
    assert decayed['weight_decay'] == 0.1 and {p.ndim for p in decayed['params']} == {2}
    assert others['weight_decay'] == 0.0 and {p.ndim for p in others['params']} == {1}


# ----------------------------------------------------------------------------------------------
# a run


def test_a_run_learns_and_its_folder_explains_it(whole):
    result, lines = Result.of(whole / '16x2'), metrics(whole / '16x2')
    assert [m['step'] for m in lines] == list(range(2, 21, 2)) and lines[-1]['loss'] < lines[0][
        'loss'
    ] - 0.5
    assert (
        result.tokens == 1280
        and result.flops == 6 * result.params * 1280 == lines[-1]['flops']
        and result.position == 1280
    )
    assert {'loss', 'lr', 'grad_norm', 'tokens', 'flops', 'tokens_per_second'} <= lines[0].keys()
    stage = json.loads((whole / '16x2' / 'stage.json').read_text())
    assert stage['block_size'] == 16 and stage['torch'] == torch.__version__
    assert stage['command'] == sys.argv
    assert {p.name for p in (whole / '16x2').iterdir()} == {
        'checksums.json',
        'config.json',
        'model.safetensors',
        'metrics.jsonl',
        'result.json',
        'stage.json',
        'tokenizer.json',
        'tokenizer_config.json',
    }
    assert (
        '16x2' in (whole / 'report.md').read_text() and (whole / 'report.png').stat().st_size > 5000
    )


def test_validation_loss_is_that_of_the_saved_model(whole, data_dir):
    from data.loader import open_corpus, validation_batches
    from evaluate import evaluate

    found = evaluate(
        load(whole / '16x2'),
        validation_batches(open_corpus('pydocs', data_dir).val, 16, 4, 512),
    )
    assert found == pytest.approx(Result.of(whole / '16x2').val_loss, abs=1e-6)


def test_the_same_command_again_trains_nothing(whole, data_dir, capsys):
    before = (whole / '16x2' / 'model.safetensors').stat().st_mtime_ns
    train.main(arguments(data_dir, whole))
    assert (
        'finished before' in capsys.readouterr().out
        and (whole / '16x2' / 'model.safetensors').stat().st_mtime_ns == before
    )


def test_other_settings_in_the_same_folder_are_refused(whole, data_dir):
    with pytest.raises(UserError, match='learning_rate was 0.01, now 0.5'):
        train.main(arguments(data_dir, whole, '--learning_rate=0.5'))


@pytest.mark.parametrize('micro_batch_size', [1, 2])
def test_accumulation_gives_the_same_losses(whole, data_dir, tmp_path, micro_batch_size):
    train.main(arguments(data_dir, tmp_path / 'run', f'--micro_batch_size={micro_batch_size}'))
    for a, b in zip(metrics(whole / '16x2'), metrics(tmp_path / 'run' / '16x2'), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['grad_norm'] == pytest.approx(
            b['grad_norm'], rel=1e-4
        )


@pytest.mark.parametrize(
    'arguments_, word',
    [
        (['--device=tpu'], 'device'),
        (['--schedule=linear'], 'schedule must be one of cosine, wsd, constant'),
        (['--data=pydocs:x'], 'WEIGHT'),
        (['--data=openwebtext'], 'data/prepare.py openwebtext'),
        (['--micro_batch_size=3'], 'cannot be divided'),
        (['--init_from=nowhere'], 'nowhere is not a folder'),
        (['--size=16y2'], 'no size'),
        (['--batch_size=0'], 'batch_size must be a whole number, at least 1'),
        (['--log_interval=0'], 'log_interval'),
        (['--micro_batch_size=-1'], 'micro_batch_size'),
        (['--beta1=2'], 'between 0 and 1'),
        (['--tokens=-1'], 'tokens'),
        (['--val_data=nope'], 'nope is not prepared'),
        (['--learning_rate=-1'], 'learning_rate'),
        (['--warmup=-1'], 'warmup'),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, arguments_, word):
    with pytest.raises(UserError, match=word):
        train.main([f'--data_dir={data_dir}', f'--out_dir={tmp_path}', *TINY, *arguments_])


def test_a_new_run_from_old_weights_says_so(whole, data_dir, tmp_path, capsys):
    train.main(
        arguments(
            data_dir,
            tmp_path / 'run',
            f'--init_from={whole / "16x2"}',
            '--learning_rate=1e-12',
            '--warmup=0',
        )
    )
    assert 'weights of' in capsys.readouterr().out
    new = Result.of(tmp_path / 'run' / '16x2-continued')
    assert new.val_loss == pytest.approx(Result.of(whole / '16x2').val_loss, abs=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(
    data_dir, tmp_path, monkeypatch
):
    def explode(model, x, y, progress):
        loss, count, scalars = next_token(model, x, y, progress)
        return loss * (math.inf if progress.step > 10 else 1), count, scalars

    monkeypatch.setattr(train, 'next_token', explode)
    with pytest.raises(UserError, match='16x2: loss inf .* at step 1[1-9]'):
        train.main(arguments(data_dir, tmp_path / 'run', '--save_minutes=1e-9'))
    states = sorted(path.name for path in (tmp_path / 'run' / '16x2').glob('state-*'))
    assert states == ['state-000000010', 'state-000000011']
    assert not (tmp_path / 'run' / '16x2' / 'model.safetensors').exists()


def test_masked_targets_count_alike_in_any_micro_batch_on_any_number_of_processes(
    data_dir, tmp_path
):
    """Answers are of different lengths: each target weighs the same, however they are batched."""
    found = []
    for size, processes in ((4, 1), (2, 1), (1, 1), (1, 2)):
        out = tmp_path / f'{size}-on-{processes}'
        more = ['--data=signatures', '--block_size=64', f'--micro_batch_size={size}']
        knobs = arguments(data_dir, out, *more, '--log_interval=1')
        run_processes(processes, 'train.py', *knobs)
        found.append([(m['loss'], m['grad_norm']) for m in metrics(out / '16x2')])
    for other in found[1:]:
        assert other == [pytest.approx(pair, rel=1e-4) for pair in found[0]]


def test_the_trained_model_of_the_highest_score_is_kept(data_dir, tmp_path):
    """Not the one that a stage begins with, and not the last."""
    scores = iter([3.0, 2.0, 1.0])  # at steps 0, 5 and 10
    config = GPTConfig.named('16x1', vocab_size=257, block_size=16)
    stage = Stage('s', config, 640, 1.0, observe=lambda model: dict(score=next(scores)))
    run = Run(out_dir=str(tmp_path), data_dir=str(data_dir), batch_size=4, device='cpu')
    run.eval_interval = run.keep_every = 5
    train.train_stage(stage, run, find_hardware(run))
    kept, fifth = (load(tmp_path / 's' / name).state_dict() for name in ('', 'step-5'))
    assert all(torch.equal(kept[name], fifth[name]) for name in kept)


def test_seeds_are_runs_of_all_that_is_not_shared(data_dir, tmp_path):
    knobs = ['--method=let', '--size=16x2', '--teacher_size=16x1', '--variants=baseline,let']
    knobs += [f'--data_dir={data_dir}', f'--out_dir={tmp_path}', '--toy=True', '--seeds=2']
    train.main([*knobs, '--device=cpu'])
    names = {path.parent.name for path in tmp_path.glob('*/result.json')}
    assert names == {'teacher', 'baseline', 'let', 'baseline-s1', 'let-s1'}
    first, second = (Result.of(tmp_path / name) for name in ('let', 'let-s1'))
    assert first.labels['seed'] == 0 and second.labels['seed'] == 1
    assert first.val_loss != second.val_loss and first.before.keys() == second.before.keys()
    assert 'against baseline' in (tmp_path / 'report.md').read_text()


# ----------------------------------------------------------------------------------------------
# interruptions


def wait_for(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.005)


def interrupted(data_dir, out, number):
    """Start a run, send it a signal after step 6, return the ended process and its output."""
    process = subprocess.Popen(
        [sys.executable, 'train.py', *arguments(data_dir, out, '--tokens=64000')],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    path = out / '16x2' / 'metrics.jsonl'
    wait_for(lambda: path.is_file() and path.read_text().count('\n') >= 3, process)
    process.send_signal(number)
    return process, process.communicate(timeout=60)


@pytest.fixture(scope='module')
def longer(data_dir, tmp_path_factory):
    """1000 steps without an interruption."""
    out = tmp_path_factory.mktemp('longer') / 'whole'
    train.main(arguments(data_dir, out, '--tokens=64000'))
    return out


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(
    data_dir, tmp_path, longer, number, code
):
    process, (out, err) = interrupted(data_dir, tmp_path / 'run', number)
    assert process.returncode == code, err
    assert 'the same command continues from there' in out and 'Traceback' not in err
    stopped_at = [
        int(p.name[6:]) for p in (tmp_path / 'run' / '16x2').glob('state-*') if p.suffix != '.tmp'
    ]
    assert (
        stopped_at
        and max(stopped_at) < 1000
        and not (tmp_path / 'run' / '16x2' / 'result.json').exists()
    )
    train.main(arguments(data_dir, tmp_path / 'run', '--tokens=64000'))
    assert same(tmp_path / 'run' / '16x2', longer / '16x2')
    ours, theirs = (metrics(folder / '16x2') for folder in (tmp_path / 'run', longer))
    steps = [m['step'] for m in ours]
    assert (
        steps == sorted(set(steps))
        and ours[-1]['step'] == 1000
        and ours[-1]['grad_norm'] == pytest.approx(theirs[-1]['grad_norm'])
    )


def test_max_minutes_saves_and_exits_with_code_75_and_a_family_goes_on(data_dir, tmp_path, capsys):
    family = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "family"}', *FAMILY]
    stops = 0
    while not (tmp_path / 'family' / '32x2' / 'result.json').exists():
        try:
            train.main([*family, '--max_minutes=1e-9'])  # one step, or one stage, at a time
        except SystemExit as exit:
            assert exit.code == 75
            stops += 1
        assert stops < 40
    train.main(
        [f'--out_dir={tmp_path / "once"}' if a.startswith('--out_dir') else a for a in family]
    )
    assert stops > 5 and same(tmp_path / 'family' / '32x2', tmp_path / 'once' / '32x2')


# ----------------------------------------------------------------------------------------------
# presets and plans

PRESETS = sorted((ROOT / 'config').glob('[!_]*.py'))
PRESETS = [path for path in PRESETS if not path.name.startswith('tasks_')]  # of evaluate.py


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.stem)
def test_every_preset_runs_at_toy_size(preset, data_dir, tmp_path):
    train.main(
        [
            str(preset),
            '--toy=True',
            f'--data_dir={data_dir}',
            '--data=pydocs',
            f'--out_dir={tmp_path}',
            '--device=cpu',
        ]
    )
    results = [Result.of(p.parent) for p in tmp_path.glob('*/result.json')]
    assert (
        results
        and all(math.isfinite(r.val_loss) for r in results)
        and (tmp_path / 'report.png').is_file()
    )


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.stem)
def test_every_preset_says_where_it_comes_from_and_plans(preset, capsys):
    header = preset.read_text().split('\n\n')[0]
    methods = 'Progressive|Scaling laws|Late-to-Early|Inheritune|Chain-of-Learngene|the papers'
    assert re.match('# ', header) and re.search(methods, header)
    train.main([str(preset), '--dry_run=True', '--data_dir=nowhere'])
    assert 'FLOPs' in capsys.readouterr().out


def planned(preset, *more):
    words = [str(ROOT / 'config' / preset), '--data_dir=nowhere', *more]
    run, method, _ = train.configure(words, Run, METHODS)
    return [(stage, result) for stage, _, _, result in train.plan(run, method)]


def test_the_8b_family_has_the_papers_tokens_and_saves_a_quarter(capsys):
    results = [result for _, result in planned('progressive_8b.py')]
    assert [r.tokens for r in results] == pytest.approx([40e9, 60e9, 120e9, 240e9], rel=1e-3)
    nominal = [6 * x * r.tokens for x, r in zip((1e9, 2e9, 4e9, 8e9), results)]  # as the paper
    assert sum(nominal) == pytest.approx(15.36e21, rel=1e-3)
    words = ['--size=8b', '--tokens=240e9', '--data=fineweb_edu', '--data_dir=nowhere']
    run, method, _ = train.configure(words, Run, METHODS)
    (single,) = train.plan(run, method)
    assert results[-1].params == single.stage.params  # one rule for X
    train.main([str(ROOT / 'config' / 'progressive_8b.py'), '--dry_run=True', '--data_dir=nowhere'])
    out = capsys.readouterr().out
    assert 'the family: 15.9ZFLOPs; every size from scratch: 21.2ZFLOPs; saved: 24.7%' in out
    assert '40,691' in out and 'not prepared yet: fineweb_edu' in out  # steps: Table 6
    assert 'growth of 4b (width aki' in out and 'GPU-hours' in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_plan_has_the_tokens_that_are_trained(data_dir, capsys):
    knobs = [f'--data_dir={data_dir}', '--size=16x2', '--dry_run=True', '--block_size=16']
    train.main([*knobs, '--batch_size=1000000', '--tokens=2000'])
    out = capsys.readouterr().out
    assert '|    16M |     1 |' in out and 'minutes on this CPU' in out
    assert 'passes over them' in out


def test_train_help_and_a_run_as_a_program(data_dir, tmp_path):
    process = run_command('train.py', *arguments(data_dir, tmp_path / 'run', '--tokens=128'))
    assert (
        process.returncode == 0
        and '| 16x2' in process.stdout
        and 'Traceback' not in process.stderr
        and 'Warning' not in process.stderr
    ), process.stderr


def test_the_method_in_the_readme_runs_as_it_is_printed(data_dir, tmp_path):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    snippet = re.search(r'```python\n(from expand import grow_stage.*?)```', readme, re.DOTALL)[1]
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    marker = '\nMETHODS = {\n'
    assert source.count(marker) == 1  # as a reader would: pasted above METHODS, with an entry
    copy, out = tmp_path / 'train.py', tmp_path / 'run'
    copy.write_text(source.replace(marker, f"\n{snippet}\n{marker}    'twice': Twice,\n"))
    knobs_ = ('--method=twice', '--toy=True', f'--data_dir={data_dir}', f'--out_dir={out}')
    process = run_command(copy, *knobs_, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr
    assert load(out / 'second').config.n_layer == 2 * load(out / 'first').config.n_layer


def test_trained_weights_are_trained_on_gently_unless_a_rate_is_given(data_dir, tmp_path):
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=16)).save(tmp_path / 'old', 'bytes')
    knobs = [f'--init_from={tmp_path}/old', f'--data_dir={data_dir}', '--block_size=16']
    knobs += ['--eval_tokens=64', '--batch_size=2', '--device=cpu', '--log_interval=1']
    for more, rate in (([], 1e-4), (['--learning_rate=1e-3'], 1e-3)):
        out = tmp_path / f'{rate}'
        train.main([*knobs, *more, '--tokens=320', f'--out_dir={out}'])
        rates = [line['lr'] for line in metrics(out / 'old-continued')]
        assert max(rates) == pytest.approx(rate, rel=0.05)
    train.main([*knobs, '--toy=True', f'--out_dir={tmp_path}/toy'])  # of its own shape
    assert load(tmp_path / 'toy' / '64x4').config.n_embd == 16


def test_epochs_are_passes_over_the_data(data_dir):
    run = train.Run(data_dir=str(data_dir), block_size=32)
    train_tokens = open_corpus('pydocs', data_dir).meta['splits']['train']['tokens']
    assert train.epoch_tokens(run) == train_tokens
    (stage,) = train.Pretrain(size='16x1', epochs=2.5).stages(run)
    assert stage.tokens == 2.5 * train_tokens
    run.unique_tokens = 100
    assert train.epoch_tokens(run) == 100
    meta = open_corpus('signatures', data_dir).meta
    run = train.Run(data='signatures', data_dir=str(data_dir), block_size=32)
    assert train.epoch_tokens(run) == 32 * meta['splits']['train']['documents']  # one an example


def test_what_cannot_be_done_is_refused_with_the_numbers(data_dir, tmp_path):
    knobs = [f'--data_dir={data_dir}', f'--out_dir={tmp_path}/run', '--device=cpu']
    for more, words in (
        (['--tokens=1e15'], 'take about .* days on this CPU'),
        (['--tokens=1e308'], 'would never end'),
        (['--data=dolly'], 'prepare.py dolly  first'),
    ):
        with pytest.raises(UserError, match=words):
            train.main([*knobs, *more])
    assert not (tmp_path / 'run').exists()
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=16)).save(tmp_path / 'short', 'bytes')
    with pytest.raises(UserError, match='reads 16 tokens at most: --block_size=16'):
        train.main([*knobs, f'--init_from={tmp_path}/short', '--block_size=64', '--tokens=640'])
