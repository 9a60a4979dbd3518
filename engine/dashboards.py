"""TensorBoard and Weights & Biases: what metrics.jsonl holds, where others look for it."""

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, first_line, import_extra
from engine.files import write_atomically


class Dashboard(NamedTuple):
    """Where lines of metrics are shown."""

    show: Any  # (line of metrics) -> None
    close: Any  # () -> None


def open_dashboards(knobs, name, step):
    """
    The Dashboards that `knobs` (train.Run) ask for, of the stage `name`, which is at a step: what
    was logged behind it is dropped. Raises UserError where one is not installed or not reached.
    """
    dashboards = []
    if knobs.tensorboard:
        import_extra('tensorboard', '--tensorboard needs tensorboard')
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(knobs.out_dir) / 'tensorboard' / name
        writer = SummaryWriter(folder, purge_step=step + 1 if step else None, flush_secs=10)

        def to_tensorboard(line):
            for key, value in numbers_of(line).items():
                writer.add_scalar(key, value, line['step'])
            writer.flush()

        dashboards.append(Dashboard(to_tensorboard, writer.close))
    if knobs.wandb:
        wandb = import_extra('wandb', '--wandb needs wandb')
        kept = Path(knobs.out_dir) / name / 'wandb-id'  # a stage that continues is the same run
        if not kept.is_file():
            write_atomically(kept, uuid.uuid4().hex)
        run = f'{Path(knobs.out_dir).name}-{name}'
        how = dict(project=knobs.wandb, name=run, id=kept.read_text(), resume='allow')
        try:
            found = wandb.init(dir=knobs.out_dir, config=asdict(knobs), **how)
        except (wandb.Error, ValueError, OSError) as error:
            way_out = 'WANDB_MODE=offline needs no account and no network'
            raise UserError(f'--wandb={knobs.wandb}: {first_line(error)}; {way_out}') from error
        show = lambda line: found.log(numbers_of(line), step=line['step'])
        dashboards.append(Dashboard(show, found.finish))
    return dashboards


def numbers_of(line):
    """The numbers of a line of metrics."""
    return {key: value for key, value in line.items() if isinstance(value, int | float)}
