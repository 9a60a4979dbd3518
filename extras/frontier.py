"""
How cheap can a family be before one of its members is worse than the same size trained alone?
Progressive families at several costs and in several ways, beside independent training under two
schedules, several seeds: the difference of every member, and the frontier as a picture. Growing
from a trunk joins Progressive training (Yano et al.) and reuse from the stable phase (Liew and
Kato, section 4.3); the comparison is no paper's.

    python train.py config/frontier_tiny.py
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean

from configurator import Count, Positive
from engine.errors import UserError, unknown
from engine.report import Line, Panel, by_label, interval
from engine.stage import adapted
from expand import Progressive, allocate_tokens

PAPER = dict(shares=(), noise=0.0, optimizer='fresh', last_schedule='')
# what is special about a family: general knobs, and knobs of Progressive
ARMS = {
    'trunk': ({}, {}),
    'laws': ({}, {}),  # with law_shares
    'fresh': ({}, dict(optimizer='fresh')),
    'branch': ({}, dict(last_schedule='')),
    'lossless': ({}, dict(width='lossless')),
    'taught': ({}, dict(taught=1.0)),
    'eq4': ({}, dict(shares=())),
    'paper': (dict(schedule='cosine'), PAPER),
    'adjusted': (dict(schedule='cosine'), PAPER | dict(learning_rates=(8e-3, 6e-3, 5e-3, 4e-3))),
}
SCHEDULES = ('wsd', 'cosine')  # of independent training


@dataclass
class Frontier(Progressive):
    """The cost of families against their worst member's difference from independent training."""

    # shares: of all sizes but the largest, which gets what the cost of a family leaves
    families: tuple[str, ...] = ('trunk:70', 'trunk:60')  # ARM:PERCENT of independent training
    law_shares: tuple[Positive, ...] = ()  # the same of the arm laws: what allocation found
    seeds: Count = 5  # runs of everything, each with its own initialisation and data order

    def stages(self, run):
        """For every seed, independent training under both schedules, then every family."""
        configs = self.configs(run)
        X = [config.num_params(head=True) for config in configs]
        replace(self, shares=()).check(configs, X)
        if self.params or self.tokens or self.compare:
            raise UserError('frontier sets params, tokens and compare itself: leave them out')
        scratch = self.scratch_tokens or [self.tokens_per_param * x for x in X]
        made = {family: self.family(family, X, scratch) for family in self.families}
        for seed, schedule in product(range(self.seeds), SCHEDULES):
            seed += run.seed
            knobs, family = dict(seed=seed, schedule=schedule), f'independent-{schedule}'
            yield from within(self.independents(configs, X, scratch), family, knobs)
            for family, (changes, method) in made.items():
                knobs = dict(seed=seed) | dict(schedule='wsd') | changes
                if knobs['schedule'] == schedule:
                    yield from within(method.stages(replace(run, **knobs)), family, knobs)

    def family(self, name, params, scratch):
        """(general knobs, Progressive) of a family that is written as ARM:PERCENT. UserError."""
        arm, _, percent = name.partition(':')
        if arm not in ARMS or not percent.isdecimal():
            raise unknown('family', name, [f'{arm}:60' for arm in ARMS])
        changes, knobs = ARMS[arm]
        own = {field: getattr(self, field) for field in Progressive.__dataclass_fields__}
        if arm == 'laws':
            own['shares'] = self.law_shares
        method = Progressive(**own | knobs)
        given, smaller = len(method.shares), len(params) - 1
        if given != smaller and (given or arm == 'laws'):
            raise UserError(f'{name} needs {smaller} shares, of all but the largest, not {given}')
        left = int(percent) / 100 * sum(x * t for x, t in zip(params, scratch))
        if left <= 0:
            raise UserError(f'{name} leaves nothing to train with')
        if not method.shares:  # Eq. 4's, in proportion
            tokens = allocate_tokens(params, scratch)
            factor = left / sum(x * t for x, t in zip(params, tokens))
            method.shares = tuple(factor * t / s for t, s in zip(tokens, scratch))
            return changes, method
        left -= sum(share * x * t for share, x, t in zip(method.shares, params, scratch))
        if left <= 0:
            raise UserError(f'shares {method.shares} leave nothing for the largest in {name}')
        method.shares += (left / (params[-1] * scratch[-1]),)
        return changes, method

    def summary(self, results):
        """A record for each family, and the frontier: worst member against cost, by arm."""
        members = [r for r in results if not r.labels.get('trunk')]
        better = {size: better_alone(runs) for size, runs in by_label(members, 'size').items()}
        families, of_family = by_label(results, 'family'), by_label(members, 'family')
        alone = mean_cost(families[f'independent-{SCHEDULES[0]}'])
        records, arms = [], {}
        for family, runs in families.items():
            record = {'family': family, 'seeds': len(by_label(runs, 'seed'))}
            record['cost'] = mean_cost(runs) / alone
            differences = {}
            for size, own in by_label(of_family[family], 'size').items():
                differences[size] = [loss - better[size][seed] for seed, loss in losses(own)]
                record[f'against {size}'] = mean(differences[size])
            record['worst'] = worst = max(differences, key=lambda size: mean(differences[size]))
            low, high = interval(differences[worst]) or (math.nan, math.nan)
            record['95% interval'] = f'{low:+.3f} to {high:+.3f}' if math.isfinite(low) else None
            record['p, worse'] = sign_flip_test(list(differences.values()))
            records.append(record)
            point = record['cost'], mean(differences[worst]), (high - low) / 2
            arms.setdefault(family.partition(':')[0], []).append(point)
        panel = Panel('cost of the family / cost of independent training', 'loss (nats per token)')
        panel.title = 'worst member, minus the better of its independent models; bands: 95%'
        for arm, points in arms.items():
            cost, difference, half = map(list, zip(*sorted(points)))
            panel.lines.append(Line(cost, difference, arm, 'o-', band=half))
        return [records, ('frontier.png', [panel])]


def within(stages, family, knobs):
    """The stages of a method, in folders of a family and seed, with general knobs of their own."""
    seed = knobs['seed']

    def change(stage):
        stage.name = f'{family.replace(":", "-")}-{stage.name.removeprefix("independent-")}-{seed}'
        stage.knobs = knobs | stage.knobs
        stage.labels |= dict(family=family, seed=seed)
        stage.baseline_flops = 0.0  # of one family; here are several

    return adapted(stages, change)


def mean_cost(runs):
    """FLOPs of a family, all its stages together, the mean over seeds."""
    return sum(r.flops for r in runs) / len(by_label(runs, 'seed'))


def losses(runs):
    """[(seed, validation loss)] of one size."""
    return [(r.labels['seed'], r.val_loss) for r in runs]


def better_alone(runs):
    """{seed: loss} of a size under the schedule that is better for independent training."""
    families = by_label(runs, 'family')
    candidates = [dict(losses(families[f'independent-{schedule}'])) for schedule in SCHEDULES]
    return min(candidates, key=lambda found: mean(found.values()))


def sign_flip_test(members):
    """
    The one-sided p-value of a worst member whose mean is above 0, exact and without a
    distribution. members: the differences of each, lists in the order of the seeds. The signs of
    a seed are flipped for all members at once, in all ways: the share of ways in which the highest
    of the means is at least as high. So it counts that the worst member was chosen afterwards.
    """

    def highest(signs):
        return max(mean(s * value for s, value in zip(signs, values)) for values in members)

    seeds = range(len(members[0]))
    found = [highest(signs) for signs in product((1, -1), repeat=len(seeds))]
    return mean(value >= found[0] - 1e-12 for value in found)  # the first one flips nothing
