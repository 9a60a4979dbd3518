"""
Scaling laws of model reuse: laws, fits, the published numbers, decisions, files and commands; and
the grid of runs, in which nothing is trained twice.
"""

import math
import re

import numpy as np
import pandas
import pytest
from conftest import ROOT, refuses, succeeds
from scipy.optimize import minimize_scalar
from test_train import plan_of

import scaling
from engine.errors import UserError
from engine.optimizer import learning_rate
from engine.stage import Result, describe
from model import load
from scaling import (
    LAWS,
    advise,
    certainty,
    compute_optimal,
    crossings,
    fit,
    groups_of,
    leave_one_out,
    plan_family,
    predict,
    published,
    read_results,
    sunk_cost_limits,
)

PAPER = published()
LOSSES = read_results(ROOT / 'data' / 'published_reuse_losses.csv')


def law_of(alpha1, alpha2, alpha3):
    """A law with such exponents, and factors that put losses where a model of 0.1B has them."""
    log_D = math.log(2e9)
    A = alpha1 * log_D + (alpha2 - alpha3 * log_D) * log_D
    return dict(A=A, alpha1=alpha1, alpha2=alpha2, alpha3=alpha3, E=math.log(1.2))


STACK = law_of(0.515, 0.350, 0.017)  # Table 6
SIZE = 98_323_840  # 0.1B


def grid(parameters=STACK, n=4, noise=0.0, sizes=(SIZE,), seed=0):
    """Losses of a multiplicative law on the paper's grid of D1 and D2, with relative noise."""
    D = [9.2275e9 / 2**i for i in range(n)]
    rows = [(N, D1, D2) for D1 in D for D2 in D for N in sizes]
    data = pandas.DataFrame(rows, columns=['N', 'D1', 'D2'], dtype=float)
    loss = predict('multiplicative', [*parameters.values()], data)
    loss *= 1 + noise * np.random.default_rng(seed).standard_normal(len(rows))
    words = dict(method='stk2', variant='', corpus='', seed=0.0, trained_N=2 * data.N)
    return data.assign(loss=loss, **words)


# ----------------------------------------------------------------------------------------------
# laws and fits


def test_a_law_predicts_what_its_equation_says():
    A, F, B, E, Dmax = 30, 7, 20, 1.1, 1e10
    logs = {name: math.log(value) for name, value in dict(A=A, F=F, B=B, E=E, Dmax=Dmax).items()}
    p = logs | dict(alpha1=0.1, alpha2=0.2, alpha3=0.003, beta=0.2, alpha=0.15)
    main = lambda d1, d2: A * d1**-0.1 * d2 ** (-0.2 + 0.003 * math.log(d1))  # noqa: E731
    expected = {
        'multiplicative': main(3e9, 5e9) + E,
        'no_interaction': A * 3e9**-0.1 * 5e9**-0.2 + E,
        'additive': A * 3e9**-0.1 + F * 5e9**-0.2 + E,
        'hybrid': (A * 3e9**-0.1 + F) * 5e9**-0.2 + E,
        'continuous': A * 8e9**-0.15 + E,
        'chinchilla': A * 8e9**-0.15 + B * 1e8**-0.2 + E,
        'joint': main(3e9, 5e9) + B * 1e8**-0.2 + E,
        'saturated_D1': main(1 / (1 / 3e9 + 1 / 1e10), 5e9) + E,
        'saturated_D2': main(3e9, 1 / (1 / 5e9 + 1 / 1e10)) + E,
    }
    assert expected.keys() == LAWS.keys()
    for law, value in expected.items():
        theta = [p[name] for name in LAWS[law].parameters.split()]
        found = predict(law, theta, dict(N=[1e8], D1=[3e9], D2=[5e9]))
        assert found == pytest.approx(value, rel=1e-12), law


