"""What a stage logs: metrics.jsonl, one JSON object every few steps, and a progress bar."""

import contextlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.errors import UserError
from engine.files import write_atomically

# a progress bar that is removed when the loop ends, and not shown without a terminal
progress_bar = partial(tqdm, leave=False, disable=None)


def truncate_metrics(path, step):
    """Drop the lines of metrics.jsonl after `step`, which will be trained and logged again."""
    path, kept = Path(path), []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
        with contextlib.suppress(Exception):  # a crash may cut a line
            if json.loads(line)['step'] <= step and line.endswith('\n'):
                kept.append(line)
    write_atomically(path, ''.join(kept))


def read_metrics(folder):
    """The lines of a stage's metrics.jsonl, as dicts. Raises UserError for a damaged file."""
    path = Path(folder) / 'metrics.jsonl'
    try:
        lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        assert lines and all(isinstance(line['step'], int) for line in lines)
    except Exception as error:
        raise UserError(f'{path} is damaged ({type(error).__name__})') from None
    return lines


class Log:
    """Writes a stage's metrics to metrics.jsonl and shows a progress bar, on process 0 only."""

    def __init__(self, stage, knobs, steps, start, is_main):
        """start: the step at which training starts or resumes; later lines are dropped."""
        self.file = Path(knobs.out_dir) / stage.name / 'metrics.jsonl' if is_main else None
        if is_main and start:
            truncate_metrics(self.file, start)
        elif is_main:
            self.file.unlink(missing_ok=True)
        one = knobs.batch_size * knobs.block_size  # tokens in a step
        self.bar = tqdm(
            desc=stage.name,
            initial=start * one,
            total=steps * one,
            unit='tok',
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; log files keep every update
            disable=not is_main,
        )

    def add(self, line):
        """Append a line of metrics, {name: value}, and show its losses next to the bar."""
        shown = {name: f'{line[name]:.3f}' for name in ('loss', 'val_loss') if name in line}
        self.bar.set_postfix(shown, refresh=False)
        if self.file:
            with open(self.file, 'a', encoding='utf-8') as file:
                file.write(json.dumps(line) + '\n')


class Meter(dict):
    """
    Means of scalars, accumulated on the device, so that the host waits only in `read`. The dict
    holds {name: tensor (sum of value x count, sum of counts)}.
    """

    def add(self, scalars, count=1.0):
        """Add {name: 0-d tensor}, each a mean over `count` terms (a number or a 0-d tensor)."""
        for name, value in scalars.items():
            count = torch.as_tensor(count, dtype=torch.float32, device=value.device)
            pair = torch.stack((value.detach().float() * count, count))
            self[name] = self[name] + pair if name in self else pair

    def read(self):
        """{name: mean since the last call}, over all processes, each of which must call this."""
        sums = torch.stack(list(self.values()))
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = dict(zip(self, (sums[:, 0] / sums[:, 1]).tolist()))
        self.clear()
        return means


def check_finite_loss(line, folder):
    """Raise UserError where the loss or the gradient of a line of metrics is not finite."""
    if not math.isfinite(line['loss'] + line['grad_norm']):
        raise UserError(
            f'{folder.name}: loss {line["loss"]} and gradient norm {line["grad_norm"]} at step '
            f'{line["step"]}, learning rate {line["lr"]:.2g}; the last good state is kept. Try a '
            'smaller --learning_rate or a longer --warmup, with another --out_dir or after '
            f'removing {folder}'
        )
