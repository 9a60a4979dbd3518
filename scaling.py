"""
Is reuse worth it? The scaling laws of model reuse: laws, fits and decisions.

Paper: Liew and Kato, From Acceleration to Saturation: Scaling Behavior of Bootstrapped Language
Model Pretraining.

    python train.py config/scaling_tiny.py                   # a grid of runs, fitted at its end
    python scaling.py fit out/scaling_tiny/results.csv       # parameters, errors, pictures
    python scaling.py advise --paper=True --base_params=1e9 --base_tokens=2e12 --budget=1e22
    python scaling.py advise --fit=out/scaling_tiny/fit.json --base_params=1e5 ...
    python scaling.py sunk_cost --paper=True                 # up to how many tokens growing wins
    python scaling.py optimal --paper=True --base_tokens=1e10    # the best N and D2 of a budget
    python scaling.py diagnose FOLDER [FOLDER ...]           # extras/diagnostics.py
    python scaling.py toy                                    # the toy model of section 5.3

    L(D1, D2) = A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + E                            (Eq. 6)

D1 and D2 are the tokens of the first and second stage, N the parameters without embeddings of the
base, before growth; D1 = 0 marks a model trained from scratch for D2 tokens. Losses are in nats,
logarithms natural. A results.csv has the columns method, N, D1, D2, seed, loss, and may have
trained_N, the N of the model that the second stage trains. A method is
scratch, cpt, or a growth (exp, stk2, stk4), with a variant (stk2+stable), and behind a dash the
corpus of its losses if that is not the base's: losses on different text cannot be compared.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from configurator import HELP, Natural, NonNegative, configure
from engine.errors import UserError, first_line, nearest, run_as_program, unknown
from engine.files import read_json, write_json
from engine.log import progress_bar
from engine.report import Line, Panel, draw_panels, draw_pictures, format_count, format_si, render

# ----------------------------------------------------------------------------------------------
# laws: (parameters p, log data x) -> the logarithms of the terms whose sum is the loss


def reuse(p, x):
    """A D1^-alpha1 D2^(-alpha2 + alpha3 log D1), the term of all laws with an interaction."""
    return p.logA - p.alpha1 * x.D1 + (-p.alpha2 + p.alpha3 * x.D1) * x.D2


def multiplicative(p, x):
    """L = A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + E   (Eq. 6)"""
    return reuse(p, x), p.logE


def no_interaction(p, x):
    """L = A D1^-alpha1 D2^-alpha2 + E   (Eq. 6 with alpha3 = 0)"""
    return p.logA - p.alpha1 * x.D1 - p.alpha2 * x.D2, p.logE


def additive(p, x):
    """L = A D1^-alpha1 + F D2^-alpha2 + E   (Eq. 7)"""
    return p.logA - p.alpha1 * x.D1, p.logF - p.alpha2 * x.D2, p.logE


def hybrid(p, x):
    """L = (A D1^-alpha1 + F) D2^-alpha2 + E   (Eq. 8)"""
    return p.logA - p.alpha1 * x.D1 - p.alpha2 * x.D2, p.logF - p.alpha2 * x.D2, p.logE


def continuous(p, x):
    """L = A (D1 + D2)^-alpha + E   (Eq. 11)"""
    return p.logA - p.alpha * x.D, p.logE


def chinchilla(p, x):
    """L = A (D1 + D2)^-alpha + B N^-beta + E: one stage, from scratch"""
    return p.logA - p.alpha * x.D, p.logB - p.beta * x.N, p.logE


def joint(p, x):
    """L = A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + B N^-beta + E   (Eq. 9)"""
    return reuse(p, x), p.logB - p.beta * x.N, p.logE


def saturate(log_D, log_limit):
    """log of D* = (1/D + 1/Dmax)^-1."""
    return -np.logaddexp(-log_D, -log_limit)


def saturated_D1(p, x):
    """L = A D1*^-alpha1 D2^(-alpha2 + alpha3 log D1*) + E, D1* = (1/D1 + 1/Dmax)^-1   (Eq. 10)"""
    return multiplicative(p, SimpleNamespace(D1=saturate(x.D1, p.logDmax), D2=x.D2))


def saturated_D2(p, x):
    """L = A D1^-alpha1 D2*^(-alpha2 + alpha3 log D1) + E, D2* = (1/D2 + 1/Dmax)^-1   (Eq. 14)"""
    return multiplicative(p, SimpleNamespace(D1=x.D1, D2=saturate(x.D2, p.logDmax)))


class Law(NamedTuple):
    """A law, its parameters in order (amplitudes as logarithms), and the data it depends on."""

    terms: Callable
    parameters: tuple
    depends_on: tuple = ('D1', 'D2')

    @property
    def equation(self):
        """What the law says, without the number it has in the paper."""
        return re.sub(r' +\(Eq\. \d+.*', '', self.terms.__doc__, flags=re.DOTALL).strip()


EQ6 = ('logA', 'alpha1', 'alpha2', 'alpha3', 'logE')
LAWS = {
    'multiplicative': Law(multiplicative, EQ6),
    'no_interaction': Law(no_interaction, ('logA', 'alpha1', 'alpha2', 'logE')),
    'additive': Law(additive, ('logA', 'alpha1', 'logF', 'alpha2', 'logE')),
    'hybrid': Law(hybrid, ('logA', 'alpha1', 'alpha2', 'logF', 'logE')),
    'continuous': Law(continuous, ('logA', 'alpha', 'logE'), ('D',)),
    'chinchilla': Law(chinchilla, ('logA', 'alpha', 'logB', 'beta', 'logE'), ('D', 'N')),
    'joint': Law(joint, (*EQ6[:4], 'logB', 'beta', 'logE'), ('D1', 'D2', 'N')),
    'saturated_D1': Law(saturated_D1, (*EQ6, 'logDmax')),
    'saturated_D2': Law(saturated_D2, (*EQ6, 'logDmax')),
}


VARIABLES = ('N', 'D1', 'D2')


def logarithms(data):
    """The logarithms of N, D1 (0 at D1 = 0), D2 and D = D1 + D2: a record array (n,)."""
    N, D1, D2 = (np.asarray(data[name], np.float64) for name in VARIABLES)
    logs = [np.log(column) for column in (N, np.maximum(D1, 1), D2, D1 + D2)]
    return np.rec.fromarrays(logs, names='N,D1,D2,D')


def log_loss(law, theta, x):
    """log L (..., n) of a Law at parameters theta (..., P) and the logarithms x (n,)."""
    values = dict(zip(law.parameters, np.moveaxis(np.asarray(theta)[..., None], -2, 0)))
    terms = law.terms(SimpleNamespace(**values), x)
    return np.logaddexp.reduce(np.broadcast_arrays(*terms))


def predict(law, theta, data):
    """Losses (..., n) in nats of a law (its name) at parameters theta (..., P), float64."""
    return np.exp(log_loss(LAWS[law], theta, logarithms(data)))


# ----------------------------------------------------------------------------------------------
# fits: the logarithm of the loss, under a Huber loss with its knee at 1e-3, in float64

DELTA = 1e-3
QUANTILES = 0.05, 0.95  # of an interval
STARTS = 8  # of the grid of starts, the nearest to the points, from which a fit is tried


class Fit(NamedTuple):
    """A fitted law."""

    law: str
    parameters: dict  # {name: value}
    intervals: dict  # {name: (low, high)}, 90%
    samples: list  # bootstrap samples of the parameters (S, P)
    rms: float  # of the residuals of log L
    leave_one_out: float  # root mean square error of log L at cells (N, D1, D2) left out
    seen: dict  # {N, D1, D2: (least, largest) of the points}
    growth: float | None = None  # N of the model that is trained / of its base; None: not known
    extrapolation: float | None = None  # the same error at the tenth of the cells of lowest loss
    base_left_out: float | None = None  # at bases (N, D1) left out whole; None: there is one base

    def losses(self, N, D1, D2):
        """
        Losses (1 + S, n) of the law at its parameters, and then at its bootstrap samples, at a
        size N and points of D1 and D2 tokens, numbers or float64 (n,).
        """
        N, D1, D2 = np.broadcast_arrays(*map(np.atleast_1d, (N, D1, D2)))
        return predict(self.law, self.rows, dict(N=N, D1=D1, D2=D2))

    @property
    def rows(self):
        """The parameters, and then the bootstrap samples of them, in the law's order."""
        return [list(self.parameters.values()), *self.samples]


