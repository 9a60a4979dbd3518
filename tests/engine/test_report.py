"""The report: what the results say, in tables, pictures and words."""

import json

import pytest
from test_configurator import result

from engine.errors import UserError
from engine.report import (
    compare_variants,
    family_cost,
    format_cell,
    format_count,
    format_si,
    interval,
    render,
    report,
    report_blocks,
    result_records,
    steps_to_loss,
    table,
    training_curve,
)
from engine.stage import Origin, Stage, describe
from model import GPTConfig


@pytest.mark.parametrize(
    'number, text',
    [
        (15.36e21, '15.4Z'),
        (0, ''),
        (7, '7'),
        (999.9e3, '1e+03k'),
        (1234567, '1.23M'),
        (2e30, '2e+06Y'),
    ],
)
def test_numbers_with_si_letters(number, text):
    assert format_si(number) == text


def test_counts_as_the_field_writes_them():
    assert format_count(8.44e9) == '8.44B' and format_count(240e9) == '240B'


def test_table_is_aligned_markdown():
    records = [{'a': 'ccc', 'bb': 1}]
    assert table(records) == '| a   | bb |\n|-----|---:|\n| ccc |  1 |'


def test_cost_of_a_family(tmp_path):
    grown = result(tmp_path, inherited_flops=30.0, flops=12.0, baseline_flops=60.0)
    alone = result(tmp_path, inherited_flops=0.0, flops=12.0, baseline_flops=60.0)
    single = result(tmp_path, inherited_flops=0.0, flops=12.0)
    assert [family_cost(r) for r in (grown, alone, single)] == [42.0, 60.0, 12.0]
    assert '30.0%' in table(result_records([grown]))
    assert '%' not in table(result_records([alone]))


def test_report_is_written_from_the_folder_alone(tmp_path):
    for i, name in enumerate(('small', 'large', 'independent-large')):
        folder = tmp_path / name
        folder.mkdir()
        result(
            folder,
            name=name,
            val_loss=2.0 - i / 10,
            inherited_flops=12.0 if i == 1 else 0.0,
            baseline_flops=24.0 if i else 12.0,
            finished=1.0 + i,
        ).write()
        (folder / 'metrics.jsonl').write_text(
            ''.join(
                json.dumps(dict(step=s, flops=s * 1.2, loss=3 - s / 10)) + '\n'
                for s in range(1, 11)
            )
        )
    text = render(report_blocks(tmp_path))
    report(tmp_path, [])
    assert [line.split('|')[1].strip() for line in text.splitlines()[2:5]] == [
        'small',
        'large',
        'independent-large',
    ]
    assert (tmp_path / 'report.md').read_text() == text + '\n' and (
        tmp_path / 'report.png'
    ).read_bytes()[:4] == b'\x89PNG'


def test_training_curve_starts_where_the_family_was(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(
        ''.join(json.dumps(dict(step=s, flops=float(s), loss=s)) + '\n' for s in range(1, 13))
    )
    flops, loss = training_curve(result(tmp_path), points=6)
    assert flops == [30 + s for s in (2, 4, 6, 8, 10, 12)] and loss == [
        1.5,
        3.5,
        5.5,
        7.5,
        9.5,
        11.5,
    ]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match='no finished stage'):
        report_blocks(tmp_path)


@pytest.mark.parametrize(
    'column, value, text',
    [
        ('N', 8.44e9, '8.44B'),
        ('FLOPs', 15.4e21, '15.4Z'),
        ('saved', 0.247, '24.7%'),
        ('steps', 40700, '40,700'),
        ('val loss', 1.44894, '1.4489'),
        ('against baseline', -0.0271, '-0.0271'),
        ('memory', 33e9, '33GB'),
        ('val loss', float('nan'), ''),
        ('sd', None, ''),
        ('from', 'a text', 'a text'),
        ('largest eigenvalue', 1234567.0, '1.23e+06'),
        ('tokens/s', 1368.2283, '1,368'),
    ],
)
def test_a_value_is_written_as_its_column_wants_it(column, value, text):
    assert format_cell(column, value) == text


def test_variants_are_compared_seed_by_seed(tmp_path):
    losses = {'random': (2.0, 2.2), 'aki': (1.5, 1.8)}
    results = []
    for variant, values in losses.items():
        for seed, loss in enumerate(values):
            labels = dict(variant=variant, seed=seed)
            results.append(result(tmp_path, val_loss=loss, labels=labels))
    random, aki = compare_variants(results, 'random')
    assert aki['val loss'] == pytest.approx(1.65) and aki['seeds'] == 2
    assert aki['against random'] == pytest.approx(-0.45)
    half = 12.706 * 0.05  # Student's t with one degree of freedom, and the standard error
    assert aki['95% interval'] == f'{-0.45 - half:+.3f} to {-0.45 + half:+.3f}'
    assert random['95% interval'] is None
    assert (
        random['against random'] == 0
        and 'against random' not in compare_variants(results, 'baseline')[0]
    )


def test_an_interval_is_students():
    assert interval([1.0]) is None and interval([1.0, 1.0]) is None
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-3)


def test_a_stage_is_described_by_its_fields():
    stage = Stage('b', GPTConfig.named('16x2'), 10, 1.0)
    assert describe(stage) == '2 layers of width 16, random initialisation'
    stage.origin = Origin('growth', ('a',), dict(width='aki', noise=0.1))
    stage.teaching = dict(objective='let', teacher='t', lambda0=0.1)
    expected = '2 layers of width 16, growth of a (width aki, noise 0.1)'
    assert describe(stage) == f'{expected}, objective let (teacher t, lambda0 0.1)'


def test_steps_to_a_loss_are_interpolated():
    curve = [(0.25, 3.0), (0.5, 2.0), (1.0, 1.0)]
    assert [steps_to_loss(curve, loss) for loss in (3.5, 2.5, 1.5, 0.5)] == [
        0.25,
        0.375,
        0.75,
        None,
    ]
