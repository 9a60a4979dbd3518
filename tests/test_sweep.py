"""
The grid of a scaling law (scaling.py, Sweep): nothing is trained twice, and what shares a stable
phase is what would have been trained alone.
"""

import pandas
import pytest
from conftest import ROOT
from test_train import planned

import train
from engine.errors import UserError
from engine.optimizer import learning_rate
from engine.stage import Result, describe
from engine.state import stage_identity
from model import GPTConfig, load
from scaling import plan_family
from train import Run

LOOP = {
    'block_size': 16,
    'batch_size': 4,
    'eval_tokens': 256,
    'learning_rate': 0.01,
    'warmup': 2,
    'decay_fraction': 0.2,
    'log_interval': 1,
    'device': 'cpu',
}
LOOP = [f'--{knob}={value}' for knob, value in LOOP.items()]
GRID = [*LOOP, '--method=sweep', '--size=16x1', '--longest=2560', '--first=0.5,1', '--second=0.5,1']


def plan_of(data_dir, *more):
    """{name: Planned} of the tiny grid."""
    argv = [*GRID, f'--data_dir={data_dir}', *more]
    run, method, _ = train.configure(argv, Run, train.METHODS)
    return {planned.stage.name: planned for planned in train.plan(run, method)}


@pytest.fixture(scope='module')
def swept(data_dir, tmp_path_factory):
    """2 x 2 grids of continual pretraining and stacking, their variants, and from scratch."""
    out = tmp_path_factory.mktemp('sweep')
    knobs = [
        '--reuse=cpt,stk2',
        '--variants=stable,replay',
        '--second_data=pycode',
        '--scratch=0.5',
    ]
    train.main([*GRID, f'--data_dir={data_dir}', f'--out_dir={out}', *knobs])
    return out


def test_every_point_is_in_the_table(swept):
    rows = pandas.read_csv(swept / 'results.csv').fillna('')
    found = set(zip(rows.method, rows.variant, rows.corpus, rows.D1, rows.D2))
    ways = [('cpt', '', 'pycode'), ('cpt', 'replay', 'pycode'), ('stk2', '', '')]
    expected = {(*way, D1, D2) for way in ways for D1 in (1280, 2560) for D2 in (1280, 2560)}
    ways = [('cpt', 'stable', 'pycode'), ('stk2', 'stable', '')]  # before the base's decay
    expected |= {(*way, D1, D2) for way in ways for D1 in (1024, 2048) for D2 in (1280, 2560)}
    expected |= {('scratch', '', '', 0, D2) for D2 in (1280, 2560)}
    expected.add(('scratch', '', 'pycode', 0, 1280))
    assert found == expected and len(rows) == len(expected) + 1  # two shapes of 1280 tokens
    assert (rows.loss > 0).all()
    (row,) = rows[(rows.method == 'stk2') & (rows.variant == '') & (rows.D1 == 1280)][
        :1
    ].itertuples()
    assert Result.of(swept / '16x1-1.28k-stk2-1.28k').val_loss == row.loss
    grown = GPTConfig.named('16x2', vocab_size=257, block_size=16).num_params()
    assert (rows.trained_N == rows.N.where(rows.method != 'stk2', grown)).all()
    report = (swept / 'report.md').read_text()
    (line,) = [line for line in report.splitlines() if 'no fit' in line]
    assert 'too few points for laws' in line


def test_a_branch_is_the_run_that_would_have_been_trained_alone(swept, data_dir, tmp_path):
    knobs = ['--size=16x1', '--tokens=2560', '--schedule=wsd']
    train.main([*LOOP, *knobs, f'--data_dir={data_dir}', f'--out_dir={tmp_path}'])
    alone, branch = Result.of(tmp_path / '16x1'), Result.of(swept / '16x1-2.56k')
    assert branch.val_loss == pytest.approx(alone.val_loss, abs=1e-4)
    assert branch.total_flops == alone.flops and branch.position == alone.position
    pairs = zip(load(alone.folder).parameters(), load(branch.folder).parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-5 for a, b in pairs)


def test_runs_share_one_stable_phase():
    """(start, stop, last, end): pieces of the stable phase, and the step at which each run ends."""
    pieces = plan_family({1000, 2000, 500}, 10, 0.1)
    assert pieces == [(0, 45, 50, 500), (45, 90, 100, 1000), (90, 180, 200, 2000)]
    assert plan_family({1, 40}, 10, 0.1) == [(0, 1, 2, 1), (1, 3, 4, 40)]  # a step for either phase


def test_learning_rates_of_pieces_are_those_of_the_whole(data_dir):
    plan = plan_of(data_dir)
    pieces = ('16x1-stable-1.02k', '16x1-stable-2.05k', '16x1-2.56k')
    found = [
        learning_rate(i, plan[p].steps, plan[p].knobs) for p in pieces for i in range(plan[p].steps)
    ]
    whole = Run(schedule='wsd', decay_fraction=0.2, warmup=2.0, learning_rate=0.01)
    assert found == pytest.approx([learning_rate(step, 40, whole) for step in range(40)])


