"""
The grid of runs behind a scaling law of model reuse (Liew and Kato, sections 2 and 3): base models
of D1 tokens, and from each of them second stages of D2 tokens, by continual pretraining or growth.

    python train.py config/scaling_tiny.py
    python train.py config/scaling_stk2.py --dry_run=True

Every run has a warmup, a stable phase and a decay (WSD), and nothing is trained twice. The points
go to results.csv, and scaling.py fits them.
"""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from configurator import Count, NonNegative, Positive
from engine.errors import UserError, unknown
from engine.files import write_atomically
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
        ways = self.ways(run)
        if run.toy:  # a corner of the grid has all its kinds of stages
            self.sizes, self.first = self.sizes[:2], self.first[:1]
            self.second, self.scratch = self.second[:2], self.scratch[:1]
        for i, size in enumerate(self.sizes):
            yield from self.of_size(i, size, run, ways)

    def of_size(self, i, name, run, ways):
        """The grid of one size."""
        config, longest = run.model_config(name), self.longest[i if len(self.longest) > 1 else 0]
        fractions = self.first, self.second, self.scratch
        first, second, scratch = ({share * longest for share in shares} for shares in fractions)
        stable = first if any(way.stable for way in ways) else ()
        knobs, N = self.knobs_of(i, run), config.num_params()
        labels = dict(method='scratch', N=N, D1=0.0, trained_N=N)
        bases, phases = yield from Series(run, knobs).runs(name, config, first, labels, stable)
        for way, D1 in itertools.product(ways, sorted(first)):
            own = Series(run, knobs | way.data, self.decays, way.low)
            start = way.second_stage(config, phases[D1] if way.stable else bases[D1])
            if self.second_position == 'begin':  # the same data for every D1 (Appendix C.2)
                start.begin = 0
            labels = dict(method=way.name + way.corpus, N=N, D1=D1)
            labels['trained_N'] = start.config.num_params()
            grid = f'{name}-{format_si(D1)}-{way.name}'
            yield from own.runs(grid, start.config, second, labels, (), start)
        for kind in sorted({way.kind for way in ways}) if scratch else ():
            way = way_of(kind, self.second_data, run)
            shape, own = way.shape(config), Series(run, knobs | way.data)
            N = shape.num_params()
            labels = dict(method=f'scratch{way.corpus}', N=N, D1=0.0, trained_N=N)
            again = kind == 'cpt' and not way.corpus  # same shape and data as the bases:
            lengths = scratch - first if again else scratch  # these lengths are there
            yield from own.runs(f'{name}-scratch-{kind}', shape, lengths, labels)

    def knobs_of(self, i, run):
        """The general knobs that size i sets for itself."""
        batch_size = self.batch_sizes[i] if self.batch_sizes else run.batch_size
        knobs = dict(batch_size=batch_size)
        if self.learning_rates:
            knobs['learning_rate'] = self.learning_rates[i]
        return knobs | dict(warmup=float(self.warmups[i] if self.warmups else run.warmup))

    def ways(self, run):
        """The ways to reuse a base. Raises UserError for knobs that do not fit together."""
        for name in ('longest', 'learning_rates', 'batch_sizes', 'warmups'):
            found = len(getattr(self, name))
            if found not in (name == 'longest', len(self.sizes)):  # one length may serve all
                raise UserError(f'{name} has {found} values for {len(self.sizes)} sizes')
        for name in ('sizes', 'first', 'second', 'reuse'):
            if not getattr(self, name):
                raise UserError(f'{name} is empty: a sweep needs one at least')
        ways = [way_of(name, self.second_data, run) for name in self.reuse]
        if any(way.low for way in ways) and not run.min_lr_fraction:
            raise UserError('+low: with min_lr_fraction=0 nothing is left to learn with')
        if run.warmup < 1 and not self.warmups:
            raise UserError(
                f'in a sweep warmup counts steps, the same for every run: {run.warmup:g}'
            )
        return ways

    @property
    def corpora(self):
        """Corpora that the stages read besides the run's."""
        return [self.second_data] if self.second_data else []

    def summary(self, results):
        """Write results.csv, fit the laws, and return their tables; or why there is no fit."""
        out = Path(results[0].folder).parent
        write_results([r for r in results if 'D2' in r.labels], out)
        try:
            blocks, fits = fit_results(out / 'results.csv')
        except UserError as error:
            return [f'no fit: {error}']
        write_fits(fits, blocks, out)
        return blocks


def write_results(results, out):
    """Write the results.csv of second stages, whose labels are columns of it, into a folder."""
    import pandas  # a second, which not every command needs

    rows = pandas.DataFrame([r.labels | dict(loss=r.val_loss) for r in results])
    rows['seed'] = rows.seed * (1 + rows.again.max()) + rows.again
    content = rows.to_csv(columns=[*COLUMNS, 'trained_N'], index=False)
    write_atomically(Path(out) / 'results.csv', content)


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


def way_of(name, second, run):
    """
    The Reuse that is written as 'stk2+stable'. second: the corpus of cpt, if not the base's. Raises
    UserError for what does not exist.
    """
    kind, *variants = name.split('+')
    shares = [variant for variant in variants if re.fullmatch(r'replay0?\.\d+', variant)]
    allowed = {'stable', 'low', *(shares[:1] if kind == 'cpt' else ())}
    once = sorted(allowed.intersection(variants))
    if kind not in ('cpt', *RELATIVE_SIZES) or sorted(variants) != once:
        known = ('cpt', 'cpt+replay0.25', *RELATIVE_SIZES, 'stk2+stable', 'stk2+low')
        raise unknown('second stage', name, known)
    stable, low = ('stable' in variants), ('low' in variants)
    if stable and low:
        raise UserError(f'{name}: the learning rate of a stable phase is not low yet')
    if shares and not second:
        raise UserError(f'{name} needs another corpus to continue on: --second_data=NAME')
    if kind != 'cpt' or not second:
        return Reuse(name, kind, stable, low, '', {})
    mixture = [second]
    for share in shares:
        replay = float(share.removeprefix('replay'))
        mixture = [f'{second}:{1 - replay:g}']
        mixture += [f'{old}:{replay * weight:g}' for old, weight in run.corpora.items()]
    data = dict(data=','.join(mixture), val_data=second)
    return Reuse(name, kind, stable, low, f'-{second}', data)


@dataclass
class Series:
    """
    Runs of several lengths that share one stable phase (Haegele et al.): it goes as far as the
    longest needs, and each length is a short decay branch from it. Nothing is trained twice.
    """

    run: object
    knobs: dict  # general knobs of all of them
    decays: int = 1  # branches for each length, on data of their own
    low: bool = False  # at the rate at which the others end, which decays no further

    def __post_init__(self):
        if self.low:
            rate = self.knobs.get('learning_rate', self.run.learning_rate)
            self.knobs = self.knobs | dict(learning_rate=rate * self.run.min_lr_fraction)

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
        schedule = 'constant' if self.low else 'wsd'
        stage.knobs = self.knobs | stage.knobs | dict(schedule=schedule, decay_fraction=1.0)
        results = []
        for i in range(self.decays):
            again = replace(stage, name=f'{stage.name}-again{i}' if i else stage.name)
            again.begin = before.position + i * round(stage.tokens)
            again.labels = stage.labels | dict(again=i)
            results.append((yield again))
        return results[0]
