"""
All tables and figures of the project. Methods and tools return data, which is formatted here:
records (a list of dicts) as a Markdown table, Panels of Lines as a figure, stages as sentences.
"""

import itertools
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError
from engine.files import commit_file, write_atomically
from engine.log import read_metrics
from engine.parallel import estimate_memory
from engine.stage import Result, describe
from model import all_params

# ----------------------------------------------------------------------------------------------
# numbers and tables


def format_si(number, letters=' kMGTPEZY'):
    """1234567 -> '1.23M', with SI letters; the empty string for zero."""
    if not number:
        return ''
    power = max(0, min(len(letters) - 1, int(math.log10(abs(number)) // 3)))
    return f'{number / 1000**power:.3g}{letters[power].strip()}'


def format_count(number):
    """Format a number of parameters or tokens: 8.44B."""
    return format_si(number, ' kMBT')


def format_bytes(number):
    """Bytes with SI letters: 1.5GB."""
    return f'{format_si(number)}B'


# columns by their format, for format_cell
COUNTS = ('N', 'tokens')
FLOPS = ('FLOPs', 'cumulative FLOPs', 'independent', 'own FLOPs', 'with all ancestors')
BYTES = ('GPU memory', 'memory')
PERCENT = ('saved', 'saved at equal loss', 'acceptance rate', 'accuracy', 'exact answers')


def format_cell(column, value):
    """A value as text, by its column; None and NaN are empty."""
    if value is None or value != value:
        return ''
    if isinstance(value, str):
        return value
    if column in COUNTS:
        return format_count(value)
    if column in FLOPS:
        return format_si(value)
    if column in BYTES:
        return format_bytes(value)
    if column in PERCENT:
        return f'{value:.1%}'
    if isinstance(value, int) or column == 'tokens/s':
        return f'{value:,.0f}'
    if column.startswith('against '):
        return f'{value:+.4f}'
    return f'{value:.4f}' if 1e-3 <= abs(value) < 1e5 or not value else f'{value:.3g}'


def table(records):
    """Format records, dicts {column: value}, as a Markdown table with aligned columns."""
    columns = [*dict.fromkeys(itertools.chain(*records))]
    rows = [columns, *([format_cell(c, r.get(c)) for c in columns] for r in records)]
    width, *widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(width), *map(str.rjust, others, widths)]
        lines.append(f'| {" | ".join(cells)} |')
    rule = ['-' * (width + 2), *('-' * (w + 1) + ':' for w in widths)]
    lines.insert(1, f'|{"|".join(rule)}|')
    return '\n'.join(lines)


def interval(values):
    """
    The 95% confidence interval (low, high) of the mean of `values`, by Student's t; None if fewer
    than two of them differ.
    """
    if len({*values}) < 2:
        return None
    from scipy.stats import sem, t  # imported here, as it takes a second

    return t.interval(0.95, len(values) - 1, statistics.mean(values), sem(values))


def by_label(results, label):
    """Group results by a label: {value: [results]}, in their order; omits those without it."""
    groups = {}
    for result in results:
        if label in result.labels:
            groups.setdefault(result.labels[label], []).append(result)
    return groups


def difference(results, others, name):
    """
    The mean difference in validation loss between results and others, paired by seed, and its 95%
    confidence interval: {'against NAME': ..., '95% interval': ...}; {} if they share no seed.
    """
    reference = {r.labels['seed']: r.val_loss for r in others}
    found = [r.val_loss - reference[s] for r in results if (s := r.labels['seed']) in reference]
    if not found:
        return {}
    limits = interval(found)
    limits = limits and '{:+.3f} to {:+.3f}'.format(*limits)
    return {f'against {name}': statistics.mean(found), '95% interval': limits}


def compare_variants(results, baseline):
    """
    A record for each variant: number of seeds, mean validation loss, and its `difference` from the
    variant `baseline`. results: Results with the labels `variant` and `seed`.
    """
    groups, records = by_label(results, 'variant'), []
    for variant, runs in groups.items():
        loss = statistics.mean(r.val_loss for r in runs)
        record = {'variant': variant, 'seeds': len(runs), 'val loss': loss}
        records.append(record | difference(runs, groups.get(baseline, []), baseline))
    return records


# ----------------------------------------------------------------------------------------------
# figures


@dataclass
class Line:
    """A curve in a Panel, or points if the style is 'o'."""

    x: list
    y: list
    label: str = ''
    style: str = '-'
    color: str | None = None
    band: list | None = None  # half-height of a shaded band around the line; arrays, like y then


@dataclass
class Panel:
    """One pair of axes."""

    xlabel: str
    ylabel: str
    lines: list = field(default_factory=list)
    log: str = ''  # the logarithmic axes: 'x', 'y' or 'xy'
    ylim: tuple | None = None


def draw_panels(panels, path):
    """
    Draw Panels into a PNG file, atomically, two in a row. A label has the same colour in every
    panel, unless its lines name their own.
    """
    from matplotlib import colormaps  # imported here, as it takes a second
    from matplotlib.figure import Figure

    columns, rows, order = min(2, len(panels)), math.ceil(len(panels) / 2), {}
    figure = Figure((5.5 * columns, 4.5 * rows), layout='tight')
    for place, panel in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, place)
        for line in panel.lines:
            # by label, the same in every panel; steps of two take the dark colours first
            color = line.color or colormaps['tab20'](
                2 * order.setdefault(line.label, len(order)) % 19
            )
            ax.plot(line.x, line.y, line.style, label=line.label, color=color)
            if line.band is not None:
                ends = line.y - line.band, line.y + line.band
                ax.fill_between(line.x, *ends, alpha=0.25, color=color)
        ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.ylim:
            ax.set_ylim(panel.ylim)  # set_ylim(None) would turn off autoscaling
        ax.xaxis.get_major_locator().set_params(integer=panel.xlabel in ('layer', 'step'))
        ax.grid(alpha=0.25)
        for which in panel.log:
            getattr(ax, f'set_{which}scale')('log')
            axis = getattr(ax, f'{which}axis')
            low, high = axis.get_view_interval()
            if high < 1000 * low:  # a short axis: ticks also at 2 and 5 times the powers of ten
                axis.get_major_locator().set_params(subs=(1, 2, 5))
            axis.set_minor_formatter('')
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda number, place: format_count(number) or '0')
        if ax.get_legend_handles_labels()[1]:  # above the axes, where it covers no line
            ax.legend(fontsize=8, ncols=2, frameon=False, loc='lower left', bbox_to_anchor=(0, 1))
    save_figure(figure, path)


