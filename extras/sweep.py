"""
The grid of runs behind a scaling law of model reuse (Liew and Kato, sections 2 and 3): base models
of D1 tokens, and from each of them second stages of D2 tokens, by continual pretraining or growth.

    python train.py config/scaling_tiny.py
    python train.py config/scaling_stk2.py --dry_run=True

Every run has a warmup, a stable phase and a decay (WSD), and nothing is trained twice. The points
go to results.csv, and scaling.py fits them.
"""

import csv
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from configurator import Count, NonNegative, Positive
from engine.errors import UserError, unknown
from engine.files import commit_file
from engine.log import read_metrics
from engine.report import format_si
from engine.stage import Stage
from expand import RELATIVE_SIZES, continue_from, grow_stage
from scaling import COLUMNS, fit_results, write_fits


@dataclass
class Sweep:
    """The grid of a scaling law of model reuse (Liew and Kato), fitted at its end."""

    sizes: tuple[str, ...] = ('48x2',)  # of the base models
    longest: tuple[Positive, ...] = (1e6,)  # tokens of the longest run of each size
    first: tuple[Positive, ...] = (0.125, 0.25, 0.5, 1.0)  # D1, as fractions of that
    second: tuple[Positive, ...] = (0.0625, 0.125, 0.25, 0.5)  # D2, as fractions of that
    reuse: tuple[str, ...] = ('stk2',)  # cpt, exp, stk2, stk4; +stable, +low; cpt+replay0.25
    second_data: str = ''  # corpus of cpt, whose loss counts there; empty: the base's
    second_position: Literal['begin', 'continue'] = 'begin'  # in the data, of second stages
    scratch: tuple[Positive, ...] = ()  # D of runs from scratch of all shapes, as fractions
    learning_rates: tuple[NonNegative, ...] = ()  # of each size; empty: learning_rate
    batch_sizes: tuple[Count, ...] = ()  # of each size; empty: batch_size
    warmups: tuple[Count, ...] = ()  # of each size, in steps; empty: warmup
    decays: Count = 1  # branches at the end of each second stage, on data of their own (E.3)

    toy_corpora = dict(second_data='pycode')

    def stages(self, run):
        """For every size the bases, their second stages, and the runs from scratch."""
        self.check(run)
        if run.toy:  # a corner of the grid has all its kinds of stages
            self.sizes = self.sizes[:2]
            self.first = self.first[:1]
            self.second = self.second[:2]
            self.scratch = self.scratch[:1]
        for i, size in enumerate(self.sizes):
            yield from self.of_size(i, size, run)

    def of_size(self, i, name, run):
        """The grid of one size."""
        config = run.model_config(name)
        longest = self.longest[i if len(self.longest) > 1 else 0]
        series = Series(run, self.knobs_of(i, run))
        first = {fraction * longest for fraction in self.first}
        second = {fraction * longest for fraction in self.second}
        scratch = {fraction * longest for fraction in self.scratch}
        ways = [Reuse.parse(text, self, run) for text in self.reuse]
        stable = first if any(way.stable for way in ways) else set()
        labels = dict(method='scratch', N=config.num_params(), D1=0.0)
        labels |= dict(trained_N=config.num_params())
        bases, phases = yield from series.runs(name, config, first, labels, stable)
        for way in ways:
            own = replace(series.with_data(way.data), decays=self.decays)
            own = own.at_low_rate() if way.low else own
            for D1 in sorted(first):
                start = way.second_stage(config, phases[D1] if way.stable else bases[D1])
                if self.second_position == 'begin':  # the same data for every D1 (Appendix C.2)
                    start.begin = 0
                labels = labels | dict(method=f'{way.name}{way.corpus}', D1=D1)
                labels |= dict(trained_N=start.config.num_params())
                grid = f'{name}-{format_si(D1)}-{way.name}'
                yield from own.runs(grid, start.config, second, labels, (), start)
        if scratch:
            for kind in sorted({way.kind for way in ways}):
                way = Reuse.parse(kind, self, run)
                shape, own = way.shape(config), series.with_data(way.data)
                labels = dict(method=f'scratch{way.corpus}', N=shape.num_params(), D1=0.0)
                labels |= dict(trained_N=shape.num_params())
                again = way.kind == 'cpt' and not way.corpus  # such runs are among the bases
                lengths = scratch - first if again else scratch
                yield from own.runs(f'{name}-scratch-{kind}', shape, lengths, labels)

    def knobs_of(self, i, run):
        """The general knobs that size i sets for itself."""
        batch_size = self.batch_sizes[i] if self.batch_sizes else run.batch_size
        knobs = dict(batch_size=batch_size)
        if self.learning_rates:
            knobs['learning_rate'] = self.learning_rates[i]
        return knobs | dict(warmup=float(self.warmups[i] if self.warmups else run.warmup))

    def check(self, run):
        """Raise UserError for knobs that do not fit together, before anything is trained."""
        lengths = dict(longest=1, learning_rates=0, batch_sizes=0, warmups=0)
        for name, allowed in lengths.items():
            found = len(getattr(self, name))
            if found not in (allowed, len(self.sizes)):
                raise UserError(f'{name} has {found} values for {len(self.sizes)} sizes')
        for name in ('sizes', 'first', 'second', 'reuse'):
            if not getattr(self, name):
                raise UserError(f'{name} is empty: a sweep needs one at least')
        for text in self.reuse:
            if Reuse.parse(text, self, run).low and not run.min_lr_fraction:
                raise UserError(f'{text}: with min_lr_fraction=0 nothing is left to learn with')
        if run.warmup < 1 and not self.warmups:
            raise UserError(
                f'in a sweep warmup counts steps, the same for every run: {run.warmup:g}'
            )

    @property
    def corpora(self):
        """Corpora that the stages read besides the run's."""
        return [self.second_data] if self.second_data else []

    def summary(self, results):
        """Write results.csv, fit the laws, and return their tables."""
        out = Path(results[0].folder).parent
        return fit_grid([r for r in results if 'D2' in r.labels], out)[0]


