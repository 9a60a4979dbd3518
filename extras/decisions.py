"""
What the laws of model reuse decide (Liew and Kato, section 5, Appendix E): whether to continue, to
grow or to start over, up to how many tokens, and at which size. A decision is as certain as the
laws are: each comes with what their bootstrap samples say.

    python scaling.py advise --paper=True --base_params=1e9 --base_tokens=2e12 --budget=1e22
    python scaling.py sunk_cost --paper=True                   # D* over N (Eq. 12, Figure 10)
    python scaling.py optimal --paper=True --base_tokens=1e10  # N and D2 of a budget (Eq. 13)
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from engine.errors import UserError, unknown
from engine.report import Line, Panel, format_count, format_si, table

QUANTILES = torch.tensor([0.05, 0.95], dtype=torch.float64)
TOKENS = torch.logspace(3, 20, 2001, dtype=torch.float64)  # among which curves are compared


# ----------------------------------------------------------------------------------------------
# crossings


def tail_record(method, data, plain, saturated):
    """
    What a limit D2max of the second stage's tokens changes (Eq. 14, Figure 11): a record with the
    mean square errors at the largest quarter of the D2, and the D2 at which the curves of all bases
    cross. A longer first stage helps while -alpha1 + alpha3 log D2* < 0, so they do at D2* =
    e^(alpha1 / alpha3), if D2max is larger. The paper has D2max <= e^(alpha2 / alpha3) as the
    condition, which is in the record too. plain, saturated: Fits of Eq. 6 and Eq. 14.
    """
    D2s = sorted(set(data['D2']))
    least = D2s[-max(1, len(D2s) // 4)]
    tail = [i for i, D2 in enumerate(data['D2']) if D2 >= least]
    N, D1, D2, loss = ([data[column][i] for i in tail] for column in ('N', 'D1', 'D2', 'loss'))
    record = {'method': method, 'points': len(tail)}
    for name, fitted in (('Eq. 6', plain), ('Eq. 14', saturated)):
        errors = fitted.losses(N, D1, D2)[0] - torch.tensor(loss, dtype=torch.float64)
        record[f'MSE of {name}'] = f'{errors.square().mean().item():.2e}'
    p = SimpleNamespace(**saturated.parameters)
    record['D2max'] = power_of_e(p.logDmax)
    record['curves cross at D2'] = 'none'
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


def crossings(reused, fresh, tokens=TOKENS):
    """
    The tokens (1 + S,) up to which reuse is ahead of starting over, in each of the laws: 0 if it
    never is, inf if starting over is still behind at the last of `tokens`, ascending. reused,
    fresh: losses (1 + S, n) at `tokens`; of as many samples as both have.
    """
    rows = min(len(reused), len(fresh))
    lead = fresh[:rows] - reused[:rows]  # above 0 reuse is ahead
    ahead = lead > 0
    last = (ahead * torch.arange(1, len(tokens) + 1)).amax(1) - 1  # -1: nowhere
    i = last.clamp(0, len(tokens) - 2)[:, None]
    before, after = lead.gather(1, i)[:, 0], lead.gather(1, i + 1)[:, 0]
    share = before / (before - after)
    log = tokens.log()
    at = torch.lerp(log[i[:, 0]], log[i[:, 0] + 1], share).exp()
    at = torch.where(last < 0, 0.0, at)
    return torch.where(last == len(tokens) - 1, torch.inf, at)


def count(tokens):
    """Up to how many tokens reuse is ahead, in words: 'none' for 0, 'any' for infinity."""
    return {0.0: 'none', math.inf: 'any'}.get(tokens) or format_count(tokens)


def interval_of(found):
    """
    'LOW to HIGH', 90% of the samples in found (1 + S,), whose first is the fit itself; None if one
    sample is all there is.
    """
    if len(found) < 3:
        return None
    low, high = found[1:].quantile(QUANTILES, interpolation='nearest').tolist()
    return f'{count(low)} to {count(high)}'


def shares_without(found):
    """The shares of the samples in which reuse is ahead at any budget, and at none."""
    return [(found[1:] == limit).double().mean().item() for limit in (math.inf, 0.0)]


def sunk_cost_limits(scratch, grown, N, factor=2):
    """
    D* in tokens (1 + S,) (Eq. 12): a model of factor x N trained from scratch for D* is as good as
    one grown from N after D* tokens and trained for D* more; beyond, starting over wins.
    """
    reused, fresh = grown.losses(N, TOKENS, TOKENS), scratch.losses(factor * N, 0.0, TOKENS)
    return crossings(reused, fresh)


def published_sunk_cost_limit(N):
    """The paper's approximation of D* in tokens (Appendix E.1)."""
    return 13e12 * (N / 1e11) ** (-0.6 - 0.04 * math.log(N / 1e11))


