"""
Laws for the loss of a second stage of training, and how they are fitted (paper 001, sections 3 and 4).

    L(D1, D2) = A D1^-a1 D2^(-a2 + a3 log D1) + E                                       (Eq. 6: multiplicative)

D1 and D2 are the tokens of the first and second stage, N the parameters without embeddings of the base, before growth; D1 = 0
marks a model trained from scratch for D2 tokens. Losses are in nats, logarithms natural. As in the paper the logarithm of the
loss is fitted, through log-sum-exp, under a Huber loss of 1e-3, by BFGS from a grid of starts in float64; here all starts and
all leave-one-out folds at once, as one batch of small problems.
"""
import itertools
import math
from typing import NamedTuple

import torch

from configurator import UserError, unknown

DELTA = 1e-3   # of the Huber loss, in log loss


# ---------------------------------------------------------------------------------------------------------------------
# laws: log L = logsumexp over terms, each linear in the parameters

class Law(NamedTuple):
    """
    A law's terms, as strings of what multiplies each parameter: {parameter: factor} with factors 1, -d1, -d2, d1*d2, -n or -d
    (log D1, log D2, log N, log(D1 + D2)). saturates: the variable that is replaced by (1/D + 1/Dmax)^-1.
    """
    terms: tuple
    equation: str
    saturates: str = ''

    @property
    def parameters(self):
        """Names, in order, each once; amplitudes as their logarithms (logA, logE, ...)."""
        names = list(dict.fromkeys(name for term in self.terms for name in term))
        return names + ([f'log{self.saturates.upper()}max'] if self.saturates else [])


_MAIN = {'logA': '1', 'alpha1': '-d1', 'alpha2': '-d2', 'alpha3': 'd1*d2'}
_E = {'logE': '1'}
LAWS = {
    'multiplicative': Law((_MAIN, _E), 'A D1^-a1 D2^(-a2 + a3 log D1) + E'),
    'no interaction': Law(({k: v for k, v in _MAIN.items() if k != 'alpha3'}, _E), 'A D1^-a1 D2^-a2 + E'),
    'additive': Law(({'logA': '1', 'alpha1': '-d1'}, {'logF': '1', 'alpha2': '-d2'}, _E), 'A D1^-a1 + F D2^-a2 + E'),
    'hybrid': Law(({'logA': '1', 'alpha1': '-d1', 'alpha2': '-d2'}, {'logF': '1', 'alpha2': '-d2'}, _E),
                  '(A D1^-a1 + F) D2^-a2 + E'),
    'continuous': Law(({'logA': '1', 'alpha': '-d'}, _E), 'A (D1 + D2)^-a + E'),
    'chinchilla': Law(({'logA': '1', 'alpha': '-d'}, {'logB': '1', 'beta': '-n'}, _E), 'A D^-a + B N^-b + E'),
    'joint': Law((_MAIN, {'logB': '1', 'beta': '-n'}, _E), 'A D1^-a1 D2^(-a2 + a3 log D1) + B N^-b + E'),
    'saturated D1': Law((_MAIN, _E), 'multiplicative, D1 -> (1/D1 + 1/Dmax)^-1', 'd1'),
    'saturated D2': Law((_MAIN, _E), 'multiplicative, D2 -> (1/D2 + 1/Dmax)^-1', 'd2'),
}


def logarithms(data):
    """{d1, d2, d, n} as float64 tensors (points) from columns D1, D2, N of any numbers; d1 is 0 where D1 is 0."""
    columns = {k: torch.as_tensor(data[k], dtype=torch.float64) for k in ('D1', 'D2', 'N')}
    return dict(d1=columns['D1'].clamp(min=1).log(), d2=columns['D2'].log(), n=columns['N'].log(),
                d=(columns['D1'] + columns['D2']).log())


