"""
Is reuse worth it? Scaling laws of model reuse: a grid of runs, laws fitted to it, and decisions.

Paper: Liew and Kato, From Acceleration to Saturation: Scaling Behavior of Bootstrapped Language
Model Pretraining (later: Reusing Overtrained Language Models Saturates Scaling).

    python train.py config/scaling_tiny.py                   # train a grid of runs, then fit laws
    python scaling.py fit out/scaling_tiny/results.csv       # parameters, errors, pictures
    python scaling.py advise out/scaling_tiny/results.csv --base_params=55536 ...
    python scaling.py advise --paper=True --base_params=1e9 --base_tokens=2e12 --budget=1e22
    python scaling.py sunk_cost --paper=True                 # up to how many tokens growing wins
    python scaling.py optimal --paper=True --base_tokens=1e10    # the best N and D2 for a budget
    python scaling.py diagnose FOLDER [FOLDER ...]           # extras/diagnostics.py
    python scaling.py toy                                    # the toy model of section 5.3
    python scaling.py advise --help

The loss after D1 tokens of a first stage and D2 tokens of a second one (continual pretraining, or
growth) is

    L(D1, D2) = A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + E                            (Eq. 6)

so after a longer first stage the second one starts at a lower loss, but the loss falls with a
smaller exponent: reuse saturates. N counts the base's parameters before growth, without embeddings.
Losses are in nats, logarithms are natural.

A results.csv has the columns method, N, D1, D2, seed and loss. method is scratch (with D1 = 0), cpt
(continual pretraining), or a growth: exp (width times sqrt 2), stk2 or stk4 (depth times 2 or 4).
Optional columns are variant (stable: from the base's stable phase, before its learning rate decays;
low: at a low constant rate; replay: with a quarter of the base's data), corpus, on which the loss
is measured (empty: the base's; losses on different text cannot be compared), and trained_N, the
size of the model that the second stage trains.
"""

import itertools
import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from configurator import HELP, Count, Natural, Positive, Range, configure
from engine.errors import UserError, first_line, run_as_program, unknown
from engine.files import write_atomically
from engine.log import progress_bar
from engine.report import Line, Panel, draw_pictures, format_count, format_si, render
from engine.stage import Stage
from expand import RELATIVE_SIZES, continue_from, grow_stage

# ----------------------------------------------------------------------------------------------
# laws

CELL = ['N', 'D1', 'D2']  # runs that agree in these differ only in their seed: they are a cell
LOGS = 'A', 'B', 'F', 'E', 'Dmax'  # positive parameters: their logarithms are fitted


class Law(NamedTuple):
    """
    A scaling law: the loss is a sum of positive terms, the last of which is the constant E. It is
    evaluated in logarithms, so that the sum is a numerically stable logaddexp.
    """

    equation: str
    data: str  # names of the variables it depends on: N, D1, D2, or D = D1 + D2
    parameters: str  # names of its parameters, E last; those in LOGS are given as logarithms
    terms: Callable  # (logs of the data, parameters without E) -> [log of each term but E]


def saturate(D, logDmax):
    """log of (1 / D + 1 / Dmax)^-1, at most log Dmax (Eqs. 10, 14). D is a logarithm, too."""
    return -np.logaddexp(-D, -logDmax)


# in `terms`, N, D1, D2 and D are logarithms: D1^-alpha1 is -alpha1 * D1
LAWS = {
    'multiplicative': Law(  # Eq. 6
        'A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + E',
        'D1 D2',
        'A alpha1 alpha2 alpha3 E',
        lambda D1, D2, logA, alpha1, alpha2, alpha3: [
            logA - alpha1 * D1 + (-alpha2 + alpha3 * D1) * D2
        ],
    ),
    'no_interaction': Law(  # Eq. 6 with alpha3 = 0
        'A D1^-alpha1 D2^-alpha2 + E',
        'D1 D2',
        'A alpha1 alpha2 E',
        lambda D1, D2, logA, alpha1, alpha2: [logA - alpha1 * D1 - alpha2 * D2],
    ),
    'additive': Law(  # Eq. 7
        'A D1^-alpha1 + F D2^-alpha2 + E',
        'D1 D2',
        'A alpha1 F alpha2 E',
        lambda D1, D2, logA, alpha1, logF, alpha2: [logA - alpha1 * D1, logF - alpha2 * D2],
    ),
    'hybrid': Law(  # Eq. 8
        '(A D1^-alpha1 + F) D2^-alpha2 + E',
        'D1 D2',
        'A alpha1 F alpha2 E',
        lambda D1, D2, logA, alpha1, logF, alpha2: [
            logA - alpha1 * D1 - alpha2 * D2,
            logF - alpha2 * D2,
        ],
    ),
    'continuous': Law(  # Eq. 11; with D1 = 0 it is Eq. 2
        'A (D1 + D2)^-alpha + E',
        'D',
        'A alpha E',
        lambda D, logA, alpha: [logA - alpha * D],
    ),
    'chinchilla': Law(  # one stage, from scratch (Table 7)
        'A (D1 + D2)^-alpha + B N^-beta + E',
        'N D',
        'A alpha B beta E',
        lambda N, D, logA, alpha, logB, beta: [logA - alpha * D, logB - beta * N],
    ),
    'joint': Law(  # Eq. 9
        'A D1^-alpha1 D2^(-alpha2 + alpha3 log D1) + B N^-beta + E',
        'N D1 D2',
        'A alpha1 alpha2 alpha3 B beta E',
        lambda N, D1, D2, logA, alpha1, alpha2, alpha3, logB, beta: [
            logA - alpha1 * D1 + (-alpha2 + alpha3 * D1) * D2,
            logB - beta * N,
        ],
    ),
    'saturated_D1': Law(  # Eq. 10, in place of D1
        'Eq. 6 with (1/D1 + 1/Dmax)^-1 in place of D1',
        'D1 D2',
        'A alpha1 alpha2 alpha3 Dmax E',
        lambda D1, D2, logA, alpha1, alpha2, alpha3, logDmax: [
            # Eq. 6 with D1 factored out: D2^-alpha2 D1^(-alpha1 + alpha3 log D2)
            logA - alpha2 * D2 + (-alpha1 + alpha3 * D2) * saturate(D1, logDmax)
        ],
    ),
    'saturated_D2': Law(  # Eq. 14
        'Eq. 6 with (1/D2 + 1/Dmax)^-1 in place of D2',
        'D1 D2',
        'A alpha1 alpha2 alpha3 Dmax E',
        lambda D1, D2, logA, alpha1, alpha2, alpha3, logDmax: [
            logA - alpha1 * D1 + (-alpha2 + alpha3 * D1) * saturate(D2, logDmax)
        ],
    ),
}


