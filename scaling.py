"""
Is reuse worth it? Fit the scaling laws of model reuse to runs, compare them, and decide (Liew and Kato, paper 001).

    python scaling.py fit out/scaling_tiny/results.csv       # parameters, intervals, leave-one-out errors, pictures, fit.json
    python scaling.py advise --paper=True --base_params=1e9 --base_tokens=2e12 --budget=1e22
    python scaling.py advise --fit=out/scaling_tiny/fit.json --base_params=1e5 --base_tokens=1e6 --budget=1e12
    python scaling.py diagnose FOLDER [FOLDER ...]           # norms, variance and curvature of base models (diagnostics.py)
    python scaling.py toy                                    # the toy model of section 5.3

A results.csv has the columns method, N, D1, D2, seed, loss: N parameters without embeddings (of the base, before growth), tokens
of the first stage (0: from scratch), tokens of the second, validation loss in nats. sweep.py writes one; yours may come from
anywhere. A method is scratch, cpt, or a growth (exp, stk2, stk4), with a variant (stk2+stable), and behind a dash the corpus of
its losses where that is not the base's: losses on different text cannot be compared.
"""
import csv
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import diagnostics
from configurator import UserError, check_ranges, configure, nearest, run_as_program, unknown, write_atomically
from evaluate import count, human, pyplot, table
from laws import LAWS, Fit, fit, leave_one_out, logarithms, predict   # noqa: F401   (scaling.fit and so on, for others)

COLUMNS = ('method', 'N', 'D1', 'D2', 'seed', 'loss')
TABLE_1 = ('multiplicative', 'no interaction', 'additive', 'hybrid')

# Table 7: the joint laws that the paper fitted, D in tokens, N before growth; under logA stands A, and so on.
PUBLISHED = {
    'scratch': ('chinchilla', dict(logA='10.383', alpha='0.092', logB='10.085', beta='0.105', logE='0.041')),
    'scratch-code': ('chinchilla', dict(logA='8.143', alpha='0.113', logB='27.286', beta='0.234', logE='0.105')),
    'cpt-code': ('joint', dict(logA='15.062', alpha1='0.048', alpha2='0.126', alpha3='0.001', logB='27.234', beta='0.238',
                               logE='0.105')),
    'stk2': ('joint', dict(logA='33.394', alpha1='0.087', alpha2='0.119', alpha3='0.003', logB='22.471', beta='0.173',
                           logE='0.041')),
}
GROWTH_FACTOR = {'exp': 2, 'stk2': 2, 'stk4': 4}


def published():
    """The paper's fits as Fit objects; their samples are drawn within the rounding of the printed coefficients."""
    fits = {}
    for method, (law, printed) in PUBLISHED.items():
        names, generator = LAWS[law].parameters, torch.Generator().manual_seed(0)
        values = torch.tensor([float(printed[name]) for name in names], dtype=torch.float64)
        unit = torch.tensor([10.0 ** -len(printed[name].partition('.')[2]) for name in names], dtype=torch.float64)
        samples = values + unit * (torch.rand(200, len(names), generator=generator, dtype=torch.float64) - 0.5)
        amplitudes = torch.tensor([name.startswith('log') for name in names])
        values, samples = (torch.where(amplitudes, v.log(), v) for v in (values, samples))
        seen = dict(N=(14_751_680, 1_085_859_424), D1=(0.0 if method == 'scratch' else 2.9e8, 7.4e10), D2=(2.9e8, 2.6e11))
        fits[method] = Fit(law, dict(zip(names, values.tolist())), {}, samples.tolist(), math.nan, math.nan, seen)
    return fits


# ---------------------------------------------------------------------------------------------------------------------
# results.csv

