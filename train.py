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
import gc
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, get_total_norm

from col import ChainOfLearngene
from configurator import Count, Fraction, Natural, NonNegative, Range, SaveDtype, configure
from data.corpus import OFFLINE, open_corpus, verify_corpus
from data.instruct import supervised_source
from data.loader import batches, parse_mixture, text_source
from data.prepare import prepare_offline
from data.vocabulary import tokenizer_to_carry
from engine.errors import UserError, run_as_program
from engine.files import locked
from engine.hub import model_folder
from engine.log import Log, Meter, check_finite_loss
from engine.loss import bits_per_byte, evaluate
from engine.optimizer import learning_rate, make_optimizer, mean_over_terms
from engine.parallel import (
    attention_kernels,
    barrier,
    catch_signals,
    choose_batch,
    exit_saved,
    find_hardware,
    gather,
    is_sharded,
    place,
    set_threads,
    should_stop,
    wrap,
)
from engine.report import duration, plan_text, report
from engine.stage import Origin, Planned, Progress, Result, Stage, describe, next_token
from expand import GrowthComparison, Progressive
from inheritune import Inheritune
from let import LET
from model import GPT, GPTConfig, load, read_config
from scaling import Sweep

Beta = Annotated[float, Range(0, 1 - 1e-9)]


@dataclass
class Run:
    """General knobs, the same for every method."""

    method: str = 'pretrain'  # progressive, growth, inheritune, let, col, sweep, timeseries, ...
    out_dir: str = ''  # folder of the run; empty: out/NAME of the config or method, or out/toy/NAME
    seeds: Count = 1  # runs of everything, each with its own initialisation and data order
    # data
    data: str = 'pydocs'  # corpus, or mixture: fineweb_edu:3,starcoder:1
    data_dir: str = 'data'  # where prepared corpora are
    val_data: str = ''  # corpus of the validation loss; empty: the first of data
    verify: bool = False  # read all of the corpora first, and compare their checksums
    block_size: Count = 1024  # tokens in a sequence
    order: Literal['epoch', 'repeat', 'random'] = 'epoch'  # shuffled; alike each time; any start
    unique_tokens: Natural = 0  # cap on unique tokens, then the second epoch begins; 0: none
    eval_tokens: Natural = 1048576  # validation tokens of an evaluation; 0: the whole split
    eval_interval: Natural = 0  # steps between evaluations within a stage; 0: only at its end
    # optimisation
    batch_size: Count = 8  # sequences in a step, over all processes and micro-batches
    learning_rate: NonNegative = 1e-3  # the maximum; with init_from 1e-4, unless it is given
    schedule: Literal['cosine', 'wsd', 'constant'] = 'cosine'  # after the warmup; wsd: linear decay
    warmup: NonNegative = 0.01  # steps, or below 1 the fraction of a stage's steps
    min_lr_fraction: Fraction = 0.1  # last learning rate / maximum
    decay_fraction: Fraction = 0.1  # wsd: fraction of the steps that decays
    beta1: Beta = 0.9  # AdamW
    beta2: Beta = 0.95  # AdamW
    weight_decay: NonNegative = 0.1  # of matrices and embeddings; none for norms and biases
    grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
    seed: Natural = 1337  # of initialisation and data order
    freeze: str = ''  # regular expression: parameters in whose names it is found are not trained
    save_dtype: SaveDtype = 'auto'  # of saved weights; auto: a source model's, else float32
    keep_every: Natural = 0  # steps between models that are kept, in STAGE/step-N; 0: none
    # hardware
    device: str = 'auto'  # cuda, mps or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # bfloat16: autocast; auto: on GPUs
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on a GPU
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # replicas or shards; auto: what fits
    micro_batch_size: Natural = 0  # sequences a process trains at once; 0: as many as fit
    recompute: bool = False  # compute activations again in the backward pass: less memory
    log_interval: Count = 10  # steps between lines of metrics.jsonl, and waits for the GPU
    save_minutes: NonNegative = 10.0  # between saved states
    max_minutes: NonNegative = 0.0  # save and stop after this long, to be continued; 0: never
    # planning
    dry_run: bool = False  # print the plan and train nothing
    toy: bool = False  # shrink every model, batch and budget: the same stages and code in seconds

    @property
    def corpora(self):
        """{corpus: weight} of the training mixture."""
        return parse_mixture(self.data)

    def open_corpora(self):
        """The corpora of the mixture that are prepared."""
        prepared = [n for n in self.corpora if (Path(self.data_dir) / n / 'meta.json').is_file()]
        return [open_corpus(name, self.data_dir) for name in prepared]

    def source(self):
        """The data.loader.Source of the corpora, text or instructions. Raises UserError."""
        corpora = [open_corpus(name, self.data_dir) for name in self.corpora]
        kinds = {corpus.meta.get('kind', 'text') for corpus in corpora}
        if 'preferences' in kinds:
            raise UserError(f'data={self.data}: preferences are for --method=posttrain')
        if 'supervised' in kinds and len(corpora) > 1:
            raise UserError(f'data={self.data}: instructions cannot be mixed with other corpora')
        return supervised_source(self) if 'supervised' in kinds else text_source(self, corpora)

    @property
    def vocab_size(self):
        """Of the corpora's common tokenizer; of an unprepared corpus, its default tokenizer's."""
        sizes = {name: 257 if name in OFFLINE else 50257 for name in self.corpora}
        sizes |= {corpus.name: corpus.meta['vocab_size'] for corpus in self.open_corpora()}
        if len(set(sizes.values())) > 1:
            raise UserError(f'the corpora have different vocabularies: {sizes}')
        return max(sizes.values())

    def given_config(self, name):
        """The GPTConfig of a model, a folder or hub name, whose tokenizer the corpora must have."""
        config = read_config(model_folder(name))
        for corpus in self.open_corpora():
            corpus.check_vocabulary(config, name)
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