def logarithms(data):
    """
    {name: logarithm} of the columns N, D1, D2 and of D = D1 + D2, float64 (n,). D1 = 0 counts as
    one token, as the paper's D^-alpha stands for (D + 1)^-alpha (its footnote 1).
    """
    N, D1, D2 = (np.asarray(data[name], np.float64) for name in CELL)
    columns = N, np.maximum(D1, 1), D2, D1 + D2
    return dict(zip((*CELL, 'D'), map(np.log, columns)))


def terms_of(law, theta, x):
    """
    The logarithms of a law's terms, that of E last, which broadcast to (..., n). law: its name;
    theta: parameters (..., P), in the order of LAWS; x: what `logarithms` returns.
    """
    # P arrays (..., 1), each of which broadcasts against the n points
    *theta, logE = np.moveaxis(np.asarray(theta)[..., None], -2, 0)
    return [*LAWS[law].terms(*map(x.get, LAWS[law].data.split()), *theta), logE]


def log_loss(law, theta, x):
    """log L, (..., n). Arguments as in `terms_of`."""
    return reduce(np.logaddexp, terms_of(law, theta, x))


def predict(law, theta, data):
    """
    The losses (..., n) in nats, float64, that a law predicts. law: its name; theta: parameters
    (..., P), in the order of LAWS; data: columns N, D1 and D2, a dict or a DataFrame.
    """
    return np.exp(log_loss(law, theta, logarithms(data)))


# ----------------------------------------------------------------------------------------------
# fits of log L under a Huber loss with delta = 1e-3 (section 3.2), in float64

QUANTILES = 0.05, 0.95  # the ends of a 90% interval
# Where fits start: exponents and the other parameters, those in LOGS as logarithms. E is relative
# to the mean loss; A, B and F are set by starts_of.
EXPONENTS = 0.03, 0.15, 0.6
STARTS = dict(A=[0], B=[0], F=[0], alpha3=(0, 0.03), Dmax=(12, 17, 22, 40), E=(-3, -0.7, -0.1))


class Fit(NamedTuple):
    """A law fitted to points, with bootstrap samples of its parameters."""

    law: str
    rows: np.ndarray  # (1 + S, P): the fitted parameters, then those of S bootstrap samples
    data: Any  # DataFrame of the points

    @property
    def parameters(self):
        """{name: fitted value}; for those in LOGS, the logarithm."""
        return dict(zip(LAWS[self.law].parameters.split(), self.rows[0]))

    @property
    def growth(self):
        """The growth factor: parameters of the trained model / parameters of its base."""
        return (self.data.trained_N / self.data.N).mean()

    def losses(self, N, D1, D2):
        """
        Predicted losses (1 + S, n) in nats: of the fit, then of each bootstrap sample. N, D1, D2:
        numbers or float64 (n,).
        """
        return predict(self.law, self.rows, dict(N=[N], D1=D1, D2=D2))


def cells_of(data):
    """The cells, a list of index arrays: points that differ only in their seed."""
    return [*data.groupby(CELL).indices.values()]


def starts_of(law, data):
    """
    A grid of starting points (S, P) for `solve`: small to large exponents; E at 5, 50 and 90% of
    the mean loss; amplitudes at which each other term is 22% of it; a limit Dmax from 163k tokens
    to practically none.
    """
    names, middle = LAWS[law].parameters.split(), np.log(data.loss).mean()
    starts = np.array([*itertools.product(*(STARTS.get(name, EXPONENTS) for name in names))])
    starts[:, -1] += middle
    amplitudes = [i for i, name in enumerate(names) if name in 'ABF']
    # terms come in the order of their amplitudes, which are 1 so far; zip drops the last one, E
    for i, term in zip(amplitudes, terms_of(law, starts, logarithms(data))):
        starts[:, i] = middle - 1.5 - term.mean(-1)  # e^-1.5 = 22%
    return starts


def solve(law, data, starts):
    """
    Minimise the Huber loss of log L from the eight best of the starting points (S, P); returns the
    best parameters found, (P,). The paper does this by BFGS. With its delta = 1e-3 the loss is
    almost piecewise linear, and a search can stop early, at an edge. So it goes on from there with
    a larger delta, which smooths the edges, and then once more with the paper's.
    """
    from scipy.optimize import least_squares  # takes a second; not every command needs it

    x, target, found = logarithms(data), np.log(data.loss.to_numpy()), []
    residuals = lambda theta: log_loss(law, theta, x) - target
    for start in sorted(starts, key=lambda start: np.abs(residuals(start)).mean())[:8]:
        for delta in 1e-3, 1e-2, 1e-3:
            best = least_squares(
                residuals, start, loss='huber', f_scale=delta, x_scale='jac', ftol=1e-10, xtol=1e-10
            )
            start = best.x
            found.append(best)
    return min(found, key=lambda result: result.cost).x  # a larger delta only adds to the cost


