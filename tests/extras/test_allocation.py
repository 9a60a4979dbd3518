"""The allocation of tokens: the grid is what is asked, and the cheapest family is the cheapest."""

import itertools
import math
import re

import pytest
import torch

import extras.allocation
from engine.errors import UserError
from engine.report import by_label
from extras.allocation import Allocation, Family
from scaling import Fit, predict
from train import Run, plan

FAMILY = Family(
    params=[1e5, 2e5, 4e5],
    scratch=[2e6, 4e6, 8e6],
    targets=[1.9, 1.75, 1.6],
    kept=0.85,
    reach=(0.2, 1.0),
)


def law(logA):
    """Eq. 6 with an amplitude."""
    parameters = dict(logA=logA, alpha1=0.05, alpha2=0.25, alpha3=0.005, logE=math.log(0.9))
    seen = dict(N=(1e5, 1e5), D1=(1e5, 1e7), D2=(1e5, 1e7))
    return Fit('multiplicative', parameters, {}, [], 0.0, 0.0, seen)


def test_the_cheapest_family_is_that_of_a_search_through_all(monkeypatch):
    monkeypatch.setattr(extras.allocation, 'CANDIDATES', 25)
    fits = [law(3.1), law(3.0)]
    shares = torch.linspace(math.log(0.2), 0.0, 25, dtype=torch.float64).exp().tolist()
    good = []
    for second, third in itertools.product(shares, shares):
        tokens = [2e6, 4e6 * second, 8e6 * third]
        for i, fitted in enumerate(fits, 1):
            data = dict(N=[1e5], D1=[0.85 * tokens[i - 1]], D2=[tokens[i]])
            if predict(fitted.law, fitted.rows, data).item() > FAMILY.targets[i]:
                break
        else:
            good.append(tokens)
    assert 5 < len(good) < 25 * 25 - 5
    best = min(good, key=FAMILY.cost)
    assert FAMILY.cheapest(fits) == pytest.approx(best)
    assert best[2] < 8e6 and FAMILY.cost(best) < 1


def test_the_allocation_is_in_words_that_can_be_pasted():
    method = Allocation(grid=(0.2, 1.0))
    method.budgets, method.kept = (FAMILY.params, FAMILY.scratch), FAMILY.kept
    alone = dict(zip(('a', 'b', 'c'), FAMILY.targets))
    fits = [law(3.1), law(3.0)]  # and twice, a little better and a little worse
    fits = [
        fitted._replace(
            samples=[[fitted.rows[0][0] + d, *fitted.rows[0][1:]] for d in (-0.01, 0.01)]
        )
        for fitted in fits
    ]
    records, words = method.allocation(fits, alone)
    best = FAMILY.cheapest(fits)
    shares = [tokens / scratch for tokens, scratch in zip(best, FAMILY.scratch)]
    assert [record['share'] for record in records] == pytest.approx(shares)
    low, high = map(float, records[2]['90% interval'].split(' to '))
    assert low < shares[2] < high
    printed = re.search(r'--shares=(\S+)', words)[1].split(',')
    for given, share in zip(printed, shares):
        assert 0 <= float(given) - share < 0.011  # rounded up
    assert f'--law_shares={",".join(printed[:-1])}' in words
    assert f'costs {FAMILY.cost(best):.2f} of' in words and 'in 100% of the resampled' in words


def test_where_no_family_is_good_enough_there_is_none():
    assert FAMILY.cheapest([law(3.1), law(4.0)]) is None


def test_every_size_grows_from_every_length_of_the_trunk_before_it():
    run = Run(data='pydocs', block_size=128, schedule='wsd', decay_fraction=0.2, warmup=5.0)
    sizes = ('32x2', '48x2', '64x2')
    stages = [planned.stage for planned in plan(run, Allocation(sizes=sizes, optimizer='grown'))]
    assert len({stage.name for stage in stages}) == len(stages)
    cells = {}
    for stage in stages:
        if stage.labels.get('D1'):
            cells.setdefault(stage.labels['size'], set()).add(
                (stage.labels['D1'], stage.labels['D2'])
            )
    assert [len(cells[size]) for size in sizes[1:]] == [9, 9]
    found = by_label([planned.result for planned in plan(run, Allocation(optimizer='grown'))], 'D1')
    for D1, results in found.items():  # and its data follow those of the trunk
        assert all(r.position == D1 + r.labels['D2'] for r in results if r.labels['size'] == '48x2')


@pytest.mark.parametrize(
    'knobs, word',
    [
        (dict(optimizer='fresh'), 'needs'),
        (dict(optimizer='grown', shares=(1.0, 1.0, 1.0, 1.0)), 'no use for shares'),
        (dict(optimizer='grown', taught=1.0), 'no use for taught'),
        (dict(optimizer='grown', width='random'), 'another width'),
        (dict(optimizer='grown', grid=(0.5, 2.0)), 'at most 1'),
    ],
)
def test_what_an_allocation_sets_itself_is_refused(knobs, word):
    run = Run(data='pydocs', block_size=128, schedule='wsd', warmup=5.0)
    with pytest.raises(UserError, match=word):
        plan(run, Allocation(**knobs))