def fit_grid(results, out):
    """
    Write the results.csv of second stages into a folder, fit the laws, and write them beside it:
    (blocks for the report, {method: Fit}); no Fit, and the reason, where there are too few points.
    """
    write_results(results, out)
    try:
        blocks, fits = fit_results(out / 'results.csv')
    except UserError as error:
        return [f'no fit: {error}'], {}
    write_fits(fits, blocks, out)
    return blocks, fits


def write_results(results, out):
    """Write the results.csv of second stages, whose labels are columns of it, into a folder."""
    columns = (*COLUMNS, 'trained_N', 'gradient_norm', 'parameter_norm')
    temporary = Path(out) / 'results.csv.tmp'
    with open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        decays = 1 + max(result.labels.get('again', 0) for result in results)
        for result in results:
            lines = read_metrics(result.folder)
            norms = [m['grad_norm'] for m in lines if 'grad_norm' in m]
            row = result.labels | dict(loss=result.val_loss, gradient_norm=statistics.mean(norms))
            row['seed'] = row['seed'] * decays + row.get('again', 0)
            writer.writerow(row | dict(parameter_norm=lines[-1]['param_norm']))
    commit_file(temporary, Path(out) / 'results.csv')


def replay_share(method):
    """The share of the base's data in a second stage: 0.25 of cpt+replay0.25, 0 without a share."""
    match = re.search(r'\+replay(0?\.\d+)(?![\w.])', method)
    return float(match[1]) if match else 0.0