# ----------------------------------------------------------------------------------------------
# the compute-optimal point


def compute_optimal(law, D1, compute, factor=1):
    """
    (D2, N) that minimise a joint law at fixed D1 for C2 = 6 factor N D2 FLOPs (Eq. 13, Appendix
    E.2; N before growth). law: {parameter: value}. Raises UserError where more tokens never help.
    """
    p = SimpleNamespace(**law)
    alpha = p.alpha2 - p.alpha3 * math.log(D1)
    if alpha <= 0 or p.beta <= 0:
        raise UserError(
            f'at D1 = {D1:g} the exponent of D2 is {alpha:.3f}: no compute-optimal point'
        )
    log_A = p.logA - p.alpha1 * math.log(D1)
    log_G = (log_A + math.log(alpha) - p.logB - math.log(p.beta)) / (alpha + p.beta)
    log_product = math.log(compute / (6 * factor))
    share = p.beta / (alpha + p.beta)
    D2 = math.exp(log_G + share * log_product)
    return D2, math.exp(-log_G + (1 - share) * log_product)


def compute_optima(fitted, D1, compute, factor=1):
    """
    compute_optimal of a fit and of its samples, float64 (1 + S, 2); 0 where there is none. Raises
    UserError if the fit itself has none.
    """
    points = []
    compute_optimal(fitted.parameters, D1, compute, factor)
    for row in [list(fitted.parameters.values()), *fitted.samples]:
        law = dict(zip(fitted.parameters, row))
        try:
            points.append(compute_optimal(law, D1, compute, factor))
        except (UserError, OverflowError):
            points.append((0.0, 0.0))
    return torch.tensor(points, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------
# continue, grow or start over


GROWTH_FACTOR = {'exp': 2, 'stk2': 2, 'stk4': 4}  # where a fit does not know its own


class Choice(NamedTuple):
    """Something to do with a budget, and the law that predicts its loss."""

    label: str
    fitted: Any  # scaling.Fit
    N: float  # of the law
    D1: float
    D2: float
    trained: float  # parameters N that are trained

    def losses(self):
        """Its losses (1 + S,): as fitted, then in the resampled laws."""
        return self.fitted.losses(self.N, self.D1, self.D2)[:, 0]

    def beyond_the_fit(self):
        """What of this choice lies outside the points of its fit, as sentences."""
        beyond = []
        for name in ('N', 'D1', 'D2'):
            value, (low, high) = getattr(self, name), self.fitted.seen[name]
            inside = low * 0.999 <= value <= high * 1.001 or name == 'D1' and value == 0
            if not inside:
                beyond.append(
                    f'  {self.label}: {name} = {value:.3g} ({low:.3g} to {high:.3g} seen)'
                )
        return beyond


def factor_of(method, fitted):
    """How many times larger than its base a method's model is, of its fit if that knows it."""
    return fitted.growth or GROWTH_FACTOR.get(method.partition('+')[0], 1)


def of_domain(fits, domain):
    """The fits whose losses are on one corpus, '' for the base's. Raises UserError for none."""
    chosen = {}
    for method, fitted in fits.items():
        name, _, corpus = method.partition('-')
        if corpus == domain:
            chosen[name] = fitted
    if not chosen:
        known = sorted({method.partition('-')[2] or "''" for method in fits})
        raise unknown('domain', domain, known)
    return chosen


def choices_for(fits, N, D1, budget):
    """The Choices for a budget of FLOPs and a base of N parameters after D1 tokens."""
    choices = []
    factors = [1]
    for factor in sorted(factor_of(method, fitted) for method, fitted in fits.items()):
        if factor > 1.01 * factors[-1]:  # those of two methods may differ by a norm's parameters
            factors.append(factor)
    for method, fitted in fits.items():
        factor = factor_of(method, fitted)
        if method.startswith('scratch'):
            for k in factors:
                D2 = budget / (6 * k * N)
                label = f'start over, {format_count(k * N)}'
                choices.append(Choice(label, fitted, k * N, 0.0, D2, k * N))
            if 'cpt' not in fits:  # the same data continue: the law of one stage, for D1 + D2
                label = f'continue, {format_count(N)}'
                choices.append(Choice(label, fitted, N, 0.0, D1 + budget / (6 * N), N))
        else:
            kind = f'grow by {method}' if factor > 1 else f'continue ({method})'
            label = f'{kind}, {format_count(factor * N)}'
            D2 = budget / (6 * factor * N)
            choices.append(Choice(label, fitted, N, D1, D2, factor * N))
    return [choice for choice in choices if says_something(choice)]


def says_something(choice):
    """Whether a fit covers a size: one at a single size says nothing about others."""
    smallest, largest = choice.fitted.seen['N']
    return smallest != largest or math.isclose(choice.N, smallest, rel_tol=0.01)


def advise(fits, N, D1, budget):
    """
    The text that answers: a base of N parameters (without embeddings) was trained for D1 tokens,
    `budget` FLOPs are left: grow it, continue, or start over? fits: {method: Fit}. Raises
    UserError if no fit covers this size.
    """
    choices = choices_for(fits, N, D1, budget)
    if not choices:
        sizes = sorted({f'{fitted.seen["N"][0]:,.0f}' for fitted in fits.values()})
        raise UserError(f'these fits are for N = {", ".join(sizes)}, not for {N:,.0f}')
    choices.sort(key=lambda c: c.losses()[0].item())
    records, warnings = [], []
    for c in choices:
        low, high = c.losses()[1:].quantile(QUANTILES).tolist()
        record = {'choice': c.label, 'tokens': budget / (6 * c.trained)}
        record['predicted loss'] = c.losses()[0].item()
        records.append(record | {'90% interval': f'{low:.3f} to {high:.3f}'})
        warnings += c.beyond_the_fit()
    lines = [best_line(choices), *(crossing_line(c, choices) for c in choices if c.D1)]
    text = f'{table(records)}\n\n' + '\n'.join(filter(None, lines))
    if warnings:
        text += '\n\noutside what the laws were fitted to, so take it as a guess:\n'
        text += '\n'.join(warnings)
    return text


def best_line(choices):
    """Which of some choices, the best first, is best, and in how many of the laws."""
    label = choices[0].label
    samples = [choice.losses()[1:] for choice in choices]
    least = min(map(len, samples))
    if len(choices) == 1:
        return f'{label} is the only choice that these laws cover'
    if least == 1:
        return f'{label} is best; the laws have no samples that could tell how surely'
    best = torch.stack([s[:least] for s in samples]).argmin(0)
    confidence = (best == 0).double().mean().item()
    return f'{label} is best, in {confidence:.0%} of the resampled laws'


def crossing_line(choice, choices):
    """Up to how many tokens a choice is ahead of starting over, in words, or ''."""
    rivals = [c for c in choices if not c.D1 and c.label.startswith('start over')]
    rivals = [c for c in rivals if math.isclose(c.trained, choice.trained, rel_tol=0.02)]
    if not rivals:
        return ''
    reused = choice.fitted.losses(choice.N, choice.D1, TOKENS)
    fresh = rivals[0].fitted.losses(choice.trained, 0.0, TOKENS)
    found = crossings(reused, fresh)
    at = found[0].item()
    words = {0.0: 'at no budget', math.inf: 'at any budget'}
    words = words.get(at) or f'up to {format_count(at)} tokens'
    line = f'{choice.label} is ahead of starting over {words}'
    if len(found) < 3:
        return line
    always, never = shares_without(found)
    return (
        f'{line} (90% interval {interval_of(found)}; at any budget in {always:.0%} of the '
        f'resampled laws, at none in {never:.0%})'
    )


# ----------------------------------------------------------------------------------------------
# tables and pictures of the decisions

BEYOND = 1000  # times what the points of a fit have, as the paper's Figure 10 goes


def spaced(low, high, n=9):
    """n numbers from low to high, evenly spaced in their logarithms."""
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64).tolist()