def _terms(law, theta, logs):
    """
    The terms and their Jacobian: (B, K, n) and (B or 1, K, n, P), at parameters theta (B, P). The Jacobian has one row for
    all B where the law is linear in its parameters, which all are but the saturated ones.
    """
    names, logs = law.parameters, {k: v[None] for k, v in logs.items()}
    slope = None
    if law.saturates:
        limit, plain = theta[:, -1:], logs[law.saturates]
        logs = logs | {law.saturates: -torch.logaddexp(-plain, -limit)}
        slope = (logs[law.saturates] - limit).exp()   # of the saturated logarithm in that of Dmax
    factors = {'1': torch.ones_like(logs['d2']), '-d1': -logs['d1'], '-d2': -logs['d2'], '-n': -logs['n'], '-d': -logs['d'],
               'd1*d2': logs['d1'] * logs['d2']}
    rows = max(f.shape[0] for f in factors.values())
    jacobian = torch.zeros(rows, len(law.terms), logs['d2'].shape[-1], len(names), dtype=torch.float64)
    for k, term in enumerate(law.terms):
        for name, factor in term.items():
            jacobian[:, k, :, names.index(name)] = factors[factor]
    if rows == 1:
        terms = (theta @ jacobian[0].flatten(0, 1).T).view(len(theta), len(law.terms), -1)
    else:
        terms = torch.einsum('bknp,bp->bkn', jacobian, theta)
        own, other = ('alpha1', '-d2') if law.saturates == 'd1' else ('alpha2', '-d1')
        exponent = -theta[:, names.index(own), None] - theta[:, names.index('alpha3'), None] * factors[other]
        jacobian[:, 0, :, -1] = exponent * slope
    return terms, jacobian


def predict(law, theta, data):
    """Losses (B, n) in nats that a law (its name) has at parameters theta (B, P), in the order of LAWS[law].parameters."""
    return _terms(LAWS[law], torch.as_tensor(theta, dtype=torch.float64), logarithms(data))[0].logsumexp(1).exp()


# ---------------------------------------------------------------------------------------------------------------------
# fitting: many small problems at once

def _centred(law, logs):
    """
    (the logarithms less their means, M (P, P), c (P,)) with theta = M theta' + c: the same law written in logarithms that vary
    about zero, in which a fit converges; the products d1*d2 mix the parameters.
    """
    means = {k: v.mean() for k, v in logs.items()}
    names = law.parameters
    matrix = torch.eye(len(names), dtype=torch.float64)
    place = {name: i for i, name in enumerate(names)}
    if 'alpha3' in place:   # a - a1 d1 - a2 d2 + a3 d1 d2 at d = m + x
        matrix[place['alpha1'], place['alpha3']] = means['d2']
        matrix[place['alpha2'], place['alpha3']] = means['d1']
        matrix[place['logA'], place['alpha3']] = means['d1'] * means['d2']
    for term in law.terms:
        amplitude = next(name for name in term if name.startswith('log'))
        for name, factor in term.items():
            if factor in ('-d1', '-d2', '-d', '-n'):
                matrix[place[amplitude], place[name]] += means[factor[1:]]
    shift = torch.zeros(len(names), dtype=torch.float64)
    if law.saturates:
        shift[-1] = means[law.saturates]
    return {k: v - means[k] for k, v in logs.items()}, matrix, shift


def huber(law, theta, logs, target, weight):
    """
    The mean Huber loss of log L in units of DELTA^2, (B,), and its gradient (B, P); target: log L (n,); weight: (B, n) of each
    point in each of the B problems.
    """
    terms, jacobian = _terms(law, theta, logs)
    predicted = terms.logsumexp(1)
    residual = (predicted - target) / DELTA
    size = residual.abs()
    value = (weight * torch.where(size <= 1, 0.5 * residual ** 2, size - 0.5)).sum(1)
    slope = (weight * residual.clamp(-1, 1) / DELTA)[:, None] * (terms - predicted[:, None]).exp()
    if jacobian.shape[0] == 1:
        return value, slope.flatten(1) @ jacobian[0].flatten(0, 1)
    return value, torch.einsum('bkn,bknp->bp', slope, jacobian)