@pytest.mark.parametrize(
    'exponents', [(0.106, 0.146, 0.004), (0.981, 0.388, 0.017), (0.549, 0.852, 0.024)]
)
def test_table_6_gives_its_coefficients_back(exponents):
    """CPT on code and on mathematics, and Expand."""
    found = fit('multiplicative', grid(law_of(*exponents)), bootstrap=0)
    assert found.parameters == pytest.approx(law_of(*exponents), rel=2e-3, abs=2e-4)


def test_intervals_cover_the_truth():
    """90% intervals of alpha1, alpha2 and alpha3 in four noisy grids: of 12, about 11."""
    covered = 0
    for seed in range(4):
        found = fit('multiplicative', grid(noise=1e-3, seed=seed), 20)
        low, high = np.quantile(found.rows, (0.05, 0.95), axis=0)
        truth = [STACK[name] for name in found.parameters]
        covered += sum(low[i] <= truth[i] <= high[i] for i in (1, 2, 3))
    assert covered >= 8


def test_the_interaction_is_told_from_its_absence():
    data = grid(noise=3e-4)
    assert leave_one_out('multiplicative', data) < 0.7 * leave_one_out('no_interaction', data)


def test_an_outlier_has_little_weight():
    """The knee of the Huber loss is at 1e-3 of log L: without it alpha1 would be 0.23."""
    data = grid(noise=1e-4)
    data.loc[5, 'loss'] *= 1.05
    found = fit('multiplicative', data, bootstrap=0).parameters
    assert found['alpha1'] == pytest.approx(STACK['alpha1'], rel=0.06)


def test_twins_are_left_out_and_resampled_together():
    """Runs that differ by their seed alone make no error and no interval smaller."""
    once = grid(noise=0.01)
    both = once, pandas.concat([once, once], ignore_index=True)
    errors = [leave_one_out('multiplicative', data) for data in both]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    spreads = [fit('multiplicative', data, 5).rows.std(0)[1] for data in both]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.15)


def test_a_pair_of_sizes_has_a_law_each():
    """A law in N needs three."""
    two, three = grid(sizes=(1e8, 2e8)), grid(sizes=(1e8, 2e8, 4e8))
    assert list(groups_of(two)) == ['stk2-100M', 'stk2-200M']
    assert list(groups_of(three)) == ['stk2'] and scaling.laws_for(three) == ['joint']
    assert scaling.laws_for(two[::2])[0] == 'multiplicative'
    assert scaling.laws_for(three.assign(D1=0)) == ['chinchilla']


# ----------------------------------------------------------------------------------------------
# what was published (docs/scaling.md, "What does not add up"), and decisions


def test_the_papers_laws_predict_the_papers_losses():
    """As printed they do not: within their rounding, some do."""
    found = PAPER['stk2'].losses(LOSSES.N.to_numpy(), LOSSES.D1, LOSSES.D2) - LOSSES.loss.to_numpy()
    assert found.shape == (201, 27) and (np.sqrt((found**2).mean(1)) < 0.06).all()
    table_7 = dict(A=33.394, alpha1=0.087, alpha2=0.119, alpha3=0.003, B=22.471)
    table_7 |= dict(beta=0.173, E=0.041)
    printed = [math.log(v) if k in scaling.LOGS else v for k, v in table_7.items()]
    off = (predict('joint', printed, LOSSES) - LOSSES.loss).mean()
    assert off == pytest.approx(-0.255, abs=1e-3)


def test_decisions_by_the_published_laws():
    """Growing beats starting over up to some 10B tokens, and a base of 1e11 has no D*."""
    grown, scratch = PAPER['stk2'], PAPER['scratch']
    limits = sunk_cost_limits(scratch, grown, 1e9)
    assert limits[0] == pytest.approx(1.07e10, rel=0.02)
    assert np.mean(sunk_cost_limits(scratch, grown, 1e11) == 0) > 0.8  # the paper: 13T
    fits = {name: fitted for name, fitted in PAPER.items() if not fitted.data.corpus.iloc[0]}
    first, second, last = advise(fits, 1e9, 2e12, 1e22)
    assert [r['choice'] for r in (first, second, last)] == ['continue', 'start over', 'stk2']
    assert first['best in'] == '100%' and last['N'] == 2e9
    assert last['not seen by the fit'] == 'D1, D2' and second['not seen by the fit'] == 'N, D2'