def starts_of(law, x, target):
    """
    A grid of starts (S, P): exponents from none to large; amplitudes such that each term is a fifth
    of the mean loss, E half or nine tenths; a saturation within what was seen, and beyond.
    """
    middle, choices, amplitudes = target.mean(), [], []
    for i, name in enumerate(law.parameters):
        if name == 'logDmax':
            seen = (x.D1 if law.terms is saturated_D1 else x.D2).mean()
            choices.append((seen - 1.0, seen + 2.0, seen + 5.0))
        elif name == 'logE':
            choices.append((middle - 3.0, middle - 0.7, middle - 0.1))
        elif name.startswith('log'):
            choices.append((0.0,))
            amplitudes.append(i)
        else:
            choices.append((0.0, 0.03) if name == 'alpha3' else (0.03, 0.15, 0.6))
    starts = np.array(list(itertools.product(*choices)))
    values = dict(zip(law.parameters, starts.T[..., None]))
    for i, term in zip(amplitudes, law.terms(SimpleNamespace(**values), x)):
        starts[:, i] = middle - 1.5 - term.mean(-1)
    return starts


def solve(law, x, target, starts):
    """
    The parameters (P,) of a Law at the least Huber loss of log L that scipy finds from the starts
    (S, P). x, target: logarithms of the points (n,), and of their losses.
    """
    from scipy.optimize import least_squares  # a second, which not every command needs

    residuals = lambda theta: log_loss(law, theta, x) - target
    how = dict(loss='huber', f_scale=DELTA, x_scale='jac', ftol=1e-10, xtol=1e-10, gtol=1e-10)
    found = [least_squares(residuals, start, max_nfev=400, **how) for start in starts]
    return min(found, key=lambda result: result.cost).x


def left_out_error(law, x, target, groups, theta):
    """
    Root mean square error of log L at groups of points, index arrays, each predicted by a fit to
    all the others, which starts at theta.
    """
    errors = []
    for group in groups:
        kept = np.delete(np.arange(len(x)), group)
        found = solve(law, x[kept], target[kept], [theta])
        errors.append(log_loss(law, found, x[group]) - target[group])
    return root_mean_square(np.concatenate(errors))


