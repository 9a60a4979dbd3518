"""What Appendix B of Chain-of-Learngene assumes, read off laws that are known."""

import math
import re

import pytest
import torch
from test_train import planned

from engine.errors import UserError
from engine.report import by_label
from engine.stage import Result
from extras.stepwise import Stepwise

NUMBERS = dict(n_params=1e5, params=1e5, flops=0.0, inherited_flops=0.0, baseline_flops=0.0)


def result(name, loss, **labels):
    numbers = dict(NUMBERS, tokens=1.0, seconds=0.0, position=0, bits_per_byte=1.0)
    return Result(name, f'nowhere/{name}', val_loss=loss, labels=labels, **numbers)


def measured(steps):
    """Results of steps {name: (teacher's loss, C, rho, epsilon)} at six n, three seeds each."""
    generator, results = torch.Generator().manual_seed(0), []
    for step, (teacher, C, rho, epsilon) in steps.items():
        results.append(result(f'{step}-teacher', teacher))
        for n in (1e4, 3e4, 1e5, 3e5, 1e6, 3e6):
            for seed in range(3):
                noise = 1 + 1e-3 * torch.randn(1, generator=generator).item()
                loss = teacher + (C * n**-rho + epsilon) * noise
                labels = dict(step=step, n=n, seed=seed, teacher=f'{step}-teacher')
                results.append(result(f'{step}-{n}-{seed}', loss, **labels))
    return results


def blocks_of(direct):
    chain = {'ancestor-large': (1.0, 30.0, 0.4, 0.1), 'large-small': (1.1, 30.0, 0.5, 0.15)}
    results = measured(chain | {'ancestor-small': direct})
    return Stepwise(chain=('large', 'small')).summary(results)


def gap_of(sentence):
    """The gap that a sentence on an assumption names."""
    return float(re.search(r': ([+-][\d.]+) ', sentence)[1])


def test_assumptions_that_hold():
    records, first, second, picture = blocks_of(direct=(1.0, 20.0, 0.3, 0.4))
    rho = {record['step']: record['rho'] for record in records}
    assert rho['large-small'] == pytest.approx(0.5, abs=0.01)
    assert records[0]['epsilon'] == pytest.approx(0.1, abs=0.01)
    assert gap_of(first) == pytest.approx(0.1, abs=0.01) and 'in 100% of the laws' in first
    assert gap_of(second) == pytest.approx(0.15, abs=0.01) and 'in 100% of the laws' in second
    name, (panel,) = picture
    assert name == 'stepwise.png' and len(panel.lines) == 6  # points and a curve each


def test_assumptions_that_do_not_hold():
    _, first, second, _ = blocks_of(direct=(1.0, 20.0, 0.45, 0.2))
    assert gap_of(first) == pytest.approx(-0.05, abs=0.01) and 'in 0% of the laws' in first
    assert gap_of(second) == pytest.approx(-0.05, abs=0.01) and 'in 0% of the laws' in second


def test_a_chain_without_a_law_of_every_step_says_nothing():
    """The epsilon of a step that is left out would be missing from the sum."""
    chain = {'ancestor-a': (1.0, 30.0, 0.4, 0.1), 'a-b': (1.1, 30.0, 0.5, 0.15)}
    results = measured(chain | {'b-c': (1.3, 30.0, 0.5, 0.3), 'ancestor-c': (1.0, 20.0, 0.3, 0.4)})
    method = Stepwise(chain=('a', 'b', 'c'))
    assert len(method.summary(results)) == 4  # the table, both assumptions, the picture
    better = [r for r in results if r.labels.get('step') == 'b-c'][-1]
    better.val_loss = 0.9
    words, records, _ = method.summary(results)
    assert words == 'b-c: a student is better than its teacher' and len(records) == 3


@pytest.mark.parametrize(
    'knobs, word',
    [
        (['--ancestor=somewhere'], 'its own ancestor'),
        (['--start=public'], 'its own ancestor'),
        (['--grid='], 'must be different shares'),
        (['--grid=0.5,0.5'], 'must be different shares'),
    ],
)
def test_knobs_that_are_not_measured_are_refused(knobs, word):
    with pytest.raises(UserError, match=word):
        planned('stepwise_tiny.py', *knobs)


def test_a_student_that_is_better_than_its_teacher_has_no_law():
    results = measured({'ancestor-small': (1.0, 30.0, 0.4, 0.1)})
    results[-1] = result('better', 0.9, **results[-1].labels)
    words, records, picture = Stepwise(chain=('small',)).summary(results)
    assert words == 'ancestor-small: a student is better than its teacher' and records == []


def test_every_step_has_its_teacher_and_every_n():
    stages = [stage for stage, _ in planned('stepwise_tiny.py', '--seeds=2')]
    steps = by_label(stages, 'step')
    assert list(steps) == ['ancestor-64x4', '64x4-48x4', '48x4-48x2', 'ancestor-48x2']
    assert all(len(runs) == 2 * 5 for runs in steps.values())
    teachers = {step: {stage.labels['teacher'] for stage in runs} for step, runs in steps.items()}
    assert teachers['ancestor-48x2'] == {'ancestor-s0', 'ancestor-s1'}
    assert teachers['48x4-48x2'] == {'64x4-48x4-1M-s0', '64x4-48x4-1M-s1'}  # of the longest
    first = steps['ancestor-64x4'][0]
    assert first.tokens == 62500 and first.knobs['seed'] == 1337 and first.teacher_params > 0
    assert math.isclose(sum(s.tokens for s in steps['48x4-48x2']), 2 * 1.9375e6)