GENTLE = 1e-4  # maximum learning rate for weights that are trained already, where none is given


@dataclass
class Pretrain:
    """Train one model, from random initialisation or from the weights of another run."""

    size: str = '64x4'  # one of model.SIZES; 64x4, a small Llama; gpt2-64x4, a GPT-2
    init_from: str = ''  # model folder to start from; step, schedule and optimizer begin anew
    tokens: NonNegative = 0.0  # training tokens; 0: 20 per parameter, or with init_from an epoch
    epochs: NonNegative = 0.0  # passes over the training data, in place of tokens

    def stages(self, run):
        """One stage."""
        given = self.init_from and not run.toy  # a toy trains a small one
        config = run.given_config(self.init_from) if given else run.model_config(self.size)
        if config.block_size < run.block_size and not run.toy:
            raise UserError(
                f'{self.init_from or self.size} reads {config.block_size} tokens at most: '
                f'--block_size={config.block_size}'
            )
        params = config.num_params(head=True)
        tokens, epochs = self.tokens or 20 * params, self.epochs
        if epochs or given and not self.tokens:
            tokens = (epochs or 1.0) * epoch_tokens(run)
        stage = Stage(self.size, config, tokens, params)
        if given:
            stage.name = f'{Path(self.init_from).name}-continued'
            stage.origin, stage.tokenizer = Origin('weights', (self.init_from,)), self.init_from
            stage.model = partial(load, self.init_from)
        yield stage


def epoch_tokens(run):
    """Tokens of one pass over a run's training data; an instruction takes a whole sequence."""
    tokens = 0
    for corpus in run.open_corpora():
        train = corpus.meta['splits']['train']
        supervised = corpus.meta.get('kind') == 'supervised'
        tokens += train['documents'] * run.block_size if supervised else train['tokens']
    return min(tokens, run.unique_tokens or tokens)


METHODS = {
    'pretrain': Pretrain,
    'progressive': Progressive,
    'growth': GrowthComparison,
    'inheritune': Inheritune,
    'let': LET,
    'sweep': Sweep,
    'col': ChainOfLearngene,
}
if Path(__file__).with_name('extras').is_dir():  # appendices, without which all of these run
    from extras.dpo import PostTraining
    from extras.timeseries import TimeSeries

    METHODS |= dict(timeseries=TimeSeries, posttrain=PostTraining)


# ----------------------------------------------------------------------------------------------
# the loop


