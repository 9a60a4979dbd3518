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
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from configurator import Natural, NonNegative, Positive, configure
from engine.errors import UserError, first_line, nearest, run_as_program, unknown
from engine.files import read_json, write_json
from engine.log import progress_bar
from engine.report import draw_panels, draw_pictures, format_count, format_si, render, table
from extras import decisions
from extras.law_pictures import fit_panels, grow_or_scratch_panel, rival_panels

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
    """Losses (..., n) in nats of a law (its name) at parameters theta (..., P), as a tensor."""
    return torch.from_numpy(np.exp(log_loss(LAWS[law], theta, logarithms(data))))


# ----------------------------------------------------------------------------------------------
# fits: the logarithm of the loss, under a Huber loss with its knee at 1e-3, in float64

DELTA = 1e-3
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
    middle, choices = target.mean(), []
    for name in law.parameters:
        if name == 'logDmax':
            seen = (x.D1 if law.terms is saturated_D1 else x.D2).mean()
            choices.append((seen - 1.0, seen + 2.0, seen + 5.0))
        elif name.startswith('alpha') or name == 'beta':
            choices.append((0.0, 0.03) if name == 'alpha3' else (0.03, 0.15, 0.6))
        else:
            shifts = (3.0, 0.7, 0.1) if name == 'logE' else (1.5,)
            choices.append([middle - shift for shift in shifts])
    starts = np.array(list(itertools.product(*choices)))
    amplitudes = [i for i, name in enumerate(law.parameters) if name in ('logA', 'logF', 'logB')]
    bare = starts.copy()
    bare[:, amplitudes] = 0.0
    values = dict(zip(law.parameters, bare.T[..., None]))
    for i, term in zip(amplitudes, law.terms(SimpleNamespace(**values), x)):
        starts[:, i] -= term.mean(-1)
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
    columns = dict(data, D=[D1 + D2 for D1, D2 in zip(data['D1'], data['D2'])])
    for column in LAWS[law].depends_on:
        found, least = len(set(columns[column])), 3 if column == 'N' else 2
        if found < least:  # of two sizes B N^-beta + E says no more than a constant for each
            raise UserError(f'{law} needs points of {least} different {column}, these have {found}')
    cells, least = len(groups_of(logarithms(data))), len(LAWS[law].parameters) + 1
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
    ends = np.quantile(samples, decisions.QUANTILES, axis=0)
    error = partial(left_out_error, shape, x, target, theta=theta)
    return Fit(
        law,
        dict(zip(shape.parameters, theta.tolist())),
        dict(zip(shape.parameters, ends.T.tolist())),
        samples.tolist(),
        rms=root_mean_square(log_loss(shape, theta, x) - target),
        leave_one_out=error(cells),
        seen={k: (float(min(data[k])), float(max(data[k]))) for k in VARIABLES},
        growth=growth_of(data),
        extrapolation=error([np.concatenate(lowest)]),
        base_left_out=error(bases) if len(bases) > 1 else None,
    )


def growth_of(data):
    """The mean of trained_N / N of points that all say it, else None."""
    trained = data.get('trained_N', [math.nan])
    ratios = [large / N for large, N in zip(trained, data['N'])]
    return statistics.mean(ratios) if all(map(math.isfinite, ratios)) else None


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
        names = LAWS[law].parameters
        generator = torch.Generator().manual_seed(0)
        values = torch.tensor([float(text) for text in printed], dtype=torch.float64)
        digits = [len(text.partition('.')[2]) for text in printed]
        unit = torch.tensor([10.0**-n for n in digits], dtype=torch.float64)
        drawn = torch.rand(200, len(names), generator=generator, dtype=torch.float64)
        rows = torch.cat([values[None], values + unit * (drawn - 0.5)])
        amplitudes = torch.tensor([name.startswith('log') for name in names])
        rows = torch.where(amplitudes, rows.log(), rows)
        first = (0.0 if method == 'scratch' else 2.9e8, 7.4e10)
        seen = dict(N=(14_751_680, 1_085_859_424), D1=first, D2=(2.9e8, 2.6e11))
        parameters = dict(zip(names, rows[0].tolist()))
        fits[method] = Fit(law, parameters, {}, rows[1:].tolist(), math.nan, math.nan, seen)
    return fits


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


@dataclass
class Fitting:
    """Fit laws to results: scaling.py fit RESULTS.csv."""

    results: str = ''  # CSV with the columns method,N,D1,D2,seed,loss
    bootstrap: Natural = 200  # resamplings for the intervals; 0: none
    out: str = ''  # folder for fit.json and pictures; empty: that of the results


