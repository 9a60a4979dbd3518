"""
How much does a teacher give? Runs of Late-to-Early Training (Zhao et al.) with different teachers,
put together: the gain over the baseline's last loss as a law of the teacher's lead and of the
sizes. It tests how the paper explains its Table 6, where a teacher of poorer data does harm.

    lead  =  loss of the baseline at its end - loss of the teacher         (nats per token)
    ratio =  parameters of the target / parameters of the teacher

    constant     gain = G
    linear       gain = G + slope lead
    saturating   gain = G (1 - e^(-(lead - none) / scale))    below `none` it harms
    size         gain = G ratio^-gamma
    both         gain = (G + slope lead) ratio^-gamma

    python extras/teaching_law.py let+30 out/let_tiny out/let_other ...

Every run has the variant, and one of them the baseline with the same seeds, size and tokens. The
laws are fitted as those of scaling.py are, but to the gains themselves; left out are whole
teachers. The laws are ours.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import engine.quick_start  # before torch, whose import it shortens

import torch

from configurator import configure
from engine.errors import UserError, run_as_program
from engine.files import read_json
from engine.minimise import from_starts
from engine.report import Line, Panel, draw_panels, finished_stages, format_count, table
from engine.stage import Result
from extras.decisions import QUANTILES
from scaling import reweighted, root_mean_square

HUBER_DELTA = 0.02  # nats; larger residuals count by their size, not by their square


def constant(p, lead, log_ratio):
    """gain = G"""
    return p.G + 0 * lead


def linear(p, lead, log_ratio):
    """gain = G + slope lead"""
    return p.G + p.slope * lead


def saturating(p, lead, log_ratio):
    """gain = G (1 - e^(-(lead - none) / scale))"""
    return p.G * (1 - torch.exp((-(lead - p.none) / p.scale.exp()).clamp(max=20)))


def by_size(p, lead, log_ratio):
    """gain = G ratio^-gamma"""
    return p.G * torch.exp(-p.gamma * log_ratio)


def by_both(p, lead, log_ratio):
    """gain = (G + slope lead) ratio^-gamma"""
    return linear(p, lead, log_ratio) * torch.exp(-p.gamma * log_ratio)


STARTS = {  # of each parameter; scale is a logarithm
    'G': (0.1, 0.3),
    'slope': (0.0,),
    'none': (-1.0, 0.0),
    'scale': (-2.0, 0.0),
    'gamma': (0.0, 0.3),
}
LAWS = {  # a function of parameters, lead and log ratio; the names of its parameters
    'constant': (constant, ('G',)),
    'linear': (linear, ('G', 'slope')),
    'saturating': (saturating, ('G', 'none', 'scale')),
    'size': (by_size, ('G', 'gamma')),
    'both': (by_both, ('G', 'slope', 'gamma')),
}


@dataclass
class Options:
    """Fit laws of what a teacher gives: teaching_law.py VARIANT RUN [RUN ...]."""

    out: str = 'out/teaching_law'  # folder of the picture


def validation_text(folder):
    """The corpus on which a stage's loss was measured."""
    described = read_json(Path(folder) / 'stage.json')
    return described.get('val_data') or described.get('data')


def teacher_of(result):
    """
    The Result of the model that taught a stage. Raises UserError without one, or where its loss is
    not of the same text.
    """
    folder = Path(result.folder)
    name = read_json(folder / 'stage.json').get('teaching', {}).get('teacher') or 'none'
    for place in (Path(name), folder.parent / name):
        if (place / 'result.json').is_file():
            texts = [validation_text(where) for where in (place, folder)]
            if len(set(texts)) > 1:
                raise UserError(f'{place} and {folder} have losses of {" and ".join(texts)}')
            return Result.of(place)
    raise UserError(f'{folder}: its teacher, {name}, is no stage that was trained here')


def baseline_losses(stages):
    """{(seed, N, tokens): losses} of the finished baselines among some Results."""
    found = {}
    for r in stages:
        if r.labels.get('variant') == 'baseline':
            found.setdefault((r.labels.get('seed'), r.n_params, r.tokens), set()).add(r.val_loss)
    return found


def points(variant, runs):
    """
    Records of every stage of a variant in run folders: teacher, lead, ratio, gain, seed. Its
    baseline, of the same seed, size and tokens, is its run's, or that of another one. Raises
    UserError where there is none, or where there are several.
    """
    stages, found = {run: finished_stages(run) for run in runs}, []
    everywhere = baseline_losses(itertools.chain(*stages.values()))
    for run, results in stages.items():
        here = baseline_losses(results)
        taught = [r for r in results if r.labels.get('variant') == variant]
        if not taught:
            raise UserError(f'{run} has no finished {variant}')
        for r in taught:
            seed, teacher = r.labels.get('seed'), teacher_of(r)
            key = seed, r.n_params, r.tokens
            losses = here.get(key) or everywhere.get(key) or ()
            if len(losses) != 1:
                many = 'several runs have' if losses else 'no run has'
                raise UserError(f'{r.folder}: {many} a baseline of seed {seed} of its size')
            (alone,) = losses
            record = dict(teacher=teacher.folder, seed=seed, loss=teacher.val_loss)
            record |= dict(lead=alone - teacher.val_loss, ratio=r.n_params / teacher.n_params)
            found.append(record | dict(gain=alone - r.val_loss))
    return found