def fit(law, data, bootstrap=100, seed=0):
    """
    Fit a law (its name) to columns N, D1, D2 and loss, a dict or a DataFrame; returns a Fit. The
    bootstrap resamples whole cells of equal N, D1 and D2, `bootstrap` times: runs that differ only
    in their seed say nothing about how well a law predicts. Raises UserError for too few points.
    """
    import pandas  # takes a second; not every command needs it

    data = pandas.DataFrame(data)
    cells, least = cells_of(data), len(LAWS[law].parameters.split()) + 1
    if len(cells) < least:
        raise UserError(f'{law} needs points of {least} different N, D1 or D2, not {len(cells)}')
    for name, least in ('N', 3), ('D1', 2), ('D2', 2):  # B, beta and E need three N
        if name in LAWS[law].data and data[name].nunique() < least:
            raise UserError(f'{law} needs points of at least {least} different {name}')
    rows, draw = [solve(law, data, starts_of(law, data))], random.Random(seed)
    for _ in range(bootstrap):
        drawn = np.concatenate(draw.choices(cells, k=len(cells)))
        rows.append(solve(law, data.iloc[drawn], rows[:1]))  # from the fit alone: the grid is slow
    return Fit(law, np.array(rows), data)


def without(fitted, group):
    """The parameters (P,) of a fit to all points but those of a group, an index array."""
    return solve(fitted.law, fitted.data.drop(fitted.data.index[group]), fitted.rows[:1])


def left_out_error(fitted, left_out):
    """
    Root mean square error of log L at groups of points, index arrays, each predicted by a fit to
    all the others.
    """
    errors = []
    for group in left_out:
        points = fitted.data.iloc[group]
        errors.append(np.log(predict(fitted.law, without(fitted, group), points) / points.loss))
    return np.sqrt(np.mean(np.concatenate(errors) ** 2))


def leave_one_out(law, data):
    """Root mean square error of log L at cells left out one at a time (Table 1)."""
    fitted = fit(law, data, bootstrap=0)
    return left_out_error(fitted, cells_of(fitted.data))


def lowest_tenth(data):
    """The points (index array) of the 10% of cells with the lowest losses (Figure 3, middle)."""
    cells = sorted(cells_of(data), key=lambda cell: data.loss.iloc[cell].mean())
    return np.concatenate(cells[: max(1, round(len(cells) / 10))])


# ----------------------------------------------------------------------------------------------
# the published fits

PUBLISHED = Path(__file__).parent / 'data'


def published():
    """
    The paper's fits (Table 7), {name: Fit}. Printed to three decimals, its law for stacking
    predicts the losses of Tables 8 and 9 0.26 nats too low. So we draw laws within the rounding:
    the Fit is the one closest to these losses, its samples are the next 200 (RMS error 0.052 at
    most). No losses are printed for the other methods: the Fit is the law as printed, its samples
    are the first 200 draws.
    """
    import pandas

    measured, fits = read_results(PUBLISHED / 'published_reuse_losses.csv'), {}
    laws = pandas.read_csv(PUBLISHED / 'published_reuse_laws.csv', comment='#').fillna('')
    for (method, corpus, law), data in laws.groupby(['method', 'corpus', 'law']):
        names, draw = LAWS[law].parameters.split(), np.random.default_rng(0)
        printed = data[names].iloc[0].to_numpy(float)
        rows = printed + draw.uniform(-5e-4, 5e-4, (20_000, len(names)))
        rows[0] = printed
        rows = np.where([name in LOGS for name in names], np.log(rows), rows)
        losses = measured[measured.method == method]
        errors = predict(law, rows, losses) - losses.loss.to_numpy()
        # without printed losses all errors are 0, and a stable sort keeps the printed law first
        nearest = (errors**2).sum(1).argsort(kind='stable')[:201]
        fits[f'{method}{corpus and "-"}{corpus}'] = Fit(law, rows[nearest], data)
    return fits


# ----------------------------------------------------------------------------------------------
# decisions (section 5, Appendix E), each with its spread over the samples of its laws

TOKENS = np.logspace(3, 20, 171)  # the grid that is searched for crossings
BEYOND = 1000  # how many times beyond the fitted points tables extrapolate, as Figure 10 does
GROWTH = {'exp': 2, 'stk2': 2, 'stk4': 4}  # growth factors for results without trained_N


def crossings(lead):
    """
    D* (1 + S,): the largest number of tokens at which `lead`, the loss of starting over minus that
    of reuse, changes sign; 0 if reuse is never ahead, inf if it still is at the last of TOKENS.
    lead: tokens (n,) -> (1 + S, n), rows as in `Fit.losses`.
    """
    from scipy.optimize import brentq  # takes a second; not every command needs it

    found = []
    for i, ahead in enumerate(lead(TOKENS) > 0):
        found.append(math.inf if ahead[-1] else 0.0)
        if ahead.any() and not ahead[-1]:
            # between the last grid point at which reuse is ahead, and the next one
            ends = np.log(TOKENS[np.flatnonzero(ahead)[-1] :][:2])
            found[-1] = math.exp(brentq(lambda log_D: lead(np.exp(log_D))[i].item(), *ends))
    return np.array(found)


def in_words(tokens):
    """A number of tokens; 'none' for 0 and 'any' for infinity."""
    return {0.0: 'none', math.inf: 'any'}.get(tokens) or format_count(tokens)


def certainty(name, found):
    """
    Table columns for a number of tokens as the laws give it, `found` (1 + S,), the fit's own first:
    its value, its 90% interval, and the share of the laws that say 'any' and 'none'.
    """
    columns = {name: in_words(found[0])}
    if len(found) > 1:
        low, high = np.quantile(found, QUANTILES, method='nearest')  # inf cannot be interpolated
        columns[f'90% of {name}'] = f'{in_words(low)} to {in_words(high)}'
        columns['any'], columns['none'] = (f'{np.mean(found == x):.0%}' for x in (math.inf, 0))
    return columns