def save_figure(figure, path):
    """Write a figure to a PNG file, atomically."""
    figure.savefig(f'{path}.tmp', format='png', dpi=140)
    commit_file(f'{path}.tmp', path)


# ----------------------------------------------------------------------------------------------
# the report of a run


def finished_stages(folder):
    """The Results of a run, in the order they finished. Raises UserError if there are none."""
    found = [Result.of(path.parent) for path in sorted(Path(folder).glob('*/result.json'))]
    if not found:
        raise UserError(f'{folder} holds no finished stage')
    return sorted(found, key=lambda result: result.finished)


def family_cost(result):
    """
    FLOPs of a model and the smaller ones of its family. For a model that started from others, this
    stage's and its ancestors'; else those of training every size up to it from scratch, or, if that
    is not known, this stage's.
    """
    if result.inherited_flops:
        return result.total_flops
    return result.baseline_flops or result.flops


def result_records(results):
    """
    A record for each Result: size, budget, loss, and the FLOPs of its family, grown (cumulative)
    and with every size trained from scratch (independent).
    """
    records = []
    for r in results:
        compared = r.baseline_flops and r.inherited_flops
        records.append(
            {
                'stage': r.name,
                'N': r.n_params,
                'tokens': r.tokens,
                'FLOPs': r.flops,
                'val loss': r.val_loss,
                'bits/byte': r.bits_per_byte,
                'cumulative FLOPs': family_cost(r),
                'independent': r.baseline_flops,
                'saved': 1 - family_cost(r) / r.baseline_flops if compared else None,
            }
        )
    return records