def sizes_for(fitted):
    """Sizes N of bases, from those of a fit's points to BEYOND them."""
    low, high = fitted.seen['N']
    return spaced(low, BEYOND * high)


def budgets_for(fitted, factor):
    """FLOPs of second stages, from those of a fit's points to BEYOND them."""
    (N, N_high), (D2, D2_high) = fitted.seen['N'], fitted.seen['D2']
    return spaced(6 * factor * N * D2, BEYOND * 6 * factor * N_high * D2_high)


def sunk_cost_over_sizes(fits, method, sizes=()):
    """{N of the base: D* (1 + S,)} (Eq. 12); fits: {method: Fit}."""
    scratch, grown = fits['scratch'], fits[method]
    factor = factor_of(method, grown)
    sizes = sizes or sizes_for(grown)
    return {N: sunk_cost_limits(scratch, grown, N, factor) for N in sizes}


def sunk_cost_records(over_sizes):
    """A record for each size of sunk_cost_over_sizes."""
    records = []
    for N, limits in over_sizes.items():
        record = {'N of the base': format_count(N), 'D* (tokens)': count(limits[0].item())}
        record |= {'90% interval': interval_of(limits)}
        if len(limits) > 2:
            record['no D* in'] = f'{sum(shares_without(limits)):.0%} of the laws'
        records.append(record)
    return records