def sunk_cost_limits(scratch, grown, N):
    """
    D* in tokens (1 + S,) (Eq. 12): a model of the grown size trained from scratch for D* tokens is
    as good as one grown from N after D* tokens and trained for D* more; beyond, starting over wins.
    scratch, grown: Fits; N: parameters of the base.
    """
    return crossings(lambda D: scratch.losses(grown.growth * N, 0, D) - grown.losses(N, D, D))


def published_sunk_cost_limit(N):
    """The paper's approximation of D* in tokens (Appendix E.1), for sizes N."""
    return 13e12 * (N / 1e11) ** (-0.6 - 0.04 * np.log(N / 1e11))


def compute_optimal(fitted, D1, compute):
    """
    The compute-optimal (D2, N), N before growth, each (1 + S,): they minimise a joint law, and each
    of its samples, at fixed D1 and C2 = 6 growth N D2 = `compute` FLOPs (Eq. 13, Appendix E.2).
    Where more tokens never help, D2 is 0 (and N infinite).
    """
    logA, alpha1, alpha2, alpha3, logB, beta, _ = fitted.rows.T
    log_D1, pairs = math.log(D1), compute / (6 * fitted.growth)  # pairs: N D2
    alpha = np.maximum(alpha2 - alpha3 * log_D1, 0)  # alpha_eff
    with np.errstate(divide='ignore'):  # of log 0 and 1 / 0, where alpha is 0
        log_G = logA - alpha1 * log_D1 + np.log(alpha) - logB - np.log(beta)
        D2 = np.exp((log_G + beta * math.log(pairs)) / (alpha + beta))
        return D2, pairs / D2


class Choice(NamedTuple):
    """One way to spend a budget, and the law that predicts its loss."""

    label: str
    fitted: Fit
    N: float  # parameters as the law counts them: before growth
    D1: float  # tokens of the first stage; 0: from scratch
    trained: float  # parameters of the model that is trained

    def losses(self, D2):
        """Losses (1 + S, n) after D2 tokens, as in `Fit.losses`."""
        return self.fitted.losses(self.N, self.D1, D2)


def choices_for(fits, N, D1):
    """
    A list of Choices for a base of N parameters trained on D1 tokens: reuse it, by each law of
    reuse; start over, at each size that reuse would train; or continue it on its own data. Those
    that no law covers are left out. fits: {name: Fit}.
    """
    choices = [
        Choice(name, fitted, N, D1, round(fitted.growth * N))
        for name, fitted in fits.items()
        if fitted.data.D1.any()
    ]
    sizes = {choice.trained for choice in choices}
    for fitted in fits.values():
        if not fitted.data.D1.any():
            choices += [Choice('start over', fitted, size, 0.0, size) for size in sizes]
            if round(N) not in sizes:  # continuing on the same data is one run of D1 + D2 tokens
                choices.append(Choice('continue', fitted, N, D1, N))
    return [  # a law of one size says nothing about others
        choice
        for choice in choices
        if 'N' in LAWS[choice.fitted.law].data or np.allclose(choice.fitted.data.N, choice.N, 0.01)
    ]


def advise(fits, N, D1, budget):
    """
    Grow a base, continue it, or start over? Records of the choices, the lowest predicted loss
    first, for a base of N parameters (without embeddings) trained on D1 tokens and `budget` FLOPs
    left to spend. fits: {name: Fit}, of losses on the same text. Raises UserError if no fit covers
    this size.
    """
    choices, records = choices_for(fits, N, D1), []
    if not choices:
        raise UserError(f'no law covers N = {N:,.0f} (parameters without embeddings)')
    tokens = [budget / (6 * choice.trained) for choice in choices]
    losses = np.array([choice.losses(D2)[:, 0] for choice, D2 in zip(choices, tokens)])
    for i in losses[:, 0].argsort():
        choice = choices[i]
        record = {
            'choice': choice.label,
            'N': choice.trained,
            'tokens': tokens[i],
            'predicted loss': losses[i, 0],
        }
        if losses.shape[1] > 1:
            low, high = np.quantile(losses[i], QUANTILES)
            record['90% interval'] = f'{low:.3f} to {high:.3f}'
            record['best in'] = f'{np.mean(losses.argmin(0) == i):.0%}'
        # reuse against starting over with the size that reuse trains
        for rival in choices if choice.D1 else ():
            if not rival.D1 and rival.trained == choice.trained:
                lead = lambda D: rival.losses(D) - choice.losses(D)
                record |= certainty('beats starting over up to', crossings(lead))
        here, seen = [choice.N, choice.D1, tokens[i]], choice.fitted.data[CELL]
        if not seen.D1.any():  # fitted to runs from scratch, whose D2 counts all tokens
            here[1:] = 0, choice.D1 + tokens[i]
        outside = (here < 0.99 * seen.min()) | (here > 1.01 * seen.max())  # 1% for rounding
        records.append(record | {'not seen by the fit': ', '.join(outside[outside].index)})
    return records


def sunk_cost(scratch, grown):
    """Report blocks (engine/report.py): D* over the base's size (Eq. 12; Figure 10, right)."""
    sizes = np.geomspace(grown.data.N.min(), BEYOND * grown.data.N.max(), 9)
    limits = [sunk_cost_limits(scratch, grown, N) for N in sizes]
    records = [
        {'N of the base': format_count(N)} | certainty('D* (tokens)', found)
        for N, found in zip(sizes, limits)
    ]
    lines = [
        Line(sizes, [found[0] or math.nan for found in limits], 'these laws', 'o-'),
        Line(sizes, published_sunk_cost_limit(sizes), 'Appendix E.1', '--'),
    ]
    panel = Panel('N of the base (parameters)', 'D* (tokens)', lines, log='xy')
    return [records, ('sunk_cost.png', [panel])]


