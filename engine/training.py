"""
One stage in training: everything the loop in train.py needs, and the life of the stage's folder.
Nothing here decides what is learned; that is the stage, and the loop.
"""

import gc
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from data.corpus import open_corpus
from data.instruct import run_source
from data.loader import batches
from data.vocabulary import tokenizer_to_carry
from engine import checkpoint, run_folder
from engine.dashboards import open_dashboards
from engine.device import (
    SIGNALS,
    attention_kernel,
    barrier,
    exit_saved,
    gather,
    peak_flops,
    set_threads,
    should_stop,
    used_memory,
)
from engine.errors import UserError
from engine.files import measure_files, measure_text, write_manifest
from engine.loss import bits_per_byte, evaluate
from engine.metrics import append_metrics, truncate_metrics
from engine.optimizer import make_optimizer, save_optimizer_state, set_optimizer_state, stable_steps
from engine.parallel import (
    Meter,
    full_state,
    full_tensor,
    load_full_state,
    place,
    wrap,
)
from engine.plan import choose_micro_batch, choose_strategy, room_for
from engine.report import describe, format_bytes, format_si
from engine.stage import Progress, Result, next_token
from engine.tokenizer_files import check_available, tokenizer_files
from model import GPT, load

LOSSES = ('loss', 'val_loss')  # of a line of metrics, that are shown
PRINT_SECONDS = 30  # between lines in a log file, where there is no bar