def read_results(path):
    """{method: {column: list}} of a results.csv. Raises UserError, with the line, for anything that is not a result."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:   # a spreadsheet's mark at the beginning is no part of it
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is no CSV file ({error})') from None
    except FileNotFoundError:
        raise UserError(f'there is no {path}') from None
    rows = [row for row in rows if row and not row[0].lstrip().startswith('#')]
    head = [name.strip() for name in rows[0]] if rows else []
    if missing := [name for name in COLUMNS if name not in head]:
        raise UserError(f'{path} has no column {missing[0]!r}{nearest(missing[0], head)}; it needs {",".join(COLUMNS)}')
    results, seen = {}, {}
    for line, row in enumerate(rows[1:], 2):
        cells = dict(zip(head, row))
        try:
            values = {name: float(cells[name]) for name in COLUMNS[1:]}
        except (ValueError, KeyError):
            raise UserError(f'{path}, row {line}: {",".join(row)} does not have a number in each of '
                            f'{",".join(COLUMNS[1:])}') from None
        if not all(map(math.isfinite, values.values())) or min(values['loss'], values['N'], values['D2']) <= 0 or values['D1'] < 0:
            raise UserError(f'{path}, row {line}: loss, N and D2 must be positive numbers, D1 positive or 0')
        key = (cells['method'], *(values[name] for name in COLUMNS[1:5]))
        if key in seen:
            raise UserError(f'{path}, row {line} repeats row {seen[key]}: the same method, N, D1, D2 and seed')
        seen[key] = line
        columns = results.setdefault(cells['method'], {name: [] for name in COLUMNS[1:]})
        for name, value in values.items():
            columns[name].append(value)
    if not results:
        raise UserError(f'{path} holds no results')
    for method, data in results.items():
        if 0 < sum(d1 > 0 for d1 in data['D1']) < len(data['D1']):
            raise UserError(f'{path}: {method} has points with D1 = 0, from scratch, and points with a base: name them apart')
    return results


def by_size(results):
    """The results, with a method whose points are of two sizes, too few for a law in N, as one of each: METHOD@N-CORPUS."""
    split = {}
    for method, data in results.items():
        sizes = sorted(set(data['N']))
        kind, dash, corpus = method.partition('-')
        for n in sizes if len(sizes) == 2 else [None]:
            chosen = [i for i, value in enumerate(data['N']) if n in (None, value)]
            name = method if n is None else f'{kind}@{n:.0f}{dash}{corpus}'
            split[name] = {column: [values[i] for i in chosen] for column, values in data.items()}
    return split


def laws_for(data):
    """The laws that a method's points can be described by: joint ones where there are several sizes."""
    if max(data['D1']) == 0:
        return ['chinchilla'] if len(set(data['N'])) > 1 else ['continuous']
    return ['joint'] if len(set(data['N'])) > 1 else [*TABLE_1, 'continuous', 'saturated D1', 'saturated D2']


# ---------------------------------------------------------------------------------------------------------------------
# decisions

def loss_of(fitted, N, D1, D2, samples=False):
    """Predicted loss in nats of one question; with samples, of every bootstrap sample, (S,)."""
    theta = fitted.samples if samples else [list(fitted.parameters.values())]
    losses = predict(fitted.law, theta, dict(N=[N], D1=[D1], D2=[D2]))[:, 0]
    return losses if samples else losses.item()


def crossing(better_early, better_late, low=1e3, high=1e20):
    """
    The tokens, between low and high, from which on the second of two curves (functions of tokens) stays below the first; None
    where it is below from the beginning, or not at the end.
    """
    grid = [low * (high / low) ** (i / 400) for i in range(401)]
    ahead = [better_late(tokens) - better_early(tokens) for tokens in grid]   # positive while the first is better
    last = max((i for i, lead in enumerate(ahead) if lead > 0), default=400)
    if last == 400:
        return None
    low, high = grid[last], grid[last + 1]
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if better_late(middle) > better_early(middle) else (low, middle)
    return low


def sunk_cost_limit(scratch, grown, N, factor=2):
    """
    D* in tokens (Eq. 12): a model of factor x N trained from scratch for D* is as good as one grown from N after D* tokens and
    trained for D* more; for larger budgets, starting over wins. None where the curves do not cross.
    """
    return crossing(lambda d: loss_of(grown, N, d, d), lambda d: loss_of(scratch, factor * N, 0.0, d))


def published_sunk_cost_limit(N):
    """The paper's approximation of D* in tokens (Appendix E.1); logarithms natural."""
    return 13e12 * (N / 1e11) ** (-0.6 - 0.04 * math.log(N / 1e11))