def optimal(grown, D1):
    """Report blocks: compute-optimal D2 and N over the budget of the second stage (Eq. 13)."""
    spent, records = 6 * grown.data.trained_N * grown.data.D2, []
    for budget in np.geomspace(spent.min(), BEYOND * spent.max(), 9):
        D2, N = compute_optimal(grown, D1, budget)
        record = {'budget (FLOPs)': format_si(budget)} | certainty('D2 (tokens)', D2)
        records.append(record | certainty('N of the base', N))
    return [records]


# ----------------------------------------------------------------------------------------------
# pictures of laws

RIVALS = ('no_interaction', 'additive', 'hybrid'), ('continuous', 'saturated_D2')
LOSS = 'loss (nats per token)'


def law_panel(fits, over='D2'):
    """
    A Panel of the loss over the tokens of one stage, `over`: measured points and fitted curves, a
    colour for each number of tokens of the other stage and a line style for each law. To compare
    laws, only the smallest and the largest of these numbers are drawn. fits: {law: Fit}, to the
    same points; laws without N.
    """
    panel, held = Panel(f'{over} (tokens)', LOSS, log='x'), 'D1' if over == 'D2' else 'D2'
    curves = []
    groups = [*next(iter(fits.values())).data.groupby(held)]
    if len(fits) > 1:
        groups = groups[0], groups[-1]
    for i, (value, points) in enumerate(groups):
        color, label = f'C{i % 10}', f'{held} = {format_count(value)}'
        if not value:
            color, label = 'black', 'from scratch'
        panel.lines.append(Line(points[over], points.loss, label, 'o', color))
        grid = np.geomspace(points[over].min(), points[over].max(), 50)
        for (law, fitted), style in zip(fits.items(), ('-', '--', '-.', ':')):
            curve = fitted.losses(1, **{held: value, over: grid})[0]  # N = 1: not in these laws
            curves.append(Line(grid, curve, '' if i else law, style, color))
    panel.lines += curves
    return panel


def power_panels(fitted):
    """
    Panels of the exponent and of the factor of the power law in D2, over D1 (Figure 1, middle and
    right). L = A D2^-alpha + E (Eq. 2) is fitted for each D1 alone; lines in log D1 are fitted to
    the exponents (Eq. 3) and to the log factors. Empty for fewer than two fits.
    """
    alone = []
    for D1, points in fitted.data.groupby('D1'):
        with suppress(UserError):  # too few D2
            # with D1 = 0 the continuous law is Eq. 2
            factor, exponent, _ = fit('continuous', points.assign(D1=0), bootstrap=0).rows[0]
            alone.append((math.log(D1), -exponent, factor))
    if len(alone) < 2:
        return []
    panels, (log_D1, *found) = [], np.array(alone).T
    D1 = np.exp(log_D1)
    for values, name in zip(found, ('exponent of D2 (-alpha)', 'log of its factor A')):
        points = Line(D1, values, 'each D1 alone (Eq. 2)', 'o')
        straight = np.polyval(np.polyfit(log_D1, values, 1), log_D1)
        line = Line(D1, straight, 'a line in log D1 (Eq. 3)', '--')
        panels.append(Panel('D1 (tokens)', name, [points, line], log='x'))
    return panels


def held_out_panel(fitted):
    """
    A Panel of predicted over measured losses, where the 10% of cells with the lowest losses are
    held out of the fit (Figure 3, middle; Figure 9, right).
    """
    lowest, loss = lowest_tenth(fitted.data), fitted.data.loss.to_numpy()
    predicted = predict(fitted.law, without(fitted, lowest), fitted.data)
    lines = [
        Line(loss, loss, 'equal', '-', 'black'),
        Line(loss, predicted, 'fitted', 'o', 'C0'),
        Line(loss[lowest], predicted[lowest], 'held out, the lowest tenth', 'o', 'C1'),
    ]
    return Panel(LOSS, f'loss predicted by {fitted.law}', lines)


def law_pictures(name, fits, scratch):
    """
    Report blocks of pictures for one group of results; their files are named after it. fits:
    {law: Fit}, the deciding law first; scratch: what `scratch_of` returns. For a single size: Eq. 6
    over D2 and over D1 (Figures 1 and 8) with the power law in D2; the rival laws (Figures 3 and 9)
    and a limit on D2 (Figure 11); growth against training the grown size from scratch (Figure 4,
    right).
    """
    law, first = next(iter(fits.items()))
    panels, alone = [held_out_panel(first)], {law: first}
    blocks = [(f'{name}.png', panels)]
    if law == 'multiplicative':
        panels += [law_panel(alone), law_panel(alone, 'D1'), *power_panels(first)]
        rivals = [law_panel(alone | {r: fits[r] for r in row if r in fits}) for row in RIVALS]
        blocks.append((f'{name}_laws.png', rivals))
        if scratch:
            rivals.append(law_panel(alone))  # the last block holds this list
            rivals[-1].lines += law_panel({scratch.law: scratch}).lines
    return blocks


# ----------------------------------------------------------------------------------------------
# results.csv and the laws fitted to it

WORDS = ['method', 'variant', 'corpus']  # text; variant, corpus and trained_N may be missing
COLUMNS = ['method', *CELL, 'seed', 'loss']
NUMBERS = [*COLUMNS[1:], 'trained_N']


