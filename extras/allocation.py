"""
How many tokens should each size of a family get? Eq. 4 of Progressive training (Yano et al.) is one
answer. Here laws of model reuse (Liew and Kato, Eq. 6) are fitted to members that branched off a
trunk after several numbers of tokens, and the cheapest family follows in which no member is worse
than the model of its size that was trained alone. The allocation is no paper's.

    python train.py config/allocation_tiny.py
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from configurator import Count, Positive
from engine.errors import UserError
from engine.report import by_label, format_si
from engine.stage import Stage
from expand import Operators, Progressive, grow_stage
from extras.decisions import QUANTILES
from extras.sweep import Series, fit_grid
from scaling import predict

CANDIDATES = 300  # numbers of tokens of a size that are looked at, evenly in their logarithm


@dataclass
class Allocation(Progressive):
    """Measure what tokens of each size are worth to the members of a family, and share them out."""

    grid: tuple[Positive, ...] = (0.25, 0.5, 1.0)  # of each size's tokens from scratch
    seeds: Count = 1  # runs of everything, each with its own initialisation and data order

    def stages(self, run):
        """For every seed: each size alone, and grown from every length of the trunk before it."""
        self.check_knobs(run)
        if run.toy:
            self.grid, self.seeds = self.grid[-1:], 1  # too few points for a law
        configs = self.configs(run)
        X = [config.num_params(head=True) for config in configs]
        self.check(configs, X)
        self.budgets = X, self.scratch_tokens or [self.tokens_per_param * x for x in X]
        self.kept = 1 - run.decay_fraction
        for seed in range(self.seeds):
            yield from self.of_seed(run, configs, seed)

    def check_knobs(self, run):
        """Raise UserError for knobs of a family that an allocation does not look at."""
        unused = ('tokens', 'shares', 'params', 'compare', 'batch_sizes', 'taught', 'last_schedule')
        unused = [name for name in unused if getattr(self, name)]
        if unused:
            raise UserError(f'allocation has no use for {unused[0]}: leave it out')
        if self.width == 'random':
            raise UserError('allocation compares with random initialisation anyway: another width')
        if run.schedule != 'wsd' or run.warmup < 1 or self.optimizer != 'grown':
            raise UserError("allocation needs schedule='wsd', optimizer='grown', a warmup in steps")
        if not self.grid or max(self.grid) > 1:
            raise UserError(f'grid={self.grid}: shares of the tokens alone, at most 1')

    def of_seed(self, run, configs, seed):
        """The members of one seed."""
        knobs = dict(seed=run.seed + seed, batch_size=run.sequences, batch_tokens=0)
        knobs['warmup'] = float(run.warmup)
        trunks = {}  # {tokens: Result} of the size before
        for i, (config, scratch) in enumerate(zip(configs, self.budgets[1])):
            series = Series(run, knobs | self.knobs_of(i))
            step = run.sequences * min(run.block_size, config.block_size)  # in tokens
            scratch = round(scratch / step) * step
            ends = {round(share * scratch / step) * step for share in self.grid}
            stable = {round(self.kept * end / step) * step for end in ends}
            name = f'{self.name(i)}-s{seed}'
            labels = dict(size=self.name(i), N=configs[max(0, i - 1)].num_params(), seed=seed)
            labels |= dict(trained_N=config.num_params(), method=self.name(i), D1=0.0)
            alone = labels | dict(alone=True)
            if not i:
                runs = series.runs(f'{name}-alone', config, ends | {scratch}, alone, stable)
                _, trunks = yield from runs
                continue
            yield from series.runs(f'{name}-alone', config, {scratch}, alone)
            for D1, base in sorted(trunks.items()):
                first = Stage('', config, 0, 0.0)
                operators = Operators(self.width, self.depth, self.noise)
                grow_stage(first, base, configs[i - 1], operators, carry_optimizer=True)
                labels = labels | dict(D1=D1)
                runs = f'{name}-after-{format_si(D1)}'
                kept = stable if D1 == max(trunks) and i + 1 < len(configs) else ()
                _, grown = yield from series.runs(runs, config, ends, labels, kept, first)
            trunks = grown  # of the longest

    def summary(self, results):
        """Write results.csv, fit the laws, and return them and the allocation by Eq. 6."""
        out = Path(results[0].folder).parent
        members = [r for r in results if 'D2' in r.labels]
        alone = {}
        for size, runs in by_label([r for r in members if r.labels.get('alone')], 'size').items():
            longest = max(r.labels['D2'] for r in runs)
            alone[size] = mean(r.val_loss for r in runs if r.labels['D2'] == longest)
        blocks, fits = fit_grid([r for r in members if r.labels['D1']], out)
        if not fits:
            return blocks
        laws = [fits[size] for size in list(alone)[1:] if size in fits]
        if len(laws) < len(alone) - 1 or any(law.law != 'multiplicative' for law in laws):
            return [*blocks, 'no allocation: Eq. 6 could not be fitted to every size']
        return [*blocks, *self.allocation(laws, alone)]

    def allocation(self, fits, alone):
        """Blocks: tokens of each size in the cheapest family, and what it costs."""
        X, scratch = self.budgets
        targets, reach = list(alone.values()), (min(self.grid), max(self.grid))
        family = Family(X, scratch, targets, self.kept, reach)
        drawn = [family.cheapest(fits, sample) for sample in range(1 + len(fits[0].samples))]
        best, *others = drawn
        others = [tokens for tokens in others if tokens]
        if not best:
            return ['no family within the grid is as good as the models trained alone']
        records = []
        for i, (size, target) in enumerate(alone.items()):
            record = {'size': size, 'tokens alone': round(scratch[i]), 'tokens': round(best[i])}
            record['share'] = best[i] / scratch[i]
            record['90% interval'] = between_90([tokens[i] / scratch[i] for tokens in others])
            records.append(record | {'loss alone': target})
        cost = between_90([family.cost(tokens) for tokens in others])
        shares = [f'{math.ceil(100 * record["share"]) / 100:g}' for record in records]
        words = (
            f'by these laws the cheapest family with no member worse costs {family.cost(best):.2f} '
            f'of training every size alone (90% interval {cost}); there is one in '
            f'{len(others) / max(1, len(drawn) - 1):.0%} of the resampled laws. Not in the '
            'interval: that the losses alone vary, and that a member is taken to depend on the '
            'size before it alone.\n'
            f'progressive: --schedule=wsd --optimizer=grown --shares={",".join(shares)}\n'
            f'frontier: --law_shares={",".join(shares[:-1])}'
        )
        return [records, words]


@dataclass
class Family:
    """What an allocation has to meet."""

    params: list  # X of each size
    scratch: list  # tokens of each size alone
    targets: list  # its loss then, in nats
    kept: float  # share of a size's tokens that the next size grows from: the rest are its branch
    reach: tuple  # (least, largest) share of the tokens alone that the laws have seen

    def cost(self, tokens):
        """FLOPs of a family as a share of those of training every size alone."""
        alone = sum(x * t for x, t in zip(self.params, self.scratch))
        return sum(x * t for x, t in zip(self.params, tokens)) / alone

    def cheapest(self, fits, sample=0):
        """
        The tokens of each size in the cheapest family with L_i(D1, D2) at most the target of every
        size i, D1 = kept T_(i-1) and D2 = T_i; None where no family is. The smallest size has its
        tokens alone. A member is taken to depend on the size before it alone, though that was
        trained on a longest trunk when the law was measured; then the best way to every T_i goes
        through a best way to some T_(i-1): dynamic programming. fits: a law of every size but the
        smallest; sample: 0 for their parameters, k for their bootstrap sample k.
        """
        tokens = torch.tensor([self.scratch[0]], dtype=torch.float64)
        spent, ways = self.params[0] * tokens, [(tokens, None)]
        low, high = map(math.log, self.reach)
        shares = torch.linspace(low, high, CANDIDATES, dtype=torch.float64).exp()
        for i, fitted in enumerate(fits, 1):
            own = self.scratch[i] * shares
            D1, D2 = torch.broadcast_tensors(self.kept * tokens[:, None], own)
            N = torch.full_like(D1, fitted.seen['N'][0])
            data = dict(N=N.flatten(), D1=D1.flatten(), D2=D2.flatten())
            losses = predict(fitted.law, fitted.rows[sample], data).view(D1.shape)
            total = spent[:, None] + self.params[i] * own
            total[losses > self.targets[i]] = math.inf
            spent, before = total.min(0)
            tokens = own
            ways.append((tokens, before))
        at = int(spent.argmin())
        if not spent[at].isfinite():
            return None
        chosen = []
        for tokens, before in reversed(ways):
            chosen.append(float(tokens[at]))
            at = int(before[at]) if before is not None else 0
        return chosen[::-1]


def between_90(values):
    """'0.41 to 0.52', of the middle nine tenths of some numbers; '' for none."""
    if not values:
        return ''
    ends = torch.tensor(values, dtype=torch.float64).quantile(QUANTILES)
    return ' to '.join(f'{end:.2f}' for end in ends.tolist())
