"""Scaling laws: fits recover the coefficients that made the data, at the optimum scipy finds."""

import math

import numpy as np
import pytest

from engine.errors import UserError
from scaling import (
    LAWS,
    fit,
    leave_one_out,
    predict,
)


def grid(law, parameters, n=5, noise=0.0, sizes=(98_323_840,), seed=0):
    """Losses of a law on the paper's grid of D1 and D2 (0.1B), with relative noise."""
    D = [9.2275e9 / 2**i for i in range(n)]
    rows = [(d1, d2, size) for d1 in D for d2 in D for size in sizes]
    data = dict(zip(('D1', 'D2', 'N'), map(list, zip(*rows))))
    exact = predict(law, [[parameters[name] for name in LAWS[law].parameters]], data)[0]
    relative = 1 + noise * np.random.default_rng(seed).standard_normal(len(rows))
    return data | dict(loss=(exact * relative).tolist())


# Table 6's exponents, with factors that put the losses where a model of 0.1B has them
TABLE_6 = {
    name: dict(
        alpha1=a1,
        alpha2=a2,
        alpha3=a3,
        logE=math.log(1.2),
        logA=a1 * math.log(2e9) + (a2 - a3 * math.log(2e9)) * math.log(2e9),
    )
    for name, a1, a2, a3 in [
        ('CPT (code)', 0.106, 0.146, 0.004),
        ('CPT (math)', 0.981, 0.388, 0.017),
        ('Expand', 0.549, 0.852, 0.024),
        ('Stack', 0.515, 0.350, 0.017),
        ('CPT (replay)', 0.424, 0.626, 0.018),
        ('CPT (stable)', 0.920, 0.156, 0.004),
        ('Stack (x4)', 0.644, 0.829, 0.028),
        ('Stack (stable)', 0.891, 0.507, 0.009),
    ]
}


def test_a_law_predicts_what_its_equation_says():
    data = dict(N=[1e8], D1=[3e9], D2=[5e9])
    p = dict(
        logA=math.log(30),
        alpha1=0.1,
        alpha2=0.2,
        alpha3=0.003,
        logB=math.log(20),
        beta=0.2,
        logE=math.log(1.1),
        logF=math.log(7),
        alpha=0.15,
        logDmax=math.log(1e10),
    )
    A, F, B, E = 30, 7, 20, 1.1
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
        assert predict(
            law, [[p[name] for name in LAWS[law].parameters]], data
        ).item() == pytest.approx(value, rel=1e-12), law


@pytest.mark.parametrize('name', TABLE_6)
def test_table_6_gives_its_coefficients_back(name):
    found = fit('multiplicative', grid('multiplicative', TABLE_6[name]), bootstrap=0)
    for parameter, value in TABLE_6[name].items():
        assert found.parameters[parameter] == pytest.approx(value, rel=2e-3, abs=2e-4)
    assert found.rms < 1e-6


def test_with_noise_they_lie_in_the_intervals():
    truth = TABLE_6['Stack']
    found = fit('multiplicative', grid('multiplicative', truth, noise=1e-3), bootstrap=100)
    assert all(
        low - 0.5 * abs(high - low) <= truth[k] <= high + 0.5 * abs(high - low)
        for k, (low, high) in found.intervals.items()
    )
    assert 0.3e-3 < found.rms < 1.5e-3 < 2 * found.leave_one_out and found.seen[
        'D2'
    ] == pytest.approx((9.2275e9 / 16, 9.2275e9))


def test_table_7s_joint_law_gives_its_coefficients_back():
    truth = dict(
        logA=math.log(33.394),
        alpha1=0.087,
        alpha2=0.119,
        alpha3=0.003,
        logB=math.log(22.471),
        beta=0.173,
        logE=math.log(0.041),
    )
    data = grid('joint', truth, n=4, sizes=(14_751_680, 98_323_840, 1_085_859_424))
    fitted = fit('joint', data, bootstrap=0)
    found = fitted.parameters
    assert (
        fitted.rms < 1e-5
        and found['beta'] == pytest.approx(0.173, rel=0.02)
        and found['alpha3'] == pytest.approx(0.003, rel=0.05)
    )
    assert found['alpha1'] == pytest.approx(0.087, rel=0.05) and found['alpha2'] == pytest.approx(
        0.119, rel=0.05
    )


def test_the_interaction_is_told_from_its_absence():
    data = grid('multiplicative', TABLE_6['Stack'], n=4, noise=3e-4)
    assert leave_one_out('multiplicative', data) < 0.7 * leave_one_out('no_interaction', data)


def test_twins_are_not_points_that_determine_a_law():
    """Five parameters on four cells: seeds do not help."""
    data = grid('multiplicative', TABLE_6['Stack'], n=2, noise=0.01)
    twice = {name: [*values, *values, *values] for name, values in data.items()}
    with pytest.raises(UserError, match='needs at least 7 points, 6 of them .*, not 12 and 4'):
        fit('multiplicative', twice, bootstrap=0)


def test_what_cannot_be_fitted_is_said():
    data = grid('multiplicative', TABLE_6['Stack'])
    few = {k: v[::6] for k, v in data.items()}
    with pytest.raises(UserError, match='multiplicative needs at least 7 points, .*, not 5 and 5'):
        fit('multiplicative', few)
    one = {
        k: [v for v, d1 in zip(values, data['D1']) if d1 == data['D1'][0]] * 2
        for k, values in data.items()
    }
    with pytest.raises(UserError, match='needs points of 2 different D1, these have 1'):
        fit('multiplicative', one)
    with pytest.raises(UserError, match='no law'):
        fit('multiplicativ', data)