def train_stage(stage, run, hardware):
    """
    Train a stage, continue it where it was saved, or find it finished: returns its Result. Every
    process runs all of this.
    """
    from engine import state  # a plan need not wait for torch's checkpoints

    knobs = stage_knobs(run, stage)
    steps, step_tokens = count_steps(knobs, stage), knobs.batch_size * knobs.block_size
    folder = Path(knobs.out_dir) / stage.name

    # 1. Finished already? result.json is written last: where it is, everything is.
    if result := state.finished_before(folder, state.stage_identity(stage, knobs)):
        return result

    # 2. Model and optimizer, as the stage begins; then as its newest saved state has them.
    torch.manual_seed(knobs.seed)
    strategy, micro_batch_size = choose_batch(knobs, stage, hardware)
    sharded, model, dtype = strategy == 'fsdp', None, 'float32'
    if hardware.is_main or not sharded:  # process 0 deals out shards
        made = stage.model() if stage.model and not state.saved_states(folder) else None
        model = made or GPT(stage.config)
        dtype = str(model.wte.weight.dtype).removeprefix('torch.')
    raw_model = place(model, GPT.on_meta(stage.config) if sharded else None, hardware)
    optimizer = make_optimizer(raw_model, knobs)
    objective, stage.objective = stage.objective or next_token, None  # its teacher goes with it
    progress = dict(step=0, seconds=0.0, best=-math.inf, dtype=dtype)
    if state.saved_states(folder):
        progress = state.load_state(folder, raw_model, optimizer, objective)
    elif stage.parent and not stage.model:  # its last state, with its optimizer
        progress['dtype'] = state.load_state(stage.parent.folder, raw_model, optimizer)['dtype']
    start = progress['step']
    save_dtype = getattr(torch, knobs.save_dtype, getattr(torch, progress['dtype']))
    model = wrap(raw_model, strategy, knobs, hardware)  # compiled, exchanging gradients

    # 3. Data: which sequences come next follows from the position alone, which no state holds.
    source = stage.source(knobs) if stage.source else knobs.source()
    accumulate = knobs.batch_size // hardware.world_size // micro_batch_size
    first = stage.position // knobs.block_size + start * knobs.batch_size
    data = batches(source.read, first, knobs.batch_size, micro_batch_size, hardware, steps - start)
    own = stage.tokenizer and tokenizer_to_carry(stage.tokenizer)
    tokenizer = own if own and not source.masked else source.tokenizer  # which knows its ends

    def validation_loss():
        with hardware.autocast:
            return evaluate(model, source.validation(micro_batch_size, hardware))

    # 4. The loop. A step does not wait for the GPU; a line of metrics does.
    set_threads(hardware.device, stage.config, micro_batch_size * knobs.block_size)
    log, meter = Log(stage, knobs, steps, start, hardware.is_main), Meter()
    if hardware.is_main:
        batch = f'{steps:,} steps of {knobs.batch_size} x {knobs.block_size} tokens'
        where = f'from step {start:,}, {strategy} on {hardware.world_size} processes'
        print(f'{stage.name}: {describe(stage)}, {batch}, {where}', flush=True)
    if start == 0 and (knobs.eval_interval or stage.observe or not steps):
        line = dict(step=0, tokens=0, flops=0.0)
        line |= dict(val_loss=validation_loss()) if knobs.eval_interval else {}
        log.add(line | observed(stage, raw_model, hardware, folder, progress))
    full = micro_batch_size * knobs.block_size  # terms of a micro-batch without masked targets
    uneven = source.masked and accumulate * hardware.world_size > 1  # micro-batches' counts differ
    logged, logged_step = time.time(), start
    started = logged - progress['seconds']  # as if there had been no interruption
    save_at = logged + 60 * knobs.save_minutes
    pause = 1  # steps until processes ask each other again whether to stop or save
    for step in range(start, steps):
        rate = learning_rate(step, steps, knobs)
        for group in optimizer.param_groups:
            group['lr'] = rate
        terms = 0
        for micro in range(accumulate):
            x, y = next(data)
            if hardware.world_size > 1:  # DDP exchanges gradients once a step; FSDP always
                model.require_backward_grad_sync = micro == accumulate - 1
            with hardware.autocast:
                loss, count, scalars = objective(model, x, y, Progress(step, steps))
            (loss * (count / full if uneven else 1) / accumulate).backward()
            terms = terms + count
            meter.add(scalars | dict(loss=loss), count)
        if uneven:
            mean_over_terms(raw_model, terms, accumulate * full)
        norm = clip_grad_norm_(raw_model.parameters(), knobs.grad_clip or math.inf)
        meter.add(dict(grad_norm=norm.full_tensor() if sharded else norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done, last, stop, save = step + 1, step + 1 == steps, False, False
        progress |= dict(step=done, seconds=time.time() - started)
        step_seconds = (time.time() - logged) / (done - logged_step)
        log.bar.update(step_tokens)
        if done % pause == 0:
            stop, save, pause = should_stop(hardware, save_at, step_seconds)
        if knobs.keep_every and done % knobs.keep_every == 0:
            state.save_model(raw_model, folder / f'step-{done}', tokenizer, save_dtype)
        evaluating = knobs.eval_interval and done % knobs.eval_interval == 0 and not last
        if evaluating or last or save or done % knobs.log_interval == 0:
            line = dict(step=done, tokens=done * step_tokens)
            line |= dict(flops=stage.flops(Progress(done, steps), step_tokens), lr=rate)
            line |= meter.read() | dict(tokens_per_second=round(step_tokens / step_seconds))
            norm = get_total_norm(raw_model.parameters())
            line['param_norm'] = (norm.full_tensor() if sharded else norm).item()
            check_finite_loss(line, folder)  # before anything is saved
            if evaluating:
                line['val_loss'] = validation_loss()
            if evaluating or last:
                line |= observed(stage, raw_model, hardware, folder, progress)
            log.add(line)
            if save:
                state.save_state(folder, raw_model, optimizer, progress, objective)
                save_at = time.time() + 60 * knobs.save_minutes
            if stop:
                log.bar.close()
                del model  # a DDP that outlives Python may wait for a thread that waits for it
                gc.collect()
                exit_saved(f'{stage.name} is saved at step {done:,} of {steps:,}', hardware)
            logged, logged_step = time.time(), done

    # 5. Evaluation and save; result.json last.
    if any(gather((folder / 'best').is_dir())):
        raw_model.load_state_dict(load(folder / 'best', hardware.device).state_dict())
    val_loss = validation_loss()
    log.bar.close()
    state.save_model(raw_model, folder, tokenizer, save_dtype)
    if knobs.schedule == 'constant':  # a trunk: its branches continue the state of its end
        state.save_state(folder, raw_model, optimizer, progress)
    result = Result.of_stage(stage, knobs, steps, val_loss=val_loss, seconds=progress['seconds'])
    result.bits_per_byte = bits_per_byte(val_loss, source.bytes_per_token)
    result.memory = torch.cuda.max_memory_allocated()
    state.save_result(result, keep=knobs.schedule == 'constant')
    return result


def observed(stage, model, hardware, folder, progress):
    """What a stage observes of its model; that of the best score so far is kept, in STAGE/best."""
    if not stage.observe or is_sharded(model) or not hardware.is_main:  # it needs the whole model
        return {}
    model.eval()
    with hardware.autocast:
        seen = stage.observe(model)
    model.train()
    if progress['step'] and seen.get('score', -math.inf) > progress['best']:  # of a trained model
        model.save(folder / 'best')
        progress['best'] = seen['score']
    return seen


def stage_knobs(run, stage):
    """The general knobs as they hold for a stage."""
    knobs = replace(run, **stage.knobs)
    knobs.block_size = min(knobs.block_size, stage.config.block_size)
    return shrink(knobs) if knobs.toy else knobs


def shrink(knobs):
    """The general knobs of a toy, which takes seconds."""
    return replace(
        knobs,
        seeds=min(2, knobs.seeds),
        batch_size=min(4, knobs.batch_size),
        eval_tokens=512,
        unique_tokens=min(256, knobs.unique_tokens),  # half a stage's: epochs come to their second
        warmup=1,
        log_interval=1,
    )


def count_steps(knobs, stage):
    """
    Optimizer steps of a stage: its tokens in whole batches, rounded up; 4 for a toy. A stage of no
    tokens is its starting model, evaluated and saved.
    """
    if knobs.toy:
        return 4
    if not stage.tokens:
        return 0
    steps = stage.tokens / (knobs.batch_size * knobs.block_size)
    if steps > 1e12:
        raise UserError(f'{stage.name}: {steps:.3g} steps would never end: fewer --tokens')
    return max(1, math.ceil(steps - 1e-9))


# ----------------------------------------------------------------------------------------------
# a run


def stages_of(method, run, train):
    """
    Run a method, every stage through `train(stage) -> Result`, for each seed: the stages of later
    ones have -s1, -s2 behind their names, but those that are trained `once`. Yields (stage,
    result).
    """
    shared = {}  # stage trained once: its result
    for seed in range(run.seeds):
        stages, result = method.stages(replace(run, seed=run.seed + seed)), None
        while True:
            try:
                stage = stages.send(result)
            except StopIteration:
                break
            if result := shared.get(stage.name):
                continue
            stage.knobs.setdefault('seed', run.seed + seed)
            if not stage.once:
                stage.name += f'-s{seed}' if seed else ''
                stage.labels['seed'] = seed
            if run.toy:  # it costs what it is, not what the size that it stands for does
                stage.params = stage.config.num_params(head=True)
                stage.labels.pop('baseline_flops', None)
            result = train(stage)
            if stage.once:
                shared[stage.name] = result
            yield stage, result


def plan(run, method):
    """A list of what each stage of a run will be, in order; no model is opened."""
    planned, run = [], replace(run, dry_run=True)

    def pretend(stage):
        knobs = stage_knobs(run, stage)
        steps = count_steps(knobs, stage)
        result = Result.of_stage(stage, knobs, steps)
        planned.append(Planned(stage, knobs, steps, result))
        return result

    for _ in stages_of(method, run, pretend):
        pass
    return planned


def corpora_of(run, method):
    """{corpus: whether it is prepared} of all that a run reads."""
    names = [*run.corpora, run.val_data, *getattr(method, 'corpora', [])]
    names = filter(None, names) if getattr(method, 'reads_corpora', True) else []
    return {name: (Path(run.data_dir) / name).is_dir() for name in names}


def make_corpora(run, names):
    """Make these corpora, if they need no network. Raises UserError for others."""
    for name in names:
        folder = Path(run.data_dir) / name
        if name not in OFFLINE or run.data_dir != 'data' and not Path(run.data_dir).is_dir():
            raise UserError(
                f'{folder} is not prepared: run  python data/prepare.py {name}  first; '
                '--dry_run=True shows the plan, --toy=True runs it small'
            )
        prepare_offline(name, folder)


def main(argv):
    """The command line: train the stages of a method, then report; or print the plan."""
    run, method, origins = configure(argv, Run, METHODS)
    files = [Path(arg).stem for arg in argv if arg.endswith('.py')]
    *_, name = run.method, *files
    run.out_dir = run.out_dir or (f'out/toy/{name}' if run.toy else f'out/{name}')
    if getattr(method, 'init_from', '') and 'learning_rate' not in origins:
        run.learning_rate, origins['learning_rate'] = GENTLE, '--init_from'
    if run.toy:
        given, run = run, shrink(run)
        if not all(corpora_of(run, method).values()):  # it need not wait for a download
            run.data, run.val_data = 'pydocs', ''
            for knob, name in getattr(method, 'toy_corpora', {}).items():
                setattr(method, knob, getattr(method, knob) and name)
        origins |= {k: '--toy' for k, v in vars(run).items() if v != getattr(given, k)}
    corpora = corpora_of(run, method)
    missing = [name for name, prepared in corpora.items() if not prepared]
    if run.dry_run:
        epoch = 0 if missing else epoch_tokens(run)
        print(plan_text(run, plan(run, method), epoch, missing))
        return
    hardware, knobs = find_hardware(run), asdict(run) | asdict(method)
    if hardware.is_main:
        for knob, where in origins.items():
            print(f'{knob} = {knobs[knob]!r}  ({where})')
        if missing:
            make_corpora(run, missing)
        for name in corpora if run.verify else ():
            verify_corpus(name, run.data_dir)
        if not run.toy:  # what a plan refuses, and on a CPU what would take years
            flops = sum(planned.result.flops for planned in plan(run, method))
            duration(flops, on_cpu=hardware.device.type == 'cpu')
    barrier()
    catch_signals()
    train = partial(train_stage, run=run, hardware=hardware)
    lock = locked(run.out_dir) if hardware.is_main else contextlib.nullcontext()
    with attention_kernels(hardware.device), lock:
        results = [result for _, result in stages_of(method, run, train)]
    if hardware.is_main:
        report(run.out_dir, method.summary(results) if hasattr(method, 'summary') else [])
    if hardware.world_size > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    run_as_program(main)