def bfgs(function, x, steps=400, tolerance=1e-7, window=25):
    """
    Minimise B functions of P variables side by side: function(x (b, P), rows (b,)) -> values (b,), gradients (b, P), of the
    problems `rows`; x (B, P) float64 starts. BFGS with a line search that brackets the weak Wolfe conditions (Lewis and
    Overton). A problem takes no more part when no component of its gradient exceeds `tolerance`, when there is no descent left
    within rounding, or when `window` steps have brought less than `tolerance` of its value. Returns (x, values, what the last
    window brought, relative: 0 where a problem has converged).
    """
    x, rows, working = x.clone(), torch.arange(len(x)), torch.ones(len(x), dtype=torch.bool)
    value, gradient = function(x, rows)
    inverse, before, brought = torch.empty(*x.shape, x.shape[1], dtype=x.dtype), value.clone(), torch.full_like(value, math.inf)
    inverse[:] = torch.eye(x.shape[1], dtype=x.dtype) / gradient.norm(dim=1).clamp(min=1e-12)[:, None, None]
    for step in range(1, steps + 1):
        done = working & (gradient.abs().amax(1) <= tolerance)
        if step % window == 0:
            brought = torch.where(working, before - value, brought)
            before, done = value.clone(), done | working & (brought < tolerance * value.clamp(min=1e-6))
        brought[done], working[done] = 0.0, False
        active = rows[working & gradient.isfinite().all(1)]
        if not len(active):
            break
        here, slope, start = x[active], gradient[active], value[active]
        direction = -(inverse[active] @ slope[..., None])[..., 0]
        descent = (direction * slope).sum(1)
        reset = descent >= 0
        direction[reset], descent[reset] = -slope[reset], -slope[reset].square().sum(1)
        new, found, new_gradient = _line_search(function, active, here, start, slope, direction, descent)
        moved, s, y = found < start, new - here, new_gradient - slope
        sy = (s * y).sum(1)
        good = moved & (sy > 1e-14 * s.norm(dim=1) * y.norm(dim=1))
        if step == 1:   # the scale of the first Hessian, once there is a curvature to read it from
            inverse[active[good]] = torch.eye(x.shape[1], dtype=x.dtype) * (sy / y.square().sum(1))[good, None, None]
        inverse[active[good]] = _update(inverse[active[good]], s[good], y[good], sy[good])
        x[active[moved]], value[active[moved]], gradient[active[moved]] = new[moved], found[moved], new_gradient[moved]
        brought[active[~moved]], working[active[~moved]] = 0.0, False
    return x, value, brought / value.clamp(min=1e-2)


def _line_search(function, rows, here, start, slope, direction, descent, trials=16):
    """A step along each direction that meets the weak Wolfe conditions: (points, values, gradients)."""
    step, low, high = torch.ones_like(start), torch.zeros_like(start), torch.full_like(start, math.inf)
    new, found, gradient = here.clone(), start.clone(), slope.clone()
    searching = torch.ones_like(start, dtype=torch.bool)
    for _ in range(trials):
        i = searching.nonzero()[:, 0]
        at = here[i] + step[i, None] * direction[i]
        value, g = function(at, rows[i])
        too_far = ~(value <= start[i] + 1e-4 * step[i] * descent[i])   # also when it is not a number
        too_near = ~too_far & ((g * direction[i]).sum(1) < 0.9 * descent[i])
        kept = ~too_far
        new[i[kept]], found[i[kept]], gradient[i[kept]] = at[kept], value[kept], g[kept]
        high[i[too_far]], low[i[too_near]] = step[i[too_far]], step[i[too_near]]
        searching[i[~too_far & ~too_near]] = False
        if not searching.any():
            break
        step = torch.where(high.isfinite(), (low + high) / 2, 2 * low.clamp(min=0.5))
    return new, found, gradient


def _update(inverse, s, y, sy):
    """BFGS' update of the inverse Hessian."""
    rho = 1 / sy
    hy = (inverse @ y[..., None])[..., 0]
    factor = (1 + rho * (y * hy).sum(1)) * rho
    return inverse + factor[:, None, None] * s[:, :, None] * s[:, None] - rho[:, None, None] * (
        hy[:, :, None] * s[:, None] + s[:, :, None] * hy[:, None])


