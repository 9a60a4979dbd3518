"""
Deciding with laws before anything is trained: which runs to train next so that a decision becomes
surer (`design`), and how to share a budget between a base and its growth (`plan`). Both are ours,
built on the laws of Liew and Kato and on the bootstrap samples of their fits.

    python scaling.py design --fit=FILE --base_params=55536 --base_tokens=524288 --budget=2e11 \\
                             --spend=1e11
    python scaling.py plan --paper=True --budget=1e22 --inference_tokens=1e13

A decision is the gap between the predicted losses of its two best choices. The samples of the fits
say how far the gap may be off, and how the outcome of a run that is not yet trained goes along with
it. Taking both as normal, a run with outcome y lowers the variance of the gap by

    cov(gap, y)^2 / (var(y) + noise^2)

so runs are chosen one after the other by this gain for each FLOP, the samples' covariances
conditioned on those that were chosen.
"""

import math
from typing import NamedTuple

import torch

from engine.errors import UserError
from engine.report import format_count, format_si
from extras.decisions import (
    QUANTILES,
    Choice,
    choices_for,
    factor_of,
    says_something,
    spaced,
)

# ----------------------------------------------------------------------------------------------
# the next runs


class Candidate(NamedTuple):
    """A run that could be trained, with its base."""

    method: str
    N: float  # of the base
    D1: float
    D2: float
    flops: float  # of both stages


def candidates(fits, points=6):
    """
    Runs that would inform the laws of `fits`, at the least and the largest N that a fit has seen:
    D1 and D2 from the smallest to four times the largest, evenly spaced in their logarithms. Each
    pays for its own base; runs that share one cost less than is counted.
    """
    found = []
    for method, fitted in fits.items():
        factor = factor_of(method, fitted)
        (least, most), (first, last) = fitted.seen['D1'], fitted.seen['D2']
        D1s = spaced(least, 4 * most, points) if least else [0.0]
        for N in sorted(set(fitted.seen['N'])):
            for D1 in D1s:
                for D2 in spaced(first, 4 * last, points):
                    flops = 6 * N * (D1 + factor * D2)
                    found.append(Candidate(method, N, D1, D2, flops))
    return found


def outcomes(fits, runs, count):
    """What `count` samples of the laws predict for runs: log losses (count, runs)."""
    columns = [
        fits[run.method].losses(run.N, run.D1, run.D2)[1 : count + 1, 0].log() for run in runs
    ]
    return torch.stack(columns, 1)


def gap_of(choices, count):
    """(the best choice, the second, by how much its log loss is higher in samples (count,))."""
    best, second = sorted(choices, key=lambda choice: choice.losses()[0].item())[:2]
    gap = second.losses().log() - best.losses().log()
    return best, second, gap[1 : count + 1]


def choose_runs(gap, predicted, noise, costs, spend):
    """
    [(index of a run, standard deviation of the gap once it is known)] for at most `spend` FLOPs:
    greedily the largest fall of the gap's variance for a FLOP. gap (S,), predicted (S, m): log
    losses in the samples; noise (m,): standard deviation of a run's log loss; costs (m,) in FLOPs.
    """
    joint = torch.cat([gap[:, None], predicted], 1).T.cov()
    chosen, left = [], spend
    while True:
        variance = joint.diagonal()[1:] + noise.square()
        gains = joint[0, 1:].square() / variance
        gains[costs > left] = 0.0
        gains[[index for index, _ in chosen]] = 0.0  # a law's own error does not average out
        i = int((gains / costs).argmax())
        if not gains[i] > 1e-3 * joint[0, 0]:
            return chosen
        seen = joint[:, i + 1]
        joint = joint - seen[:, None] * seen / variance[i]
        left -= costs[i].item()
        chosen.append((i, math.sqrt(max(0.0, joint[0, 0].item()))))


def check_samples(fits):
    """The number of samples that all fits have. Raises UserError for fits without."""
    count = min(len(fitted.samples) for fitted in fits.values())
    if count < 10:
        raise UserError('these laws have no samples: fit them with --bootstrap=200')
    return count


def design(fits, N, D1, budget, spend):
    """
    (records of the next runs, what they are to decide in words): a base of N parameters after D1
    tokens, `budget` FLOPs for what is done with it, `spend` FLOPs for runs that make that surer.
    fits: {method: Fit}. Raises UserError if there is nothing to decide.
    """
    count, choices = check_samples(fits), choices_for(fits, N, D1, budget)
    if len(choices) < 2:
        raise UserError(f'these fits cover {len(choices)} choices at N = {N:,.0f}: none to decide')
    best, second, gap = gap_of(choices, count)
    used = {name: fits[name] for name in fits if fits[name] in (best.fitted, second.fitted)}
    runs = [run for run in candidates(used) if run.flops <= spend]
    if not runs:
        raise UserError(f'{format_si(spend)}FLOPs are too few for any run of these laws')
    noise = torch.tensor([used[run.method].rms for run in runs], dtype=torch.float64)
    costs = torch.tensor([run.flops for run in runs], dtype=torch.float64)
    chosen = choose_runs(gap, outcomes(used, runs, count), noise.nan_to_num(1e-3), costs, spend)
    mean, before = gap.mean().item(), gap.std().item()
    records = []
    for i, after in chosen:
        run = runs[i]
        record = {'method': run.method, 'N': run.N, 'D1 (tokens)': format_count(run.D1) or '0'}
        record |= {'D2 (tokens)': format_count(run.D2), 'FLOPs': run.flops}
        records.append(record | {'then known to': f'{after:.4f}'})
    return records, (
        f'to decide: {best.label} or {second.label}. Their log losses differ by {mean:.4f}, known '
        f'to {before:.4f} (standard deviation over the laws)'
    )