def compute_optimal(joint, D1, compute, factor=1):
    """
    (D2, N) that minimise a joint law at fixed D1 for C2 = 6 factor N D2 FLOPs (Eq. 13 and Appendix E.2; N is before growth).
    Raises UserError where the effective exponent a2 - a3 log D1 is not positive: then more tokens never help.
    """
    p = joint.parameters
    exponent = p['alpha2'] - p['alpha3'] * math.log(D1)
    if exponent <= 0 or p['beta'] <= 0:
        raise UserError(f'at D1 = {D1:g} the exponent of D2 is {exponent:.3f}: this law has no compute-optimal point there')
    amplitude = p['logA'] - p['alpha1'] * math.log(D1)
    log_g = (amplitude + math.log(exponent) - p['logB'] - math.log(p['beta'])) / (exponent + p['beta'])
    product, share = math.log(compute / (6 * factor)), p['beta'] / (exponent + p['beta'])
    return math.exp(log_g + share * product), math.exp(-log_g + (1 - share) * product)


def unseen(fitted, N, D1, D2):
    """What of a question lies outside the range of a fit's points, as words."""
    return [f'{name} = {value:.3g} (seen: {low:.3g} to {high:.3g})'
            for name, value in (('N', N), ('D1', D1), ('D2', D2)) for low, high in [fitted.seen[name]]
            if not low * 0.999 <= value <= high * 1.001 and not (name == 'D1' and value == 0)]


def factor_of(method):
    """How many times larger than its base a method's model is."""
    return GROWTH_FACTOR.get(re.split('[+@]', method)[0], 1)


def of_domain(fits, domain):
    """The fits whose losses are on one corpus, '' for the base's, by method without it. Raises UserError when there are none."""
    chosen = {m.partition('-')[0]: f for m, f in fits.items() if m.partition('-')[2] == domain}
    if not chosen:
        raise unknown('domain', domain, sorted({m.partition('-')[2] or "''" for m in fits}))
    return chosen


def options_for(fits, N, D1, budget):
    """{what to do: (Fit, N of the law, D1, D2, N trained)} for a budget of FLOPs and a base of N parameters after D1 tokens."""
    found, factors = {}, sorted({1} | {factor_of(method) for method in fits})
    for method, fitted in fits.items():
        factor = factor_of(method)
        if method.startswith('scratch'):
            choices = {f'start over, {count(k * N)}': (fitted, k * N, 0.0, budget / (6 * k * N), k * N) for k in factors}
            if 'cpt' not in fits:   # the same data go on: the law of one stage, for D1 + D2
                choices[f'continue, {count(N)}'] = fitted, N, 0.0, D1 + budget / (6 * N), N
        else:
            kind = f'grow by {method}' if factor > 1 else f'continue ({method})'
            choices = {f'{kind}, {count(factor * N)}': (fitted, N, D1, budget / (6 * factor * N), factor * N)}
        size, largest = fitted.seen['N']   # a fit at one size says nothing of others
        found |= {what: how for what, how in choices.items() if size != largest or math.isclose(how[1], size, rel_tol=0.01)}
    return found