def test_the_papers_grid_costs_its_longest_runs_and_its_decays():
    stages = planned('scaling_stk2.py', '--scratch=')
    tokens = sum(s.tokens for s, _ in stages if 'stk2' not in s.name)
    longest = 17600 * 512 * 1024
    ends = [longest / 2**i for i in range(5)]
    assert tokens == pytest.approx(0.9 * longest + 0.1 * sum(ends), rel=1e-3)
    second = [s for s, _ in stages if s.labels.get('D2') and 'stk2' in s.name]
    assert len(second) == 25 and all(s.config.n_layer == 30 for s in second)


@pytest.mark.parametrize('fresh, offset', [(False, 0), (True, 1280)])
def test_second_stages_read_the_data_again_or_fresh_data(data_dir, fresh, offset):
    """From the beginning for every base, as in the paper, or on from where the base stopped."""
    plan = plan_of(data_dir, f'--fresh_data={fresh}')
    first, branch = plan['16x1-1.28k-stk2-stable-1.02k'], plan['16x1-1.28k-stk2-1.28k']
    assert first.stage.position == offset and first.stage.parent.position == 1280
    assert branch.stage.position == offset + 1024 and branch.result.position == offset + 1280
    assert stage_identity(first.stage, first.knobs)['position'] == offset


def test_replay_reads_both_corpora_and_the_stable_phase_no_warmup():
    stages = {s.name: s for s, _ in planned('scaling_cpt_code.py', '--variants=replay,stable')}
    replay = stages['0.1b-577M-cpt+replay-stable-519M']
    assert replay.knobs['data'] == 'starcoder:0.75,slimpajama:0.25' and replay.model
    assert replay.knobs['val_data'] == 'starcoder' and 'warmup' not in replay.knobs
    stable = stages['0.1b-577M-cpt+stable-stable-519M']
    assert stable.knobs['data'] == 'starcoder' and stable.knobs['warmup'] == 0
    assert describe(stable).endswith('last state of 0.1b-stable-519M')
    assert stable.labels['D1'] == stable.parent.position < 0.91 * 577e6  # what it has seen


def test_a_second_stage_at_the_low_rate_has_it_throughout(data_dir):
    """A constant learning rate, that at which the base ended (Figure 7)."""
    plan, rates = plan_of(data_dir, '--variants=low', '--min_lr_fraction=0.1'), {}
    for name, (_, knobs, steps, _) in plan.items():
        rates[name] = [learning_rate(step, steps, knobs) for step in range(steps)]
    assert all(rate == pytest.approx(0.001) for rate in rates['16x1-1.28k-stk2+low-1.28k'])
    assert rates['16x1-1.28k-stk2+low-stable-1.02k'][-1] == pytest.approx(0.001)  # after its warmup
    assert rates['16x1-1.28k-stk2-1.28k'][-1] < 0.01 == rates['16x1-1.28k-stk2-1.28k'][0]


def test_second_stages_decay_several_times_on_data_of_their_own(data_dir, tmp_path):
    """As Appendix E.3 does, to learn how noisy a loss is: of one trunk, several branches."""
    knobs = ['--first=1', '--second=0.5', '--decays=3', f'--out_dir={tmp_path}']
    train.main([*GRID, f'--data_dir={data_dir}', *knobs])
    rows = pandas.read_csv(tmp_path / 'results.csv')
    losses = rows[rows.method == 'stk2'].loss
    assert losses.nunique() == 3 and losses.max() - losses.min() < 0.5
    assert rows[rows.method == 'stk2'].seed.tolist() == [0, 1, 2]
    assert len(list(tmp_path.glob('*stk2-stable-*'))) == 1


def test_seeds_and_shapes(data_dir):
    plan = plan_of(data_dir, '--seeds=2', '--reuse=exp,stk4', '--scratch=1')
    assert '16x1-2.56k-stk4-2.56k-s1' in plan and '16x1-scratch-exp-2.56k' in plan
    assert plan['16x1-2.56k-stk4-2.56k'].stage.config.n_layer == 4


@pytest.mark.parametrize(
    'more, word',
    [
        (['--reuse=stk3'], 'reuse must be a list, .* of one of cpt, exp, stk2, stk4'),
        (['--variants=replay'], '--second_data=NAME'),
        (['--variants=fast'], 'variants must be'),
        (['--warmup=0.01'], 'warmup counts steps'),
        (['--first=0'], 'first must be'),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        train.main([*GRID, f'--data_dir={data_dir}', f'--out_dir={tmp_path}', *more])
    assert not list(tmp_path.rglob('stage.json'))


def test_a_toy_of_a_grid_has_too_few_points_for_laws(tmp_path, capsys):
    preset = str(ROOT / 'config' / 'scaling_tiny.py')
    train.main([preset, '--toy=True', f'--out_dir={tmp_path}', '--seeds=1'])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'no fit' in line]
    assert 'too few points for laws' in line