@pytest.mark.parametrize('name', ['cpt-code', 'stk2'])
def test_the_compute_optimum_is_the_numerical_one(name):
    """Eq. 13: a budget of 6 FLOPs for each parameter that is trained, and each token."""
    fitted, D1, budget = PAPER[name], 1e10, 1e21
    D2, N = (values[0] for values in compute_optimal(fitted, D1, budget))
    assert 6 * N * D2 * (2 if name == 'stk2' else 1) == pytest.approx(budget)

    def loss(log):
        return fitted.losses(N * math.exp(-log), D1, D2 * math.exp(log))[0].item()

    assert minimize_scalar(loss, (-1, 1)).x == pytest.approx(0, abs=1e-3)
    assert compute_optimal(fitted, 1e60, budget)[0][0] == 0  # more tokens never help


def test_a_crossing_is_the_last_one_and_never_and_always_are_two_answers():
    reused = np.array([[3.0, 0.1], [0.5, 0.0], [1.0, 0.0]])
    fresh = np.array([[10.0, 0.2], [1.0, 0.0], [0.5, 0.0]])

    def losses(law, D):
        return law[:, :1] * np.atleast_1d(D) ** -law[:, 1:]

    found = crossings(lambda D: losses(fresh, D) - losses(reused, D))
    assert found.tolist() == [pytest.approx((10 / 3) ** 10), math.inf, 0.0]
    columns = certainty('D*', found)
    assert columns == {'D*': '169k', '90% of D*': 'none to any', 'any': '33%', 'none': '33%'}


def test_the_size_that_is_trained_is_counted_as_it_is():
    """A growth by 1.89, as results.csv has it, not by 2."""
    data = grid().assign(method='exp', trained_N=1.89 * SIZE)
    (record,) = advise(dict(exp=fit('multiplicative', data, bootstrap=0)), SIZE, 4e9, 1e19)
    assert record['N'] == pytest.approx(1.89 * SIZE)
    assert record['tokens'] == pytest.approx(1e19 / (6 * 1.89 * SIZE))


# ----------------------------------------------------------------------------------------------
# files and commands


def test_from_a_file_to_a_report_and_advice(tmp_path, monkeypatch):
    """Two bases with four second stages each, of two seeds, and the grown size from scratch."""
    laws = ['multiplicative', 'no_interaction']  # not all, which takes long
    monkeypatch.setattr(scaling, 'laws_for', lambda d: laws if d.D1.any() else ['continuous'])
    grown = grid(noise=1e-4)[:8]
    scratch = grown.assign(method='scratch', N=2 * grown.N, D1=0.0, loss=grown.loss + 0.1)[:4]
    twins = grown.assign(seed=1.0, loss=grown.loss + 1e-3)
    path = tmp_path / 'results.csv'
    pandas.concat([grown, twins, scratch]).to_csv(path, index=False)
    out = succeeds(f'scaling.py fit {path} --bootstrap=2')
    assert 'stk2, 16 points: L = A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + E' in out
    assert '| alpha3 ' in out and ' spread over seeds ' in out
    errors = dict(re.findall(r'\| (multiplicative\S* ?\w*)[^|]*\| +([\d.]+) ', out))
    assert float(errors['multiplicative, of']) > 2 * float(errors['multiplicative '])  # D.4
    for name in ('stk2', 'stk2_laws', 'scratch'):
        assert (tmp_path / f'{name}.png').stat().st_size > 10_000
    line = f'scaling.py advise {path} --bootstrap=2 --base_params'
    out = succeeds(f'{line}={SIZE} --base_tokens=4e9 --budget=1e19')
    assert '| stk2 ' in out and '197M' in out and '| start over ' in out
    refuses(f'{line}=1000', 'no law covers N = 1,000')


HEAD = 'method,N,D1,D2,seed,loss\n'


