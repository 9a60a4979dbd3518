"""
One training loop for every method.

    python train.py config/progressive_tiny.py                   # a family, minutes on a CPU
    python train.py config/progressive_8b.py --dry_run=True      # stages, FLOPs, memory, disk
    torchrun --standalone --nproc_per_node=8 train.py config/progressive_8b.py
    python train.py --size=gpt2 --data=openwebtext --tokens=9e9  # one model, from scratch
    python train.py --help

A method yields stages (engine/stage.py says what a stage is); this file trains each of them into
out_dir/STAGE/ and sends the method its result. A finished stage is not trained again, and an
interrupted one continues where it was saved: after any interruption the same command continues.
"""

import contextlib
import copy
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist

from col import ChainOfLearngene
from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    SaveDtype,
    configure,
    differences,
)
from data.corpus import OFFLINE, check_vocabulary, open_corpus, verify_corpus
from data.instruct import SETS
from data.loader import parse_mixture
from data.prepare import prepare_offline
from engine.device import attention_kernels, barrier, catch_signals, find_hardware
from engine.errors import UserError, run_as_program
from engine.files import locked
from engine.hub import model_folder
from engine.optimizer import learning_rate
from engine.parallel import full_tensor, gradient_sync
from engine.plan import PlannedStage, check_memory, room_for
from engine.report import format_si, plan_text, render, report_blocks, write_report
from engine.run_folder import record_session
from engine.stage import Origin, Progress, Result, Stage
from expand import GrowthComparison, Progressive
from extras.dpo import PostTraining
from extras.sweep import Sweep
from extras.timeseries import TimeSeries
from inheritune import Inheritune
from let import LET
from model import GPTConfig, load, read_config

Beta = Annotated[float, Range(0, 1 - 1e-9)]