def check_points(law, data):
    """Raise UserError for an unknown law, or points that cannot determine it."""
    if law not in LAWS:
        raise unknown('law', law, LAWS)
    x = logarithms(data)
    for column in LAWS[law].depends_on:
        found, least = len(np.unique(x[column])), 3 if column == 'N' else 2
        if found < least:  # of two sizes B N^-beta + E says no more than a constant for each
            raise UserError(f'{law} needs points of {least} different {column}, these have {found}')
    cells, least = len(groups_of(x)), len(LAWS[law].parameters) + 1
    n = len(data['loss'])
    if n <= least or cells < least:
        raise UserError(
            f'{law} needs at least {least + 1} points, {least} of them of different N, D1 or D2, '
            f'not {n} and {cells}'
        )


def fit(law, data, bootstrap=200, seed=0):
    """
    Fit a law (its name) to columns N, D1, D2, loss, from the best of a grid of starts. Left out,
    and resampled `bootstrap` times for the intervals, are whole cells of equal N, D1 and D2: runs
    that differ by their seed alone say nothing about how well the law predicts. Left out are also
    whole bases, and the tenth of the cells with the lowest losses. Raises UserError.
    """
    check_points(law, data)
    shape, x, target = LAWS[law], logarithms(data), np.log(data['loss'])
    starts = starts_of(shape, x, target)
    near = np.abs(log_loss(shape, starts, x) - target).mean(1).argsort()[:STARTS]
    theta = solve(shape, x, target, starts[near])
    cells, bases = groups_of(x[['N', 'D1', 'D2']]), groups_of(x[['N', 'D1']])
    lowest = sorted(cells, key=lambda cell: target[cell].mean())[: max(1, round(len(cells) / 10))]
    draw, samples = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        rows = np.concatenate([cells[i] for i in draw.integers(len(cells), size=len(cells))])
        samples.append(solve(shape, x[rows], target[rows], [theta]))
    samples = np.array(samples or [theta])
    ends = np.quantile(samples, QUANTILES, axis=0)
    error = partial(left_out_error, shape, x, target, theta=theta)
    ratio = np.mean(np.divide(data.get('trained_N', math.nan), data['N']))
    return Fit(
        law,
        dict(zip(shape.parameters, theta.tolist())),
        dict(zip(shape.parameters, ends.T.tolist())),
        samples.tolist(),
        rms=root_mean_square(log_loss(shape, theta, x) - target),
        leave_one_out=error(cells),
        seen={k: (float(min(data[k])), float(max(data[k]))) for k in VARIABLES},
        growth=float(ratio) if math.isfinite(ratio) else None,
        extrapolation=error([np.concatenate(lowest)]),
        base_left_out=error(bases) if len(bases) > 1 else None,
    )


def groups_of(rows):
    """The points of each group of equal rows of a record array, index arrays."""
    _, group = np.unique(rows, return_inverse=True)
    return [np.flatnonzero(group == i) for i in range(group.max() + 1)]


def root_mean_square(residuals):
    """The root of the mean square of an array, as a number."""
    return float(np.sqrt(np.mean(np.square(residuals))))


def leave_one_out(law, data):
    """Root mean square error of log L at cells left out one at a time (Table 1)."""
    return fit(law, data, bootstrap=0).leave_one_out


# ----------------------------------------------------------------------------------------------
# the published fits (Table 7): D in tokens, N before growth; amplitudes as printed

PUBLISHED = {
    'scratch': ('chinchilla', ('10.383', '0.092', '10.085', '0.105', '0.041')),
    'scratch-code': ('chinchilla', ('8.143', '0.113', '27.286', '0.234', '0.105')),
    'cpt-code': ('joint', ('15.062', '0.048', '0.126', '0.001', '27.234', '0.238', '0.105')),
    'stk2': ('joint', ('33.394', '0.087', '0.119', '0.003', '22.471', '0.173', '0.041')),
}


def published():
    """The paper's fits as Fits; their samples are drawn within the rounding of what is printed."""
    fits = {}
    for method, (law, printed) in PUBLISHED.items():
        names, values = LAWS[law].parameters, np.array(printed, np.float64)
        units = [10.0 ** -len(text.partition('.')[2]) for text in printed]
        drawn = np.random.default_rng(0).uniform(-0.5, 0.5, (200, len(names)))
        rows = np.concatenate([values[None], values + units * drawn])
        rows = np.where([name.startswith('log') for name in names], np.log(rows), rows).tolist()
        first = (0.0 if method.startswith('scratch') else 2.9e8, 7.4e10)
        seen = dict(N=(14_751_680, 1_085_859_424), D1=first, D2=(2.9e8, 2.6e11))
        parameters = dict(zip(names, rows[0]))
        fits[method] = Fit(law, parameters, {}, rows[1:], math.nan, math.nan, seen)
    return fits


# ----------------------------------------------------------------------------------------------
# decisions (section 5, Appendix E): each comes with what the bootstrap samples of its laws say

TOKENS = np.logspace(3, 20, 171)  # between which crossings are looked for
BEYOND = 1000  # times what the points of a fit have, as the paper's Figure 10 goes
GROWTH_FACTOR = {'exp': 2, 'stk2': 2, 'stk4': 4}  # where a fit does not know its own


