"""
One training loop for every method.

    python train.py config/progressive_tiny.py                   # a family of four sizes, minutes on a CPU
    python train.py config/progressive_8b.py --dry_run=True      # the plan: stages, tokens, FLOPs, GPU-hours, memory, disk
    torchrun --standalone --nproc_per_node=8 train.py config/progressive_8b.py
    python train.py --size=gpt2 --data=openwebtext --tokens=9e9  # one model, from scratch
    python train.py --help

A method yields stages (configurator.py says what a stage is); this file trains each of them into out_dir/STAGE/ and sends
the method its result. A finished stage is never trained again and an interrupted one goes on where it was saved, so after
any interruption the same command continues the run.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data.prepare
from configurator import Result, Stage, UserError, configure, differences, run_as_program, write_atomically
from data.loader import batches, open_corpus, parse_mixture, sequences, validation_batches
from evaluate import bits_per_byte, count, evaluate, human, report, table
from expand import Progressive
from model import GPT, GPTConfig, load


@dataclass
class Run:
    """General knobs, the same for every method."""
    method: str = 'pretrain'          # which method's stages to train
    out_dir: str = ''                 # folder of the run; empty: out/ and the config file's name, or the method's
    # data
    data: str = 'pydocs'              # corpus, or mixture: fineweb_edu:3,starcoder:1
    data_dir: str = 'data'            # where prepared corpora are
    val_data: str = ''                # corpus of the validation loss; empty: the first of data
    block_size: int = 1024            # tokens in a sequence
    order: str = 'epoch'              # epoch (shuffled, without replacement) or random (any offset, with replacement)
    unique_tokens: int = 0            # cap on different training tokens, then the second epoch begins; 0: none
    eval_tokens: int = 1048576        # validation tokens of an evaluation; 0: the whole split
    eval_interval: int = 0            # steps between evaluations within a stage; 0: at its end only
    # batch
    batch_size: int = 8               # sequences in a step, over all processes and micro-batches
    batch_tokens: int = 0             # the same in tokens, in place of batch_size; 0: batch_size counts
    micro_batch_size: int = 0         # sequences a process trains at once; 0: as many as fit
    # optimisation
    learning_rate: float = 1e-3       # the maximum
    schedule: str = 'cosine'          # cosine, wsd (constant, then linear decay) or constant, after the warmup
    warmup: float = 0.01              # steps, or below 1 the fraction of a stage's steps
    min_lr_fraction: float = 0.1      # last learning rate / maximum
    decay_fraction: float = 0.1       # wsd: share of the steps that decays
    beta1: float = 0.9                # AdamW
    beta2: float = 0.95               # AdamW
    eps: float = 1e-8                 # AdamW
    weight_decay: float = 0.1         # of matrices and embeddings; norms and biases have none
    grad_clip: float = 1.0            # largest norm of the gradient; 0: no clipping
    seed: int = 1337                  # of initialisation and data order
    # machine
    device: str = 'auto'              # cuda, mps or cpu
    dtype: str = 'auto'               # bfloat16 (autocast) or float32; auto: bfloat16 on a GPU that has it
    compile: str = 'auto'             # torch.compile: True or False; auto: on a GPU
    log_interval: int = 10            # steps between lines of metrics.jsonl; also how often the host waits for the GPU
    save_minutes: float = 10.0        # between saved states, from which an interrupted stage goes on
    max_minutes: float = 0.0          # save and stop after so long, to be continued; 0: no limit
    # planning
    dry_run: bool = False             # print the plan and train nothing
    toy: bool = False                 # shrink every model, batch and budget to try a run in seconds; same stages, same code
    gpu_tflops: float = 400.0         # TFLOP/s one GPU sustains in training, for the plan's GPU-hours (an H100: 40% of its peak)

    @property
    def corpora(self):
        """{corpus: weight} of the training mixture."""
        return parse_mixture(self.data)

    @property
    def vocab_size(self):
        """Of the corpora's tokenizer, which must be one; of a corpus not prepared yet, its default tokenizer's."""
        sizes = {}
        for name in self.corpora:
            prepared = (Path(self.data_dir) / name / 'meta.json').is_file()
            sizes[name] = open_corpus(name, self.data_dir).meta['vocab_size'] if prepared else 257 if name in data.prepare.OFFLINE else 50257
        if len(set(sizes.values())) > 1:
            raise UserError('the corpora have different vocabularies: ' + ', '.join(f'{name} {size}' for name, size in sizes.items()))
        return next(iter(sizes.values()))

    def model_config(self, size, **changes):
        """The configuration of a named size with this run's vocabulary and block_size; its toy twin when `toy` is set."""
        block_size = min(self.block_size, 32) if self.toy else self.block_size
        config = GPTConfig.named(size, **{**dict(vocab_size=self.vocab_size, block_size=block_size), **changes})
        if not self.toy:
            return config
        head_dim = 4
        return dataclasses.replace(config, head_dim=head_dim, n_embd=head_dim * config.n_head, n_mlp=max(1, config.n_mlp * head_dim // config.head_dim),
                                   n_layer=min(config.n_layer, 3 + -(-config.n_layer // 4)))

    def count_params(self, config):
        """X in FLOPs = 6 X T: the parameters that every token is multiplied by, layers and head."""
        with torch.device('meta'):
            return GPT(config).num_params(head=True)


@dataclass
class Pretrain:
    """Train one model, from random initialisation or from the weights of another run."""
    size: str = '64x4'        # a named size, or WIDTHxLAYERS
    init_from: str = ''       # model folder: start from its weights; steps, schedule and optimizer begin anew
    tokens: float = 0.0       # training tokens; 0: 20 a parameter

    def stages(self, run):
        """One stage."""
        if self.init_from:
            model = partial(load, self.init_from)
            with torch.device('meta'):
                config = model().config
            if config.vocab_size != run.vocab_size:
                raise UserError(f'{self.init_from} has a vocabulary of {config.vocab_size}, the data {run.vocab_size}')
            print(f'starting from the weights in {self.init_from}; step, schedule and optimizer begin anew')
        else:
            model, config = None, run.model_config(self.size)
        params = run.count_params(config)
        yield Stage(Path(self.init_from).name + '-continued' if self.init_from else self.size, config, self.tokens or 20 * params, params, model=model,
                    start=f'weights of {self.init_from}' if self.init_from else 'random initialisation')


METHODS = {'pretrain': Pretrain, 'progressive': Progressive}


# ---------------------------------------------------------------------------------------------------------------------
# machine

class Machine(NamedTuple):
    """Where this process runs."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int
    world_size: int
    deadline: float   # seconds since 1970, when max_minutes are over

    def autocast(self):
        """Context of the forward pass: bfloat16 matrix products where dtype says so."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()


def find_machine(run):
    """Choose the device and join the other processes, if torchrun started some. Raises UserError for a device that is not there."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    name = run.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if name == 'cuda' else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device {name!r} cannot be used: {str(error).splitlines()[0]}') from None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    for knob, legal in dict(dtype=('auto', 'bfloat16', 'float32'), compile=('auto', 'True', 'False'), order=('epoch', 'random'),
                            schedule=('cosine', 'wsd', 'constant')).items():
        if getattr(run, knob) not in legal:
            raise UserError(f'{knob} is one of {", ".join(legal)}, not {getattr(run, knob)!r}')
    bf16 = run.dtype == 'bfloat16' or (run.dtype == 'auto' and device.type == 'cuda' and torch.cuda.is_bf16_supported())
    compiled = device.type == 'cuda' if run.compile == 'auto' else run.compile == 'True'
    return Machine(device, torch.bfloat16 if bf16 else torch.float32, compiled, rank, world_size,
                   time.time() + 60 * run.max_minutes if run.max_minutes else math.inf)


STOP = []   # signals received; the loop saves and exits at the next step


def catch_signals():
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second one ends the program at once."""
    def remember(number, frame):
        if STOP:
            signal.default_int_handler(number, frame)
        STOP.append(number)
        print('\nstopping after this step (once more: at once, without saving)', file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)


# ---------------------------------------------------------------------------------------------------------------------
# what one stage trains with

def stage_knobs(run, stage, world_size=1):
    """The general knobs as they hold for this stage: its own settings in place of the run's, batches in sequences, toy sizes applied."""
    knobs = dataclasses.replace(run, **stage.knobs)
    knobs.block_size = stage.config.block_size
    knobs.batch_size = max(1, knobs.batch_tokens // knobs.block_size) if knobs.batch_tokens else knobs.batch_size
    if knobs.toy:
        knobs.batch_size, knobs.eval_tokens, knobs.warmup = min(4, knobs.batch_size), 2048, 1
    if knobs.batch_size % world_size:
        raise UserError(f'{stage.name}: a batch of {knobs.batch_size} sequences cannot be dealt to {world_size} processes')
    return knobs


def count_steps(knobs, stage):
    """Optimizer steps of a stage: its tokens in whole batches, rounded up; 4 for a toy."""
    return 4 if knobs.toy else max(1, math.ceil(stage.tokens / (knobs.batch_size * knobs.block_size) - 1e-9))


def estimate_memory(config, micro_batch_size, n_params):
    """
    (bytes of the training state, bytes of the activations) on one GPU: float32 weights, gradients and AdamW moments;
    what a compiled bfloat16 step keeps for the backward pass, logits included. An estimate, for planning.
    """
    attention = 2 * (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim
    per_token = config.n_layer * (10 * config.n_embd + attention + 6 * config.n_mlp) + 8 * config.vocab_size
    return 16 * n_params, micro_batch_size * config.block_size * per_token


def choose_micro_batch(knobs, config, n_params, machine):
    """Sequences a process trains at once: the knob, or the largest divisor of its share that fits (a CPU: 8192 tokens, its caches)."""
    share = knobs.batch_size // machine.world_size
    if knobs.micro_batch_size:
        if share % knobs.micro_batch_size:
            raise UserError(f'micro_batch_size {knobs.micro_batch_size} does not divide the {share} sequences of a process')
        return knobs.micro_batch_size
    for size in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        if machine.device.type == 'cuda':
            fits = sum(estimate_memory(config, size, n_params)) < 0.85 * torch.cuda.get_device_properties(machine.device).total_memory
        else:
            fits = size * config.block_size <= 8192
        if fits and size * config.block_size <= 2 ** 17:   # beyond that a GPU gains nothing
            return size
    return 1


def learning_rate(step, steps, knobs):
    """Learning rate of `step` (0 .. steps - 1): linear warmup, then the schedule, from the maximum towards min_lr_fraction of it."""
    warmup = knobs.warmup * steps if knobs.warmup < 1 else knobs.warmup
    if step < warmup:
        return knobs.learning_rate * min(1.0, (step + 1) / warmup)
    if knobs.schedule == 'cosine':
        height = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    elif knobs.schedule == 'wsd':
        height = min(1.0, (steps - step) / max(1, knobs.decay_fraction * steps))
    else:
        height = 1.0
    return knobs.learning_rate * (knobs.min_lr_fraction + (1 - knobs.min_lr_fraction) * height)


def make_optimizer(model, knobs):
    """AdamW, one fused kernel a step; weight decay on matrices and embeddings only. Every parameter is in exactly one group."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    assert len(matrices) + len(vectors) == len(list(model.parameters()))
    groups = [dict(params=matrices, weight_decay=knobs.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g['params']], lr=knobs.learning_rate, betas=(knobs.beta1, knobs.beta2), eps=knobs.eps,
                             fused=matrices[0].device.type in ('cuda', 'cpu'))


def next_token(model, x, y, progress):
    """The default objective: mean cross entropy of the next token, in nats."""
    return model(x, y).loss, {}


class Meter:
    """Means of what each step measures, kept on the device: the host waits for the GPU only when they are read."""

    def __init__(self):
        self.sums, self.steps = {}, 0

    def add(self, values):
        """Add one step's scalars, tensors of no dimension."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.steps += 1

    def read(self, world_size):
        """{name: mean over the steps since the last call, and over the processes}."""
        stacked = torch.stack(list(self.sums.values())) / (self.steps * world_size)
        if world_size > 1:
            dist.all_reduce(stacked)
        means = dict(zip(self.sums, stacked.tolist()))
        self.sums, self.steps = {}, 0
        return means


# ---------------------------------------------------------------------------------------------------------------------
# saving and going on

warnings.filterwarnings('ignore', message='torch.distributed is disabled, unavailable or uninitialized')   # one process: as intended


def training_state(model, optimizer):
    """What torch.distributed.checkpoint saves: weights, optimizer, random states."""
    weights, moments = get_state_dict(model, optimizer)
    random = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        random['cuda'] = torch.cuda.get_rng_state()
    return dict(model=weights, optimizer=moments, random=random)


def save_state(folder, model, optimizer, progress, machine):
    """Save so that the stage can go on from here: whole under a temporary name, moved into place, the state before it removed last."""
    target = folder / f'state-{progress["step"]:09d}'
    temporary = Path(f'{target}.tmp')
    dcp.save(training_state(model, optimizer) | dict(progress=progress), checkpoint_id=temporary)
    if machine.rank == 0:
        older = list(folder.glob('state-*'))
        os.replace(temporary, target)
        for path in older:
            if path not in (target, temporary):
                shutil.rmtree(path)
    if machine.world_size > 1:
        dist.barrier()


def load_state(folder, model, optimizer, progress):
    """Go on from the newest saved state in the folder, if there is one: fills model, optimizer, random states and `progress`."""
    states = sorted(p for p in folder.glob('state-*') if p.suffix != '.tmp')
    if not states:
        return
    state = training_state(model, optimizer) | dict(progress=progress)
    dcp.load(state, checkpoint_id=states[-1])
    set_state_dict(model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
    torch.set_rng_state(state['random']['cpu'].cpu())
    if 'cuda' in state['random']:
        torch.cuda.set_rng_state(state['random']['cuda'].cpu())
    progress.update(state['progress'])


MACHINE_KNOBS = ('out_dir', 'data_dir', 'eval_interval', 'micro_batch_size', 'device', 'dtype', 'compile', 'log_interval', 'save_minutes', 'max_minutes',
                 'dry_run', 'gpu_tflops')   # free to change when a stage goes on


def check_identity(folder, stage, knobs, machine):
    """Write what the stage is to stage.json, or refuse a folder where another stage stands under the same name."""
    identity = dict(start=stage.start, parent=stage.parent.name if stage.parent else None, tokens=stage.tokens, params=stage.params,
                    **{k: v for k, v in asdict(knobs).items() if k not in MACHINE_KNOBS}, **{f'model.{k}': v for k, v in asdict(stage.config).items()})
    identity = json.loads(json.dumps(identity))
    path = folder / 'stage.json'
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except (ValueError, UnicodeDecodeError):
            raise UserError(f'{path} is damaged; delete {folder} to train this stage anew') from None
        changed = [f'{k} was {found.get(k)!r}, now {identity.get(k)!r}' for k in {**found, **identity} if found.get(k) != identity.get(k)]
        if changed:
            raise UserError(f'{folder} holds a stage with other settings ({"; ".join(changed[:4])}): choose another --out_dir, or delete that folder')
    elif machine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(identity, indent=1) + '\n')


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def train_stage(stage, run, machine):
    """Train one stage, or go on with it, or do nothing where it is finished: returns its Result."""
    knobs, folder = stage_knobs(run, stage, machine.world_size), Path(run.out_dir) / stage.name
    check_identity(folder, stage, knobs, machine)
    if (folder / 'result.json').is_file():
        print(f'{stage.name}: finished before')
        return Result.of(folder)
    torch.manual_seed(knobs.seed)
    model = (stage.model() if stage.model else GPT(stage.config)).to(machine.device)
    optimizer, steps = make_optimizer(model, knobs), count_steps(knobs, stage)
    progress = dict(step=0, seconds=0.0)   # of this stage, over all sessions
    load_state(folder, model, optimizer, progress)
    micro_batch_size = choose_micro_batch(knobs, stage.config, model.num_params(True, True), machine)
    if machine.rank == 0:
        keep_metrics(folder / 'metrics.jsonl', progress['step'])
        print(f'{stage.name}: {stage.start}, N = {model.num_params():,}, {steps:,} steps of {knobs.batch_size} x {knobs.block_size} tokens'
              + (f', going on from step {progress["step"]:,}' if progress['step'] else ''), flush=True)

    corpora = [open_corpus(name, knobs.data_dir) for name in knobs.corpora]
    val = open_corpus(knobs.val_data, knobs.data_dir) if knobs.val_data else corpora[0]
    origin = stage.parent.position // knobs.block_size if stage.parent else 0   # sequences drawn by the stages before
    read = partial(sequences, corpora, list(knobs.corpora.values()), block_size=knobs.block_size, order=knobs.order, seed=knobs.seed,
                   unique_tokens=knobs.unique_tokens)
    where = machine.device, machine.rank, machine.world_size
    trained = torch.compile(model) if machine.compile else model
    if machine.world_size > 1:
        trained = DistributedDataParallel(trained, broadcast_buffers=False)

    def validate():
        with machine.autocast():
            return evaluate(trained, validation_batches(val.val, knobs.block_size, micro_batch_size, knobs.eval_tokens, *where))

    with contextlib.closing(batches(read, origin + progress['step'] * knobs.batch_size, knobs.batch_size, micro_batch_size, *where)) as stream:
        optimise(stage, knobs, machine, folder, model, trained, optimizer, stream, micro_batch_size, validate, progress, steps)
    since, loss = time.time(), validate()
    tokens = steps * knobs.batch_size * knobs.block_size
    result = Result(stage.name, str(folder), model.num_params(), stage.params, tokens, 6.0 * stage.params * tokens, stage.inherited_flops,
                    0.0 if knobs.toy else stage.baseline_flops, loss, bits_per_byte(loss, val.bytes_per_token), (origin + steps * knobs.batch_size) * knobs.block_size,
                    progress['seconds'] + time.time() - since)
    if machine.rank == 0:
        model.save(folder)
        result.write()
        for path in folder.glob('state-*'):
            shutil.rmtree(path)
    if machine.world_size > 1:
        dist.barrier()
    return result


def optimise(stage, knobs, machine, folder, model, trained, optimizer, stream, micro_batch_size, validate, progress, steps):
    """
    The hot loop: from progress['step'] to `steps`. `model` is the bare module, `trained` the same one compiled and wrapped.
    When asked to stop it saves the state, says how to go on and ends the program.
    """
    step_tokens, meter, saved = knobs.batch_size * knobs.block_size, Meter(), time.time()
    bar = tqdm(desc=stage.name, total=steps * step_tokens, initial=progress['step'] * step_tokens, unit='tok', unit_scale=True,
               disable=machine.rank > 0, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True)
    accumulate, since, seconds_before = knobs.batch_size // machine.world_size // micro_batch_size, time.time(), progress['seconds'] - time.time()
    while progress['step'] < steps:
        rate = learning_rate(progress['step'], steps, knobs)
        meter.add(train_step(stage.objective or next_token, model, trained, optimizer, stream, accumulate, rate, progress['step'] / steps, knobs, machine))
        progress['step'] = done = progress['step'] + 1
        progress['seconds'] = seconds_before + time.time()
        bar.update(step_tokens)

        evaluating = knobs.eval_interval and done % knobs.eval_interval == 0 and done < steps
        logging = done % knobs.log_interval == 0 or done == steps or evaluating
        # one process may look at its clock and signals every step; several must agree, which is a wait, so do it where there is one
        stop, save = agree(machine, saved, knobs) if logging or machine.world_size == 1 else (False, False)
        if logging or save:
            line = dict(step=done, tokens=done * step_tokens, flops=6.0 * stage.params * done * step_tokens, lr=rate,
                        tokens_per_second=meter.steps * step_tokens, **meter.read(machine.world_size))
            line['tokens_per_second'] = round(line['tokens_per_second'] / (time.time() - since))
            if not math.isfinite(line['loss'] + line['grad_norm']):   # before anything is saved
                raise UserError(f'{stage.name}: loss {line["loss"]} and gradient norm {line["grad_norm"]} at step {done}, learning rate {rate:.2g}; '
                                'nothing was saved since the last good state. Try a smaller --learning_rate or a longer --warmup')
            if evaluating:
                line['val_loss'] = validate()
            bar.set_postfix_str(', '.join(f'{k} {line[k]:.3f}' for k in ('loss', 'val_loss') if k in line), refresh=False)
            if machine.rank == 0:
                with open(folder / 'metrics.jsonl', 'a', encoding='utf-8') as metrics:
                    metrics.write(json.dumps(line) + '\n')
            since = time.time()
        if save:
            save_state(folder, model, optimizer, progress, machine)
            saved = since = time.time()
        if stop:
            bar.close()
            leave(f'{stage.name} is saved at step {done:,} of {steps:,}', machine)
    bar.close()


def train_step(objective, model, trained, optimizer, stream, accumulate, rate, progress, knobs, machine):
    """One optimizer step over `accumulate` micro-batches; returns its scalars, tensors on the device. Nothing here waits for the GPU."""
    for group in optimizer.param_groups:
        group['lr'] = rate
    scalars = {}
    for micro in range(accumulate):
        x, y = next(stream)
        # processes exchange gradients once, in the last backward pass of the step
        exchange = contextlib.nullcontext() if machine.world_size == 1 or micro == accumulate - 1 else trained.no_sync()
        with exchange:
            with machine.autocast():
                loss, more = objective(trained, x, y, progress)
            (loss / accumulate).backward()
        for name, value in dict(more, loss=loss).items():
            scalars[name] = scalars.get(name, 0) + value.detach() / accumulate
    scalars['grad_norm'] = torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return scalars


def agree(machine, saved, knobs):
    """(stop now?, save now?), the same on every process: a signal or max_minutes on any of them counts for all."""
    stop = bool(STOP) or time.time() > machine.deadline
    save = stop or time.time() - saved > 60 * knobs.save_minutes
    if machine.world_size > 1:
        flags = torch.tensor([stop, save], dtype=torch.float32, device=machine.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, save = (flag > 0 for flag in flags.tolist())
    return stop, save


def leave(what, machine):
    """Say what is saved and how to go on, and end the program: exit code 0 after max_minutes, 128 + signal after a signal."""
    if machine.rank == 0:
        print(f'\n{what}; the same command goes on from there:\n  python {shlex.join(sys.argv)}', flush=True)
    if machine.world_size > 1:
        dist.destroy_process_group()
    raise SystemExit(128 + STOP[0] if STOP else 0)


def keep_metrics(path, step):
    """Drop from metrics.jsonl what was logged after `step`: it is trained, and logged, again."""
    if path.is_file():
        lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
        write_atomically(path, ''.join(line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step))


# ---------------------------------------------------------------------------------------------------------------------
# a run

def stages_of(method, run, train):
    """Train the method's stages one after the other with `train(stage) -> Result`; yields (stage, result)."""
    stages, result = method.stages(run), None
    try:
        while True:
            stage = stages.send(result)
            result = train(stage)
            yield stage, result
    except StopIteration:
        return


def plan(run, method):
    """Print what a run would do and cost, without training: the dry run."""
    def pretend(stage):
        knobs = stage_knobs(run, stage)
        tokens = count_steps(knobs, stage) * knobs.batch_size * knobs.block_size
        return Result(stage.name, str(Path(run.out_dir) / stage.name), 0, stage.params, tokens, 6.0 * stage.params * stage.tokens, stage.inherited_flops,
                      stage.baseline_flops, math.nan, math.nan, (stage.parent.position if stage.parent else 0) + tokens, 0.0)
    rows = [['stage', 'from', 'N', 'all parameters', 'tokens', 'steps', 'batch', 'max LR', 'FLOPs', 'GPU-hours', 'GPU memory', '+ a sequence', 'disk']]
    total, disk, largest, position, baseline, family = 0.0, 0.0, 0.0, 0, 0.0, 0.0
    for stage, result in stages_of(method, run, pretend):
        knobs = stage_knobs(run, stage)
        with torch.device('meta'):
            model = GPT(stage.config)
        n_params = model.num_params(True, True)
        state, sequence = estimate_memory(stage.config, 1, n_params)
        rows.append([stage.name, stage.start, f'{model.num_params():,}', f'{n_params:,}', count(stage.tokens), f'{count_steps(knobs, stage):,}',
                     str(knobs.batch_size), f'{knobs.learning_rate:g}', human(result.flops), f'{result.flops / run.gpu_tflops / 3.6e15:,.0f}',
                     human(state) + 'B', human(sequence) + 'B', human(4 * n_params) + 'B'])
        total, disk, largest, position = total + result.flops, disk + 4 * n_params, max(largest, 12 * n_params), max(position, result.position)
        if stage.baseline_flops and (stage.parent or not family):
            family, baseline = result.total_flops, stage.baseline_flops
    print(table(rows))
    print(f'\nthis run: {human(total)}FLOPs, {total / run.gpu_tflops / 3.6e15:,.0f} GPU-hours at {run.gpu_tflops:g} TFLOP/s')
    if baseline:
        print(f'the family: {human(family)}FLOPs; every size from scratch: {human(baseline)}FLOPs; saved: {1 - family / baseline:.1%}')
    unique = min(position, run.unique_tokens or position)
    print(f'disk: {human(disk)}B of models, {human(2 * largest)}B for saved states, {human(2 * unique)}B of tokens ({count(position)} drawn, '
          f'{count(unique)} different, from {run.data})')


def record_session(run, method, origins, argv, machine):
    """Add to run.json what explains this run's numbers: knobs, what differs from the defaults, command, commit, versions, device."""
    path = Path(run.out_dir) / 'run.json'
    git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True, cwd=Path(__file__).parent)
    device = torch.cuda.get_device_name() if machine.device.type == 'cuda' else platform.machine()
    session = dict(command=['train.py', *argv], started=time.strftime('%Y-%m-%d %H:%M:%S %z'), commit=git.stdout.strip(), python=platform.python_version(),
                   torch=torch.__version__, device=f'{machine.device.type} ({device})', processes=machine.world_size, threads=torch.get_num_threads(),
                   differences=differences(run) | differences(method), set_by=origins)
    try:
        sessions = json.loads(path.read_text(encoding='utf-8'))['sessions']
    except (OSError, ValueError, KeyError):
        sessions = []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dict(knobs=asdict(run) | asdict(method), sessions=[*sessions, session]), indent=1) + '\n')


def main(argv):
    """The command line: train the stages of a method, then report; or, with dry_run, print the plan."""
    run, method, origins = configure(argv, Run, METHODS)
    files = [Path(arg).stem for arg in argv if arg.endswith('.py')]
    run.out_dir = run.out_dir or f'out/{files[-1] if files else run.method}'
    parse_mixture(run.data)
    if run.toy and any(not (Path(run.data_dir) / name / 'meta.json').is_file() for name in run.corpora):
        run.data, run.val_data = 'pydocs', ''
    if run.dry_run:
        return plan(run, method)
    machine = find_machine(run)
    if machine.rank == 0:
        print('\n'.join(f'{k} = {v!r}  ({origins.get(k, "derived")})' for k, v in (differences(run) | differences(method)).items()))
        for name in filter(None, [*run.corpora, run.val_data]):
            if name in data.prepare.OFFLINE and not (Path(run.data_dir) / name).is_dir():
                data.prepare.prepare(data.prepare.Preparation(corpus=name, out=str(Path(run.data_dir) / name)))
        record_session(run, method, origins, argv, machine)
    if machine.world_size > 1:
        dist.barrier()
    STOP.clear()
    catch_signals()
    for _ in stages_of(method, run, partial(train_stage, run=run, machine=machine)):
        pass
    if machine.rank == 0:
        print('\n' + report(run.out_dir) + f'\n\nmodels, metrics, report.md and report.png are in {run.out_dir}/')
    if machine.world_size > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    run_as_program(main)