# ----------------------------------------------------------------------------------------------
# a base and its growth, planned together


class Plan(NamedTuple):
    """How to share a budget, and what comes of it."""

    N: float  # of the base
    D1: float  # tokens of the base
    D2: float  # tokens after growth; of a model from scratch all
    losses: torch.Tensor  # (1 + S,): as fitted, then in the samples


def best_growth(fitted, factor, budget, sizes, inference_tokens=0.0):
    """
    The Plan of least loss for 6 N D1 + 6 factor N D2 + 2 factor N inference_tokens = budget FLOPs,
    among `sizes` N and shares of D1 evenly spaced in their logarithms. Raises UserError if nothing
    is left to train with.
    """
    N = torch.tensor(sizes, dtype=torch.float64)[:, None]
    left = budget - 2 * factor * N * inference_tokens
    possible = left[:, 0] > 6 * N[:, 0]
    if not possible.any():
        raise UserError(f'inference alone needs more than {format_si(budget)}FLOPs')
    N, left = N[possible], left[possible]
    D1 = torch.logspace(-3, 0, 200, dtype=torch.float64)[:-1] * left / (6 * N)
    D2 = (left / (6 * N) - D1) / factor
    N, D1, D2 = N.expand_as(D2).flatten(), D1.flatten(), D2.flatten()
    losses = fitted.losses(N, D1, D2)
    i = int(losses[0].argmin())
    return Plan(N[i].item(), D1[i].item(), D2[i].item(), losses[:, i])


def from_scratch(fits, N, budget, inference_tokens=0.0):
    """The Plan of a model of N parameters without a base; None if no law covers it."""
    D2 = (budget - 2 * N * inference_tokens) / (6 * N)
    for method, fitted in fits.items():
        if method.startswith('scratch') and says_something(Choice('', fitted, N, 0.0, D2, N)):
            return Plan(N, 0.0, D2, fitted.losses(N, 0.0, D2)[:, 0])
    return None


def plan(fits, budget, base_params=0.0, inference_tokens=0.0):
    """
    (records, words): for each growth of which there is a law, the base that it should start from
    and the tokens of both stages, against a model of the grown size from scratch for the same
    FLOPs, inference included. base_params: N of the base; 0: the best among those the law has
    seen. fits: {method: Fit}. Raises UserError.
    """
    records, lines, beyond = [], [], []
    for method, fitted in fits.items():
        factor = factor_of(method, fitted)
        if method.startswith('scratch') or factor <= 1:
            continue
        low, high = fitted.seen['N']
        sizes = [base_params] if base_params else spaced(low, high, 60) if low < high else [low]
        grown = best_growth(fitted, factor, budget, sizes, inference_tokens)
        records.append(plan_record(method, grown, factor))
        choice = Choice(method, fitted, grown.N, grown.D1, grown.D2, factor * grown.N)
        beyond += choice.beyond_the_fit()
        if len(sizes) > 1 and grown.N in (sizes[0], sizes[-1]):
            beyond.append(f'  {method}: the best N is the last that was seen')
        fresh = from_scratch(fits, factor * grown.N, budget, inference_tokens)
        if fresh:
            records.append(plan_record('scratch', fresh, 1))
            lines.append(ahead(method, grown, fresh))
    if not records:
        raise UserError('these fits have no law of a growth')
    if beyond:
        lines += ['', 'outside what the laws were fitted to, so take it as a guess:', *beyond]
    return records, '\n'.join(lines)


def plan_record(method, found, factor):
    """A Plan as a record."""
    low, high = found.losses[1:].quantile(QUANTILES).tolist()
    record = {'method': method, 'N of the base': format_count(found.N) if found.D1 else 'none'}
    record |= {'N': factor * found.N, 'D1': format_count(found.D1), 'D2': format_count(found.D2)}
    record['share of D1'] = None
    if found.D1:
        record['share of D1'] = found.D1 / (found.D1 + factor * found.D2)
    return record | {'loss': found.losses[0].item(), '90% interval': f'{low:.3f} to {high:.3f}'}


def ahead(method, grown, fresh):
    """How surely a planned growth is better than starting with its size, in words."""
    count = min(len(grown.losses), len(fresh.losses))
    wins = (grown.losses[1:count] < fresh.losses[1:count]).double().mean().item()
    gain = (fresh.losses[0] - grown.losses[0]).item()
    words = f'{method}: {gain:+.4f} nats against starting with the grown size'
    return f'{words}; it wins in {wins:.0%} of the laws'
