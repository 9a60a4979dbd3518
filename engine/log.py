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

# the progress bar of a loop: gone when it is done, and none where there is no terminal
progress_bar = partial(tqdm, leave=False, disable=None)


def truncate_metrics(path, step):
    """Drop what metrics.jsonl logged after `step`: it is trained, and logged, again."""
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
    """Where the lines of metrics of a stage go: its file and the terminal."""

    def __init__(self, stage, knobs, steps, start, is_main):
        """start: the step from which it is trained now; what was logged after it goes."""
        self.file = Path(knobs.out_dir) / stage.name / 'metrics.jsonl' if is_main else None
        if is_main and start:
            truncate_metrics(self.file, start)
        elif is_main:
            self.file.unlink(missing_ok=True)
        one = knobs.batch_size * knobs.block_size
        self.bar = tqdm(
            desc=stage.name,
            initial=start * one,
            total=steps * one,
            unit='tok',
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a log file keeps each bar
            disable=not is_main,
        )

    def add(self, line):
        """Add a line, a dict."""
        shown = {name: f'{line[name]:.3f}' for name in ('loss', 'val_loss') if name in line}
        self.bar.set_postfix(shown, refresh=False)
        if self.file:
            with open(self.file, 'a', encoding='utf-8') as file:
                file.write(json.dumps(line) + '\n')


class Meter(dict):
    """
    Means of scalars, kept on the device: the host waits only when they are read. {name: tensor
    (sum of value x count, sum of counts)}.
    """

    def add(self, scalars, count=1.0):
        """Add {name: tensor without dimensions}, means over `count` terms."""
        for name, value in scalars.items():
            count = torch.as_tensor(count, dtype=torch.float32, device=value.device)
            pair = torch.stack((value.detach().float() * count, count))
            self[name] = self[name] + pair if name in self else pair

    def read(self):
        """{name: mean since the last call, over the terms of all processes}."""
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