def crossings(reused, fresh):
    """
    D* (1 + S,): the last number of tokens at which the loss of starting over, less that of reuse,
    changes its sign; 0: reuse is never ahead; inf: it still is at the last of TOKENS. reused,
    fresh: functions of tokens (n,) that give losses (1 + S, n).
    """
    from scipy.optimize import brentq  # a second, which not every command needs

    def lead(tokens):
        pair = fresh(tokens), reused(tokens)
        rows = min(map(len, pair))
        return pair[0][:rows] - pair[1][:rows]

    found, ahead = [], lead(TOKENS) > 0
    for i, row in enumerate(ahead):
        found.append(math.inf if row[-1] else 0.0)
        if row.any() and not row[-1]:
            ends = np.log(TOKENS[np.flatnonzero(row)[-1] :][:2])
            found[-1] = math.exp(brentq(lambda log_D: lead(np.exp([log_D]))[i, 0], *ends))
    return np.array(found)


def in_words(tokens):
    """A number of tokens; 'none' for 0 and 'any' for infinity."""
    return {0.0: 'none', math.inf: 'any'}.get(tokens) or format_count(tokens)


def certainty(name, found):
    """
    Columns of a table for what the laws give, (1 + S,), the fit itself first: its value, 90% of the
    samples, and in how many of them it is any number or none.
    """
    columns = {name: in_words(found[0])}
    if len(found) > 2:
        low, high = np.quantile(found[1:], QUANTILES, method='nearest')
        columns[f'90% of {name.split()[0]}'] = f'{in_words(low)} to {in_words(high)}'
        columns['any'], columns['none'] = (f'{np.mean(found[1:] == x):.0%}' for x in (math.inf, 0))
    return columns


def factor_of(method, fitted):
    """How many times larger than its base a method's model is, of its fit if that knows it."""
    return fitted.growth or GROWTH_FACTOR.get(method.partition('+')[0], 1)


def sunk_cost_limits(scratch, grown, N, factor=2):
    """
    D* in tokens (1 + S,) (Eq. 12): a model of factor x N trained from scratch for D* is as good as
    one grown from N after D* tokens and trained for D* more; beyond, starting over wins.
    """
    return crossings(lambda D: grown.losses(N, D, D), lambda D: scratch.losses(factor * N, 0.0, D))


def published_sunk_cost_limit(N):
    """The paper's approximation of D* in tokens (Appendix E.1)."""
    return 13e12 * (N / 1e11) ** (-0.6 - 0.04 * math.log(N / 1e11))


def compute_optimal(law, D1, compute, factor=1):
    """
    (D2, N) that minimise a joint law at fixed D1 for C2 = 6 factor N D2 FLOPs (Eq. 13, Appendix
    E.2; N before growth); 0 and 0 where more tokens never help. law: {parameter: value}.
    """
    p = SimpleNamespace(**law)
    alpha = p.alpha2 - p.alpha3 * math.log(D1)
    if alpha <= 0 or p.beta <= 0:
        return 0.0, 0.0
    log_A = p.logA - p.alpha1 * math.log(D1)
    log_G = (log_A + math.log(alpha) - p.logB - math.log(p.beta)) / (alpha + p.beta)
    log_D2 = log_G + p.beta / (alpha + p.beta) * math.log(compute / (6 * factor))
    D2 = math.exp(min(log_D2, 700))
    return D2, compute / (6 * factor * D2)


def compute_optima(fitted, D1, compute, factor=1):
    """compute_optimal of a fit and of its samples, float64 (1 + S, 2)."""
    laws = (dict(zip(fitted.parameters, row)) for row in fitted.rows)
    return np.array([compute_optimal(law, D1, compute, factor) for law in laws])


def of_domain(fits, domain):
    """The fits whose losses are on one corpus, '' for the base's. Raises UserError for none."""
    corpora = {method: method.partition('-')[2] for method in fits}
    if domain not in corpora.values():
        raise unknown('domain', domain, sorted({corpus or "''" for corpus in corpora.values()}))
    return {m.partition('-')[0]: f for m, f in fits.items() if corpora[m] == domain}


class Choice(NamedTuple):
    """Something to do with a budget, and the law that predicts its loss."""

    label: str
    fitted: Fit
    N: float  # of the law
    D1: float
    D2: float
    trained: float  # parameters N that are trained

    @property
    def beyond(self):
        """Which of N, D1 and D2 lie outside the points of its fit, in words."""
        found = zip(VARIABLES, self[2:5], map(self.fitted.seen.get, VARIABLES))
        return '; '.join(
            f'{name} = {value:.3g} ({low:.3g} to {high:.3g} seen)'
            for name, value, (low, high) in found
            if value and not low * 0.999 <= value <= high * 1.001
        )


def choices_for(fits, N, D1, budget):
    """The Choices for a budget of FLOPs and a base of N parameters after D1 tokens."""
    choices, factors = [], [1]
    for factor in sorted(factor_of(method, fitted) for method, fitted in fits.items()):
        if factor > 1.01 * factors[-1]:  # those of two methods may differ by a norm's parameters
            factors.append(factor)
    for method, fitted in fits.items():
        factor = factor_of(method, fitted)
        kind, D2 = 'grow by' if factor > 1 else 'continue', budget / (6 * N)
        if method.startswith('scratch'):
            for k in factors:
                choices.append(Choice('start over', fitted, k * N, 0.0, D2 / k, k * N))
            if 'cpt' not in fits:  # the same data continue: the law of one stage, for D1 + D2
                choices.append(Choice('continue', fitted, N, 0.0, D1 + D2, N))
        else:
            choices.append(Choice(f'{kind} {method}', fitted, N, D1, D2 / factor, factor * N))
    covered = []
    for choice in choices:  # a fit at one size says nothing about others
        low, high = choice.fitted.seen['N']
        if low < high or math.isclose(choice.N, low, rel_tol=0.01):
            covered.append(choice)
    return covered


