"""The next runs are those that make a decision surer; a base and its growth share a budget."""

import math

import pytest
import torch

import scaling
from engine.errors import UserError
from extras.decisions import sunk_cost_limits
from extras.design import best_growth, candidates, choose_runs, design, from_scratch, plan
from scaling import Fit, published

NORMAL = torch.distributions.MultivariateNormal


def test_what_is_known_after_some_runs_is_what_bayes_says():
    """For laws linear in their parameters, with the gap and the outcomes as linear readings."""
    torch.manual_seed(0)
    theta = torch.randn(2000, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    reading, points = torch.randn(4), torch.randn(4, 30)
    gap, predicted = theta @ reading.double(), theta @ points.double()
    noise = torch.full((30,), 0.3, dtype=torch.float64)
    chosen = choose_runs(gap, predicted, noise, torch.ones(30), spend=3.0)
    assert len({i for i, _ in chosen}) == 3
    covariance, X = theta.T.cov(), points.double()[:, [i for i, _ in chosen]]
    gain = covariance @ X @ torch.linalg.inv(X.T @ covariance @ X + 0.09 * torch.eye(3))
    after = covariance - gain @ X.T @ covariance
    expected = (reading.double() @ after @ reading.double()).sqrt().item()
    assert chosen[-1][1] == pytest.approx(expected, rel=1e-6)
    spreads = [gap.std().item(), *(spread for _, spread in chosen)]
    assert spreads == sorted(spreads, reverse=True)


def test_no_run_is_chosen_twice_or_beyond_what_may_be_spent():
    torch.manual_seed(1)
    predicted = torch.randn(100, 5, dtype=torch.float64)
    costs = torch.tensor([1.0, 2.0, 4.0, 8.0, 100.0], dtype=torch.float64)
    noise = torch.zeros(5, dtype=torch.float64)
    chosen = [i for i, _ in choose_runs(predicted.sum(1), predicted, noise, costs, spend=12.0)]
    assert len(set(chosen)) == len(chosen) and costs[chosen].sum() <= 12 and 4 not in chosen
    assert (
        choose_runs(torch.randn(100).double(), torch.zeros(100, 5).double(), noise, costs, 9) == []
    )


def reading_of(D1, D2):
    """log L of Eq. 6 with E = 0 is linear in log A, alpha1, alpha2 and alpha3."""
    one, two = math.log(D1), math.log(D2)
    return torch.tensor([1.0, -one, -two, one * two], dtype=torch.float64)


def estimate(points, losses, reading):
    """A reading of the law that fits some points best."""
    return (torch.linalg.lstsq(points, losses[:, None]).solution[:, 0] @ reading).item()


def test_chosen_runs_decide_better_than_a_grid_of_the_same_cost():
    """The simulation: a law, noisy runs, and what is read off far from them."""
    truth, noise = torch.tensor([6.0, 0.25, 0.45, 0.015], dtype=torch.float64), 0.01
    D = [2.0**i for i in range(4)]
    first = [(D1, D2) for D1 in D[:3] for D2 in D[:3]]
    possible = [(4.0**i, 4.0**j) for i in range(4) for j in range(4)]
    costs = torch.tensor([D1 + 2 * D2 for D1, D2 in possible], dtype=torch.float64)
    wanted, errors = reading_of(64.0, 256.0), {'chosen': [], 'grid': []}
    at_first = torch.stack([reading_of(*point) for point in first])
    at_possible = torch.stack([reading_of(*point) for point in possible])
    posterior = torch.linalg.inv(at_first.T @ at_first) * noise**2
    for seed in range(200):
        torch.manual_seed(seed)
        seen = at_first @ truth + noise * torch.randn(len(first), dtype=torch.float64)
        middle = torch.linalg.lstsq(at_first, seen[:, None]).solution[:, 0]
        theta = NORMAL(middle, posterior).sample((200,))
        spread = torch.full((len(possible),), noise, dtype=torch.float64)
        chosen = choose_runs(theta @ wanted, theta @ at_possible.T, spread, costs, spend=100.0)
        by_size = sorted(range(len(possible)), key=lambda i: costs[i])
        grid = [i for n, i in enumerate(by_size) if costs[by_size[: n + 1]].sum() <= 100]
        for name, picked in (('chosen', [i for i, _ in chosen]), ('grid', grid)):
            outcome = at_possible[picked] @ truth
            outcome += noise * torch.randn(len(picked), dtype=torch.float64)
            points = torch.cat([at_first, at_possible[picked]])
            found = estimate(points, torch.cat([seen, outcome]), wanted)
            errors[name].append(found - (truth @ wanted).item())
    chosen, grid = (torch.tensor(errors[name]).square().mean().sqrt() for name in errors)
    assert chosen < 0.6 * grid, (chosen, grid)


def test_the_next_runs_for_the_published_laws():
    fits = published()
    used = {name: fits[name] for name in ('scratch', 'stk2')}
    records, words = design(used, 1e9, 1e12, 1e22, spend=1e23)
    assert records and sum(record['FLOPs'] for record in records) <= 1e23
    assert words.startswith('to decide: ') and {r['method'] for r in records} <= set(used)
    costs = [run.flops for run in candidates(used)]
    assert min(costs) > 0 and len(costs) == len(set(candidates(used)))
    with pytest.raises(UserError, match='too few for any run'):
        design(used, 1e9, 1e12, 1e22, spend=1e10)


@pytest.mark.parametrize('inference', [0.0, 2e11])
def test_a_budget_is_shared_at_the_least_loss(inference):
    law = published()['stk2']
    N, budget = 1e9, 1e22
    found = best_growth(law, 2, budget, [N], inference)
    spent = 6 * N * found.D1 + 12 * N * found.D2 + 4 * N * inference
    assert spent == pytest.approx(budget)
    for change in (0.97, 1.03):  # another D1, and what is then left for D2
        D1 = change * found.D1
        D2 = (budget - 4 * N * inference - 6 * N * D1) / (12 * N)
        assert law.losses(N, D1, D2)[0, 0] >= found.losses[0] - 1e-6
    with pytest.raises(UserError, match='inference alone'):
        best_growth(law, 2, budget, [N], 1e13)


def test_a_plan_says_what_starting_with_the_grown_size_would_give():
    fits = published()
    records, words = plan(fits, 1e22)
    grown, fresh = (r for r in records if r['method'] in ('stk2', 'scratch'))
    assert grown['N'] == fresh['N'] and fresh['D1'] == '' and 0 < grown['share of D1'] < 1
    assert 'stk2: ' in words and 'the best N is the last that was seen' in words
    one = from_scratch(fits, grown['N'], 1e22)
    assert one.losses[0].item() == pytest.approx(fresh['loss'])
    # where growing no longer pays, the plan for both says so too
    N = 1e8
    limit = sunk_cost_limits(fits['scratch'], fits['stk2'], N)[0].item()
    budget = 6 * N * limit + 12 * N * limit
    ours = best_growth(fits['stk2'], 2, budget, [N])
    assert ours.losses[0] <= from_scratch(fits, 2 * N, 12 * N * limit).losses[0] + 1e-9


def test_commands(capsys):
    how = ['--paper=True', '--budget=1e22']
    scaling.main(['design', *how, '--base_params=1e9', '--base_tokens=1e12', '--spend=1e23'])
    assert 'then known to' in capsys.readouterr().out
    scaling.main(['plan', *how, '--inference_tokens=1e12'])
    assert '| stk2 ' in capsys.readouterr().out
    with pytest.raises(UserError, match='missing argument --spend'):
        scaling.main(['design', *how, '--base_params=1e9', '--base_tokens=1e12'])
    with pytest.raises(UserError, match='missing argument --budget'):
        scaling.main(['plan', '--paper=True'])
    alone = {'stk2': published()['stk2']}
    with pytest.raises(UserError, match='none to decide'):
        design(alone, 1e9, 1e12, 1e22, 1e23)
    few = Fit(**published()['stk2']._asdict() | dict(samples=[]))
    with pytest.raises(UserError, match='no samples'):
        design({'stk2': few}, 1e9, 1e12, 1e22, 1e23)
