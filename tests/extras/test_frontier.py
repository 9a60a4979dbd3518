"""The frontier: families cost what they say, and are compared with the better independent model."""

import pytest

from engine.errors import UserError
from engine.report import by_label
from engine.stage import Result
from extras.frontier import Frontier, sign_flip_test
from train import Run, plan, stages_of


def test_the_sign_flip_test_counts_the_flips_that_are_as_extreme():
    assert sign_flip_test([[1.0, 2.0, 3.0]]) == 1 / 8  # none but the values themselves
    assert sign_flip_test([[-1.0, -2.0, -3.0]]) == 1
    assert sign_flip_test([[1.0, -1.0]]) == 3 / 4  # means 0, 1, -1, 0: three at least 0
    assert sign_flip_test([[1.0, 1.0], [-1.0, -1.0]]) == 2 / 4  # flipped, the other is the worst
    assert sign_flip_test([[0.0, 0.0], [-1.0, -2.0]]) == 1  # nobody is worse


def test_families_cost_what_they_say_with_trunks_and_branches():
    method = Frontier(
        families=('trunk:60', 'trunk:50', 'eq4:70', 'paper:70', 'laws:60'),
        shares=(1, 0.9, 0.8),
        law_shares=(1, 0.7, 0.6),
        seeds=1,
    )
    results = [planned.result for planned in plan(Run(data='pydocs', block_size=128), method)]
    costs = {
        family: sum(result.flops for result in found)
        for family, found in by_label(results, 'family').items()
    }
    alone = costs.pop('independent-wsd')
    assert costs.pop('independent-cosine') == alone
    for family, cost in costs.items():
        assert cost / alone == pytest.approx(int(family[-2:]) / 100, rel=2e-3)
    names = [result.name for result in results]
    assert len(set(names)) == len(names) and 'paper-70-32x2-trunk-1337' not in names


def test_the_worst_member_counts_against_the_better_schedule():
    method = Frontier(sizes=('16x1', '16x2'), shares=(1.0,), families=('trunk:80',), seeds=3)
    losses = {
        'independent-wsd': {'16x1': 2.0, '16x2': 1.5},
        'independent-cosine': {'16x1': 2.2, '16x2': 1.4},
        'trunk:80': {'16x1': 1.9, '16x2': 1.45},
    }

    def pretend(stage):
        result = Result.given(stage.name, stage.name)
        result.labels, result.flops = stage.labels, 6 * stage.params * stage.tokens
        size, seed = stage.labels['size'], stage.labels['seed']
        result.val_loss = losses[stage.labels['family']][size] + (seed - 1338) * 0.3
        if stage.labels['family'] == 'trunk:80':
            result.val_loss += (seed - 1338) * 0.01
        return result

    run = Run(data='pydocs', block_size=128)
    results = [result for _, result in stages_of(method, run, pretend)]
    records, (name, (panel,)) = method.summary(results)
    family = {record['family']: record for record in records}['trunk:80']
    assert family['against 16x1'] == pytest.approx(-0.1)  # of wsd's 2.0
    assert family['against 16x2'] == pytest.approx(0.05)  # of cosine's 1.4
    assert family['worst'] == '16x2' and family['p, worse'] == 2 / 8
    assert family['95% interval'] == '+0.025 to +0.075'  # 0.05, 0.01 / sqrt 3 x 4.303
    assert family['cost'] == pytest.approx(0.8, rel=2e-3) and name == 'frontier.png'
    assert [line.label for line in panel.lines] == [
        'independent-wsd',
        'trunk',
        'independent-cosine',
    ]


@pytest.mark.parametrize(
    'families, shares, word',
    [
        (('trunk',), (1.0, 0.9, 0.8), "no family 'trunk'"),
        (('best:60',), (1.0, 0.9, 0.8), 'choose from trunk:60'),
        (('trunk:20',), (1.0, 0.9, 0.8), 'leave nothing for the largest in trunk:20'),
        (('trunk:60',), (1.0, 0.9), 'needs 3 shares, of all but the largest, not 2'),
        (('laws:60',), (1.0, 0.9, 0.8), 'laws:60 needs 3 shares, of all but the largest, not 0'),
    ],
)
def test_families_that_do_not_exist_are_refused(families, shares, word):
    with pytest.raises(UserError, match=word):
        plan(Run(data='pydocs', block_size=128), Frontier(families=families, shares=shares))