def advise(fits, N, D1, budget):
    """
    The text that answers: a base of N parameters (without embeddings) was trained for D1 tokens, `budget` FLOPs are left: grow
    it, continue, or start over? fits: {method: Fit}. Raises UserError when no fit covers a model of this size at all.
    """
    options = options_for(fits, N, D1, budget)
    if not options:
        sizes = sorted({f'{f.seen["N"][0]:,.0f}' for f in fits.values()})
        raise UserError(f'these fits are for N = {", ".join(sizes)}: they say nothing about {N:,.0f}')
    rows, warnings, losses, samples = [['choice', 'tokens', 'predicted loss', '90% interval']], [], {}, {}
    for what, (fitted, n, d1, d2, _) in options.items():
        losses[what], samples[what] = loss_of(fitted, n, d1, d2), loss_of(fitted, n, d1, d2, samples=True)
        low, high = samples[what].quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        trained = budget / (6 * options[what][4])
        rows.append([what, count(trained), f'{losses[what]:.4f}', f'{low:.3f} to {high:.3f}'])
        warnings += [f'{what}: {beyond}' for beyond in unseen(fitted, n, d1, d2)]
    rows[1:] = sorted(rows[1:], key=lambda row: losses[row[0]])
    best, n_samples = rows[1][0], min(len(s) for s in samples.values())
    draws = torch.stack([samples[row[0]][:n_samples] for row in rows[1:]])
    confidence = (draws.argmin(0) == 0).double().mean().item()
    lines = [table(rows), '', f'{best} is best, in {confidence:.0%} of the resampled laws']
    for what, (fitted, n, d1, _, trained) in options.items():
        rival = f'start over, {count(trained)}'
        if d1 and rival in options:
            scratch = options[rival][0]
            at = crossing(lambda d: loss_of(fitted, n, d1, d), lambda d: loss_of(scratch, trained, 0.0, d))
            until = f'is ahead of starting over up to {count(at)} tokens' if at else 'and starting over do not cross'
            lines.append(f'{what} {until}')
    if warnings:
        lines += ['', 'outside what the laws were fitted to, so take it as a guess:', *(f'  {w}' for w in warnings)]
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def draw_fit(method, data, fits, folder):
    """FOLDER/METHOD.png: loss over D2, exponents over D1, factors over D1 (Figure 1), and all laws side by side (Figure 3)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(17, 4))
    firsts, p = sorted(set(data['D1'])), fits['multiplicative'].parameters
    points = {d1: sorted((d2, loss) for a, d2, loss in zip(data['D1'], data['D2'], data['loss']) if a == d1) for d1 in firsts}
    styles = dict(zip(TABLE_1, ('-', '--', '-.', ':')))
    for i, (d1, line) in enumerate(points.items()):
        xs = torch.logspace(*(math.log10(end) for end in (line[0][0], line[-1][0])), 50).tolist()
        for law, fitted in fits.items():
            ys = [loss_of(fitted, data['N'][0], d1, x) for x in xs]
            for ax in (axes[0],) * (law == 'multiplicative') + (axes[3],) * (law in styles):
                ax.plot(xs, ys, styles.get(law, '-'), color=f'C{i % 10}', linewidth=1)
        for ax in (axes[0], axes[3]):
            ax.plot(*zip(*line), 'o', color=f'C{i % 10}', markersize=4, label=f'D1 = {count(d1)}')
    slopes, factors = [], []
    for line in points.values():   # the power law of one D1, at the E of the whole fit
        x = torch.tensor([[1.0, math.log(d2)] for d2, _ in line], dtype=torch.float64)
        y = torch.tensor([max(loss - math.exp(p['logE']), 1e-9) for _, loss in line], dtype=torch.float64).log()
        intercept, slope = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()
        slopes.append(slope)
        factors.append(math.exp(min(intercept, 700)))
    axes[1].plot(firsts, slopes, 'o')
    axes[1].plot(firsts, [-p['alpha2'] + p['alpha3'] * math.log(d) for d in firsts], '-')
    axes[2].plot(firsts, factors, 'o')
    axes[2].plot(firsts, [math.exp(p['logA'] - p['alpha1'] * math.log(d)) for d in firsts], '-')
    for ax, x, title in zip(axes, ('D2', 'D1', 'D1', 'D2'), ('loss (nats): the law and the points', 'exponent of D2',
                                                             'factor of D2', 'the laws: ' + ', '.join(TABLE_1))):
        ax.set(xscale='log', xlabel=f'{x} (tokens)')
        ax.set_title(title, fontsize=9)
    for ax in (axes[0], axes[2], axes[3]):
        ax.set_yscale('log')
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(folder) / f'{method}.png', dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

@dataclass
class Fitting:
    """Fit laws to results: scaling.py fit RESULTS.csv"""
    results: str = ''            # CSV with the columns method,N,D1,D2,seed,loss
    bootstrap: int = 200         # resamplings for the intervals; 0: none
    out: str = ''                # folder for fit.json and pictures; empty: that of the results


@dataclass
class Question:
    """Grow, continue or start over: scaling.py advise"""
    fit: str = ''                # fit.json of `scaling.py fit`
    paper: bool = False          # the published coefficients instead
    base_params: float = 0.0     # N of the base model, without embeddings
    base_tokens: float = 0.0     # tokens it was trained on
    budget: float = 0.0          # FLOPs to spend, at 6 a parameter and token
    domain: str = ''             # corpus whose loss counts, where it is not the base's (of the paper's: code)


def fit_results(options):
    """Fit every method's laws; writes fit.json and a picture a method, returns the tables. Raises UserError."""
    results, out = by_size(read_results(options.results)), Path(options.out or Path(options.results).parent)
    out.mkdir(parents=True, exist_ok=True)
    errors, best, text = [['leave-one-out RMS x 1e-3', *results]], {}, []
    fitted = {method: {} for method in results}
    for method, data in results.items():
        for law in laws_for(data):
            try:
                fitted[method][law] = fit(law, data, options.bootstrap)
            except UserError as error:
                text.append(f'{method}: {error}')
        if not fitted[method]:   # what is wrong has been said
            continue
        best[method] = fitted[method].get('multiplicative') or next(iter(fitted[method].values()))
        rows = [['parameter', 'value', '90% interval']]
        for name, value in best[method].parameters.items():
            low, high = best[method].intervals[name]
            if name.startswith('log'):
                name, (value, low, high) = name[3:], (math.exp(min(v, 700)) for v in (value, low, high))
            rows.append([name, f'{value:.4g}', f'{low:.4g} to {high:.4g}'])
        law = best[method].law
        text.append(f'{method}, {len(data["loss"])} points: {law}, L = {LAWS[law].equation}\n\n{table(rows)}')
        if 'multiplicative' in fitted[method]:
            draw_fit(method, data, fitted[method], out)
    if not best:
        raise UserError('\n'.join(text))
    for law in LAWS:
        if any(law in laws for laws in fitted.values()):
            errors.append([law, *(f'{1e3 * laws[law].leave_one_out:.3f}' if law in laws else '' for laws in fitted.values())])
    write_atomically(out / 'fit.json', json.dumps({method: f._asdict() for method, f in best.items()}, indent=1) + '\n')
    return '\n\n'.join([*text, table(errors)])


