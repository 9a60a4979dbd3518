"""Evaluation: the mean is over targets, and the report says what the results say."""
import json
import math

import pytest
import torch

from configurator import UserError
from evaluate import bits_per_byte, count, evaluate, family_cost, human, report, result_table, table, training_curve
from test_configurator import result
from test_model import small, tokens


def test_the_mean_is_over_targets_not_over_batches():
    model, x, y = small(), tokens(4), tokens(4).roll(1, 1)
    y_padded = torch.cat((y[3:], torch.full_like(y[:2], -100)))
    x_padded = torch.cat((x[3:], x[:2]))
    found = evaluate(model, [(x[:3], y[:3], 60), (x_padded, y_padded, 20)])
    assert found == pytest.approx(model(x, y).loss.item(), abs=1e-6)
    assert model.training


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0) and bits_per_byte(4 * math.log(2), 4.0) == pytest.approx(1.0)


@pytest.mark.parametrize('number, text', [(15.36e21, '15.4Z'), (0, ''), (7, '7'), (999.9e3, '1e+03k'), (1234567, '1.23M'), (2e30, '2e+06Y')])
def test_human(number, text):
    assert human(number) == text


def test_count():
    assert count(8.44e9) == '8.44B' and count(240e9) == '240B'


def test_table_is_aligned_markdown():
    assert table([['a', 'bb'], ['ccc', '1']]) == '| a   | bb |\n|-----|---:|\n| ccc |  1 |'


def test_cost_of_a_family(tmp_path):
    grown = result(tmp_path, inherited_flops=30.0, flops=12.0, baseline_flops=60.0)
    alone = result(tmp_path, inherited_flops=0.0, flops=12.0, baseline_flops=60.0)
    single = result(tmp_path, inherited_flops=0.0, flops=12.0)
    assert [family_cost(r) for r in (grown, alone, single)] == [42.0, 60.0, 12.0]
    assert '30.0%' in result_table([grown]) and '%' not in result_table([alone])


def test_report_is_written_from_the_folder_alone(tmp_path):
    for i, name in enumerate(('small', 'large', 'independent-large')):
        folder = tmp_path / name
        folder.mkdir()
        result(folder, name=name, val_loss=2.0 - i / 10, inherited_flops=12.0 if i == 1 else 0.0, baseline_flops=24.0 if i else 12.0).write()
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(dict(step=s, flops=s * 1.2, loss=3 - s / 10)) + '\n' for s in range(1, 11)))
    text = report(tmp_path)
    assert [line.split('|')[1].strip() for line in text.splitlines()[2:]] == ['small', 'large', 'independent-large']
    assert (tmp_path / 'report.md').read_text().startswith(text) and (tmp_path / 'report.png').read_bytes()[:4] == b'\x89PNG'


def test_training_curve_starts_where_the_family_was(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(dict(step=s, flops=float(s), loss=s)) + '\n' for s in range(1, 13)))
    flops, loss = training_curve(result(tmp_path), points=6)
    assert flops == [30 + s for s in (2, 4, 6, 8, 10, 12)] and loss == [1.5, 3.5, 5.5, 7.5, 9.5, 11.5]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match='no finished stage'):
        report(tmp_path)
