"""What a teacher gives: a law that made the gains comes back, from runs as they are on disk."""

import json
import math

import pytest
import torch
from conftest import run_command

import train
from engine.errors import UserError
from engine.stage import Result
from extras.teaching_law import LAWS, law_records, points, predict

TRUTH = dict(G=0.2, slope=0.1, none=-0.3, scale=math.log(0.25), gamma=0.1)


def write_stage(folder, n_params, loss, teacher='', **labels):
    """A finished stage as a run of LET leaves it."""
    folder.mkdir(parents=True)
    numbers = dict(params=1.0, tokens=8, flops=48.0, seconds=1.0, position=0, bits_per_byte=1.0)
    numbers |= dict(inherited_flops=0.0, baseline_flops=0.0, labels=labels)
    Result(folder.name, str(folder), n_params, val_loss=loss, **numbers).write()
    (folder / 'stage.json').write_text(json.dumps(dict(teaching=dict(teacher=teacher))))


def write_runs(folder, law='both', noise=1e-3):
    """Runs with teachers of three sizes and several losses, two seeds; gains as a law has them."""
    generator, runs = torch.Generator().manual_seed(0), []
    for seed in range(2):
        write_stage(folder / 'run0' / f'baseline-{seed}', 160, 2.6, variant='baseline', seed=seed)
    theta = torch.tensor([[TRUTH[name] for name in LAWS[law][1]]], dtype=torch.float64)
    for size in (16, 40, 80):
        for loss in (2.7, 2.5, 2.2, 1.8):
            run, teacher = folder / f'run{len(runs)}', folder / 'teachers' / f'{size}-{loss}'
            write_stage(teacher, size, loss)
            record = dict(lead=2.6 - loss, ratio=160 / size, gain=0.0)
            gain = predict(law, theta, [record]).item()
            for seed in range(2):
                off = noise * torch.randn(1, generator=generator).item()
                labels = dict(variant='let+30', seed=seed)
                write_stage(run / f'let+30-{seed}', 160, 2.6 - gain + off, str(teacher), **labels)
            runs.append(str(run))
    return runs


@pytest.mark.parametrize('law', ['both', 'saturating'])
def test_the_law_that_made_the_gains_comes_back(tmp_path, law):
    records = points('let+30', write_runs(tmp_path, law))
    assert len(records) == 24 and len({r['teacher'] for r in records}) == 12
    table, fitted = law_records(records)
    expected = [TRUTH[name] for name in LAWS[law][1]]
    assert fitted[law][0].tolist() == pytest.approx(expected, rel=0.1)
    errors = {record['law']: record['a teacher left out'] for record in table}
    assert errors[law] < 2e-3 and min(errors['constant'], errors['size']) > 5e-3


def test_the_command_draws_and_prints(tmp_path):
    runs = write_runs(tmp_path, 'saturating')
    words = ['let+30', *runs, f'--out={tmp_path / "law"}']
    process = run_command('extras/teaching_law.py', *words)
    assert process.returncode == 0, process.stderr
    assert '| saturating ' in process.stdout and '| both ' in process.stdout
    assert (tmp_path / 'law' / 'teaching_law.png').stat().st_size > 10_000


def test_a_runs_own_baseline_comes_first(tmp_path):
    """Of runs on other data each is compared with its own."""
    runs = write_runs(tmp_path)
    write_stage(tmp_path / 'other' / 'baseline-0', 160, 9.0, variant='baseline', seed=0)
    teacher = str(tmp_path / 'teachers' / '16-2.7')
    write_stage(tmp_path / 'other' / 'let+30-0', 160, 8.9, teacher, variant='let+30', seed=0)
    records = points('let+30', [*runs[:2], str(tmp_path / 'other')][::2])
    assert records[-1]['gain'] == pytest.approx(0.1) and records[0]['lead'] == pytest.approx(-0.1)
    with pytest.raises(UserError, match='several runs have a baseline of seed 0'):
        points('let+30', [*runs[:2], str(tmp_path / 'other')])


def test_runs_of_the_method_are_read_as_they_are(data_dir, tmp_path):
    """The teacher that a run trains, and one that another run is given."""
    words = ['--method=let', '--size=16x2', '--tokens=640', '--block_size=32', '--batch_size=4']
    words += ['--teacher_size=16x1', '--teacher_tokens=640', '--eval_tokens=256', '--device=cpu']
    words += [f'--data_dir={data_dir}']
    own, given = tmp_path / 'own', tmp_path / 'given'
    train.main([*words, '--variants=baseline,let', f'--out_dir={own}'])
    train.main([*words, '--variants=let', f'--teacher={own / "teacher"}', f'--out_dir={given}'])
    records = points('let', [str(own), str(given)])
    assert len(records) == 2 and len({record['teacher'] for record in records}) == 1
    assert records[0]['ratio'] == pytest.approx(2, rel=0.1)
    assert records[0]['gain'] == records[1]['gain']  # the same teacher, seed and data
    with pytest.raises(UserError, match='its teacher, none, is no stage'):
        points('baseline', [str(own)])
    process = run_command('extras/teaching_law.py', 'let', own, given)
    assert process.returncode == 2 and 'at least three teachers' in process.stderr


def test_few_teachers_determine_few_laws(tmp_path):
    records = points('let+30', write_runs(tmp_path)[:3])
    table, _ = law_records(records)
    assert [record['law'] for record in table] == ['constant']


def test_runs_that_cannot_be_compared(tmp_path):
    runs = write_runs(tmp_path)
    with pytest.raises(UserError, match='run1 has no finished let.9'):
        points('let+9', [*runs[1:2]])
    with pytest.raises(UserError, match='no run has a baseline of seed 0'):
        points('let+30', runs[1:])
    write_stage(tmp_path / 'lost' / 'let+30-0', 160, 2.0, 'away', variant='let+30', seed=0)
    with pytest.raises(UserError, match='its teacher, away, is no stage'):
        points('let+30', [runs[0], str(tmp_path / 'lost')])