@dataclass
class Run:
    """General knobs, the same for every method."""

    method: str = 'pretrain'  # progressive, growth, inheritune, let, col, sweep, timeseries, ...
    out_dir: str = ''  # folder of the run; empty: out/NAME of the config or method, or out/toy/NAME
    # data
    data: str = 'pydocs'  # corpus, or mixture: fineweb_edu:3,starcoder:1
    data_dir: str = 'data'  # where prepared corpora are
    val_data: str = ''  # corpus of the validation loss; empty: the first of data
    block_size: Count = 1024  # tokens in a sequence
    order: Literal['epoch', 'repeat', 'random'] = 'epoch'  # shuffled; alike each time; any start
    unique_tokens: Natural = 0  # cap on unique tokens, then the second epoch begins; 0: none
    eval_tokens: Natural = 1048576  # validation tokens of an evaluation; 0: the whole split
    eval_interval: Natural = 0  # steps between evaluations within a stage; 0: only at its end
    # batch
    batch_size: Count = 8  # sequences in a step, over all processes and micro-batches
    batch_tokens: Natural = 0  # the same in tokens, instead of batch_size; 0: batch_size counts
    micro_batch_size: Natural = 0  # sequences a process trains at once; 0: as many as fit
    # optimisation
    learning_rate: NonNegative = 1e-3  # the maximum; with init_from 1e-4, unless it is given
    schedule: Literal['cosine', 'wsd', 'constant'] = 'cosine'  # after the warmup; wsd: linear decay
    warmup: NonNegative = 0.01  # steps, or below 1 the fraction of a stage's steps
    min_lr_fraction: Fraction = 0.1  # last learning rate / maximum
    decay_fraction: Fraction = 0.1  # wsd: fraction of the steps that decays
    beta1: Beta = 0.9  # AdamW
    beta2: Beta = 0.95  # AdamW
    eps: NonNegative = 1e-8  # AdamW
    weight_decay: NonNegative = 0.1  # of matrices and embeddings; none for norms and biases
    grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
    seed: Natural = 1337  # of initialisation and data order
    save_dtype: SaveDtype = 'auto'  # of saved weights; auto: a source model's, else float32
    keep_optimizer: bool = False  # save AdamW's state with the model, for a branch to continue it
    keep_every: Natural = 0  # steps between models that are kept, in STAGE/step-N; 0: none
    # hardware
    device: str = 'auto'  # cuda, mps or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # bfloat16: autocast; auto: on GPUs
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on a GPU
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # replicas or shards; auto: what fits
    recompute: bool = False  # compute activations again in the backward pass: less memory
    log_interval: Count = 10  # steps between lines of metrics.jsonl, and waits for the GPU
    tensorboard: bool = False  # also write the metrics to out_dir/tensorboard
    wandb: str = ''  # project of Weights & Biases to which they are sent
    save_minutes: NonNegative = 10.0  # between saved states
    keep_states: Count = 2  # saved states kept: the one before the newest, in case of damage
    accept_changes: bool = False  # continue a stage although knobs have changed since it began
    max_minutes: NonNegative = 0.0  # save and stop after this long, to be continued; 0: never
    anyway: bool = False  # begin although it needs more memory, or time on a CPU, than there is
    # planning
    dry_run: bool = False  # print the plan and train nothing
    toy: bool = False  # shrink every model, batch and budget: the same stages and code in seconds
    gpu_tflops: Positive = 400.0  # TFLOP/s that one GPU sustains (an H100: 40% of its peak)

    @property
    def corpora(self):
        """{corpus: weight} of the training mixture."""
        return parse_mixture(self.data)

    @property
    def sequences(self):
        """Sequences in a step, given as such or in tokens; a toy's at most 4."""
        sequences = self.batch_size
        if self.batch_tokens:
            sequences = max(1, self.batch_tokens // self.block_size)
        return min(4, sequences) if self.toy else sequences

    @property
    def vocab_size(self):
        """Of the corpora's common tokenizer; of an unprepared corpus, its default tokenizer's."""
        sizes = {}
        for name in self.corpora:
            sizes[name] = 257 if name in OFFLINE else 50257
            if (Path(self.data_dir) / name / 'meta.json').is_file():
                sizes[name] = open_corpus(name, self.data_dir).meta['vocab_size']
        if len(set(sizes.values())) > 1:
            raise UserError(f'the corpora have different vocabularies: {sizes}')
        return next(iter(sizes.values()))

    def given_config(self, name):
        """The GPTConfig of a model, a folder or hub name, whose tokenizer the corpora must have."""
        config = read_config(model_folder(name))
        for corpus in self.corpora:
            if (Path(self.data_dir) / corpus / 'meta.json').is_file():
                check_vocabulary(open_corpus(corpus, self.data_dir), config, name)
        return config

    def model_config(self, size, **changes):
        """The configuration of a named size with this run's vocabulary and block_size."""
        fields = dict(vocab_size=self.vocab_size, block_size=self.block_size) | changes
        config = GPTConfig.named(size, **fields)
        return toy_config(config) if self.toy else config


def toy_config(config):
    """A shape in proportion that trains in seconds: narrower heads, fewer layers, order kept."""
    head_dim = 4 if config.rotary_fraction == 1 else 8
    n_layer = 3 + -(-config.n_layer // 4)
    n_layer += (config.n_layer - n_layer) % 2  # what was even stays even
    return replace(
        config,
        block_size=min(32, config.block_size),
        head_dim=head_dim,
        n_embd=head_dim * config.n_head,
        n_mlp=max(1, config.n_mlp * head_dim // config.head_dim),
        n_layer=min(config.n_layer, n_layer),
    )


@dataclass
class Pretrain:
    """Train one model, from random initialisation or from the weights of another run."""

    size: str = '64x4'  # one of engine/sizes.toml; 64x4, a small Llama; gpt2-64x4, a GPT-2
    init_from: str = ''  # model folder to start from; step, schedule and optimizer begin anew
    tokens: NonNegative = 0.0  # training tokens; 0: 20 per parameter, or with init_from an epoch
    epochs: NonNegative = 0.0  # passes over the training data, in place of tokens

    def stages(self, run):
        """One stage."""
        name, origin, model = self.size, Origin(), None
        if self.init_from and not run.toy:  # a toy trains a small one
            name = f'{Path(self.init_from).name}-continued'
            origin = Origin('weights', (self.init_from,))
            model = partial(load, self.init_from)
            config = run.given_config(self.init_from)
            if not run.dry_run:
                print(f'weights from {self.init_from}; step, schedule and optimizer begin anew')
        else:
            config = run.model_config(self.size)
        params = config.num_params(head=True)
        tokens = self.tokens or 20 * params
        if (self.epochs or self.init_from and not self.tokens) and not run.toy:
            tokens = (self.epochs or 1.0) * epoch_tokens(run, config)
        kept = '' if run.toy else self.init_from
        yield Stage(name, config, tokens, params, origin, model, tokenizer=kept)


GENTLE = 1e-4  # maximum learning rate for weights that are trained already, where none is given


def epoch_tokens(run, config):
    """Tokens of one pass over a run's training data; an instruction takes a whole sequence."""
    tokens = 0
    for name in run.corpora:
        meta = open_corpus(name, run.data_dir).meta
        train, length = meta['splits']['train'], min(run.block_size, config.block_size)
        supervised = meta.get('kind') == 'supervised'
        tokens += train['documents'] * length if supervised else train['tokens']
    return min(tokens, run.unique_tokens or tokens)


METHODS = {
    'pretrain': Pretrain,
    'progressive': Progressive,
    'growth': GrowthComparison,
    'inheritune': Inheritune,
    'let': LET,
    'timeseries': TimeSeries,
    'sweep': Sweep,
    'col': ChainOfLearngene,
    'posttrain': PostTraining,
}


# ----------------------------------------------------------------------------------------------
# the loop


def train_step(training):
    """One optimizer step; returns its scalars as tensors: nothing here waits for the GPU."""
    model = training.ddp_model
    optimizer = training.optimizer
    hardware = training.hardware
    accumulate, scalars = training.accumulate, {}
    for micro in range(accumulate):
        x, y = next(training.batches)
        with gradient_sync(model, last=micro == accumulate - 1):
            with hardware.forward():
                loss, more = training.objective(model, x, y, training.progress)
            with attention_kernels(hardware.device):  # recomputed attention uses the same one
                (loss / accumulate).backward()
        for name, value in (more | dict(loss=loss)).items():
            scalars[name] = scalars.get(name, 0) + value.detach() / accumulate
    limit = training.knobs.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(training.raw_model.parameters(), limit)
    scalars['grad_norm'] = full_tensor(norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return scalars


def train_to_the_end(training):
    """The loop over the steps of a stage."""
    knobs = training.knobs
    if training.step == 0 and (knobs.eval_interval or training.stage.observe or not training.steps):
        line = dict(step=0, tokens=0, flops=0.0)
        if knobs.eval_interval:
            line['val_loss'] = training.validate()
        training.log(line | training.observe())
    while training.step < training.steps:
        rate = learning_rate(training.step, training.steps, knobs)
        for group in training.optimizer.param_groups:
            group['lr'] = rate
        scalars = train_step(training)
        training.meter.add(scalars)
        training.count_step()
        if knobs.keep_every and training.step % knobs.keep_every == 0:
            training.keep()

        last = training.step == training.steps
        evaluating = knobs.eval_interval and training.step % knobs.eval_interval == 0 and not last
        logging = training.step % knobs.log_interval == 0 or last or evaluating
        stop, save = training.due()
        if logging or save:
            line = training.measure(rate)
            if evaluating:
                line['val_loss'] = training.validate()
            if evaluating or last:
                line |= training.observe()
            if training.stage.score and (evaluating or last):
                line['score'] = training.keep_best()
            training.log(line)
        if save:
            training.save()
        if stop:
            training.exit()


def train_stage(stage, run, hardware, record):
    """
    Train a stage, continue it, or do nothing if it is finished: returns its Result. `record` is
    called once the folder is known to be this stage's.
    """
    from engine.training import Training  # a plan need not wait for what it imports

    knobs = stage_knobs(run, stage, hardware.world_size)
    training = Training(stage, knobs, hardware, count_steps(knobs, stage))
    result = training.finished_before()
    if result:
        return result
    training.make_model()  # by the method, unless a state was saved
    training.make_optimizer()
    training.restore()  # the newest state, if there is one
    training.open_data()
    if hardware.is_main:
        record()
    with contextlib.closing(training.batches):
        train_to_the_end(training)
    return training.finish()


def stage_knobs(run, stage, world_size=1):
    """The general knobs as they hold for a stage, its batch in sequences. Raises UserError."""
    knobs = replace(run, **stage.knobs)
    knobs.block_size = min(knobs.block_size, stage.config.block_size)
    knobs.batch_size = knobs.sequences
    if knobs.toy:
        knobs.eval_tokens, knobs.warmup, knobs.log_interval = 2048, 1, 1
    if knobs.batch_size % world_size:
        raise UserError(
            f'{stage.name}: a batch of {knobs.batch_size} sequences cannot be divided among '
            f'{world_size} processes'
        )
    return knobs


def count_steps(knobs, stage):
    """
    Optimizer steps of a stage: its tokens in whole batches, rounded up; 4 for a toy. A stage of no
    tokens is its starting model, evaluated and saved.
    """
    if knobs.toy:
        return 4
    if not stage.tokens:
        return 0
    return max(1, math.ceil(stage.tokens / (knobs.batch_size * knobs.block_size) - 1e-9))


# ----------------------------------------------------------------------------------------------
# a run


def stages_of(method, run, train):
    """Run a method, every stage through `train(stage) -> Result`. Yields (stage, result)."""
    stages, result = method.stages(run), None
    while True:
        try:
            stage = stages.send(result)
        except StopIteration:
            return
        if run.toy:  # it costs what it is, not what the size that it stands for does
            stage.params, stage.baseline_flops = stage.config.num_params(head=True), 0.0
        result = train(stage)
        yield stage, result


def plan_stage(stage, run):
    """The PlannedStage of a dry run: its Result has no loss."""
    knobs = stage_knobs(run, stage)
    steps = count_steps(knobs, stage)
    result = Result.given(stage.name, Path(run.out_dir) / stage.name)
    result.params = stage.params
    result.tokens = steps * knobs.batch_size * knobs.block_size
    if run.toy:
        stage.tokens = result.tokens
    # of the tokens asked for: those trained on are rounded up to whole batches
    result.flops = stage.flops(Progress(steps, steps), stage.tokens / max(1, steps))
    result.inherited_flops, result.before = stage.inherited_flops, stage.before
    result.baseline_flops = stage.baseline_flops
    result.position = stage.position + result.tokens
    result.labels = stage.labels
    return PlannedStage(stage, knobs, steps, result)


def plan(run, method):
    """The PlannedStages of a run, in order."""
    planned = []

    def pretend(stage):
        planned.append(plan_stage(stage, run))
        return planned[-1].result

    for _ in stages_of(method, run, pretend):
        pass
    return planned


CPU_FLOPS = 5e10  # what a core sustains, for a plan: a guess from machines of these years
CPU_DAYS = 60  # that a run on a CPU may take


def for_planning(run, method):
    """The knobs with which a plan opens no model, and a method that it may change."""
    method = copy.deepcopy(method)
    for knob in ('reference', 'base_model', 'ancestor'):  # shapes are read where they are
        if getattr(method, knob, '') and not run.toy:
            setattr(method, knob, str(model_folder(getattr(method, knob))))
    return replace(run, dry_run=True), method


def check_possible(run, method, hardware):
    """Raise UserError, with the numbers, for a run that needs more memory or time than there is."""
    planned = plan(*for_planning(run, method))
    for stage, knobs, _, _ in planned:
        check_memory(stage.name, stage.config, knobs, room_for(hardware, stage))
    flops = sum(result.flops for _, _, _, result in planned)
    days = flops / (CPU_FLOPS * (os.cpu_count() or 1)) / 86400
    if hardware.device.type == 'cpu' and days > CPU_DAYS:
        long = f'{days:,.0f} days' if days < 1000 else f'{days / 365:,.0f} years'
        raise UserError(
            f'{format_si(flops)}FLOPs take about {long} on this CPU: --dry_run=True shows the '
            'plan, --toy=True runs it small, --anyway=True begins'
        )


def use_toy_corpora(run, method):
    """Replace corpora that are not prepared: a toy need not wait for a download."""

    def missing(names):
        return any(name and not (Path(run.data_dir) / name).is_dir() for name in names)

    if missing(run.corpora):
        run.data, run.val_data = 'pydocs', ''
    for knob, stand_in in getattr(method, 'toy_corpora', {}).items():
        names = getattr(method, knob)
        if missing([names] if isinstance(names, str) else names):
            setattr(method, knob, stand_in)


def find_corpora(run, method):
    """The names of the corpora that are used; offline ones are made. UserError: one is missing."""
    names = list(filter(None, [*run.corpora, run.val_data, *getattr(method, 'corpora', [])]))
    for name in names:
        folder = Path(run.data_dir) / name
        if name in OFFLINE and not folder.is_dir():
            prepare_offline(name, folder)
        if not folder.is_dir():
            raise UserError(
                f'{folder} is not prepared: run  python data/prepare.py {name}'
                f'{tokens_wanted(name, run, method)}  first; --dry_run=True shows the plan, '
                '--toy=True runs it small'
            )
    return names


def tokens_wanted(name, run, method):
    """' --max_tokens=...', what a run draws from a corpus of text that is not prepared, or ''."""
    if name not in run.corpora or name in SETS or getattr(method, 'init_from', ''):
        return ''
    tokens = max(p.result.position for p in plan(*for_planning(run, method)))
    tokens = (
        min(tokens, run.unique_tokens or tokens) * run.corpora[name] / sum(run.corpora.values())
    )
    return f' --max_tokens={1.06 * tokens:.2g}'  # rounding may take 5% off


def main(argv):
    """The command line: train the stages of a method, then report; or print the plan."""
    run, method, origins = configure(argv, Run, METHODS)
    files = [Path(arg).stem for arg in argv if arg.endswith('.py')]
    name = files[-1] if files else run.method
    run.out_dir = run.out_dir or (f'out/toy/{name}' if run.toy else f'out/{name}')
    parse_mixture(run.data)
    if getattr(method, 'init_from', '') and 'learning_rate' not in origins:
        run.learning_rate = GENTLE
    if run.toy:
        use_toy_corpora(run, method)
    if run.dry_run:
        print(plan_text(run, plan(run, method)))
        return
    hardware = find_hardware(run)
    changed = differences(run) | differences(method)
    if hardware.is_main:
        for knob, value in changed.items():
            print(f'{knob} = {value!r}  ({origins.get(knob, "derived")})')
        corpora = find_corpora(run, method) if getattr(method, 'reads_corpora', True) else []
        if not run.anyway:
            check_possible(run, method, hardware)
        for name in corpora:
            verify_corpus(name, run.data_dir)
    session = dict(command=['train.py', *argv], device=hardware.name)
    session |= dict(processes=hardware.world_size, differences=changed, set_by=origins)
    record = cache(partial(record_session, run.out_dir, asdict(run) | asdict(method), session))
    barrier()
    catch_signals()
    train = partial(train_stage, run=run, hardware=hardware, record=record)
    with locked(run.out_dir) if hardware.is_main else contextlib.nullcontext():
        results = [result for _, result in stages_of(method, run, train)]
    if hardware.is_main:
        summary = method.summary(results) if hasattr(method, 'summary') else []
        blocks = report_blocks(run.out_dir, summary)
        print(f'\n{render(blocks)}')  # before anything is written, which may fail
        write_report(run.out_dir, blocks)
        print(f'\nmodels, metrics, report.md and report.png are in {run.out_dir}/')
    if hardware.world_size > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    run_as_program(main)