def training_curve(result, points=80):
    """
    A stage's training curve: (cumulative FLOPs, loss on the data in nats), two lists of at most
    `points` numbers. Losses are means over equal parts of the stage, without a teacher's term.
    """
    metrics = [m for m in read_metrics(result.folder) if 'loss' in m]
    start, n = family_cost(result) - result.flops, len(metrics)
    edges = sorted({i * n // points for i in range(points + 1)})
    groups = [metrics[first:last] for first, last in itertools.pairwise(edges)]
    losses = [statistics.mean(m.get('data_loss', m['loss']) for m in g) for g in groups]
    return [start + group[-1]['flops'] for group in groups], losses


def loss_panel(results):
    """Training loss against cumulative FLOPs, a line per stage, a dot at its validation loss."""
    panel = Panel('cumulative training FLOPs', 'training loss (nats per token; dots: validation)')
    sizes = list(dict.fromkeys(r.labels.get('size', r.name) for r in results))
    for r in results:  # one colour per size; its independent baseline is dashed
        color = f'C{sizes.index(r.labels.get("size", r.name)) % 10}'
        style = '--' if r.labels.get('independent') else '-'
        panel.lines.append(Line(*training_curve(r), r.name, style, color))
        panel.lines.append(Line([family_cost(r)], [r.val_loss], '', 'o', color))
    losses = [r.val_loss for r in results]
    panel.ylim = min(losses) * 0.93, max(losses) * 1.4  # cuts off the first steps
    return panel


def render(blocks):
    """Blocks as Markdown: texts as they are, records as tables, (file, Panels) as image links."""
    parts = []
    for block in blocks:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block, tuple):
            name, panels = block
            parts += [f'![{Path(name).stem}]({name})'] if panels else []
        elif block:
            parts.append(table(block))
    return '\n\n'.join(parts)


def draw_pictures(blocks, folder):
    """Draw the figures among blocks, (file, Panels), into a folder."""
    for block in blocks:
        if isinstance(block, tuple) and block[1]:
            draw_panels(block[1], Path(folder) / block[0])


def report(folder, summary):
    """
    Print the report of a run, then write report.md and its figures (last, as they may fail).
    summary: blocks from the method. Raises UserError if no stage is finished.
    """
    results = finished_stages(folder)
    drawn = [r for r in results if not r.labels.get('seed')][:8]  # of the first seed
    blocks = [
        result_records(results),
        'N: parameters of the layers. val loss: nats per token. cumulative FLOPs: this model and '
        'all that it was made from. independent: training every size so far from scratch. saved: '
        'the share of that which was not needed.',
        *summary,
        ('report.png', [loss_panel(drawn)]),
    ]
    text = render(blocks)
    print(f'\n{text}')
    write_atomically(Path(folder) / 'report.md', text + '\n')
    draw_pictures(blocks, folder)
    print(f'\nmodels, metrics, report.md and report.png are in {folder}/')


def steps_to_loss(curve, loss):
    """
    The x from which a curve [(x, loss), ...] stays at or below `loss`, interpolated linearly; None
    if it ends above. x: steps, a fraction of them, or FLOPs.
    """
    if curve[-1][1] > loss:
        return None
    for (after, low), (before, high) in itertools.pairwise(reversed(curve)):
        if high > loss:
            return before + (after - before) * (high - loss) / (high - low)
    return curve[0][0]


def validation_curve(result):
    """[(step, validation loss)] of a stage, including the final evaluation."""
    lines = read_metrics(result.folder)
    curve = [(m['step'], m['val_loss']) for m in lines if 'val_loss' in m]
    return curve + [(lines[-1]['step'], result.val_loss)]


def mean_curve(results):
    """[(fraction of the steps, mean validation loss)] of runs with the same number of steps."""
    curves = [dict(validation_curve(result)) for result in results]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(s / max(1, steps[-1]), statistics.mean(curve[s] for curve in curves)) for s in steps]


