"""
How good the models are: validation loss, and the report (table and picture) of a run of any method.

    python evaluate.py out/progressive_tiny        # print the report of a run again
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import Result, UserError, configure, run_as_program, write_atomically


@torch.no_grad()
def evaluate(model, batches):
    """
    Mean next-token loss in nats over `batches` of (x, y, number of real targets), as data.loader.validation_batches yields
    them; summed over all processes under torch.distributed.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)   # (loss x targets, targets)
    for x, y, count in batches:
        total += torch.tensor([model(x, y).loss.item() * count, count], dtype=torch.float64)
    model.train(was_training)
    if torch.distributed.is_initialized():
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, total.tolist())
        total = torch.tensor(gathered, dtype=torch.float64).sum(0)
    return (total[0] / total[1]).item()


def bits_per_byte(loss, bytes_per_token):
    """Nats per token -> bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


# ---------------------------------------------------------------------------------------------------------------------
# the report of a run

def human(number, letters=('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')):
    """1234567 -> '1.23M', with SI letters; the empty string for zero."""
    if not number:
        return ''
    power = max(0, min(len(letters) - 1, int(math.log10(abs(number)) // 3)))
    return f'{number / 1000 ** power:.3g}{letters[power]}'


def count(number):
    """Parameters or tokens as the field writes them: 8.44B."""
    return human(number, ('', 'k', 'M', 'B', 'T'))


def table(rows):
    """Rows of strings (the first is the head) as a Markdown table with aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return f'| {" | ".join(cells)} |'
    rule = '|' + '|'.join('-' * (w + 2) if i == 0 else '-' * (w + 1) + ':' for i, w in enumerate(widths)) + '|'
    return '\n'.join([line(rows[0]), rule, *map(line, rows[1:])])


def finished_stages(folder):
    """The results of a run's finished stages, in the order of their training. Raises UserError when there are none."""
    paths = sorted(Path(folder).glob('*/result.json'), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f'{folder} holds no finished stage')
    return [Result.of(path.parent) for path in paths]


def family_cost(result):
    """FLOPs spent to have this model and the smaller ones of its family: its ancestors', or each one's from scratch."""
    return result.total_flops if result.inherited_flops else result.baseline_flops or result.flops


def result_table(results):
    """Sizes, budgets, losses, and what the family has cost so far against training each of its models from scratch."""
    rows = [['stage', 'N', 'tokens', 'FLOPs', 'val loss', 'bits/byte', 'cumulative FLOPs', 'independent', 'saved']]
    for r in results:
        saved = f'{1 - family_cost(r) / r.baseline_flops:.1%}' if r.baseline_flops and r.inherited_flops else ''
        rows.append([r.name, count(r.n_params), count(r.tokens), human(r.flops), f'{r.val_loss:.4f}',
                     f'{r.bits_per_byte:.4f}', human(family_cost(r)), human(r.baseline_flops), saved])
    return table(rows)


def training_curve(result, points=80):
    """(cumulative family FLOPs, smoothed training loss) of a stage, from its metrics.jsonl: two lists."""
    lines = (Path(result.folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    metrics = [m for m in map(json.loads, lines) if 'loss' in m]
    width = max(1, len(metrics) // points)
    groups = [metrics[i:i + width] for i in range(0, len(metrics), width)]
    start = family_cost(result) - result.flops
    return [start + g[-1]['flops'] for g in groups], [sum(m['loss'] for m in g) / len(g) for g in groups]


def draw(results, path):
    """The picture of a run: training loss against cumulative FLOPs, one line a stage, a dot at its validation loss."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4.5))
    sizes = list(dict.fromkeys(r.name.removeprefix('independent-') for r in results))
    for r in results:   # a size has one colour, dashed where it was trained from scratch to compare
        size = r.name.removeprefix('independent-')
        color, style = f'C{sizes.index(size)}', '-' if size == r.name else '--'
        axes.plot(*training_curve(r), linewidth=1.4, linestyle=style, color=color, label=r.name)
        axes.plot(family_cost(r), r.val_loss, 'o', color=color)
    axes.set_ylim(min(r.val_loss for r in results) * 0.93, max(r.val_loss for r in results) * 1.4)
    axes.set(xlabel='cumulative training FLOPs of the family', ylabel='loss (nats per token)')
    axes.set_title('training loss (dots: validation loss)')
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(f'{path}.tmp', format='png', dpi=150)
    plt.close(figure)
    Path(f'{path}.tmp').replace(path)


def report(folder, summary=''):
    """
    Write report.md and report.png into a run's folder; returns the table, with the method's own `summary` below it. Raises
    UserError when nothing is finished.
    """
    results, folder = finished_stages(folder), Path(folder)
    text = result_table(results) + (f'\n\n{summary}' if summary else '')
    write_atomically(folder / 'report.md', text + '\n\n![loss against cumulative FLOPs](report.png)\n')
    draw(results, folder / 'report.png')
    return text


@dataclass
class Evaluation:
    """What to report on."""
    folder: str = ''   # a run's folder


def main(argv):
    """Command line: a run's folder."""
    if argv and not argv[0].startswith('-'):
        argv = [f'--folder={argv[0]}', *argv[1:]]
    options, _, _ = configure(argv, Evaluation, program='evaluate.py')
    print(report(options.folder or 'out'))


if __name__ == '__main__':
    run_as_program(main)
