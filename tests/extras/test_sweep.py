"""
The grid of a scaling law: nothing is trained twice, and what shares a stable phase is what would
have been trained alone.
"""

import csv
import math

import pytest
from test_train import planned

import train
from engine.errors import UserError
from engine.optimizer import learning_rate
from engine.stage import Result, describe
from engine.state import stage_identity
from model import GPTConfig, load
from scaling import COLUMNS
from train import Run

TINY = [
    '--method=sweep',
    '--sizes=16x1',
    '--longest=1280',
    '--first=0.5,1',
    '--second=0.25,0.5',
    '--block_size=16',
    '--batch_size=4',
    '--eval_tokens=256',
    '--learning_rate=0.01',
    '--warmup=2',
    '--decay_fraction=0.2',
    '--log_interval=1',
    '--device=cpu',
]


@pytest.fixture(scope='module')
def swept(data_dir, tmp_path_factory):
    """
    A 2 x 2 grid of continual pretraining, replay, stacking and stacking from the stable phase,
    and from scratch.
    """
    out = tmp_path_factory.mktemp('sweep')
    train.main(
        [
            *TINY,
            f'--data_dir={data_dir}',
            f'--out_dir={out}',
            '--reuse=cpt,cpt+replay0.25,cpt+stable,stk2,stk2+stable',
            '--second_data=pycode',
            '--scratch=0.5',
        ]
    )
    return out


def test_every_point_is_in_the_table(swept):
    rows = list(csv.DictReader(open(swept / 'results.csv')))
    found = {(r['method'], float(r['D1']), float(r['D2'])) for r in rows}
    methods = ('cpt-pycode', 'cpt+replay0.25-pycode', 'cpt+stable-pycode', 'stk2', 'stk2+stable')
    expected = {(m, d1, d2) for m in methods for d1 in (640, 1280) for d2 in (320, 640)} | {
        ('scratch', 0, 640),
        ('scratch', 0, 1280),
        ('scratch-pycode', 0, 640),
    }
    assert (
        found == expected and len(rows) == len(expected) + 1
    )  # from scratch 640 tokens: the base's shape and the stacked one
    assert all(float(r['loss']) > 0 for r in rows)
    assert Result.of(swept / '16x1-640-stk2-320').val_loss == float(
        next(
            r['loss']
            for r in rows
            if r['method'] == 'stk2' and r['D1'] == '640.0' and r['D2'] == '320.0'
        )
    )
    assert 'no fit' in (swept / 'report.md').read_text()  # of four points there is none


def test_every_row_says_which_size_was_trained(swept):
    for row in csv.DictReader(open(swept / 'results.csv')):
        N, trained = float(row['N']), float(row['trained_N'])
        if row['method'].startswith('stk2'):
            grown = GPTConfig.named('16x2', vocab_size=257, block_size=16)
            assert trained == grown.num_params() > 1.9 * N
        else:
            assert trained == N


def test_even_the_shortest_run_has_a_step_of_decay(data_dir, tmp_path):
    """Of four steps a tenth would be none, and a branch that trains nothing has no gradients."""
    short = [a for a in TINY if not a.startswith(('--longest', '--decay'))]
    train.main(
        [*short, '--longest=256', f'--data_dir={data_dir}', f'--out_dir={tmp_path}', '--reuse=stk2']
    )
    rows = list(csv.DictReader(open(tmp_path / 'results.csv')))
    assert len(rows) == 6


@pytest.mark.parametrize('place, offset', [('begin', 0), ('continue', 640)])
def test_second_stages_begin_in_the_data_where_they_are_told_to(data_dir, tmp_path, place, offset):
    """From the beginning for every base, as in the paper, or on from where the base stopped."""
    argv = [*TINY, f'--data_dir={data_dir}', f'--out_dir={tmp_path}', '--reuse=stk2,stk2+stable']
    run, method, _ = train.configure(
        [*argv, f'--second_position={place}'], train.Run, train.METHODS
    )
    stages = {p.stage.name: p for p in train.plan(run, method)}
    for way in ('stk2', 'stk2+stable'):
        first = stages[f'16x1-640-{way}-stable-256']
        assert first.stage.position == offset and first.stage.parent.position == 640
        branch = stages[f'16x1-640-{way}-320']
        assert branch.stage.position == offset + 256 and branch.result.position == offset + 320
        assert stage_identity(first.stage, first.knobs)['position'] == offset