def columns(records):
    """(lead, log of ratio, gain) of records, float64 tensors (n,)."""
    rows = [[r['lead'], r['ratio'], r['gain']] for r in records]
    lead, ratio, gain = torch.tensor(rows, dtype=torch.float64).T
    return lead, ratio.log(), gain


def predict(law, theta, records):
    """The gains (..., n) of a law at parameters theta (..., 1 or n, P)."""
    function, names = LAWS[law]
    lead, log_ratio, _ = columns(records)
    return function(SimpleNamespace(**dict(zip(names, theta.unbind(-1)))), lead, log_ratio)


def fit(law, records, weight):
    """
    The parameters (W, P) of a law that fit records best under each row of weights (W, n), of
    several starts.
    """
    gain = columns(records)[2]
    choices = [STARTS[name] for name in LAWS[law][1]]
    starts = torch.tensor(list(itertools.product(*choices)), dtype=torch.float64)

    def residuals(theta):
        return (predict(law, theta, records) - gain) / HUBER_DELTA

    return from_starts(residuals, starts, weight)[0][:, 0]


def law_records(records):
    """
    A record for each law, its parameters with intervals over reweighted teachers, its errors with
    all teachers and with one left out; and the parameters, {law: (1, P)}.
    """
    teachers, gain = sorted({r['teacher'] for r in records}), columns(records)[2]
    of_teacher = [[float(r['teacher'] == teacher) for r in records] for teacher in teachers]
    of_teacher = torch.tensor(of_teacher, dtype=torch.float64)
    everything = torch.ones(1, len(gain), dtype=torch.float64)
    found, fitted = [], {}
    for law, (_, names) in LAWS.items():
        if len(teachers) < len(names) + 2:
            continue  # with one left out they would not determine it
        fitted[law] = fit(law, records, everything)
        samples = fit(law, records, reweighted(len(teachers), 200, 0) @ of_teacher)
        own = predict(law, fitted[law][:, None], records) - gain
        left_out = predict(law, fit(law, records, 1 - of_teacher)[:, None], records) - gain
        record = {'law': law}
        for name, value, ends in zip(names, fitted[law][0], samples.quantile(QUANTILES, dim=0).T):
            numbers = [x.exp() if name == 'scale' else x for x in (value, *ends)]
            record[name] = '{:.3f} ({:.3f} to {:.3f})'.format(*numbers)
        record['error (nats)'] = root_mean_square(own)
        record['a teacher left out'] = root_mean_square(left_out[of_teacher > 0])
        found.append(record)
    return found, fitted


def teacher_records(records):
    """A record for each teacher: its size, its loss, its lead, and the mean gain."""
    found = []
    for teacher in dict.fromkeys(r['teacher'] for r in records):
        own = [r for r in records if r['teacher'] == teacher]
        record = {'teacher': teacher, 'target / teacher': own[0]['ratio'], 'seeds': len(own)}
        record |= {'its loss': own[0]['loss'], 'lead': mean(r['lead'] for r in own)}
        found.append(record | {'gain': mean(r['gain'] for r in own)})
    return sorted(found, key=lambda record: record['lead'])


def gain_panel(records, fitted):
    """Gain over lead, a colour for each ratio of sizes, with the law of the lead alone."""
    panel = Panel("teacher's lead over the baseline's end (nats)", 'gain (nats per token)')
    for i, ratio in enumerate(sorted({round(r['ratio'], 2) for r in records})):
        own = [r for r in records if round(r['ratio'], 2) == ratio]
        label = f'target {format_count(ratio)} times the teacher'
        lead, gain = [r['lead'] for r in own], [r['gain'] for r in own]
        panel.lines.append(Line(lead, gain, label, 'o', f'C{i}'))
    for law in fitted.keys() & {'linear', 'saturating'}:
        leads = [r['lead'] for r in records]
        grid = torch.linspace(min(leads), max(leads), 100).tolist()
        along = [dict(lead=lead, ratio=1.0, gain=0.0) for lead in grid]
        curve = predict(law, fitted[law], along).tolist()
        panel.lines.append(Line(grid, curve, law, '-' if law == 'linear' else '--', 'black'))
    return panel


def main(argv):
    """Command line: VARIANT RUN [RUN ...], then knobs."""
    knobs = [arg for arg in argv if arg.startswith('-')]
    variant, *runs = [arg for arg in argv if arg not in knobs] or ['']
    options, _, _ = configure(knobs, Options, program='extras/teaching_law.py VARIANT RUN ...')
    if not runs:
        raise UserError('missing arguments; usage: teaching_law.py VARIANT RUN [RUN ...]')
    records = points(variant, runs)
    laws, fitted = law_records(records)
    if not laws:
        raise UserError('a law needs at least three teachers: give more runs')
    print(f'{table(teacher_records(records))}\n\n{table(laws)}')
    Path(options.out).mkdir(parents=True, exist_ok=True)
    draw_panels([gain_panel(records, fitted)], Path(options.out) / 'teaching_law.png')
    print(f'\nteaching_law.png is in {options.out}/')


if __name__ == '__main__':
    run_as_program(main)
