"""
Pictures of the laws of model reuse (Liew and Kato): loss over the tokens of either stage, as points
and as the curves of the laws.
"""

import math
from types import SimpleNamespace

import numpy as np

from engine.report import Line, Panel, format_count
from extras.decisions import spaced

STYLES = dict(multiplicative='-', no_interaction='--', additive='-.', hybrid=':', continuous='--')


def points_over(data, over, held, value):
    """(tokens of the stage `over`, losses) of the points whose stage `held` has `value` tokens."""
    columns = zip(data[held], data[over], data['loss'])
    points = sorted((tokens, loss) for other, tokens, loss in columns if other == value)
    return [tokens for tokens, _ in points], [loss for _, loss in points]


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
        grid = spaced(tokens[0], tokens[-1], 50)
        for law, fitted in fits.items():
            curve = fitted.losses(data['N'][0], **{held: value, over: grid})[0].tolist()
            panel.lines.append(Line(grid, curve, '', STYLES[law], color))
    return panel


def power_panels(data, fitted):
    """Exponent and factor of the power of D2, over D1 (Figure 1)."""
    p = SimpleNamespace(**fitted.parameters)
    exponents = Panel('D1 (tokens)', 'exponent of D2', log='x')
    factors = Panel('D1 (tokens)', 'factor of the power of D2', log='xy')
    points = {D1: points_over(data, 'D2', 'D1', D1) for D1 in sorted(set(data['D1']))}
    points = {D1: found for D1, found in points.items() if len(set(found[0])) > 1}  # else no power
    D1s = list(points)
    powers = []  # (exponent, log factor) of each D1: a line through log(L - E)
    for D2s, losses in points.values():
        above = np.maximum(np.array(losses) - math.exp(p.logE), 1e-9)
        powers.append(np.polyfit(np.log(D2s), np.log(above), 1))
    exponents.lines = [
        Line(D1s, [exponent for exponent, _ in powers], 'each D1 alone', 'o'),
        Line(D1s, [-p.alpha2 + p.alpha3 * math.log(D1) for D1 in D1s], 'Eq. 6'),
    ]
    factors.lines = [
        Line(D1s, [math.exp(min(log, 700)) for _, log in powers], 'each D1 alone', 'o'),
        Line(D1s, [math.exp(p.logA - p.alpha1 * math.log(D1)) for D1 in D1s], 'Eq. 6'),
    ]
    return [exponents, factors]


def fit_panels(data, fitted):
    """The multiplicative law: loss over D2 and D1 (Figures 1, 8), the power of D2 (Figure 1)."""
    ours = {'multiplicative': fitted}
    panels = [law_panel(data, ours, 'Eq. 6 and the points')]
    panels.append(law_panel(data, ours, 'the same over D1', 'D1'))
    return panels + power_panels(data, fitted)


def rival_panels(data, fits):
    """Four laws (Figure 3) and the continuous one (Figure 9), of {law: Fit}."""
    four = ('multiplicative', 'no_interaction', 'additive', 'hybrid')
    rivals = {law: fits[law] for law in four if law in fits}
    panels = [law_panel(data, rivals, 'four laws')]
    if 'continuous' in fits:
        panels.append(law_panel(data, {'continuous': fits['continuous']}, 'Eq. 11: D1 + D2'))
    return panels


def grow_or_scratch_panel(grown, scratch):
    """
    Growing at several D1 beside starting with the grown size (Figure 4, right). grown, scratch:
    (points, Fit).
    """
    data, fitted = grown
    panel = law_panel(data, {'multiplicative': fitted}, 'grow, or start with the grown size')
    points, law = scratch
    tokens, losses = points_over(points, 'D2', 'D1', 0.0)
    panel.lines.append(Line(tokens, losses, 'from scratch', 'o', 'black'))
    grid = spaced(tokens[0], max(*tokens, *data['D2']), 50)
    curve = law.losses(points['N'][0], 0.0, grid)[0].tolist()
    panel.lines.append(Line(grid, curve, '', '-', 'black'))
    return panel