def test_a_branch_is_the_run_that_would_have_been_trained_alone(swept, data_dir, tmp_path):
    train.main(
        [
            '--size=16x1',
            '--tokens=1280',
            '--schedule=wsd',
            *[
                a
                for a in TINY
                if a.split('=')[0]
                in (
                    '--block_size',
                    '--batch_size',
                    '--eval_tokens',
                    '--learning_rate',
                    '--warmup',
                    '--decay_fraction',
                    '--device',
                    '--log_interval',
                )
            ],
            f'--data_dir={data_dir}',
            f'--out_dir={tmp_path}',
        ]
    )
    alone, branch = Result.of(tmp_path / '16x1'), Result.of(swept / '16x1-1.28k')
    assert (
        branch.val_loss == pytest.approx(alone.val_loss, abs=1e-4)
        and branch.total_flops == alone.flops
        and branch.position == alone.position
    )
    for a, b in zip(
        load(tmp_path / '16x1').parameters(), load(swept / '16x1-1.28k').parameters(), strict=True
    ):
        assert (a - b).abs().max() < 1e-5


def test_learning_rates_of_pieces_are_those_of_the_whole():
    whole = [
        learning_rate(s, 100, Run(schedule='wsd', decay_fraction=0.2, warmup=10.0))
        for s in range(100)
    ]
    stable = [learning_rate(s, 80, Run(schedule='constant', warmup=10.0)) for s in range(80)]
    decay = [
        learning_rate(s, 20, Run(schedule='wsd', decay_fraction=1.0, warmup=0.0)) for s in range(20)
    ]
    assert whole == pytest.approx(stable + decay)


def test_the_papers_grid_costs_its_longest_runs_and_its_decays():
    stages = planned('scaling_stk2.py', '--scratch=')
    tokens, longest = (
        sum(s.tokens for s, _ in stages if s.name.startswith('0.1b-') and 'stk2' not in s.name),
        17600 * 512 * 1024,
    )
    ends = [longest / 2**i for i in range(5)]
    assert tokens == pytest.approx(0.9 * longest + 0.1 * sum(ends), rel=1e-3)
    assert sum('stable' not in s.name and 'stk2' in s.name for s, _ in stages) == 25 and all(
        s.config.n_layer == 30 for s, _ in stages if 'stk2' in s.name
    )


def test_training_on_is_not_also_a_run_from_scratch():
    """Without another corpus, runs from scratch of the base's shape are the bases themselves."""
    stages = planned(
        'scaling_tiny.py', '--reuse=cpt,stk2,stk4', '--second_data=', '--scratch=0.5,0.75'
    )
    points = [tuple(s.labels[c] for c in COLUMNS[:-1]) for s, _ in stages if 'D2' in s.labels]
    assert len(points) == len(set(points))
    sizes = {N for method, N, _, D2, _ in points if method == 'scratch' and D2 == 0.75 * 2**20}
    assert len(sizes) == 3  # the base's shape and both grown ones


def test_replay_reads_both_corpora_and_the_stable_phase_no_warmup():
    knobs = {
        s.name: (s.knobs, s)
        for s, _ in planned('scaling_cpt_code.py', '--reuse=cpt+replay0.25,cpt+stable')
    }
    replay, stage = next(v for k, v in knobs.items() if 'cpt+replay0.25' in k)
    assert (
        replay['data'] == 'starcoder:0.75,slimpajama:0.25'
        and replay['val_data'] == 'starcoder'
        and replay['warmup'] == 200
        and stage.model
    )
    stable, stage = next(v for k, v in knobs.items() if 'cpt+stable' in k)
    assert (
        stable['data'] == 'starcoder'
        and stable['warmup'] == 0
        and describe(stage).endswith('last state of 0.1b-stable-577M')
    )