def starts_of(law, target):
    """A grid of starts in centred logarithms, (S, P): amplitudes about the losses', exponents from none to large."""
    middle = float(target.exp().mean().log())
    choices = {'alpha3': (0.0, 0.03), 'beta': (0.05, 0.3), 'logE': tuple(middle + shift for shift in (-3.0, -0.7, -0.1)),
               'logD1max': (-1.0, 2.0, 5.0), 'logD2max': (-1.0, 2.0, 5.0)}
    for name in law.parameters:
        if name in ('logA', 'logB', 'logF'):
            choices[name] = tuple(middle + shift for shift in (-3.0, -1.5, -0.3))
        elif name.startswith('alpha') and name != 'alpha3':
            choices[name] = (0.03, 0.15, 0.6)
    return torch.tensor(list(itertools.product(*(choices[name] for name in law.parameters))), dtype=torch.float64)


def solve(law, data, weight, starts=None):
    """
    The best parameters of a law (its name) on columns N, D1, D2, loss, for each row of weight (F, n), every fold from every
    start: (theta (F, P), values (F,), how far each still moved, relative (F,), theta in centred logarithms (F, P)). starts: (S, P)
    in centred logarithms; None: the grid.
    """
    shape, target = LAWS[law], torch.as_tensor(data['loss'], dtype=torch.float64).log()
    logs, back, shift = _centred(shape, logarithms(data))
    weight = weight / weight.sum(1, keepdim=True)
    starts = starts_of(shape, target) if starts is None else starts
    folds = torch.arange(len(weight)).repeat_interleave(len(starts))
    theta, value, moving = bfgs(lambda x, rows: huber(shape, x, logs, target, weight[folds[rows]]),
                               starts.repeat(len(weight), 1))
    best = value.nan_to_num(math.inf).view(len(weight), -1).argmin(1) + torch.arange(len(weight)) * len(starts)
    return theta[best] @ back.T + shift, value[best], moving[best], theta[best]


class Fit(NamedTuple):
    """A fitted law: its name, {parameter: value}, {parameter: (low, high)}, bootstrap samples (S, P), errors, ranges seen."""
    law: str
    parameters: dict
    intervals: dict
    samples: list
    rms: float
    leave_one_out: float
    seen: dict


def fit(law, data, bootstrap=200, seed=0):
    """
    Fit a law (its name) to columns N, D1, D2, loss. 90% intervals by resampling points. Raises UserError for an unknown law,
    too few points, or a fit that does not converge.
    """
    if law not in LAWS:
        raise unknown('law', law, LAWS)
    n, names = len(data['loss']), LAWS[law].parameters
    if n < len(names) + 2:
        raise UserError(f'{law} has {len(names)} parameters and needs at least {len(names) + 2} points, not {n}')
    logs, factors = logarithms(data), ' '.join(factor for term in LAWS[law].terms for factor in term.values())
    for symbol, column in (('d1', 'D1'), ('d2', 'D2'), ('n', 'N'), ('d', 'D1 + D2')):
        if f'-{symbol}' in factors.split() and len(set(logs[symbol].tolist())) < 2:
            raise UserError(f'{law} needs points of several {column}, these have one')
    folds = torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).double()
    theta, value, moving, centred = solve(law, data, folds)
    if not theta.isfinite().all() or moving.max() > 1e-2:
        raise UserError(f'the fit of {law} did not converge: the points do not determine its {len(names)} parameters')
    residual = predict(law, theta, data).log() - torch.as_tensor(data['loss'], dtype=torch.float64).log()
    held_out = residual[1:].diagonal()
    samples = theta[:1]
    if bootstrap:
        drawn = torch.randint(n, (bootstrap, n), generator=torch.Generator().manual_seed(seed))
        samples = solve(law, data, torch.nn.functional.one_hot(drawn, n).sum(1).double(), centred[:1])[0]
    low, high = samples.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    seen = {k: (float(min(data[k])), float(max(data[k]))) for k in ('N', 'D1', 'D2')}
    return Fit(law, dict(zip(names, theta[0].tolist())), dict(zip(names, zip(low.tolist(), high.tolist()))), samples.tolist(),
               float(residual[0].square().mean().sqrt()), float(held_out.square().mean().sqrt()), seen)


def leave_one_out(law, data):
    """Root mean square error of log L at points left out of the fit, one at a time (Table 1's measure; of log L, as fitted)."""
    return fit(law, data, bootstrap=0).leave_one_out