class Training:
    """A stage, its folder, its model and optimizer, and how far it is."""

    def __init__(self, stage, knobs, hardware, steps):
        """knobs: the general knobs as they hold for the stage; steps: of the whole stage."""
        self.stage, self.knobs, self.hardware, self.steps = stage, knobs, hardware, steps
        self.folder = Path(knobs.out_dir) / stage.name
        self.objective = stage.objective or next_token
        self.step_tokens = knobs.batch_size * knobs.block_size
        self.stable_step = stable_steps(steps, knobs)
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self.changes = {}  # knobs that changed since the stage began: {key: (before, now)}

    # ------------------------------------------------------------------------------------------
    # before the first step

    def finished_before(self):
        """
        Claim the folder; return the Result if the stage was finished before, else None. A stage
        asked for more tokens continues from the end of its stable phase. Raises UserError.
        """
        texts = {}
        if not self.stage.source:
            for name in self.knobs.corpora:
                splits = open_corpus(name, self.knobs.data_dir).meta['splits']
                texts[name] = splits['train'].get('sha256')
        identity = run_folder.stage_identity(self.stage, self.knobs, texts)
        accept = self.knobs.accept_changes
        self.changes = run_folder.claim_folder(self.folder, identity, accept)
        result = self.read_result()
        if result and not self.extends(result):
            if self.hardware.is_main:
                changes = run_folder.describe_changes(self.changes)
                settings = f', with other settings ({changes})' if changes else ''
                print(f'{self.stage.name}: finished before{settings}')
                run_folder.remove_states(self.folder)
            return result
        if result:
            barrier()  # everyone has seen it
            if self.hardware.is_main:
                run_folder.remove_states(self.folder)  # a crash may have left some
                (self.folder / 'result.json').unlink()
        if self.changes:
            run_folder.update_identity(self.folder, identity)
        barrier()  # stage.json is there
        return None

    def read_result(self):
        """The Result in the folder, its files checked, or None. Raises UserError for damage."""
        if not (self.folder / 'result.json').is_file():
            return None
        if (self.folder / 'checksums.json').is_file():
            owner = run_folder.owner_of(self.folder)
            if damage := checkpoint.find_damage_together(self.folder, owner):
                raise UserError(
                    f'{damage}. Remove {self.folder / "result.json"} to train the stage again, '
                    'from its last state if it has one'
                )
        return Result.of(self.folder)

    def extends(self, result):
        """Whether more tokens are wanted than a finished stage had, and a stable state is kept."""
        states = run_folder.saved_states(self.folder)
        more = 'tokens' in self.changes and self.stage.tokens > result.tokens
        return more and any(path.name.startswith('stable') for path in states)

    def make_model(self):
        """The stage's starting model, placed on the hardware."""
        stage, knobs, hardware = self.stage, self.knobs, self.hardware
        torch.manual_seed(knobs.seed)
        room = room_for(hardware, stage)
        self.strategy = choose_strategy(knobs, stage.config, room)
        self.fresh = not run_folder.saved_states(self.folder)  # else restore() brings the weights
        model, dtype = None, ''
        if self.has_whole:
            model = stage.model() if self.fresh and stage.model else GPT(stage.config)
            dtype = str(model.wte.weight.dtype).removeprefix('torch.')
        self.source_dtype = gather(dtype)[0]  # under fsdp the others have built nothing
        self.raw_model = place(model, stage.config, self.strategy, hardware)

    @property
    def has_whole(self):
        """Whether this process needs whole tensors: shards are dealt by process 0."""
        return self.strategy != 'fsdp' or self.hardware.is_main

    def make_optimizer(self):
        """AdamW for the model, with the state that the stage starts from."""
        self.optimizer = make_optimizer(self.raw_model, self.knobs)
        if self.stage.optimizer_state and self.fresh:
            state = self.stage.optimizer_state() if self.has_whole else None
            set_optimizer_state(self.raw_model, self.optimizer, state)

    def restore(self):
        """Continue from the newest saved state, if there is one; then compile and wrap."""
        knobs, hardware = self.knobs, self.hardware
        progress = checkpoint.load_state(self.folder, self.raw_model, self.optimizer)
        if progress:
            self.step, self.seconds = progress['step'], progress['seconds']
            self.best = progress.get('best', self.best)
            self.source_dtype = progress.get('source_dtype', 'float32')
        if self.step > self.steps:
            raise UserError(
                f'{self.stage.name} is at step {self.step:,}, beyond the {self.steps:,} asked'
            )
        if hardware.compile:
            torch.compiler.reset()  # the stages before count towards torch's limit on compilations
        self.ddp_model = wrap(self.raw_model, self.strategy, knobs, hardware)

    def open_data(self):
        """Open the data where the stage is, say what follows, and start the clocks."""
        knobs, hardware, config = self.knobs, self.hardware, self.stage.config
        room = room_for(hardware, self.stage)
        self.micro_batch_size = choose_micro_batch(knobs, config, room)
        self.accumulate = knobs.batch_size // hardware.world_size // self.micro_batch_size
        if self.stage.whole_batch and self.micro_batch_size < knobs.batch_size:
            raise UserError(
                f'{self.stage.name}: its objective is of a whole batch, which must be one '
                f'micro-batch of one process, not {self.micro_batch_size} of {knobs.batch_size} '
                'sequences: --micro_batch_size, or a smaller batch'
            )
        self.source = (self.stage.source or run_source)(knobs)
        self.tokenizer = self.source.tokenizer
        if self.stage.tokenizer:
            self.tokenizer = tokenizer_to_carry(self.stage.tokenizer) or self.tokenizer
        if self.tokenizer:
            check_available(self.tokenizer)  # now, not when the trained model is saved
        if hardware.is_main:
            logged_until = self.step or -1  # from the beginning: not even the line of step 0
            truncate_metrics(self.folder / 'metrics.jsonl', logged_until)
            self.announce()
        wanted = hardware.is_main
        self.dashboards = open_dashboards(knobs, self.stage.name, self.step) if wanted else []
        set_threads(hardware.device, config, self.micro_batch_size * knobs.block_size)
        self.start_clock()

    def start_clock(self):
        """Open the stream of micro-batches, and start the bar and the clocks."""
        knobs, hardware = self.knobs, self.hardware
        self.first = self.stage.position // knobs.block_size  # sequences drawn before the stage
        position = self.first + self.step * knobs.batch_size
        read = self.source.read
        sizes = (knobs.batch_size, self.micro_batch_size)
        self.batches = batches(read, position, *sizes, hardware, self.steps - self.step)
        self.meter = Meter()
        self.started = time.time() - self.seconds
        self.logged = time.time()
        self.save_at = self.logged + 60 * knobs.save_minutes
        self.next_look, self.printed = 0, 0.0
        if hardware.device.type == 'cuda':  # what exists stays: searching it would stall a step
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        self.bar = tqdm(
            desc=self.stage.name,
            total=self.steps * self.step_tokens,
            initial=self.step * self.step_tokens,
            unit='tok',
            unit_scale=True,
            disable=not (hardware.is_main and sys.stderr.isatty()),
            mininterval=0.2,
            dynamic_ncols=True,
        )

    def announce(self):
        """Print what is about to be trained, and how."""
        name, knobs, hardware = self.stage.name, self.knobs, self.hardware
        details = [describe(self.stage), f'N = {self.stage.config.num_params():,}']
        batch = f'{knobs.batch_size} x {knobs.block_size} tokens'
        details.append(f'{self.steps:,} steps of {batch}')
        if self.step:
            details.append(f'from step {self.step:,}')
        if hardware.world_size > 1:
            details.append(f'{self.strategy} on {hardware.world_size} processes')
        if self.stage.observe and self.strategy == 'fsdp':
            details.append('not observed, as it is in shards')
        if hardware.device.type == 'cuda':
            details.append(f'attention: {attention_kernel(self.stage.config, hardware)}')
        if self.changes:
            print(f'{name}: {run_folder.describe_changes(self.changes)}')
        print(f'{name}: {", ".join(details)}', flush=True)

    # ------------------------------------------------------------------------------------------
    # between steps

    @property
    def progress(self):
        """How far the stage is, for its objective."""
        return Progress(self.step, self.steps)

    def count_step(self):
        """One more step is done."""
        self.step += 1
        self.seconds = time.time() - self.started
        self.bar.update(self.step_tokens)

    def due(self):
        """
        (whether to stop, whether to save). One process checks clock and signals every step; several
        agree about every 5 seconds. The end of a stable phase is always saved.
        """
        stop = save = False
        if self.hardware.world_size == 1 or self.step >= self.next_look:
            stop, save, pause = should_stop(self.hardware, self.save_at, self.step_seconds)
            self.next_look = self.step + pause
        return stop, save or self.step == self.stable_step

    @property
    def step_seconds(self):
        """Seconds per step since the last line of metrics."""
        return (time.time() - self.logged) / max(1, self.meter.steps)

    def validate(self, stoppable=False):
        """Validation loss in nats per token; stoppable: a signal saves and ends the program."""
        hardware = self.hardware
        found = self.source.validation(self.micro_batch_size, hardware)
        with hardware.forward():
            return evaluate(self.ddp_model, self.watched(found) if stoppable else found)

    def watched(self, found):
        """The same batches; a signal between them saves and ends a program of one process."""
        for batch in found:
            if SIGNALS and self.hardware.world_size == 1:
                self.save()
                self.exit()
            yield batch

    def measure(self, rate):
        """A line of metrics: means since the last one. Raises UserError if they are not finite."""
        line = dict(step=self.step, tokens=self.step * self.step_tokens)
        line['flops'] = self.stage.flops(self.progress, self.step_tokens)
        line['lr'] = rate
        speed = self.step_tokens / self.step_seconds
        line |= self.meter.read(self.hardware.world_size)
        line['param_norm'] = full_tensor(get_total_norm(self.raw_model.parameters())).item()
        line['tokens_per_second'] = round(speed)
        peak = peak_flops(self.hardware.name) if self.hardware.dtype == torch.bfloat16 else None
        if peak:  # model FLOPs utilisation, attention not counted
            line['mfu'] = 6 * self.stage.params * speed / (peak * self.hardware.world_size)
        if not math.isfinite(line['loss'] + line['grad_norm']):  # before anything is saved
            raise UserError(
                f'{self.stage.name}: loss {line["loss"]} and gradient norm {line["grad_norm"]} at '
                f'step {self.step}, learning rate {rate:.2g}; the last good state is kept. Try a '
                'smaller --learning_rate or a longer --warmup, with another --out_dir or after '
                f'removing {self.folder}'
            )
        return line

    def observe(self):
        """What the stage observes of its model, on one process; nothing of a model in shards."""
        if not self.stage.observe or self.strategy == 'fsdp' or not self.hardware.is_main:
            return {}
        self.raw_model.eval()
        seen = self.stage.observe(self.raw_model)
        self.raw_model.train()
        return seen

    def log(self, line):
        """Append a line to metrics.jsonl, and show its losses on the bar."""
        shown = [f'{key} {line[key]:.3f}' for key in LOSSES if key in line]
        self.bar.set_postfix_str(', '.join(shown), refresh=False)
        self.logged = time.time()
        if self.hardware.is_main:
            append_metrics(self.folder / 'metrics.jsonl', line)
            for dashboard in self.dashboards:
                dashboard.show(line)
            last = line['step'] == self.steps
            if self.bar.disable and (last or self.logged - self.printed > PRINT_SECONDS):
                print(self.in_words(line), file=sys.stderr, flush=True)
                self.printed = self.logged

    def in_words(self, line):
        """A line of metrics for a log file, where a bar would be unreadable."""
        words = [f'{self.stage.name}: step {line["step"]:,} of {self.steps:,}']
        words += [f'{key.replace("_", " ")} {line[key]:.3f}' for key in LOSSES if key in line]
        if 'tokens_per_second' in line:
            speed = line['tokens_per_second']
            words += [f'{speed:,} tokens/s', f'{format_si(6 * self.stage.params * speed)}FLOP/s']
            if 'mfu' in line:
                words += [f'MFU {line["mfu"]:.0%}']
            left = (self.steps - self.step) * self.step_tokens / max(1, speed)
            words += [f'{format_bytes(used_memory(self.hardware.device))} of memory']
            words += [f'{timedelta(seconds=round(left))} left']
        return ', '.join(words)

    def keep_best(self):
        """The model's score by its stage; the best model so far is saved in `best`."""
        self.raw_model.eval()
        with self.hardware.forward():
            score = torch.tensor(self.stage.score(self.raw_model), device=self.hardware.device)
        self.raw_model.train()
        if self.hardware.world_size > 1:  # one decision for all
            dist.broadcast(score, 0)
        score = score.item()
        if score > self.best:
            state = full_state(self.raw_model)
            if self.hardware.is_main:
                self.raw_model.save(self.folder / 'best', state=state)
            self.best = score
        barrier()
        return score

    @property
    def weights_dtype(self):
        """The dtype of saved weights: the knob, or that of the model the stage started from."""
        asked = self.knobs.save_dtype
        return getattr(torch, self.source_dtype if asked == 'auto' else asked)

    def keep(self):
        """Save the model as it is now beside what the stage will end with, for evaluation."""
        state = full_state(self.raw_model)
        if self.hardware.is_main:
            folder = self.folder / f'step-{self.step}'
            self.raw_model.save(folder, self.tokenizer, state, self.weights_dtype)

    def save(self):
        """Save a resumable state, for good at the end of a stable phase."""
        progress = dict(step=self.step, seconds=self.seconds, source_dtype=self.source_dtype)
        if self.stage.score:
            progress['best'] = self.best
        stable = self.step == self.stable_step
        keep = self.knobs.keep_states
        checkpoint.save_state(self.folder, self.raw_model, self.optimizer, progress, keep, stable)
        self.logged = time.time()
        self.save_at = self.logged + 60 * self.knobs.save_minutes

    def exit(self):
        """Say that the stage is saved, and end the program."""
        self.bar.close()
        self.ddp_model = None  # a DDP that outlives Python may wait for a thread that waits for it
        gc.collect()
        exit_saved(
            f'{self.stage.name} is saved at step {self.step:,} of {self.steps:,}', self.hardware
        )

    # ------------------------------------------------------------------------------------------
    # after the last step

    def finish(self):
        """Evaluate and save the trained model, then write its Result: the stage is finished."""
        self.bar.close()
        stage, knobs = self.stage, self.knobs
        if stage.score:
            best = {}
            if self.has_whole:
                best = load(self.folder / 'best', self.hardware.device).state_dict()
            load_full_state(self.raw_model, best)
        loss = self.validate(stoppable=True)
        for dashboard in self.dashboards:
            dashboard.show(dict(step=self.steps, val_loss=loss))
            dashboard.close()
        sequences = self.steps * knobs.batch_size
        tokens = sequences * knobs.block_size
        result = Result(
            stage.name,
            str(self.folder),
            stage.config.num_params(),
            stage.params,
            tokens,
            flops=stage.flops(self.progress, self.step_tokens),
            inherited_flops=stage.inherited_flops,
            before=stage.before,
            baseline_flops=stage.baseline_flops,
            val_loss=loss,
            bits_per_byte=bits_per_byte(loss, self.source.bytes_per_token),
            position=(self.first + sequences) * knobs.block_size,
            seconds=self.seconds,
            labels=stage.labels,
            finished=time.time(),
        )
        try:
            self.save_result(result)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f'{self.folder}: the trained model could not be saved ({error}); its last state is '
                'kept: when there is room on the disk, the same command continues'
            ) from error
        barrier()
        return result

    def save_result(self, result):
        """Write the model, its manifest and, last, result.json; then drop the states."""
        state = full_state(self.raw_model)
        if self.knobs.keep_optimizer:
            save_optimizer_state(self.folder, self.raw_model, self.optimizer)
        if not self.hardware.is_main:
            return
        self.raw_model.save(self.folder, self.tokenizer, state, self.weights_dtype)
        saved = [
            *self.folder.glob('model*.safetensors*'),
            *self.folder.glob('optimizer.safetensors'),
        ]
        saved += [self.folder / 'config.json', *tokenizer_files(self.folder)]
        files = measure_files(saved) | {'result.json': measure_text(result.text())}
        write_manifest(self.folder, files, run_folder.owner_of(self.folder))
        result.write()
        run_folder.remove_states(self.folder)
