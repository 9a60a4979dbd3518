"""
What a stage logs: metrics.jsonl, one JSON object every few steps; a progress bar, or in a log file
a plain line every half minute; Weights & Biases.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.errors import UserError, first_line, import_extra
from engine.files import write_atomically

# the progress bar of a loop: gone when it is done, and none where there is no terminal
progress_bar = partial(tqdm, leave=False, disable=None)
LOSSES = ('loss', 'val_loss')  # of a line of metrics, that are shown


def truncate_metrics(path, step):
    """Drop what metrics.jsonl logged after `step`: it is trained, and logged, again."""
    path, kept = Path(path), []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)['step'] <= step and line.endswith('\n'):  # a crash may cut a line
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
    """Where the lines of metrics of a stage go: its file, the terminal, dashboards."""

    def __init__(self, stage, knobs, steps, start, is_main):
        """start: the step from which it is trained now; what was logged after it goes."""
        self.wandb, self.file, self.printed = None, None, 0.0
        if is_main:
            self.file = Path(knobs.out_dir) / stage.name / 'metrics.jsonl'
            if start:
                truncate_metrics(self.file, start)
            else:
                self.file.unlink(missing_ok=True)
            if knobs.wandb:
                self.wandb = open_wandb(knobs, stage.name)
        self.tty = is_main and sys.stderr.isatty()
        self.steps, one = steps, knobs.batch_size * knobs.block_size
        nowhere = SimpleNamespace(write=lambda text: None, flush=lambda: None)
        self.bar = tqdm(
            desc=stage.name,
            initial=start * one,
            total=steps * one,
            unit='tok',
            unit_scale=True,
            dynamic_ncols=self.tty,
            file=sys.stderr if self.tty else nowhere,
        )

    def add(self, line):
        """Add a line, a dict."""
        shown = [f'{k.replace("_", " ")} {line[k]:.3f}' for k in LOSSES if k in line]
        self.bar.set_postfix_str(', '.join(shown), refresh=False)
        if not self.file:
            return
        with open(self.file, 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        if self.wandb:
            self.wandb.log(line, step=line['step'])
        due = time.time() - self.printed > 30 or line['step'] == self.steps
        if due and not self.tty:
            print(self.bar, file=sys.stderr, flush=True)
            self.printed = time.time()

    def close(self, **last):
        """End, with what Weights & Biases shows last."""
        self.bar.close()
        if self.wandb:
            self.wandb.log(last, step=self.steps)
            self.wandb.finish()


def open_wandb(knobs, name):
    """The run of Weights & Biases for the stage `name`. Raises UserError if it cannot be."""
    wandb = import_extra('wandb', '--wandb needs wandb')
    run = f'{Path(knobs.out_dir).name}-{name}'  # a stage that continues is the same run
    how = dict(project=knobs.wandb, name=run, id=run, resume='allow')
    try:
        return wandb.init(dir=knobs.out_dir, config=asdict(knobs), **how)
    except (wandb.Error, ValueError, OSError) as error:
        way_out = 'WANDB_MODE=offline needs no account and no network'
        raise UserError(f'--wandb={knobs.wandb}: {first_line(error)}; {way_out}') from error


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


def speed(stage, tokens_per_second, hardware):
    """Tokens per second and, where it is defined, MFU (6 X a token, attention not counted)."""
    line = dict(tokens_per_second=round(tokens_per_second))
    if hardware.peak_flops:
        achieved = 6 * stage.params * tokens_per_second
        line['mfu'] = achieved / (hardware.peak_flops * hardware.world_size)
    return line


def check_finite_loss(line, folder):
    """Raise UserError where the loss or the gradient of a line of metrics is not finite."""
    if not math.isfinite(line['loss'] + line['grad_norm']):
        raise UserError(
            f'{folder.name}: loss {line["loss"]} and gradient norm {line["grad_norm"]} at step '
            f'{line["step"]}, learning rate {line["lr"]:.2g}; the last good state is kept. Try a '
            'smaller --learning_rate or a longer --warmup, with another --out_dir or after '
            f'removing {folder}'
        )