@pytest.mark.parametrize(
    'text, words',
    [
        ('', 'separated by commas: EmptyDataError'),
        ('method;N;D1;D2;seed;loss\na;1;1e9;1e9;0;3\n', 'separated by commas: KeyError'),
        (HEAD + 'stk2,1,x,1e9,0,1\n', 'could not convert'),
        (HEAD + 'stk2,1e8,1e9,1e9,0,-1\n', 'row 2: N and loss must be positive'),
        (HEAD + 'stk2,1e8,1e9,1e9,0,3\nstk2,1e8,2,5,0,3\n', 'row 3.*not billions'),
        (HEAD + 'stk2,1e8,0,1e9,0,3\n', 'row 2.* scratch alone'),
        (HEAD + 'scratch,1e8,1e9,1e9,0,3\n', 'row 2.* scratch alone'),
        (HEAD + 'stk2,1e8,1e9,1e9,,3\n', 'row 2.* missing'),
        (HEAD + 'stk2,1e8,1e9,1e9,0,inf\n', 'row 2.* infinite'),
        (HEAD + 'stk2,1e8,1e9,1e9,0,3\nstk2,1e8,1e9,1e9,0,2\n', 'row 3.* all of another'),
        (HEAD[:-1] + ',trained_N\nexp,1e8,1e9,1e9,0,3,9e7\n', 'row 2.* at least N'),
        ('\xff\x00', 'separated by commas'),
    ],
)
def test_files_that_are_no_results(tmp_path, text, words):
    (tmp_path / 'r.csv').write_text(text)
    with pytest.raises(UserError, match=words):
        read_results(tmp_path / 'r.csv')


def test_commands_about_the_paper(tmp_path):
    for line, words in (
        ('sunk_cost', 'D* (tokens)'),
        ('optimal', 'N of the base'),
        ('advise --corpus=code', '| cpt-code '),
    ):
        assert words in succeeds(f'scaling.py {line} --paper --out={tmp_path}')
    assert (tmp_path / 'sunk_cost.png').stat().st_size > 10_000
    for line, words in (
        ('guess', "no verb 'guess'"),
        ('fit', 'missing argument: RESULTS.csv'),
        ('advise --paper --base_tokens=2', 'base_tokens must be .*at least 1000'),
        ('sunk_cost --paper --growth=exp', 'needs a joint law of exp'),
    ):
        refuses(f'scaling.py {line}', words)


# ----------------------------------------------------------------------------------------------
# the grid of runs

LOOP = '--block_size=16 --batch_size=4 --eval_tokens=256 --learning_rate=0.01 --warmup=2'
LOOP += ' --decay_fraction=0.2 --log_interval=1'
GRID = f'{LOOP} --method=sweep --size=16x1 --longest=2560 --first=0.5,1 --second=0.5,1'


@pytest.fixture
def planned(data_dir):
    """A function: the plan of the tiny grid, with more knobs."""
    return lambda *more: plan_of(*GRID.split(), f'--data_dir={data_dir}', *more)


@pytest.fixture(scope='module')
def swept(data_dir, tmp_path_factory):
    """2 x 2 grids of continual pretraining and stacking, their variants, and from scratch."""
    out = tmp_path_factory.mktemp('sweep')
    more = '--reuse=cpt,stk2 --variants=stable,replay --second_data=pycode --scratch=0.5'
    succeeds(f'train.py {GRID} {more} --data_dir={data_dir} --out_dir={out}')
    return out


def test_every_point_is_in_the_table(swept):
    rows = pandas.read_csv(swept / 'results.csv').fillna('')
    found = set(zip(rows.method, rows.variant, rows.corpus, rows.D1, rows.D2))
    ways = [('cpt', '', 'pycode'), ('cpt', 'replay', 'pycode'), ('stk2', '', '')]
    expected = {(*way, D1, D2) for way in ways for D1 in (1280, 2560) for D2 in (1280, 2560)}
    ways = [('cpt', 'stable', 'pycode'), ('stk2', 'stable', '')]  # before the base's decay
    expected |= {(*way, D1, D2) for way in ways for D1 in (1024, 2048) for D2 in (1280, 2560)}
    expected |= {('scratch', '', '', 0, D2) for D2 in (1280, 2560)}
    assert found == expected | {('scratch', '', 'pycode', 0, 1280)}
    assert re.search('no fit.*too few points for laws', (swept / 'report.md').read_text())


