"""The report: what the results say, in tables, pictures and words."""

import pytest
from conftest import write_lines

from engine.errors import UserError
from engine.report import (
    compare_variants,
    format_cell,
    interval,
    mean_curve,
    report,
    result_records,
    steps_to_loss,
    table,
)
from engine.stage import Result


@pytest.mark.parametrize(
    'column, value, text',
    [
        ('FLOPs', 15.4e21, '15.4Z'),
        ('saved', 0.247, '24.7%'),
        ('val loss', 1.44894, '1.4489'),
        ('against baseline', -0.0271, '-0.0271'),
        ('val loss', float('nan'), ''),
        ('sd', None, ''),
        ('tokens/s', 1368.2283, '1,368'),
    ],
)
def test_a_value_is_written_as_its_column_wants_it(column, value, text):
    assert format_cell(column, value) == text


def test_the_cost_of_a_family_is_against_what_its_sizes_cost_from_scratch():
    numbers = dict(flops=12.0, val_loss=1.5, labels=dict(baseline_flops=60.0))
    grown = Result('a', 'a', before={'those before': 30.0}, **numbers)
    assert '30.0%' in table(result_records([grown]))  # 42 of 60 FLOPs
    assert '%' not in table(result_records([Result('a', 'a', **numbers)]))


def test_report_is_written_from_the_folder_alone(tmp_path):
    for finished, name in ((2.0, 'large'), (1.0, 'small')):
        (tmp_path / name).mkdir()
        Result(name, str(tmp_path / name), flops=12.0, val_loss=2.0, finished=finished).write()
        write_lines(tmp_path / name / 'metrics.jsonl', [dict(step=1, flops=1.2, loss=3.0)])
    report(tmp_path, [])
    lines = (tmp_path / 'report.md').read_text().splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ['small', 'large']
    assert lines[5].startswith('N: ') and lines[-1] == '![report](report.png)'
    assert (tmp_path / 'report.png').read_bytes()[:4] == b'\x89PNG'


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match='no finished stage'):
        report(tmp_path, [])


def test_a_curve_is_the_mean_over_seeds_against_the_share_of_the_steps(tmp_path):
    results = []
    for name, shift in (('a', 0.1), ('b', -0.1)):
        lines = [dict(step=10, val_loss=3.0 + shift), dict(step=15)]
        lines += [dict(step=20, val_loss=2.0 + shift), dict(step=40)]
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / 'metrics.jsonl', lines)
        results.append(Result(name, str(tmp_path / name), val_loss=1.0 + shift))
    curve = mean_curve(results)
    assert curve == [(0.25, 3.0), (0.5, 2.0), (1.0, 1.0)]
    found = [steps_to_loss(curve, loss) for loss in (3.5, 2.5, 1.5, 0.5)]
    assert found == [0.25, 0.375, 0.75, None]


def test_variants_are_compared_seed_by_seed():
    results = [
        Result('a', 'a', val_loss=loss, labels=dict(variant=variant, seed=seed))
        for variant, losses in dict(random=(2.0, 2.2), aki=(1.5, 1.8)).items()
        for seed, loss in enumerate(losses)
    ]
    random, aki = compare_variants(results, 'random')
    assert aki['val loss'] == pytest.approx(1.65) and aki['seeds'] == 2
    assert aki['against random'] == pytest.approx(-0.45)
    half = 12.706 * 0.05  # Student's t with one degree of freedom, and the standard error
    assert aki['95% interval'] == f'{-0.45 - half:+.3f} to {-0.45 + half:+.3f}'
    assert random['95% interval'] is None and random['against random'] == 0
    assert 'against random' not in compare_variants(results, 'baseline')[0]


def test_an_interval_is_students():
    assert interval([1.0]) is None and interval([1.0, 1.0]) is None
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-3)