def advise(fits, N, D1, budget):
    """
    Records that answer: a base of N parameters (without embeddings) was trained for D1 tokens,
    `budget` FLOPs are left: grow it, continue, or start over? The best first. fits: {method: Fit}.
    Raises UserError if no fit covers this size.
    """
    choices = choices_for(fits, N, D1, budget)
    if not choices:
        sizes = sorted({f'{fitted.seen["N"][0]:,.0f}' for fitted in fits.values()})
        raise UserError(f'these fits are for N = {", ".join(sizes)}, not for {N:,.0f}')
    losses = [c.fitted.losses(c.N, c.D1, c.D2)[:, 0] for c in choices]
    samples = np.stack([found[1 : min(map(len, losses))] for found in losses])
    best, records = samples.argmin(0), []
    for i in np.argsort([found[0] for found in losses]):
        c, (low, high) = choices[i], np.quantile(losses[i][1:], QUANTILES)
        record = {'choice': f'{c.label}, {format_count(c.trained)}'}
        record |= {'tokens': budget / (6 * c.trained), 'predicted loss': losses[i][0]}
        if samples.shape[1] > 1:  # else there is only the fit itself
            record['90% interval'] = f'{low:.3f} to {high:.3f}'
            record['best in'] = f'{np.mean(best == i):.0%}'
        rivals = [r for r in choices if c.D1 and r.label == 'start over']
        for rival in (r for r in rivals if math.isclose(r.trained, c.trained, rel_tol=0.02)):
            reused = lambda D: c.fitted.losses(c.N, c.D1, D)
            fresh = lambda D: rival.fitted.losses(c.trained, 0.0, D)
            record |= certainty('D2 up to which it beats starting over', crossings(reused, fresh))
        records.append(record | {'not seen by the fit': c.beyond or None})
    return records


def sunk_cost(fits, method, paper=False):
    """
    (records, panels) of D* over the size of the base (Eq. 12, Figure 10, right), between which half
    of the laws lie. fits: {method: Fit}; paper: also the paper's approximation.
    """
    scratch, grown = fits['scratch'], fits[method]
    sizes = np.geomspace(grown.seen['N'][0], BEYOND * grown.seen['N'][1], 9)
    limits = [sunk_cost_limits(scratch, grown, N, factor_of(method, grown)) for N in sizes]
    records = []
    for N, found in zip(sizes, limits):
        records.append({'N of the base': format_count(N)} | certainty('D* (tokens)', found))
    panel = Panel('N of the base', 'D* (tokens)', log='xy')
    labels = 'as fitted', 'a quarter of the laws is below', 'a quarter is above'
    rows = [(f[0], *np.quantile(f[1:], (0.25, 0.75), method='nearest')) for f in limits]
    for label, style, line in zip(labels, ('o-', ':', ':'), zip(*rows)):
        panel.lines.append(Line(sizes, line, label, style, 'C0'))
    if paper:
        approximate = [published_sunk_cost_limit(N) for N in sizes]
        panel.lines.append(Line(sizes, approximate, 'Appendix E.1', '--', 'C3'))
    return records, [panel]


def optimal(fitted, method, D1):
    """(records, panels) of the compute-optimal N and D2 over the budget (Eq. 13)."""
    if fitted.law != 'joint':
        raise UserError(f'the law of {method} is {fitted.law}: it has no N and D1')
    factor = factor_of(method, fitted)
    least, most = (6 * factor * N * D2 for N, D2 in zip(fitted.seen['N'], fitted.seen['D2']))
    budgets = np.geomspace(least, BEYOND * most, 9)
    found = [compute_optima(fitted, D1, compute, factor) for compute in budgets]
    if not found[0][0].any():
        raise UserError(f'at D1 = {D1:g} more tokens never help: no compute-optimal point')
    names, records = ('D2 (tokens)', 'N of the base'), []
    for compute, values in zip(budgets, found):
        record = {'budget (FLOPs)': format_si(compute)}
        for name, column in zip(names, values.T):
            record |= certainty(name, column)
        records.append(record)
    panels = []
    for name, values in zip(names, zip(*(f[0] for f in found))):
        panel = Panel('budget of the second stage (FLOPs)', name, log='xy')
        panel.lines.append(Line(budgets, values, f'D1 = {format_count(D1)}', 'o-'))
        panels.append(panel)
    return records, panels