def fit_results(path, bootstrap=200):
    """
    Fit every method's laws to a results.csv: (blocks for the report, {method: Fit}). bootstrap: as
    in fit().
    """
    results = read_results(path)
    blocks, failures, best, found = [], [], {}, {}
    for method, data in results.items():
        fits = found[method] = {}
        for law in progress_bar(laws_for(data), desc=f'laws of {method}'):
            try:
                fits[law] = fit(law, data, bootstrap=0)
            except UserError as error:
                failures.append(f'{method}: {error}')
    for method, fits in found.items():
        if not fits:
            continue
        data, law = results[method], next(iter(fits))  # the first has intervals, and decides
        fits[law] = fit(law, data, bootstrap)
        points, equation = len(data['loss']), LAWS[law].equation
        blocks += [f'{method}, {points} points: {law}, {equation}', fit_records(fits[law])]
        best[method] = fits[law]
        if law == 'multiplicative':
            blocks.append((f'{method}.png', fit_panels(data, fits[law])))
            blocks.append((f'{method}_laws.png', rival_panels(data, fits)))
    if not best:
        raise UserError('\n'.join(failures))
    tails = []
    for method, laws in found.items():
        if {'multiplicative', 'saturated_D2'} <= set(laws):
            pair = laws['multiplicative'], laws['saturated_D2']
            tails.append(decisions.tail_record(method, results[method], *pair))
    pictures = grow_or_scratch(results, best)
    return [*failures, *blocks, *pictures, *error_tables(found), tails], best


LEFT_OUT = {  # errors of a Fit, and at which points they are
    'leave_one_out': 'a cell left out',
    'base_left_out': 'a base left out',
    'extrapolation': 'lowest tenth left out',
}


def error_tables(found):
    """A table for each kind of error, RMS of log L in thousandths: {method: {law: Fit}}."""
    tables = []
    for field, title in LEFT_OUT.items():
        records = []
        for law in LAWS:
            record = {f'{title}, RMS x 1e-3': law}
            for method, laws in found.items():
                error = getattr(laws[law], field) if law in laws else None
                if error is not None:
                    record[method] = f'{1e3 * error:.3f}'
            records += [record] if len(record) > 1 else []
        tables.append(records)
    return tables


def starts_over(scratch, grown, factor):
    """Whether a law of one size, from scratch, is of what a growth from one size ends at."""
    (size, last), (small, large) = scratch.seen['N'], grown.seen['N']
    one_size = size == last and small == large and factor > 1
    without_base = scratch.seen['D1'][1] == 0
    return one_size and without_base and math.isclose(size, factor * small, rel_tol=0.02)


def grow_or_scratch(results, fits):
    """Blocks of a picture for each growth whose grown size was also trained from scratch."""
    blocks = []
    for (method, grown), (other, scratch) in itertools.product(fits.items(), repeat=2):
        same_text = method.partition('-')[2] == other.partition('-')[2]
        if same_text and starts_over(scratch, grown, decisions.factor_of(method, grown)):
            pair = (results[method], grown), (results[other], scratch)
            blocks.append((f'{method}_or_scratch.png', [grow_or_scratch_panel(*pair)]))
    return blocks


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
        numbers = [value, *fitted.intervals[name]]
        if name.startswith('log'):
            name = name[3:]
            numbers = [math.exp(min(number, 700)) for number in numbers]
        value, low, high = (f'{number:.4g}' for number in numbers)
        records.append({'parameter': name, 'value': value, '90% interval': f'{low} to {high}'})
    return records


def read_fits(path):
    """{method: Fit} of a fit.json. Raises UserError if the file is not one."""
    try:
        fits = {method: Fit(**values) for method, values in read_json(path).items()}
        for fitted in fits.values():
            names = LAWS[fitted.law].parameters
            theta = torch.tensor([list(fitted.parameters.values()), *fitted.samples])
            assert tuple(fitted.parameters) == names and theta.isfinite().all()
            assert theta.shape == (1 + len(fitted.samples), len(names)) and fitted.samples
            for name in ('N', 'D1', 'D2'):
                low, high = fitted.seen[name]
                assert 0 <= low <= high < math.inf
            assert fitted.growth is None or 1 <= fitted.growth < math.inf
        assert fits
    except (ValueError, TypeError, AttributeError, AssertionError, LookupError, RuntimeError) as e:
        reason = type(e).__name__
        raise UserError(f'{path} is not a fit.json of scaling.py fit ({reason})') from None
    return fits


def fit_command(argv):
    """scaling.py fit RESULTS.csv"""
    words = ('results',)
    options, _, _ = configure(argv, Fitting, program='scaling.py fit RESULTS.csv', words=words)
    if not options.results:
        raise UserError('missing argument; usage: scaling.py fit RESULTS.csv')
    options.out = options.out or str(Path(options.results).parent)
    blocks, fits = fit_results(options.results, options.bootstrap)
    print(render(blocks))  # before anything is written, which may fail
    write_fits(fits, blocks, options.out)
    print(f'\nfit.json and pictures are in {options.out}/')