def test_a_branch_is_the_run_that_would_have_been_trained_alone(swept, data_dir, tmp_path):
    line = f'train.py {LOOP} --size=16x1 --tokens=2560 --schedule=wsd'
    succeeds(f'{line} --data_dir={data_dir} --out_dir={tmp_path}')
    alone, branch = Result.of(tmp_path / '16x1'), Result.of(swept / '16x1-2.56k')
    assert branch.val_loss == pytest.approx(alone.val_loss, abs=1e-4)
    assert branch.total_flops == alone.flops and branch.position == alone.position
    pairs = zip(load(alone.folder).parameters(), load(branch.folder).parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-5 for a, b in pairs)


def test_runs_share_one_stable_phase(planned):
    """(start, stop, last, end): pieces of the stable phase, and the step at which each run ends."""
    pieces = plan_family({1000, 2000, 500}, 10, 0.1)
    assert pieces == [(0, 45, 50, 500), (45, 90, 100, 1000), (90, 180, 200, 2000)]
    assert plan_family({1, 40}, 10, 0.1) == [(0, 1, 2, 1), (1, 3, 4, 40)]  # a step for either phase
    found = []
    for name in ('16x1-stable-1.02k', '16x1-stable-2.05k', '16x1-2.56k'):
        _, knobs, steps, _ = planned()[name]
        found += [learning_rate(step, steps, knobs) for step in range(steps)]
    assert found[:2] == [0.005, 0.01] and found[2:33] == [0.01] * 31
    assert found[32:] == pytest.approx([0.01 - 0.001125 * i for i in range(8)])


def test_the_papers_grid_costs_its_longest_runs_and_its_decays():
    stages = [p.stage for p in plan_of('config/scaling_stk2.py', '--scratch=').values()]
    tokens = sum(s.tokens for s in stages if 'stk2' not in s.name)
    longest = 17600 * 512 * 1024
    ends = [longest / 2**i for i in range(5)]
    assert tokens == pytest.approx(0.9 * longest + 0.1 * sum(ends), rel=1e-3)
    second = [s for s in stages if s.labels.get('D2') and 'stk2' in s.name]
    assert len(second) == 25 and all(s.config.n_layer == 30 for s in second)


@pytest.mark.parametrize('fresh, offset', [(False, 0), (True, 1280)])
def test_second_stages_read_the_data_again_or_fresh_data(planned, fresh, offset):
    """From the beginning for every base, as in the paper, or on from where the base stopped."""
    plan = planned(f'--fresh_data={fresh}')
    first, branch = plan['16x1-1.28k-stk2-stable-1.02k'], plan['16x1-1.28k-stk2-1.28k']
    assert first.stage.position == offset and first.stage.parent.position == 1280
    assert branch.stage.position == offset + 1024 and branch.result.position == offset + 1280


def test_replay_reads_both_corpora_and_the_stable_phase_no_warmup():
    plan = plan_of('config/scaling_cpt_code.py', '--variants=replay,stable')
    replay = plan['0.1b-577M-cpt+replay-stable-519M'].stage
    assert replay.knobs['data'] == 'starcoder:0.75,slimpajama:0.25'
    assert replay.knobs['val_data'] == 'starcoder' and 'warmup' not in replay.knobs
    stable = plan['0.1b-577M-cpt+stable-stable-519M'].stage
    assert stable.knobs['data'] == 'starcoder' and stable.knobs['warmup'] == 0
    assert describe(stable).endswith('last state of 0.1b-stable-519M')
    assert stable.labels['D1'] == stable.parent.position < 0.91 * 577e6  # what it has seen