def test_seeds_and_sizes(data_dir):
    names = [
        s.name
        for s, _ in planned(
            'scaling_tiny.py', '--sizes=16x1,32x1', '--longest=1e5,2e5', '--seeds=2'
        )
    ]
    assert (
        '16x1-100k' in names
        and '32x1-200k-stk2-100k-s1' in names
        and len(names) == len(set(names))
        and math.isclose(len(names) % 4, 0)
    )


@pytest.mark.parametrize(
    'more, word',
    [
        (['--reuse=stk3'], "no second stage 'stk3'"),
        (['--reuse=cpt+replay0.25'], '--second_data=NAME'),
        (['--reuse=cpt+replay', '--second_data=pycode'], 'no second stage'),  # how much?
        (['--reuse=cpt+replay1.5', '--second_data=pycode'], 'no second stage'),
        (['--reuse=cpt+replay0.5+replay0.2', '--second_data=pycode'], 'no second stage'),
        (['--reuse=stk2+low+low'], 'no second stage'),
        (['--longest=1,2'], 'longest has 2 values for 1 sizes'),
        (['--warmup=0.01'], 'warmup counts steps'),
        (['--reuse=stk2+replay'], 'no second stage'),
        (['--first=0'], 'first must be'),
        (['--learning_rates=1,2'], 'learning_rates has 2'),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        train.main([*TINY, f'--data_dir={data_dir}', f'--out_dir={tmp_path}', *more])
    assert not list(tmp_path.rglob('stage.json'))


def test_a_second_stage_at_the_low_rate_has_it_throughout(data_dir):
    """A constant learning rate, that at which the base ended (Figure 7)."""
    argv = [*TINY, f'--data_dir={data_dir}', '--reuse=stk2,stk2+low', '--min_lr_fraction=0.1']
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    rates = {}
    for planned_stage in train.plan(run, method):
        stage, knobs, steps, _ = planned_stage
        rates[stage.name] = [learning_rate(step, steps, knobs) for step in range(steps)]
    assert all(rate == pytest.approx(0.001) for rate in rates['16x1-640-stk2+low-320'])
    assert rates['16x1-640-stk2-640'][-1] < 0.01 == rates['16x1-640-stk2-640'][0]
    assert rates['16x1-640-stk2+low-stable-256'][-1] == pytest.approx(0.001)  # after its warmup


@pytest.mark.parametrize(
    'knobs, word',
    [
        (['--reuse=stk2+low', '--min_lr_fraction=0'], 'nothing is left to learn with'),
        (['--reuse=stk2+stable+low'], 'is not low yet'),
    ],
)
def test_low_rates_that_do_not_exist_are_refused(data_dir, knobs, word):
    argv = [*TINY, f'--data_dir={data_dir}', *knobs]
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    with pytest.raises(UserError, match=word):
        train.plan(run, method)


def test_second_stages_decay_several_times_on_data_of_their_own(data_dir, tmp_path):
    """As Appendix E.3 does, to learn how noisy a loss is: of one trunk, several branches."""
    argv = [*TINY, f'--data_dir={data_dir}', f'--out_dir={tmp_path}', '--first=1', '--second=0.5']
    train.main([*argv, '--decays=3', '--seeds=1'])
    rows = list(csv.DictReader(open(tmp_path / 'results.csv')))
    losses = [float(row['loss']) for row in rows if row['method'] == 'stk2']
    assert [row['seed'] for row in rows if row['method'] == 'stk2'] == ['0', '1', '2']
    assert len(set(losses)) == 3 and max(losses) - min(losses) < 0.5
    assert len(list(tmp_path.glob('*stk2-stable-*'))) == 1