def read_results(path):
    """The rows of a results.csv as a DataFrame. Raises UserError, which names a bad row."""
    import pandas

    try:
        numbers = dict.fromkeys(NUMBERS, float)
        rows = pandas.read_csv(path, comment='#', skipinitialspace=True, dtype=numbers)
        rows[COLUMNS]  # raises KeyError if one is missing
    except (KeyError, ValueError) as error:  # a missing column; no numbers, no text or no table
        raise UserError(
            f'{path} is no table of {",".join(COLUMNS)}, separated by commas: {first_line(error)}'
        ) from None
    rows = rows.reindex(columns=[*WORDS, *NUMBERS])
    rows[WORDS] = rows[WORDS].fillna('')
    rows['trained_N'] = rows.trained_N.fillna(rows.N * rows.method.map(GROWTH).fillna(1))
    given = np.where(rows.method == 'scratch', rows.D1 == 0, rows.D1 >= 1e3) & (rows.D2 >= 1e3)
    wrong = ~(given & (rows.N > 0) & (rows.loss > 0) & (rows.trained_N >= rows.N))
    # missing numbers are NaN, for which `<` is False
    wrong |= ~(rows[NUMBERS] < math.inf).all(axis=1) | rows.duplicated([*WORDS, *COLUMNS[1:-1]])
    if wrong.any():  # rows as in an editor: the header is row 1
        raise UserError(
            f'{path}, row {wrong.argmax() + 2}: N and loss must be positive, D1 and D2 tokens, '
            '1000 or more (not billions of them), D1 = 0 of the method scratch alone, trained_N '
            'at least N; no number missing or infinite, no row with all of another'
        )
    return rows


def groups_of(results):
    """
    {name: DataFrame} of the runs that one law is fitted to: those of one method, variant and
    corpus; of one size, too, if there are two sizes, which cannot determine a law in N.
    """
    groups = {}
    for (method, variant, corpus), data in results.groupby(WORDS, sort=False):
        # the name becomes part of file names
        name = f'{method}{variant and "-"}{variant}{corpus and "-"}{corpus}'.replace('/', '-')
        sizes = [*data.groupby('N')]
        if len(sizes) == 2:
            groups |= {f'{name}-{format_count(N)}': part for N, part in sizes}
        else:
            groups[name] = data
    return groups


def laws_for(data):
    """Names of the laws that can describe these points; decisions are made by the first."""
    reused = data.D1.any()
    if data.N.nunique() > 1:
        return ['joint' if reused else 'chinchilla']
    return [name for name, law in LAWS.items() if 'N' not in law.data] if reused else ['continuous']


def fit_first(results, bootstrap):
    """
    {name: Fit} of the first of `laws_for`, for each group of results with enough points. Raises
    UserError if no group has.
    """
    fits, failure = {}, 'there are none'
    for name, data in progress_bar(groups_of(results).items()):
        try:
            fits[name] = fit(laws_for(data)[0], data, bootstrap)
        except UserError as error:
            failure = f'{name}: {error}'
    if not fits:
        raise UserError(f'too few points for laws: {failure}')
    return fits


def scratch_of(fits, reused):
    """The Fit of runs from scratch with the trained size and text of the Fit `reused`, or None."""
    for fitted in fits.values():
        one, other = fitted.data.iloc[0], reused.data.iloc[0]
        same_size = fitted.law == 'chinchilla' or one.N == other.trained_N
        if other.D1 and not one.D1 and one.corpus == other.corpus and same_size:
            return fitted


def fit_results(results, bootstrap=100):
    """
    Fit all laws to a DataFrame of results. Returns the blocks of a report (engine/report.py):
    parameters, errors of all laws, pictures. bootstrap: as in `fit`. Raises UserError if nothing
    can be fitted.
    """
    blocks, decisive = [], fit_first(results, bootstrap)
    for name, first in decisive.items():
        fits, data = {first.law: first}, first.data
        for law in laws_for(data)[1:]:
            with suppress(UserError):  # too few points for its parameters
                fits[law] = fit(law, data, bootstrap=0)
        scratch = scratch_of(decisive, first)
        blocks.append(f'{name}, {len(data)} points: L = {LAWS[first.law].equation}')
        blocks += [fit_records(first), error_records(fits, scratch), spread_records(data)]
        if 'saturated_D2' in fits:
            blocks += ['with a limit of D2 (Eq. 14):', fit_records(fits['saturated_D2'])]
        blocks += law_pictures(name, fits, scratch)
    return blocks


def fit_records(fitted):
    """
    Records of a fit's parameters with their 90% intervals, those in LOGS as themselves, not as
    logarithms. A parameter is 'not determined' if its interval holds negative exponents (they are
    positive by Eq. 1) or, for those in LOGS, if it reaches below e^-7 = 0.001 or spans more than a
    factor of e^7 = 1100.
    """
    records = []
    for name, samples in zip(fitted.parameters, fitted.rows.T):
        value, low, high = samples[0], *np.quantile(samples, QUANTILES)
        known = -7 < low <= high < low + 7 if name in LOGS else low > 0
        if name in LOGS:
            value, low, high = np.exp(np.minimum((value, low, high), 700))  # e^710 overflows
        record = {'parameter': name, 'value': f'{value:.4g}' if known else 'not determined'}
        if len(samples) > 1:
            record['90% interval'] = f'{low:.4g} to {high:.4g}'
        records.append(record)
    return records


def error_records(fits, scratch):
    """
    Records of the errors of all laws: RMS of log L x 1e-3 with a cell left out at a time (Table 1)
    and with the 10% lowest losses held out; mean square error of the loss at the largest quarter of
    D2 (Appendix E.3). With runs from scratch, the last record is the first law fitted to them and
    the second stages together (Appendix D.4 gives no formula: we take Eq. 9, or for a single size
    Eq. 6, with D1 = 1 for scratch). fits: {law: Fit}; scratch: what `scratch_of` returns.
    """
    import pandas

    records, (first, *_) = [], fits.values()
    data = first.data
    if scratch:
        # the law of reuse counts N before growth
        before_growth = scratch.data.assign(N=scratch.data.N / first.growth)
        together = fit(first.law, pandas.concat([data, before_growth]), bootstrap=0)
        fits = fits | {f'{first.law}, of scratch and reuse together': together}
    tail = data[data.D2 >= data.D2.quantile(0.75)]
    cells, lowest = cells_of(data), [lowest_tenth(data)]
    for name, fitted in fits.items():
        record = {'RMS x 1e-3': name, 'cells left out': 1e3 * left_out_error(fitted, cells)}
        record['lowest tenth left out'] = 1e3 * left_out_error(fitted, lowest)
        errors = predict(fitted.law, fitted.rows[0], tail) - tail.loss
        records.append(record | {'MSE at the largest D2': (errors**2).mean()})
    return records