def read_fits(path):
    """{method: Fit} of a fit.json. Raises UserError for a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        fits = {method: Fit(**fields) for method, fields in content.items()}
        assert all(f.law in LAWS and list(f.parameters) == LAWS[f.law].parameters for f in fits.values())
        assert all(math.isfinite(number) for f in fits.values() for number in f.parameters.values())
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError, RecursionError) as error:
        raise UserError(f'{path} is not a fit.json of scaling.py fit ({type(error).__name__})') from None
    return fits


def main(argv):
    """Command line: a verb, then knobs."""
    verbs = ('fit', 'advise', 'diagnose', 'toy')
    verb, rest = (argv[0] if argv else ''), argv[1:]
    if verb in ('-h', '--help', ''):
        print(__doc__)
        sys.exit(0 if verb else 2)
    if verb == 'fit':
        named = [f'--results={arg}' if not arg.startswith('-') else arg for arg in rest]
        options, _, _ = configure(named, Fitting, program='scaling.py fit')
        check_ranges(options, bootstrap=(0, None))
        if not options.results:
            raise UserError('say which results: scaling.py fit RESULTS.csv')
        print(fit_results(options))
        print(f'\nfit.json and pictures are in {options.out or Path(options.results).parent}/')
    elif verb == 'advise':
        options, _, _ = configure(rest, Question, program='scaling.py advise')
        check_ranges(options, base_params=(1, None), base_tokens=(1, None), budget=(1, None))
        if options.paper == bool(options.fit):
            raise UserError('say whose laws: --fit=FILE or --paper=True')
        fits = of_domain(published() if options.paper else read_fits(options.fit), options.domain)
        print(advise(fits, options.base_params, options.base_tokens, options.budget))
        print(f'\n{human(options.budget)}FLOPs; N without embeddings; losses in nats on the data of the fit')
    elif verb == 'diagnose':
        diagnostics.main(rest)
    elif verb == 'toy':
        diagnostics.toy_main(rest)
    else:
        raise unknown('verb', verb, verbs)


if __name__ == '__main__':
    run_as_program(main)
