"""
Why distil step by step? Appendix B of Chain-of-Learngene bounds the risk of a student X of a
teacher Y by

    R(X) - R(Y)  <=  C n^-rho  +  epsilon                                              (Eq. 3)

of n tokens, and assumes for the chain G -> H_1 -> ... -> S against G -> S at once that rho of the
direct step is no larger than any of the chain's (Assumption 1), and that the epsilons of the chain
add up to no more than the direct one (Assumption 2). Here both are measured: every step at several
n, the law fitted to the losses.

    python train.py config/stepwise_tiny.py
"""

import math
from dataclasses import dataclass

import torch

from col import ChainOfLearngene
from configurator import Count, Positive
from engine.errors import UserError
from engine.report import Line, Panel, by_label, format_si
from engine.stage import adapted
from extras.decisions import QUANTILES, spaced
from scaling import fit


@dataclass
class Stepwise(ChainOfLearngene):
    """Measure what the theory of stepwise distillation assumes (Chain-of-Learngene, Appendix B)."""

    grid: tuple[Positive, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)  # n, as shares of tokens
    seeds: Count = 1  # runs of everything

    def stages(self, run):
        """For every seed: the ancestor, every step of the chain and the direct one, at every n."""
        self.check_knobs()
        if run.toy:
            self.grid, self.seeds = self.grid[-1:], 1  # too few points for a law
        configs = self.configs(run)
        for seed in range(self.seeds):
            yield from self.of_seed(run, configs, seed)

    def of_seed(self, run, configs, seed):
        """The stages of one seed."""
        knobs = dict(seed=run.seed + seed)

        def change(stage):
            stage.name, stage.knobs = f'{stage.name}-s{seed}', stage.knobs | knobs

        top = teacher = yield from adapted(self.ancestors(run, configs['ancestor']), change)
        for above, below in zip(('ancestor', *self.chain), self.chain):
            step = f'{above}-{below}'
            teacher = yield from self.step(step, teacher, configs[below], run, knobs)
        if len(self.chain) > 1:
            last = self.chain[-1]
            yield from self.step(f'ancestor-{last}', top, configs[last], run, knobs)

    def check_knobs(self):
        """Raise UserError for knobs of a chain that are not measured here."""
        if self.ancestor or self.start == 'public':
            raise UserError(
                'stepwise trains its own ancestor and chain: no ancestor, no public start'
            )
        lengths = {format_si(share * self.tokens) for share in self.grid}
        if not self.grid or len(lengths) < len(self.grid):
            raise UserError(f'grid={self.grid} must be different shares of tokens')
        self.descendants = ()

    def step(self, name, teacher, config, run, knobs):
        """A student of `config` taught for every n; returns the Result of the longest."""
        result, seed = None, knobs['seed'] - run.seed
        for share in sorted(self.grid):
            stage = self.student('', config, teacher, None)
            stage.tokens *= share
            stage.name = f'{name}-{format_si(stage.tokens)}-s{seed}'
            self.teach(stage, self.distillation, teacher, run)
            stage.knobs = stage.knobs | knobs
            stage.labels = dict(step=name, n=stage.tokens, seed=seed, teacher=teacher.name)
            result = yield stage
        return result

    def summary(self, results):
        """Rates and floors of every step, what the assumptions say of them, and the curves."""
        risk, fits, blocks = {r.name: r.val_loss for r in results}, {}, []
        panel = Panel('n (tokens)', "student's loss - teacher's (nats per token)", log='xy')
        for i, (step, runs) in enumerate(by_label(results, 'step').items()):
            n = [r.labels['n'] for r in runs]
            excess = [r.val_loss - risk[r.labels['teacher']] for r in runs]
            panel.lines.append(Line(n, excess, step, 'o', f'C{i}'))
            data = dict(N=[r.n_params for r in runs], D1=[0.0] * len(n), D2=n, loss=excess)
            if min(excess) <= 0:
                blocks.append(f'{step}: a student is better than its teacher')
                continue
            try:
                fits[step] = fit('continuous', data)
            except UserError as error:
                blocks.append(f'{step}: {error}')
                continue
            grid = spaced(min(n), max(n), 50)
            curve = fits[step].losses(data['N'][0], 0.0, grid)[0].tolist()
            panel.lines.append(Line(grid, curve, '', '-', f'C{i}'))
        blocks.append(step_records(fits))
        if len(fits) > len(self.chain) > 1:  # every step has a law, the direct one too
            blocks += assumptions(fits, f'ancestor-{self.chain[-1]}')
        return [*blocks, ('stepwise.png', [panel])]


def step_records(fits):
    """A record for each step: rho and epsilon with their intervals. fits: {step: Fit}."""
    records = []
    for step, fitted in fits.items():
        p = fitted.parameters
        record = {'step': step, 'rho': p['alpha']}
        record['90% interval of rho'] = '{:.3f} to {:.3f}'.format(*fitted.intervals['alpha'])
        record['epsilon'] = math.exp(p['logE'])
        low, high = map(math.exp, fitted.intervals['logE'])
        record['90% interval of epsilon'] = f'{low:.3f} to {high:.3f}'
        records.append(record)
    return records


def assumptions(fits, direct):
    """
    A sentence each on Assumptions 1 and 2, for the step `direct` against the chain of all others.
    fits: {step: Fit}, of every step.
    """
    chain = [fitted for step, fitted in fits.items() if step != direct]
    rho = torch.tensor([f.rows for f in chain], dtype=torch.float64)[..., 1].amin(0)
    floor = torch.tensor([f.rows for f in chain], dtype=torch.float64)[..., 2].exp().sum(0)
    _, rho_direct, log_floor = torch.tensor(fits[direct].rows, dtype=torch.float64).T
    words = []
    for name, gap in (
        ('Assumption 1: the least rho of the chain - rho of the direct step', rho - rho_direct),
        (
            'Assumption 2: epsilon of the direct step - epsilons of the chain',
            log_floor.exp() - floor,
        ),
    ):
        low, high = gap[1:].quantile(QUANTILES).tolist()
        holds = (gap[1:] >= 0).double().mean().item()
        interval = f'90% interval {low:+.3f} to {high:+.3f}'
        words.append(f'{name}: {gap[0]:+.3f} ({interval}; at least 0 in {holds:.0%} of the laws)')
    return words