@dataclass
class Laws:
    """Whose laws decide."""

    fit: str = ''  # fit.json of `scaling.py fit`
    paper: bool = False  # the published coefficients instead
    domain: str = ''  # corpus whose loss counts, if not the base's (of the paper's: code)

    def read(self):
        """{method: Fit} of the domain. Raises UserError."""
        if self.paper == bool(self.fit):
            raise UserError('whose laws? --fit=FILE or --paper=True')
        fits = published() if self.paper else read_fits(self.fit)
        return decisions.of_domain(fits, self.domain)


@dataclass
class Question(Laws):
    """Grow, continue or start over: scaling.py advise."""

    base_params: NonNegative = 0.0  # N of the base model, without embeddings
    base_tokens: NonNegative = 0.0  # tokens it was trained on
    budget: NonNegative = 0.0  # FLOPs to spend, at 6 per parameter and token


def advise_command(argv):
    """scaling.py advise"""
    options, _, _ = configure(argv, Question, program='scaling.py advise')
    for knob in ('base_params', 'base_tokens', 'budget'):
        if getattr(options, knob) < 1:
            raise UserError(f'missing argument --{knob}=NUMBER')
    fits = options.read()
    print(decisions.advise(fits, options.base_params, options.base_tokens, options.budget))
    budget = format_si(options.budget)
    print(f'\n{budget}FLOPs; N without embeddings; losses in nats on the data of the fit')


@dataclass
class SunkCost(Laws):
    """Up to how many tokens growing is ahead of starting over, D* over N: scaling.py sunk_cost."""

    growth: str = 'stk2'  # method whose law is compared with starting over
    out: str = '.'  # folder for sunk_cost.png


def sunk_cost_command(argv):
    """scaling.py sunk_cost"""
    options, _, _ = configure(argv, SunkCost, program='scaling.py sunk_cost')
    fits = options.read()
    for method in ('scratch', options.growth):
        law = law_of(fits, method)
        if law.seen['N'][0] == law.seen['N'][1]:
            raise UserError(f'the law of {method} is of one size: D* over N needs several')
    found = decisions.sunk_cost_over_sizes(fits, options.growth)
    print(table(decisions.sunk_cost_records(found)))
    Path(options.out).mkdir(parents=True, exist_ok=True)
    approximate = decisions.published_sunk_cost_limit if options.paper else None
    panels = decisions.sunk_cost_panels(found, approximate)
    draw_panels(panels, Path(options.out) / 'sunk_cost.png')
    print(f'\n{seen_sizes(fits[options.growth])}; sunk_cost.png is in {options.out}/')


@dataclass
class Optimum(Laws):
    """The compute-optimal N and D2 of a second stage (Eq. 13): scaling.py optimal."""

    growth: str = 'stk2'  # method of the second stage: cpt, stk2, ...
    base_tokens: Positive = 1e10  # D1, of the base
    out: str = '.'  # folder for optimal.png


def optimal_command(argv):
    """scaling.py optimal"""
    options, _, _ = configure(argv, Optimum, program='scaling.py optimal')
    law, D1 = law_of(options.read(), options.growth), options.base_tokens
    if law.law != 'joint':
        raise UserError(f'the law of {options.growth} is {law.law}, which says nothing about N')
    records = decisions.optimal_records(law, options.growth, D1)
    print(table(records))
    Path(options.out).mkdir(parents=True, exist_ok=True)
    panels = decisions.optimal_panels(law, options.growth, D1)
    draw_panels(panels, Path(options.out) / 'optimal.png')
    print(f'\n{seen_sizes(law)}; optimal.png is in {options.out}/')


def seen_sizes(law):
    """Which sizes a law was fitted to, in words: what lies beyond is a guess."""
    low, high = law.seen['N']
    return f'the law was fitted to N from {format_count(low)} to {format_count(high)}'


def law_of(fits, method):
    """The Fit of a method. Raises UserError if there is none."""
    if method not in fits:
        raise unknown('law of a method', method, fits)
    return fits[method]


def main(argv):
    """Command line: a verb, then its arguments."""
    from extras import diagnostics

    verbs = {
        'fit': fit_command,
        'advise': advise_command,
        'sunk_cost': sunk_cost_command,
        'optimal': optimal_command,
        'diagnose': diagnostics.diagnose_command,
        'toy': diagnostics.toy_command,
    }
    if not argv or argv[0] in ('-h', '--help'):
        print(__doc__)
        sys.exit(0 if argv else 2)
    if argv[0] not in verbs:
        raise unknown('verb', argv[0], verbs)
    verbs[argv[0]](argv[1:])


if __name__ == '__main__':
    run_as_program(main)