def tail_record(method, data, plain, saturated):
    """
    What a limit D2max of the second stage's tokens changes (Eq. 14, Figure 11): a record with the
    mean square errors at the largest quarter of the D2, and the D2 at which the curves of all bases
    cross. A longer first stage helps while -alpha1 + alpha3 log D2* < 0, so they do at D2* =
    e^(alpha1 / alpha3), if D2max is larger. The paper has D2max <= e^(alpha2 / alpha3) as the
    condition, which is in the record too. plain, saturated: Fits of Eq. 6 and Eq. 14.
    """
    N, D1, D2, loss = (np.array(data[column]) for column in (*VARIABLES, 'loss'))
    different = np.unique(D2)
    tail = D2 >= different[-max(1, len(different) // 4)]
    record = {'method': method, 'points': int(tail.sum())}
    for name, fitted in (('Eq. 6', plain), ('Eq. 14', saturated)):
        errors = fitted.losses(N[tail], D1[tail], D2[tail])[0] - loss[tail]
        record[f'MSE of {name}'] = f'{np.mean(errors**2):.2e}'
    p = SimpleNamespace(**saturated.parameters)
    record['D2max'], record['curves cross at D2'] = power_of_e(p.logDmax), 'none'
    if p.alpha3 > 0:
        record['e^(alpha2/alpha3)'] = power_of_e(p.alpha2 / p.alpha3)
        crossing = p.alpha1 / p.alpha3  # of log D2*; D2 = 1 / (1 / D2* - 1 / D2max)
        if 0 < crossing < p.logDmax:
            log_D2 = crossing - math.log1p(-math.exp(crossing - p.logDmax))
            record['curves cross at D2'] = power_of_e(log_D2)
    return record


def power_of_e(exponent):
    """e^exponent, in words."""
    return f'{math.exp(exponent):.3g}' if abs(exponent) < 700 else f'e^{exponent:.0f}'


# ----------------------------------------------------------------------------------------------
# pictures of laws

STYLES = dict(multiplicative='-', no_interaction='--', additive='-.', hybrid=':', continuous='--')


def points_over(data, over, held, value):
    """(tokens of the stage `over`, losses) of the points whose stage `held` has `value` tokens."""
    columns = zip(data[held], data[over], data['loss'])
    return zip(*sorted((tokens, loss) for other, tokens, loss in columns if other == value))


def law_panel(data, fits, title, over='D2'):
    """
    Loss over the tokens of one stage: the points, a colour for each number of tokens of the other
    stage, and the curves of some laws, {name: Fit}.
    """
    held = 'D1' if over == 'D2' else 'D2'
    panel = Panel(f'{over} (tokens)', 'loss (nats per token)', title=title, log='xy')
    for i, value in enumerate(sorted(set(data[held]))):
        tokens, losses = points_over(data, over, held, value)
        color, label = f'C{i % 10}', f'{held} = {format_count(value)}'
        panel.lines.append(Line(tokens, losses, label, 'o', color))
        grid = np.geomspace(tokens[0], tokens[-1], 50)
        for law, fitted in fits.items():
            curve = fitted.losses(data['N'][0], **{held: value, over: grid})[0]
            panel.lines.append(Line(grid, curve, '', STYLES[law], color))
    return panel


def power_panels(data, fitted):
    """Exponent and factor of the power of D2, over D1 (Figure 1)."""
    p, powers = SimpleNamespace(**fitted.parameters), {}
    for D1 in sorted(set(data['D1'])):  # a line through log(L - E)
        D2, losses = map(np.array, points_over(data, 'D2', 'D1', D1))
        if len(set(D2)) > 1:
            above = np.maximum(losses - math.exp(p.logE), 1e-9)
            powers[D1] = np.polyfit(np.log(D2), np.log(above), 1)
    panels = [
        Panel('D1 (tokens)', 'exponent of D2', log='x'),
        Panel('D1 (tokens)', 'factor of the power of D2', log='xy'),
    ]
    D1, log_D1 = [*powers], np.log([*powers])
    measured = np.reshape([*powers.values()], (-1, 2)).T
    laws = -p.alpha2 + p.alpha3 * log_D1, np.exp(p.logA - p.alpha1 * log_D1)
    found = measured[0], np.exp(np.minimum(measured[1], 700))
    for panel, points, law in zip(panels, found, laws):
        panel.lines = [
            Line(D1, points, 'each D1 alone', 'o'),
            Line(D1, law, 'Eq. 6'),
        ]
    return panels


def law_pictures(method, data, fits):
    """
    Blocks of pictures: the multiplicative law over D2 and D1 (Figures 1, 8) with the power of D2
    (Figure 1); four laws (Figure 3) and the continuous one (Figure 9). fits: {law: Fit}.
    """
    ours = {'multiplicative': fits['multiplicative']}
    panels = [law_panel(data, ours, 'Eq. 6 and the points')]
    panels.append(law_panel(data, ours, 'the same over D1', 'D1'))
    panels += power_panels(data, fits['multiplicative'])
    *four, _ = STYLES
    rivals = [law_panel(data, {law: fits[law] for law in four if law in fits}, 'four laws')]
    if 'continuous' in fits:
        rivals.append(law_panel(data, {'continuous': fits['continuous']}, 'Eq. 11: D1 + D2'))
    return [(f'{method}.png', panels), (f'{method}_laws.png', rivals)]


def grow_or_scratch(results, fits):
    """
    Blocks of a picture for each growth whose grown size was also trained from scratch: growing at
    several D1 beside starting with the grown size (Figure 4, right).
    """
    blocks = []
    for (method, grown), (other, scratch) in itertools.permutations(fits.items(), 2):
        (N, most), same_text = grown.seen['N'], method.partition('-')[2] == other.partition('-')[2]
        wanted = factor_of(method, grown) * N
        same_size = N == most < wanted and np.allclose(scratch.seen['N'], wanted, rtol=0.02)
        if same_text and same_size and not scratch.seen['D1'][1]:
            data = results[method]
            title = 'grow, or start with the grown size'
            panel = law_panel(data, {'multiplicative': grown}, title)
            tokens, losses = points_over(results[other], 'D2', 'D1', 0.0)
            panel.lines.append(Line(tokens, losses, 'from scratch', 'o', 'black'))
            grid = np.geomspace(tokens[0], max(*tokens, *data['D2']), 50)
            curve = scratch.losses(results[other]['N'][0], 0.0, grid)[0]
            panel.lines.append(Line(grid, curve, '', '-', 'black'))
            blocks.append((f'{method}_or_scratch.png', [panel]))
    return blocks


# ----------------------------------------------------------------------------------------------
# results.csv

COLUMNS = ('method', 'N', 'D1', 'D2', 'seed', 'loss')
NUMBERS = (*COLUMNS[1:], 'trained_N')  # the last may be missing: NaN


def read_results(path):
    """{method: {column: list}} of a results.csv. Raises UserError, with the row, for a bad one."""
    import pandas  # a second, which not every command needs

    try:
        rows = pandas.read_csv(path, comment='#', skipinitialspace=True, dtype=dict(method=str))
    except ValueError as error:  # no text, no table, or nothing
        raise UserError(f'{path} is not a CSV file ({first_line(error)})') from None
    for name in COLUMNS:
        if name not in rows:
            close = nearest(name, rows.columns)
            raise UserError(f'{path} has no column {name!r}{close}; it needs {",".join(COLUMNS)}')
    values = rows.reindex(columns=NUMBERS).apply(pandas.to_numeric, errors='coerce')
    positive = (values[['N', 'D2', 'loss']] > 0).all(axis=1) & (values.D1 >= 0)
    named = rows.method.str.fullmatch(r'[\w+.-]+', na=False)
    problems = {
        'a number is missing': ~(values[[*COLUMNS[1:]]] < math.inf).all(axis=1),
        'loss, N and D2 must be positive numbers, D1 positive or 0': ~positive,
        'trained_N must be at least N': values.trained_N < values.N,
        'a method is letters, digits and + . _ -': ~named,
        'it has method, N, D1, D2 and seed of another': rows[[*COLUMNS[:-1]]].duplicated(),
    }
    for what, found in problems.items():
        if found.any():
            raise UserError(f'{path}, row {found.argmax() + 2}: {what}')
    if rows.empty:
        raise UserError(f'{path} holds no results')
    results = {m: g.to_dict('list') for m, g in values.groupby(rows.method, sort=False)}
    for method, data in results.items():
        if min(data['D1']) == 0 < max(data['D1']):
            raise UserError(f'{path}: {method} has points from scratch (D1 = 0) and with a base')
    return results


def laws_for(data):
    """The laws that can describe a method's points: joint ones for several sizes."""
    sizes = len(set(data['N']))
    if max(data['D1']) == 0:
        return ['chinchilla'] if sizes > 1 else ['continuous']
    if sizes > 1:
        return ['joint']
    return [name for name, law in LAWS.items() if 'N' not in law.depends_on]


# ----------------------------------------------------------------------------------------------
# the command line


def fit_results(path, bootstrap=200):
    """
    Fit every method's laws to a results.csv: (blocks for the report, {method: Fit}). bootstrap: as
    in fit().
    """
    results = read_results(path)
    blocks, failures, best, found, tails = [], [], {}, {}, []
    for method, data in results.items():
        fits = found[method] = {}
        for law in progress_bar(laws_for(data), desc=f'laws of {method}'):
            try:  # the first has intervals, and decides
                fits[law] = fit(law, data, 0 if fits else bootstrap)
            except UserError as error:
                failures.append(f'{method}: {error}')
        for law, fitted in itertools.islice(fits.items(), 1):
            best[method] = fitted
            points, equation = len(data['loss']), LAWS[law].equation
            blocks += [f'{method}, {points} points: {law}, {equation}', fit_records(fitted)]
            blocks += law_pictures(method, data, fits) if law == 'multiplicative' else []
        if {'multiplicative', 'saturated_D2'} <= fits.keys():
            pair = fits['multiplicative'], fits['saturated_D2']
            tails.append(tail_record(method, data, *pair))
    if not best:
        raise UserError('\n'.join(failures))
    return [*failures, *blocks, *grow_or_scratch(results, best), *error_tables(found), tails], best


LEFT_OUT = {  # errors of a Fit, and at which points they are
    'leave_one_out': 'a cell left out',
    'base_left_out': 'a base left out',
    'extrapolation': 'lowest tenth left out',
}


def error_tables(found):
    """A table for each kind of error, RMS of log L in thousandths: {method: {law: Fit}}."""
    tables = []
    for field, title in LEFT_OUT.items():
        tables.append([])
        for law in LAWS:
            errors = {m: getattr(laws.get(law), field, None) for m, laws in found.items()}
            shown = {m: f'{1e3 * error:.3f}' for m, error in errors.items() if error is not None}
            tables[-1] += [{f'{title}, RMS x 1e-3': law} | shown] if shown else []
    return tables


def write_fits(fits, blocks, out):
    """Write fit.json and the pictures among blocks into a folder."""
    Path(out).mkdir(parents=True, exist_ok=True)
    content = {method: fitted._asdict() for method, fitted in fits.items()}
    write_json(Path(out) / 'fit.json', content)
    draw_pictures(blocks, out)


def fit_records(fitted):
    """Records of a fit's parameters with their intervals, amplitudes as they are."""
    records = []
    for name, value in fitted.parameters.items():
        numbers, bare = [value, *fitted.intervals[name]], name.removeprefix('log')
        if bare != name:
            numbers = [math.exp(min(number, 700)) for number in numbers]
        value, low, high = (f'{number:.4g}' for number in numbers)
        records.append({'parameter': bare, 'value': value, '90% interval': f'{low} to {high}'})
    return records


def read_fits(path):
    """{method: Fit} of a fit.json. Raises UserError if the file is not one."""
    try:
        fits = {method: Fit(**values) for method, values in read_json(path).items()}
        for fitted in fits.values():
            names = LAWS[fitted.law].parameters
            theta = np.array(fitted.rows, np.float64)
            assert tuple(fitted.parameters) == names and np.isfinite(theta).all()
            assert theta.shape == (1 + len(fitted.samples), len(names)) and fitted.samples
            for low, high in (fitted.seen[name] for name in VARIABLES):
                assert 0 <= low <= high < math.inf
            assert fitted.growth is None or 1 <= fitted.growth < math.inf
        assert fits
    except Exception as error:  # damage takes many forms
        reason = f'not a fit.json of scaling.py fit ({type(error).__name__})'
        raise UserError(f'{path} is {reason}') from None
    return fits


@dataclass
class Question:
    """What scaling.py's verbs ask: fit, advise, sunk_cost and optimal."""

    results: str = ''  # fit: CSV with the columns method,N,D1,D2,seed,loss
    bootstrap: Natural = 200  # fit: resamplings for the intervals; 0: none
    fit: str = ''  # the others: whose laws decide, those of a fit.json, or ...
    paper: bool = False  # ... the published coefficients
    domain: str = ''  # corpus whose loss counts, if not the base's (of the paper's: code)
    growth: str = 'stk2'  # sunk_cost, optimal: method of the second stage: cpt, stk2, ...
    base_params: NonNegative = 0.0  # advise: N of the base model, without embeddings
    base_tokens: NonNegative = 0.0  # advise, optimal: D1, tokens it was trained on
    budget: NonNegative = 0.0  # advise: FLOPs to spend, at 6 per parameter and token
    out: str = ''  # folder for fit.json and pictures; empty: that of the results, or this one


def fit_command(options):
    """scaling.py fit RESULTS.csv"""
    if not options.results:
        raise UserError('missing argument; usage: scaling.py fit RESULTS.csv')
    out = options.out or str(Path(options.results).parent)
    blocks, fits = fit_results(options.results, options.bootstrap)
    print(render(blocks))  # before anything is written, which may fail
    write_fits(fits, blocks, out)
    print(f'\nfit.json and pictures are in {out}/')


def decide(verb, options):
    """scaling.py advise, sunk_cost and optimal: print the table, and draw the picture."""
    if options.paper == bool(options.fit):
        raise UserError('whose laws? --fit=FILE or --paper=True')
    needed = dict(advise=('base_params', 'base_tokens', 'budget'), optimal=('base_tokens',))
    for knob in needed.get(verb, ()):
        if getattr(options, knob) < 1:
            raise UserError(f'missing argument --{knob}=NUMBER')
    fits = of_domain(published() if options.paper else read_fits(options.fit), options.domain)
    D1, out = options.base_tokens, Path(options.out or '.')
    if verb == 'advise':
        print(render([advise(fits, options.base_params, D1, options.budget)]))
        budget = format_si(options.budget)
        print(f'\n{budget}FLOPs; N without embeddings; losses in nats on the data of the fit')
        return
    for method in (options.growth, 'scratch')[: 1 + (verb == 'sunk_cost')]:
        if method not in fits:
            raise unknown('law of a method', method, fits)
        if 'N' not in LAWS[fits[method].law].depends_on:
            raise UserError(f'the law of {method} is of one size, and says nothing about N')
    if verb == 'sunk_cost':
        records, panels = sunk_cost(fits, options.growth, options.paper)
    else:
        records, panels = optimal(fits[options.growth], options.growth, D1)
    print(render([records]))
    out.mkdir(parents=True, exist_ok=True)
    draw_panels(panels, out / f'{verb}.png')
    low, high = map(format_count, fits[options.growth].seen['N'])
    print(f'\nthe law was fitted to N from {low} to {high}; {verb}.png is in {out}/')


def main(argv):
    """Command line: a verb, then its arguments."""
    from extras import diagnostics

    verbs = ['fit', 'advise', 'sunk_cost', 'optimal', 'diagnose', 'toy']
    if not argv or argv[0] in HELP:
        print(__doc__)
        sys.exit(0 if argv else 2)
    verb, *knobs = argv
    if verb not in verbs:
        raise unknown('verb', verb, verbs)
    if verb in verbs[4:]:
        getattr(diagnostics, f'{verb}_command')(knobs)
        return
    words = ('results',) if verb == 'fit' else ()
    options, _, _ = configure(knobs, Question, program=f'scaling.py {verb}', words=words)
    if verb == 'fit':
        fit_command(options)
    else:
        decide(verb, options)


if __name__ == '__main__':
    run_as_program(main)