def sunk_cost_panels(over_sizes, approximate=None):
    """
    D* over the size of the base, and between which half of the laws lie (Figure 10, right), of
    sunk_cost_over_sizes. approximate: also a function N -> D*.
    """
    sizes = list(over_sizes)
    panel = Panel('N of the base', 'D* (tokens)', log='xy')
    rows = {'as fitted': [], 'a quarter of the laws is below': [], 'a quarter is above': []}
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for found in over_sizes.values():
        low, high = found[1:].quantile(quarters, interpolation='nearest').tolist()
        for values, value in zip(rows.values(), (found[0].item(), low, high)):
            values.append(value if 0 < value < math.inf else math.nan)
    for (label, values), style in zip(rows.items(), ('o-', ':', ':')):
        panel.lines.append(Line(sizes, values, label, style, 'C0'))
    if approximate:
        values = [approximate(N) for N in sizes]
        panel.lines.append(Line(sizes, values, 'Appendix E.1', '--', 'C3'))
    return [panel]


def optimal_records(fitted, method, D1, budgets=()):
    """The compute-optimal N and D2 of budgets in FLOPs (Eq. 13), a record each."""
    factor, records = factor_of(method, fitted), []
    for compute in budgets or budgets_for(fitted, factor):
        found = compute_optima(fitted, D1, compute, factor)
        record = {'budget (FLOPs)': format_si(compute)}
        for name, values in zip(('D2 (tokens)', 'N of the base'), found.T):
            record[name] = count(values[0].item())
            record[f'90% interval of {name.split()[0]}'] = interval_of(values)
        if len(found) > 2:
            _, without = shares_without(found[:, 0])
            record['none in'] = f'{without:.0%} of the laws'
        records.append(record)
    return records


def optimal_panels(fitted, method, D1):
    """The compute-optimal N and D2 over the budget (Eq. 13)."""
    factor = factor_of(method, fitted)
    budgets = budgets_for(fitted, factor)
    points = [compute_optimal(fitted.parameters, D1, compute, factor) for compute in budgets]
    panels = []
    for label, values in zip(('D2 (tokens)', 'N of the base'), zip(*points)):
        panel = Panel('budget of the second stage (FLOPs)', label, log='xy')
        panel.lines.append(Line(list(budgets), list(values), f'D1 = {format_count(D1)}', 'o-'))
        panels.append(panel)
    return panels