class Reuse(NamedTuple):
    """
    A way to reuse a base: cpt, exp, stk2 or stk4, with +stable, +low, and cpt with +replay0.25, a
    quarter of whose second stage is the base's data.
    """

    name: str
    kind: str
    stable: bool  # from the stable phase; cpt with its optimizer state
    low: bool  # at the learning rate at which the base ended, constant (Figure 7)
    corpus: str  # '-NAME' if the losses are on another corpus than the base's
    data: dict  # general knobs that say what the second stage reads

    @classmethod
    def parse(cls, name, sweep, run):
        """The Reuse that is written as 'stk2+stable'. Raises UserError for what does not exist."""
        kind, *variants = name.split('+')
        replay = replay_share(name)
        shares = [variant for variant in variants if replay_share(f'+{variant}')]
        allowed = {'stable', 'low', *(shares[:1] if kind == 'cpt' else ())}
        twice = len(set(variants)) < len(variants)
        if kind not in ('cpt', *RELATIVE_SIZES) or set(variants) - allowed or twice:
            known = ('cpt', 'cpt+replay0.25', 'cpt+stable', *RELATIVE_SIZES, 'stk2+stable')
            raise unknown('second stage', name, (*known, 'stk2+low'))
        stable, low = ('stable' in variants), ('low' in variants)
        if stable and low:
            raise UserError(f'{name}: the learning rate of a stable phase is not low yet')
        second = sweep.second_data
        if replay and not second:
            raise UserError(f'{name} needs another corpus to continue on: --second_data=NAME')
        if kind != 'cpt' or not second:
            return cls(name, kind, stable, low, '', {})
        mixture = [second]
        if replay:
            mixture = [f'{second}:{1 - replay:g}']
            mixture += [f'{old}:{replay * weight:g}' for old, weight in run.corpora.items()]
        data = dict(data=','.join(mixture), val_data=second)
        return cls(name, kind, stable, low, f'-{second}', data)

    def shape(self, config):
        """The GPTConfig that the second stage trains."""
        return config if self.kind == 'cpt' else RELATIVE_SIZES[self.kind](config)

    def second_stage(self, config, base):
        """
        A Stage that starts from the Result `base`: continued, or grown by an operator that keeps
        the function at any width (section 3.2), as fpi does only at whole multiples.
        """
        stage = Stage('', self.shape(config), 0, 0.0, parent=base)
        if self.kind == 'cpt':
            return continue_from(stage, base, self.stable)
        grow_stage(stage, base, width='lossless', depth='stack')
        return stage


@dataclass
class Series:
    """
    Runs of several lengths that share one stable phase (Haegele et al.): it goes as far as the
    longest needs, and each length is a short decay branch from it. Nothing is trained twice.
    """

    run: object
    knobs: dict  # general knobs of all of them
    decays: int = 1  # branches for each length, on data of their own
    constant: bool = False  # the branches decay no further

    def at_low_rate(self):
        """The same at a constant learning rate, that at which the others end."""
        rate = self.knobs.get('learning_rate', self.run.learning_rate) * self.run.min_lr_fraction
        return replace(self, knobs=self.knobs | dict(learning_rate=rate), constant=True)

    def with_data(self, data):
        """The same with the general knobs that say what is read."""
        return replace(self, knobs=self.knobs | data)

    def runs(self, name, config, ends, labels, stable=(), first=None):
        """
        Yield the pieces of the stable phase and the decay branches of runs of `ends` tokens.
        first: a Stage that says how the phase starts; stable: tokens at which its own state is
        needed too. Returns ({tokens: decayed Result}, {tokens: stable Result}).
        """
        run, X = self.run, config.num_params(head=True)
        step = self.knobs['batch_size'] * min(run.block_size, config.block_size)  # in tokens
        steps = {end: max(2, round(end / step)) for end in {*ends, *stable}}
        branch = {}  # step at which the decay of each length begins: it has one at least
        for end in ends:
            stable_part = round((1 - run.decay_fraction) * steps[end])
            branch[end] = min(max(1, stable_part), steps[end] - 1)
        at, decayed, before, done = {}, {}, None, 0
        for stop in sorted({*branch.values(), *(steps[end] for end in stable)}):
            stage = first or Stage('', config, 0, X)
            if before:
                stage = continue_from(Stage('', config, 0, X, parent=before), before, True)
            tokens = (stop - done) * step
            stage = replace(stage, name=f'{name}-stable-{format_si(stop * step)}', tokens=tokens)
            stage.params = X
            stage.knobs = self.knobs | stage.knobs | dict(schedule='constant')
            at[stop] = before = yield stage
            done = stop
            for end in sorted(branch):
                if branch[end] == stop:
                    tokens = (steps[end] - stop) * step
                    stage = Stage(f'{name}-{format_si(end)}', config, tokens, X)
                    stage.labels = labels | dict(D2=end)
                    decayed[end] = yield from self.branches(stage, before)
        return decayed, {end: at[steps[end]] for end in stable}

    def branches(self, stage, before):
        """The decay from the Result `before`, once or several times; returns the first Result."""
        stage = continue_from(stage, before, True)
        schedule = 'constant' if self.constant else 'wsd'
        stage.knobs = self.knobs | stage.knobs | dict(schedule=schedule, decay_fraction=1.0)
        results = []
        for i in range(self.decays):
            again = replace(stage, name=f'{stage.name}-again{i}' if i else stage.name)
            again.begin = before.position + i * round(stage.tokens)
            again.labels = stage.labels | dict(again=i)
            results.append((yield again))
        return results[0]