def spread_records(data):
    """Records of the loss's standard deviation over seeds at each D2, over all D1 (Table 8)."""
    spread = data.groupby(CELL).loss.var().groupby('D2').mean().dropna() ** 0.5
    return [{'D2': format_count(D2), 'spread over seeds': value} for D2, value in spread.items()]


# ----------------------------------------------------------------------------------------------
# the grid of runs (sections 2 and 3)


@dataclass
class Sweep:
    """A grid of runs for scaling laws of model reuse (Liew and Kato), and fits to its losses."""

    size: str = '48x2'  # of the base models
    longest: Positive = 1e6  # tokens of the longest run
    first: tuple[Positive, ...] = (0.125, 0.25, 0.5, 1.0)  # D1, as fractions of longest
    second: tuple[Positive, ...] = (0.0625, 0.125, 0.25, 0.5)  # D2, as fractions of longest
    scratch: tuple[Positive, ...] = ()  # D of all shapes from scratch, as fractions of longest
    reuse: tuple[Literal['cpt', 'exp', 'stk2', 'stk4'], ...] = ('stk2',)  # second stages
    variants: tuple[Literal['stable', 'low', 'replay'], ...] = ()  # further second stages
    second_data: str = ''  # corpus of cpt, on which it is also evaluated; empty: the base's
    fresh_data: bool = False  # second stages read on where the base stopped, not from the beginning
    decays: Count = 1  # decay branches at the end of each second stage, each on its own data (E.3)

    toy_corpora = dict(second_data='pycode')

    @property
    def corpora(self):
        """Corpora that the stages read besides the run's."""
        return [self.second_data] if self.second_data else []

    def stages(self, run):
        """Yield the stages: bases, second stages, runs from scratch. Raises UserError."""
        if 'replay' in self.variants and not self.second_data:
            raise UserError('replay needs another corpus to continue on: --second_data=NAME')
        if run.warmup < 1:
            raise UserError(f'in a sweep warmup is a number of steps, not {run.warmup:g}')
        lengths, n = (self.first, self.second, self.scratch), 2 if run.toy else None
        first, second, scratch = ({part * self.longest for part in some[:n]} for some in lengths)
        bases = yield from family(self.start(run), first, run)
        variants = '', *self.variants
        for kind, variant, D1 in itertools.product(self.reuse, variants, sorted(first)):
            if kind == 'cpt' or variant != 'replay':  # growth reads the base's data anyway
                first_stage = self.start(run, kind, variant, D1, bases)
                yield from family(first_stage, second, run, self.decays)
        for kind in self.reuse:
            if kind != 'cpt' or self.second_data:  # else the bases are these runs
                yield from family(self.start(run, kind), scratch, run)

    def start(self, run, kind='', variant='', D1=0.0, bases=None):
        """
        The Stage, still without tokens, from which `family` makes runs: a second stage of `kind`
        and `variant` after D1 tokens of a base; or with D1 = 0 a run from scratch of that stage's
        shape, on its data. bases: what `family` returned for them. Widths grow by `lossless`, which
        preserves the function at any ratio (section 3.2); fpi does so at whole multiples only.
        """
        config, corpus, knobs = run.model_config(self.size), '', {}
        N = config.num_params()
        if kind in RELATIVE_SIZES:
            config = RELATIVE_SIZES[kind](config)
        elif kind and self.second_data:
            corpus = data = self.second_data
            if variant == 'replay':
                data = f'{corpus}:0.75,{run.data}:0.25'
            knobs = dict(data=data, val_data=corpus)
        name = f'{self.size}-{format_si(D1) or "scratch"}-{kind}{variant and "+"}{variant}'
        trained_N, X = config.num_params(), config.num_params(head=True)
        labels = dict(method='scratch', variant=variant, corpus=corpus, N=trained_N, D1=0.0)
        labels['trained_N'] = trained_N
        stage = Stage(name, config, 0, X, begin=0, knobs=knobs, labels=labels)
        if not D1:
            return stage if kind else replace(stage, name=self.size)
        before = bases[D1][variant == 'stable']  # (decayed base, end of its stable phase)
        # labels and knobs are the stage's own dicts: |= changes them in place. A stable phase has
        # seen fewer than D1 tokens.
        labels |= dict(method=kind, N=N, D1=before.position)
        if variant == 'low':  # constant, at the base's last learning rate (Figure 7)
            knobs |= dict(
                learning_rate=run.learning_rate * run.min_lr_fraction, min_lr_fraction=1.0
            )
        if self.fresh_data:  # read on where the base stopped (Appendix C.2)
            stage.begin = None
        if kind == 'cpt':
            return continue_from(stage, before, variant == 'stable')
        return grow_stage(stage, before, width='lossless', depth='stack')

    def summary(self, results):
        """Write results.csv, fit the laws, and return their tables; or why there is no fit."""
        import pandas

        points = [r.labels | dict(loss=r.val_loss) for r in results if 'D2' in r.labels]
        rows, path = pandas.DataFrame(points), Path(results[0].folder).parent / 'results.csv'
        # repeated decays count as further seeds: a number for each (seed, again)
        rows['seed'] = rows.seed * (1 + rows.again.max()) + rows.again
        write_atomically(path, rows.to_csv(index=False))
        try:
            return fit_results(read_results(path))
        except UserError as error:
            return [f'no fit: {error}']


