"""TensorBoard and Weights & Biases: what metrics.jsonl holds, where others look for it."""

from dataclasses import asdict
from pathlib import Path

from engine.errors import UserError, first_line, import_extra


def open_dashboards(knobs, name, step):
    """
    Functions (line of metrics) -> None for the dashboards that `knobs` (train.Run) ask for, of the
    stage `name`, which is at a step: what was logged behind it is dropped. Raises UserError where
    one is not installed or not reached.
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

        dashboards.append(to_tensorboard)
    if knobs.wandb:
        wandb = import_extra('wandb', '--wandb needs wandb')
        Path(knobs.out_dir).mkdir(parents=True, exist_ok=True)
        run = f'{Path(knobs.out_dir).name}-{name}'
        how = dict(project=knobs.wandb, name=run, id=run, resume='allow', config=asdict(knobs))
        try:
            found = wandb.init(dir=knobs.out_dir, reinit='finish_previous', **how)
        except (wandb.Error, ValueError, OSError) as error:
            way_out = 'WANDB_MODE=offline needs no account and no network'
            raise UserError(f'--wandb={knobs.wandb}: {first_line(error)}; {way_out}') from error
        dashboards.append(lambda line: found.log(numbers_of(line), step=line['step']))
    return dashboards


def numbers_of(line):
    """The numbers of a line of metrics."""
    return {key: value for key, value in line.items() if isinstance(value, int | float)}
