"""Decisions by scaling laws: the paper's own, what a person asks, and files that cannot be read."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_scaling_laws import TABLE_6, grid

import scaling
from engine.errors import UserError
from scaling import (
    Fit,
    advise,
    certainty,
    compute_optima,
    compute_optimal,
    crossings,
    fit,
    fit_results,
    of_domain,
    optimal,
    published,
    published_sunk_cost_limit,
    read_fits,
    read_results,
    sunk_cost,
    sunk_cost_limits,
)

PAPER = published()


def loss_of(fitted, N, D1, D2):
    """The loss that a fit predicts at one point."""
    return fitted.losses(N, D1, D2)[0, 0].item()


def test_sunk_cost_limit_is_the_papers():
    found = sunk_cost_limits(PAPER['scratch'], PAPER['stk2'], 1e11)[0].item()
    assert found == pytest.approx(1.2e13, rel=0.02)
    grown, scratch = PAPER['stk2'], PAPER['scratch']
    assert loss_of(grown, 1e11, found, found) == pytest.approx(loss_of(scratch, 2e11, 0, found))
    for N in (1e10, 1e11, 1e12):  # Appendix E.1's approximation
        limits = sunk_cost_limits(scratch, grown, N)
        assert limits[0].item() == pytest.approx(published_sunk_cost_limit(N), rel=0.1)
    assert published_sunk_cost_limit(1e11) == 13e12


def test_crossings():
    def losses(*amplitudes_and_exponents):
        return lambda D: np.stack([a * D**-b for a, b in amplitudes_and_exponents])

    found = crossings(losses((3, 0.1), (0.5, 0), (1, 0)), losses((10, 0.2), (1, 0), (0.5, 0)))
    assert found.tolist() == [pytest.approx((10 / 3) ** 10), math.inf, 0.0]


def test_a_decision_is_as_certain_as_the_laws():
    """The published coefficients within their rounding: what do they decide?"""
    records, panels = sunk_cost(PAPER, 'stk2', paper=True)
    assert len(records) == 9 and len(panels[0].lines) == 4
    limits = sunk_cost_limits(PAPER['scratch'], PAPER['stk2'], 1e11)
    columns = certainty('D* (tokens)', limits)
    assert columns['D* (tokens)'] == '11.9T'
    never, always = (np.mean(limits[1:] == answer) for answer in (0, math.inf))
    assert columns['none'] == f'{never:.0%}' and columns['any'] == f'{always:.0%}'
    assert 0.15 < never < 0.3 and always < 0.05
    inside = limits[np.isfinite(limits) & (limits > 0)]
    assert inside.min() < 2e10 and inside.max() > 1e19
    first, *_ = advise(of_domain(PAPER, ''), 1e9, 2e12, 1e22)
    assert first['choice'] == 'grow by stk2, 2B' and first['best in'] == '62%'
    assert first['D2 up to which it beats starting over'] == '736T'
    assert first['any'] == '48%'


def test_the_optimum_of_every_law():
    records, panels = optimal(PAPER['stk2'], 'stk2', 1e10)
    points = compute_optima(PAPER['stk2'], 1e10, 1e21, factor=2)
    expected = compute_optimal(PAPER['stk2'].parameters, 1e10, 1e21, 2)
    assert points[0].tolist() == pytest.approx(list(expected)) and len(points) == 201
    assert {record['none'] for record in records} == {'0%'} and len(panels) == 2
    low, high = records[0]['90% of D2'].split(' to ')
    assert low != high
    with pytest.raises(UserError, match='no compute-optimal point'):
        optimal(PAPER['stk2'], 'stk2', 1e60)
    uncertain = PAPER['stk2']._replace(samples=[[*PAPER['stk2'].samples[0][:3], 9.0, 1, 1, 1]] * 3)
    records, _ = optimal(uncertain, 'stk2', 1e10)
    assert records[0]['none'] == '100%'
    alone = PAPER['stk2']._replace(samples=PAPER['stk2'].samples[:1])
    records, _ = optimal(alone, 'stk2', 1e10)
    assert '90% of D2' not in records[0] and 'none' not in records[0]


def test_what_does_not_add_up_in_the_paper():
    """docs/scaling.md, "What does not add up": its numbers."""
    data = read_results(ROOT / 'data' / 'published_reuse_losses.csv')['stk2']
    expected = {14_751_680: (1.259, 1.244), 521_889_760: (1.62, 1.377)}
    for N, (with_it, without) in expected.items():
        chosen = [i for i, n in enumerate(data['N']) if n == N]
        rows = {k: [v[i] for i in chosen] for k, v in data.items()}
        found = fit('multiplicative', rows, bootstrap=100 if N > 1e8 else 0)
        assert 1e3 * found.leave_one_out == pytest.approx(with_it, abs=0.02)
        rival = fit('no_interaction', rows, bootstrap=0)
        assert 1e3 * rival.leave_one_out == pytest.approx(without, abs=0.02)
    low, high = found.intervals['alpha3']  # of the 0.5B base
    assert low < -0.3 and high > 0.1
    limits = [sunk_cost_limits(PAPER['scratch'], PAPER['stk2'], N)[0] for N in (1e8, 5e8, 5e9)]
    assert limits[0] < limits[1] > limits[2]  # D* rises before it falls
    N, D1 = 521_889_760, 7.38e10
    scratch = PAPER['scratch']
    found = crossings(
        lambda D: PAPER['stk2'].losses(N, D1, D), lambda D: scratch.losses(2 * N, 0.0, D)
    )
    assert found[0] == math.inf  # Figure 4 has a crossing


@pytest.mark.parametrize('method, factor', [('cpt-code', 1), ('stk2', 2)])
def test_compute_optimum_is_the_numerical_one(method, factor):
    fitted, D1, compute = PAPER[method], 1e10, 1e21
    D2, N = compute_optimal(fitted.parameters, D1, compute, factor)
    assert 6 * factor * N * D2 == pytest.approx(compute)
    around = [loss_of(fitted, N * s, D1, D2 / s) for s in np.logspace(-0.5, 0.5, 101)]
    assert min(range(101), key=around.__getitem__) == 50
    assert compute_optimal(fitted.parameters, 1e60, compute) == (0, 0)  # more tokens never help


def test_eq_13_is_how_the_optimum_grows_with_compute():
    p = PAPER['cpt-code'].parameters
    effective = p['alpha2'] - p['alpha3'] * math.log(1e10)
    (d, n), (d10, n10) = (
        compute_optimal(p, 1e10, 1e20),
        compute_optimal(p, 1e10, 1e21),
    )
    assert math.log10(d10 / d) == pytest.approx(p['beta'] / (p['beta'] + effective)) and math.log10(
        n10 / n
    ) == pytest.approx(effective / (p['beta'] + effective))


def test_published_losses_are_fitted():
    data = read_results(ROOT / 'data' / 'published_reuse_losses.csv')['stk2']
    large = [i for i, n in enumerate(data['N']) if n == 521_889_760]
    table_9 = {k: [v[i] for i in large] for k, v in data.items()}
    assert len(data['loss']) == 27 and len(large) == 13
    found = fit('multiplicative', table_9, bootstrap=0)
    assert (
        found.rms < 1.2e-3 and found.parameters['alpha1'] > 0 and found.parameters['alpha3'] > 0
    )  # Table 9's own error: 0.0012-0.0016


# ----------------------------------------------------------------------------------------------
# advice


def test_advice_by_the_published_laws():
    records = advise(of_domain(PAPER, ''), 1e9, 2e12, 1e22)
    names = [record['choice'] for record in records]
    assert names == ['grow by stk2, 2B', 'continue, 1B', 'start over, 2B', 'start over, 1B']
    losses = [record['predicted loss'] for record in records]
    assert losses == sorted(losses)
    assert sum(int(record['best in'][:-1]) for record in records) == pytest.approx(100, abs=2)
    assert 'D1 = 2e+12 (2.9e+08 to 7.4e+10 seen)' in records[0]['not seen by the fit']
    inside = advise(of_domain(PAPER, ''), 1e8, 1e10, 6e8 * 2e10)
    assert not any(record['not seen by the fit'] for record in inside)
    code = [record['choice'] for record in advise(of_domain(PAPER, 'code'), 1e9, 1e10, 1e20)]
    assert 'continue cpt, 1B' in code and not [name for name in code if 'stk2' in name]
    with pytest.raises(UserError, match='no domain'):
        of_domain(PAPER, 'medicine')


# ----------------------------------------------------------------------------------------------
# files and commands


def write(path, data, method='stk2', growth=None):
    rows = [
        f'{method},{n},{d1},{d2},0,{loss}' + (f',{growth * n}' if growth else '')
        for n, d1, d2, loss in zip(data['N'], data['D1'], data['D2'], data['loss'])
    ]
    head = 'method,N,D1,D2,seed,loss' + (',trained_N' if growth else '')
    path.write_text('\n'.join([head, *rows]) + '\n')


def test_fit_from_a_file_to_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, 'laws_for', lambda data: ['multiplicative', 'no_interaction'])
    write(tmp_path / 'results.csv', grid('multiplicative', TABLE_6['Stack'], n=4, noise=1e-4))
    scaling.main(['fit', str(tmp_path / 'results.csv'), '--bootstrap=20'])
    out = capsys.readouterr().out
    assert (
        '| alpha3 ' in out
        and '| no_interaction ' in out
        and (tmp_path / 'stk2.png').stat().st_size > 10_000
        and (tmp_path / 'stk2_laws.png').stat().st_size > 10_000
    )
    fits = read_fits(tmp_path / 'fit.json')
    assert len(fits['stk2'].samples) == 20 and fits['stk2'].parameters['alpha1'] == pytest.approx(
        0.515, rel=0.2
    )
    scaling.main(
        [
            'advise',
            f'--fit={tmp_path / "fit.json"}',
            '--base_params=98323840',
            '--base_tokens=4e9',
            '--budget=1e19',
        ]
    )
    assert '| grow by stk2, 197M |' in capsys.readouterr().out


def test_the_size_that_is_trained_is_counted_as_it_is(tmp_path):
    """Width by sqrt 2 at 8 heads is 1.89 times the parameters, not twice."""
    data = grid('multiplicative', TABLE_6['Stack'])
    for name, growth in (('with', 1.89), ('without', None)):
        write(tmp_path / f'{name}.csv', data, 'exp', growth)
        (found,) = read_results(tmp_path / f'{name}.csv').values()
        fits = dict(exp=fit('multiplicative', found, bootstrap=0))
        assert fits['exp'].growth == (growth and pytest.approx(growth))
        N = data['N'][0]
        (record,) = advise(fits, N, 4e9, 1e19)
        assert record['choice'] == f'grow by exp, {(growth or 2) * N / 1e6:.0f}M'
    write(tmp_path / 'smaller.csv', data, 'exp', 0.9)
    with pytest.raises(UserError, match='row 2: trained_N must be at least N'):
        read_results(tmp_path / 'smaller.csv')


def test_twins_are_left_out_together():
    """Runs that differ by their seed alone do not make the leave-one-out error smaller."""
    generator = torch.Generator().manual_seed(0)
    once = grid('multiplicative', TABLE_6['Stack'])
    noise = 1 + 0.01 * torch.randn(len(once['loss']), generator=generator)
    once['loss'] = [loss * n for loss, n in zip(once['loss'], noise.tolist())]
    twice = {name: [*values, *values] for name, values in once.items()}
    alone = fit('multiplicative', once, bootstrap=0)
    twins = fit('multiplicative', twice, bootstrap=0)
    assert twins.leave_one_out == pytest.approx(alone.leave_one_out, rel=1e-3)
    assert twins.leave_one_out > 1.2 * twins.rms


def test_a_base_is_left_out_with_all_that_was_made_from_it():
    """A base that is off takes its second stages with it; the law of the others does not know."""
    data = grid('multiplicative', TABLE_6['Stack'], noise=1e-4)
    off = sorted(set(data['D1']))[-1]
    shifted = [1.02 * loss if D1 == off else loss for loss, D1 in zip(data['loss'], data['D1'])]
    exact = fit('multiplicative', data, bootstrap=0)
    found = fit('multiplicative', dict(data, loss=shifted), bootstrap=0)
    assert exact.base_left_out < 1e-3 < 5e-3 < found.base_left_out
    assert found.leave_one_out < 0.7 * found.base_left_out  # its twins tell of it
    kept = [i for i, D1 in enumerate(data['D1']) if D1 == off]
    alone = {column: [values[i] for i in kept] for column, values in data.items()}
    assert fit('continuous', alone, bootstrap=0).base_left_out is None  # there is no other


def test_laws_that_points_can_carry():
    single, several = dict(N=[1, 1], D1=[1, 2]), dict(N=[1, 2, 3], D1=[1, 2, 2])
    assert 'multiplicative' in scaling.laws_for(single) and scaling.laws_for(several) == ['joint']
    found = [scaling.laws_for(dict(N=[1, n], D1=[0, 0])) for n in (1, 2)]
    assert found == [['continuous'], ['chinchilla']]


@pytest.mark.parametrize(
    'text, word',
    [
        ('', 'not a CSV file'),
        ('method,N,D1,D2,seed,lost\n', "no column 'loss' .did you mean lost"),
        ('method,N,D1,D2,seed,loss,,\n', 'holds no results'),  # as spreadsheets write
        ('method,N,D1,D2,seed,loss\n', 'holds no results'),
        ('method,N,D1,D2,seed,loss\na,1,1,1,0,-1\n', 'row 2: loss, N and D2 must be positive'),
        ('method,N,D1,D2,seed,loss\na,1,1,0,0,1\n', 'positive'),
        ('method,N,D1,D2,seed,loss\na,1,1,1,0,nan\n', 'a number is missing'),
        ('method,N,D1,D2,seed,loss\na,1,x,1,0,1\n', 'a number is missing'),
        ('method,N,D1,D2,seed,loss\na,1,1,1\n', 'a number is missing'),
        (
            'method,N,D1,D2,seed,loss\na,1,1,1,0,1\na,1,1,1,0,2\n',
            'row 3: it has method',
        ),
        ('method,N,D1,D2,seed,loss\na,1,0,1,0,1\na,1,5,1,0,1\n', 'points from scratch'),
        ('\xff\x00', 'no column|not a CSV'),
    ],
)
def test_files_that_are_no_results(tmp_path, text, word):
    (tmp_path / 'r.csv').write_text(text)
    with pytest.raises(UserError, match=word):
        read_results(tmp_path / 'r.csv')


def test_a_file_of_too_few_points_is_said_in_words(tmp_path):
    write(tmp_path / 'r.csv', grid('multiplicative', TABLE_6['Stack'], n=2))
    with pytest.raises(UserError, match='needs at least 7 points, 6 of them .* not 4 and 4'):
        fit_results(tmp_path / 'r.csv')


@pytest.mark.parametrize(
    'content',
    [
        '',
        '{',
        '[]',
        '{"a": 1}',
        '{"a": {"law": "cubic"}}',
        json.dumps({'a': Fit('joint', {}, {}, [], 0, 0, {})._asdict()}),
        json.dumps({'a': PAPER['stk2']._replace(seen={})._asdict()}),
    ],
)
def test_files_that_are_no_fits(tmp_path, content):
    (tmp_path / 'fit.json').write_text(content)
    with pytest.raises(UserError, match='not a fit.json'):
        read_fits(tmp_path / 'fit.json')


@pytest.mark.parametrize(
    'arguments, word',
    [
        (['guess'], "no verb 'guess'"),
        (['fit'], 'usage: scaling.py fit'),
        (['advise', '--paper=True'], 'missing argument --base_params'),
        (['advise', '--base_params=1', '--base_tokens=1', '--budget=1'], 'whose laws'),
    ],
)
def test_mistakes_at_the_command_line(arguments, word):
    with pytest.raises(UserError, match=word):
        scaling.main(arguments)