def plan_family(ends, step, decay_fraction):
    """
    How runs of `ends` tokens share one stable phase, from which each branches off into a short
    decay (Haegele et al.). Returns [(start, stop, last, end)], ascending: train the stable phase
    from step `start` to `stop`, then decay to step `last`, which ends the run of `end` tokens.
    step: tokens in a step.
    """
    pieces, start = [], 0
    for end in sorted(ends):
        last = max(2, round(end / step))  # at least one step for each phase
        stop = min(max(1, round((1 - decay_fraction) * last)), last - 1)
        pieces.append((start, stop, last, end))
        start = stop
    return pieces


def family(first, ends, run, decays=1):
    """
    Yield the stages of runs of `ends` tokens that all start as the Stage `first` does; they share
    one stable phase (`plan_family`), so that nothing is trained twice. decays: how often each run
    decays, each time on other data. Returns {end: (Result of the first decay, Result of the stable
    phase before it)}.
    """
    results, stage = {}, first
    step = run.batch_size * min(run.block_size, first.config.block_size)  # in tokens
    for start, stop, last, end in plan_family(ends, step, run.decay_fraction):
        if stop > start:  # always so for the first piece, which sets `before`
            name = f'{first.name}-stable-{format_si(stop * step)}'
            knobs, tokens = stage.knobs | dict(schedule='constant'), (stop - start) * step
            before = yield replace(stage, name=name, tokens=tokens, knobs=knobs)
            stage = continue_from(replace(first, begin=None), before, with_optimizer=True)
        knobs, tokens = stage.knobs | dict(schedule='wsd', decay_fraction=1.0), (last - stop) * step
        for again in range(decays):
            name = f'{first.name}-{format_si(end)}{f"-again{again}" if again else ""}'
            branch = replace(stage, name=name, tokens=tokens, knobs=knobs)
            branch.labels = first.labels | dict(D2=end, again=again)
            branch.begin = before.position + again * tokens  # each decay reads the next tokens
            result = yield branch
            results.setdefault(end, (result, before))
    return results


# ----------------------------------------------------------------------------------------------
# the command line


Number = Annotated[float, Range(1e3)]  # parameters, tokens, FLOPs; refuses 7 where 7e9 is meant


@dataclass
class Options:
    """Options of scaling.py fit, advise, sunk_cost, optimal, diagnose and toy."""

    bootstrap: Natural = 100  # resamplings for the intervals; 0: none
    paper: bool = False  # advise, sunk_cost, optimal: use the published laws
    corpus: str = ''  # advise: corpus of the loss; empty: the base's; with --paper also: code
    growth: str = 'stk2'  # sunk_cost, optimal: the second stage: cpt, stk2, stk2-stable, ...
    base_params: Number = 1e9  # advise: N of the base model, without embeddings
    base_tokens: Number = 2e12  # advise, optimal: D1, tokens it was trained on
    budget: Number = 1e22  # advise: FLOPs to spend, at 6 per parameter and token
    data: str = 'pydocs'  # diagnose: prepared corpus, whose validation split is read
    data_dir: str = 'data'  # diagnose: where prepared corpora are
    samples: Count = 128  # diagnose: sequences from which the curvature is estimated
    out: str = ''  # folder for pictures; empty: that of the first file, or the current one


def results_of(files):
    """The rows of all these results.csv, one DataFrame. Raises UserError if there is no file."""
    import pandas

    if not files:
        raise UserError('missing argument: RESULTS.csv, or for a decision --paper=True')
    return pandas.concat(map(read_results, files), ignore_index=True)


def decide(verb, files, options):
    """Report blocks of scaling.py advise, sunk_cost or optimal, the `verb`. Raises UserError."""
    fits = published() if options.paper else fit_first(results_of(files), options.bootstrap)
    if verb == 'advise':
        asked = {k: f for k, f in fits.items() if f.data.corpus.iloc[0] == options.corpus}
        return [advise(asked, options.base_params, options.base_tokens, options.budget)]
    for name, law in (('scratch', 'chinchilla'), (options.growth, 'joint')):
        if name not in fits or fits[name].law != law:
            raise UserError(f'{verb} needs a {law} law of {name}, so runs of three sizes at least')
    if verb == 'optimal':
        return optimal(fits[options.growth], options.base_tokens)
    return sunk_cost(fits['scratch'], fits[options.growth])


def main(argv):
    """Command line: a verb, its files, and options."""
    verbs = ('fit', 'advise', 'sunk_cost', 'optimal', 'diagnose', 'toy')
    verb, *rest = argv or HELP  # without arguments: the help
    if verb in HELP:
        print(__doc__)
        return
    if verb not in verbs:
        raise unknown('verb', verb, verbs)
    files = [*itertools.takewhile(lambda arg: not arg.startswith('-'), rest)]
    options, _, _ = configure(rest[len(files) :], Options, program=f'scaling.py {verb}')
    if verb == 'fit':
        blocks = fit_results(results_of(files), options.bootstrap)
    elif verb in verbs[:4]:
        blocks = decide(verb, files, options)
        if options.paper:  # as printed, the law for stacking misses the losses by 0.26 nats
            blocks.append('laws within the rounding of Table 7, the nearest to Tables 8 and 9')
    else:
        from extras import diagnostics

        blocks = getattr(diagnostics, verb)(files, options)
    print(render(blocks))  # first, because writing files may fail
    out = Path(options.out or Path(*files[:1]).parent)
    out.mkdir(parents=True, exist_ok=True)
    draw_pictures(blocks, out)


if __name__ == '__main__':
    run_as_program(main)
