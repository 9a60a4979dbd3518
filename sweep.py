"""
The grid of runs behind a scaling law of model reuse (paper 001, sections 2 and 3): base models of D1 tokens, and from each of them
second stages of D2 tokens, by continual pretraining or growth.

    python train.py config/scaling_tiny.py
    python train.py config/scaling_stk2.py --dry_run=True

Every run has a warmup, a stable phase and a decay (WSD), and nothing is trained twice: one stable phase goes as far as its longest
run needs, and each D is a short decay branch from it (Haegele et al.). The points go to results.csv, and scaling.py fits them.
"""
import csv
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from checkpoint import load_moments
from configurator import Stage, UserError, check_ranges, unknown
from evaluate import human, read_metrics
from expand import SECOND_STAGES, grow_stage
from model import load
from scaling import COLUMNS, Fitting, fit_results

WIDTH, DEPTH = 'fpi', 'stack'   # paper 001, Appendix C.5


@dataclass
class Sweep:
    """The grid of a scaling law of model reuse (Liew and Kato, paper 001), fitted at its end."""
    sizes: tuple[str, ...] = ('48x2',)       # of the base models
    longest: tuple[float, ...] = (1e6,)      # tokens of the longest run of each size
    first: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)    # D1, as fractions of that
    second: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5)  # D2, as fractions of that
    reuse: tuple[str, ...] = ('stk2',)       # cpt, exp, stk2, stk4; with +stable (from the stable phase), cpt also with +replay
    second_data: str = ''                    # corpus of cpt; its loss counts there
    replay: float = 0.25                     # share of the base's data under cpt+replay
    scratch: tuple[float, ...] = ()          # also runs from scratch of what the second stages train, D as fractions
    learning_rates: tuple[float, ...] = ()   # of each size; empty: learning_rate
    batch_sizes: tuple[int, ...] = ()        # of each size; empty: batch_size
    warmups: tuple[int, ...] = ()            # of each size, in steps; empty: warmup
    seeds: int = 1                           # runs of the whole grid

    def stages(self, run):
        """For every seed and size: the bases, their second stages, and the runs from scratch."""
        self.check(run)
        self.points = {}   # name of a stage -> method, N, D1, D2, seed
        if run.toy:        # a corner of the grid has all its kinds of stages
            self.sizes, self.first, self.second, self.scratch = self.sizes[:2], self.first[:1], self.second[:2], self.scratch[:1]
        for seed in range(self.seeds):
            for i, size in enumerate(self.sizes):
                knobs, config = self.knobs_of(i, run, seed), run.model_config(size)
                name, longest = size + f'-s{seed}' * (seed > 0), self.longest[i if len(self.longest) > 1 else 0]
                grid = partial(self.runs, run=run, knobs=knobs)
                wanted = {f * longest for f in self.first}
                stable = wanted if any('+stable' in how for how in self.reuse) else set()
                bases, phases = yield from grid(name, config, wanted, 'scratch', stable=stable)
                for how in self.reuse:
                    kind, variants = how.partition('+')[0], how.split('+')[1:]
                    shape = SECOND_STAGES.get(kind, lambda c: c)(config)
                    data = self.data_of(run, kind, variants)
                    corpus = f'-{self.second_data}' * (kind == 'cpt')
                    for d1 in sorted(wanted):
                        before = phases[d1] if 'stable' in variants else bases[d1]
                        first = Stage('', shape, 0, 0.0, parent=before)
                        if kind == 'cpt':
                            first = go_on(first, 'stable' in variants)
                        else:
                            grow_stage(first, before, config, WIDTH, DEPTH, 0.0, 'grown' if 'stable' in variants else 'fresh')
                        yield from grid(f'{name}-{human(d1)}-{how}', shape, {f * longest for f in self.second}, how + corpus,
                                        first=first, data=data, base=(config.num_params(), d1))
                for kind in sorted({how.partition('+')[0] for how in self.reuse} if self.scratch else ()):
                    shape, corpus = SECOND_STAGES.get(kind, lambda c: c)(config), f'-{self.second_data}' * (kind == 'cpt')
                    yield from grid(f'{name}-scratch-{kind}', shape, {f * longest for f in self.scratch}, 'scratch' + corpus,
                                    data=self.data_of(run, kind, []))

    def runs(self, name, config, ends, method, run, knobs, stable=(), first=None, data=None, base=None):
        """
        Runs of `ends` tokens that share one stable phase: yields its pieces and the decay branches. first: a Stage that says how
        the phase begins; stable: where its own state is wanted too. Returns ({tokens: decayed Result}, {tokens: stable Result}).
        """
        step = knobs['batch_size'] * min(run.block_size, config.block_size)
        whole = {end: max(2, round(end / step)) for end in {*ends, *stable}}             # in steps
        branch = {end: max(1, round((1 - run.decay_fraction) * whole[end])) for end in ends}
        stops, params = sorted({*branch.values(), *(whole[end] for end in stable)}), config.num_params(head=True)
        at, before, done = {}, None, 0
        for stop in stops:
            more = dict(schedule='constant', keep_optimizer=True)
            if before:
                stage = go_on(Stage('', config, 0, params, parent=before), stable=True)
            else:
                stage = first or Stage('', config, 0, params)
            at[stop] = before = yield replace(
                stage, name=f'{name}-stable-{human(stop * step)}', tokens=(stop - done) * step, params=params,
                knobs=knobs | stage.knobs | more | (data or {}))
            done = stop
            for end in (end for end in sorted(branch) if branch[end] == stop):
                stage = go_on(Stage('', config, 0, params, parent=before), stable=True)
                decayed = yield replace(
                    stage, name=f'{name}-{human(end)}', tokens=(whole[end] - stop) * step,
                    knobs=knobs | stage.knobs | dict(schedule='wsd', decay_fraction=1.0) | (data or {}))
                n, d1 = base or (config.num_params(), 0.0)
                self.points[decayed.name] = dict(method=method, N=n, D1=d1, D2=end, seed=knobs['seed'])
                at[end] = decayed
        return {end: at[end] for end in ends}, {end: at[whole[end]] for end in stable}

    def data_of(self, run, kind, variants):
        """The general knobs that say what a second stage reads."""
        if kind != 'cpt':
            return {}
        share = 1 - self.replay
        old = [f'{name}:{self.replay * weight:g}' for name, weight in run.corpora.items()] if 'replay' in variants else []
        return dict(data=','.join([f'{self.second_data}:{share:g}', *old] if old else [self.second_data]),
                    val_data=self.second_data)

    def knobs_of(self, i, run, seed):
        """The general knobs that size i sets for itself."""
        batch_size = self.batch_sizes[i] if self.batch_sizes else run.sequences
        knobs = dict(seed=run.seed + seed, batch_size=batch_size, batch_tokens=0)
        if self.learning_rates:
            knobs['learning_rate'] = self.learning_rates[i]
        return knobs | dict(warmup=float(self.warmups[i] if self.warmups else run.warmup))

    def check(self, run):
        """Raise UserError for knobs that do not fit together, before anything is trained."""
        check_ranges(self, longest=(1, None), first=(1e-9, None), second=(1e-9, None), scratch=(1e-9, None), replay=(0, 1),
                     seeds=(1, None), learning_rates=(0, None), batch_sizes=(1, None), warmups=(1, None))
        for name in ('longest', 'learning_rates', 'batch_sizes', 'warmups'):
            if len(getattr(self, name)) not in ({1} if name == 'longest' else {0}) | {len(self.sizes)}:
                raise UserError(f'{name} has {len(getattr(self, name))} values for {len(self.sizes)} sizes')
        for how in self.reuse:
            kind, *variants = how.split('+')
            if kind not in ('cpt', *SECOND_STAGES) or set(variants) - {'stable', *(['replay'] if kind == 'cpt' else [])}:
                raise unknown('second stage', how, ('cpt', 'cpt+replay', 'cpt+stable', *SECOND_STAGES, 'stk2+stable'))
            if kind == 'cpt' and not self.second_data:
                raise UserError('cpt needs a corpus to go on with: --second_data=NAME')
        if run.warmup < 1 and not self.warmups:
            raise UserError(f'in a sweep warmup counts steps, the same for every run: {run.warmup:g} is none')

    stand_ins = dict(second_data='pycode')   # in a toy

    @property
    def corpora(self):
        """Corpora that the stages read besides the run's."""
        return [self.second_data] if self.second_data else []

    def summary(self, results):
        """Write results.csv, fit the laws, and return their tables."""
        out, found = Path(results[0].folder).parent, {r.name: r for r in results}
        with open(out / 'results.csv.tmp', 'w', newline='', encoding='utf-8') as file:
            rows = csv.DictWriter(file, (*COLUMNS, 'gradient_norm', 'parameter_norm'))
            rows.writeheader()
            for name, point in self.points.items():
                lines = read_metrics(found[name].folder)
                rows.writerow(point | dict(loss=found[name].val_loss, parameter_norm=lines[-1]['param_norm'],
                                           gradient_norm=statistics.mean(m['grad_norm'] for m in lines if 'grad_norm' in m)))
        (out / 'results.csv.tmp').replace(out / 'results.csv')
        try:
            return fit_results(Fitting(results=str(out / 'results.csv')))
        except UserError as error:
            return f'no fit: {error}'


def go_on(stage, stable):
    """Let a stage go on from its parent's weights: from its stable phase with its optimizer, else with a new one and a warmup."""
    before = stage.parent
    stage.model, stage.start = partial(load, before.folder), f'weights of {before.name}' + ' and its optimizer' * stable
    if stable:
        stage.moments, stage.knobs = partial(load_moments, before.folder), dict(warmup=0.0)
    return stage