def curve_panels(groups):
    """
    Panels of validation loss over tokens, each variant's mean_curve without its first point, whose
    high loss would squeeze the rest. Every panel has the first two variants and up to six others.
    groups: {variant: its results}.
    """
    panels, variants = [], list(groups.items())
    for i in range(2, max(3, len(variants)), 6):
        panels.append(Panel('training tokens', 'validation loss (nats per token)'))
        for name, runs in variants[:2] + variants[i : i + 6]:
            curve = mean_curve(runs)
            shares, losses = zip(*(curve[1:] or curve))
            tokens = [share * runs[0].tokens for share in shares]
            panels[-1].lines.append(Line(tokens, losses, name))
    return panels


# ----------------------------------------------------------------------------------------------
# the dry run

GPU_FLOPS = 4e14  # sustained FLOP/s of an H100, assumed in plans
CPU_FLOPS = 1e10  # sustained FLOP/s of a CPU core in models as small as config/*_tiny.py's
CPU_DAYS = 60  # longest run allowed on a CPU


def duration(flops, on_cpu=False):
    """
    The time that FLOPs take, in words: minutes on this CPU, or GPU-hours if the CPU would need more
    than CPU_DAYS. In that case, on_cpu raises UserError.
    """
    days = flops / (CPU_FLOPS * os.cpu_count()) / 86400
    if days <= CPU_DAYS:
        return f'about {max(1, 1440 * days):,.0f} minutes on this CPU'
    if on_cpu:
        raise UserError(
            f'{format_si(flops)}FLOPs take about {days:,.0f} days on this CPU: --dry_run=True '
            'shows the plan, --toy=True runs it small'
        )
    return f'{flops / GPU_FLOPS / 3600:,.0f} GPU-hours at {GPU_FLOPS / 1e12:g} TFLOP/s'


def plan_record(stage, knobs, steps, result):
    """A row of the plan. GPU memory is that of one replica with a micro-batch of one sequence."""
    taught = stage.teaching.get('teacher_params', 0.0)
    return {
        'stage': stage.name,
        'N': result.n_params,
        'tokens': result.tokens,
        'steps': steps,
        'batch': knobs.batch_size,
        'max LR': f'{knobs.learning_rate:g}',
        'FLOPs': result.flops,
        'GPU memory': sum(estimate_memory(stage.config, knobs, 1, 1, taught)),
    }


def plan_text(run, planned, epoch, missing):
    """
    The text of a run's plan. planned: a list of Planned; epoch: tokens in one pass over the
    training data, 0 if unknown; missing: names of corpora that are not prepared. Raises UserError
    if there are no stages.
    """
    if not planned:
        raise UserError('this run has no stages')
    first = [row for row in planned if not row[0].labels.get('seed')]  # the others are alike
    lines = [table([plan_record(*row) for row in first]), '']
    lines += [f'{stage.name}: {describe(stage)}' for stage, *_ in first]
    flops, drawn = sum(r.flops for *_, r in planned), max(r.position for *_, r in planned)
    lines.append(f'\nthis run, seeds {run.seeds}: {format_si(flops)}FLOPs, {duration(flops)}')
    *_, last = planned[-1]
    if last.baseline_flops and last.inherited_flops:
        spent, alone = last.total_flops, last.baseline_flops
        lines.append(
            f'the family: {format_si(spent)}FLOPs; every size from scratch: {format_si(alone)}'
            f'FLOPs; saved: {1 - spent / alone:.1%}'
        )
    passes = f', {drawn / epoch:.2g} passes over them' if epoch else ''
    lines.append(f'data: {format_count(drawn)} tokens of {run.data}{passes}')
    if missing:
        lines.append(f'not prepared yet: {", ".join(missing)}')
    kept = [
        4 * all_params(stage.config) * (1 + steps // (knobs.keep_every or steps + 1))
        for stage, knobs, steps, _ in planned
    ]
    # two states kept and one being saved; 12 bytes per parameter: weight and AdamW's two moments
    states = 3 * 12 * max(all_params(stage.config) for stage, *_ in planned)
    lines.append(
        f'disk: {format_bytes(sum(kept))} kept, {format_bytes(states)} for the states of the '
        'largest while it trains'
    )
    return '\n'.join(lines)
