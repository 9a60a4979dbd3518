"""
The training loop that all methods share.

    python train.py config/progressive_tiny.py                   # a family, minutes on a CPU
    python train.py config/progressive_8b.py --dry_run=True      # stages, FLOPs, memory, disk
    torchrun --standalone --nproc_per_node=8 train.py config/progressive_8b.py
    python train.py --size=gpt2 --data=openwebtext --tokens=9e9  # one model, from scratch
    python train.py --help

A method yields stages (see engine/stage.py). This file trains each stage in out_dir/STAGE/ and
sends its Result back to the method. Finished stages are skipped and an interrupted one resumes from
its newest saved state, so after any interruption the same command continues the run.
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

Beta = Annotated[float, Range(0, 1 - 1e-9)]  # AdamW needs beta < 1


@dataclass
class Run:
    """General knobs, the same for every method."""

    method: str = 'pretrain'  # progressive, growth, inheritune, let, col, sweep, timeseries, ...
    out_dir: str = ''  # folder; empty: out/NAME or out/toy/NAME, NAME of the config file or method
    seeds: Count = 1  # repetitions of the run, each with its own initialisation and data order
    # data
    data: str = 'pydocs'  # corpus, or mixture: fineweb_edu:3,starcoder:1
    data_dir: str = 'data'  # folder of the prepared corpora
    val_data: str = ''  # corpus for the validation loss; empty: the first one in data
    verify: bool = False  # compare the checksums of all corpora before training
    block_size: Count = 1024  # tokens in a sequence
    order: Literal['epoch', 'repeat', 'random'] = 'epoch'  # reshuffled; same order; random offsets
    unique_tokens: Natural = 0  # use only this many tokens of the data, then repeat; 0: no cap
    eval_tokens: Natural = 1048576  # tokens per evaluation; 0: the whole validation split
    eval_interval: Natural = 0  # steps between evaluations within a stage; 0: only at its end
    # optimisation
    batch_size: Count = 8  # sequences per step, over all processes and micro-batches
    learning_rate: NonNegative = 1e-3  # the peak; with init_from the default is 1e-4
    schedule: Literal['cosine', 'wsd', 'constant'] = 'cosine'  # after warmup; wsd decays linearly
    warmup: NonNegative = 0.01  # steps; below 1: fraction of the stage's steps
    min_lr_fraction: Fraction = 0.1  # final learning rate / peak
    decay_fraction: Fraction = 0.1  # wsd: fraction of the steps spent decaying
    beta1: Beta = 0.9  # AdamW
    beta2: Beta = 0.95  # AdamW
    weight_decay: NonNegative = 0.1  # of matrices and embeddings; none for norms and biases
    grad_clip: NonNegative = 1.0  # maximum gradient norm; 0: no clipping
    seed: Natural = 1337  # of initialisation and data order
    freeze: str = ''  # regular expression; parameters whose names match (re.search) are not trained
    save_dtype: SaveDtype = 'auto'  # of saved weights; auto: the starting model's, else float32
    keep_every: Natural = 0  # steps between checkpoints to keep, in STAGE/step-N; 0: none
    # hardware
    device: str = 'auto'  # cuda, mps or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # bfloat16: autocast; auto: on GPUs
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on a GPU
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # replicas or shards; auto: ddp if it fits
    micro_batch_size: Natural = 0  # sequences per process and forward pass; 0: as many as fit
    recompute: bool = False  # activation checkpointing: less memory, more compute
    log_interval: Count = 10  # steps between lines of metrics.jsonl; each waits for the GPU
    save_minutes: NonNegative = 10.0  # minutes between saved states
    max_minutes: NonNegative = 0.0  # save and exit after so many minutes, to be resumed; 0: never
    # planning
    dry_run: bool = False  # print the plan and train nothing
    toy: bool = False  # shrink every model, batch and budget: the same stages and code in seconds

    @property
    def corpora(self):
        """{corpus: weight} of the training mixture."""
        return parse_mixture(self.data)

    def open_corpora(self):
        """Open those corpora of the mixture that are already prepared."""
        prepared = [n for n in self.corpora if (Path(self.data_dir) / n / 'meta.json').is_file()]
        return [open_corpus(name, self.data_dir) for name in prepared]

    def source(self):
        """
        The data.loader.Source of the mixture: text corpora, or one instruction set. Raises
        UserError for other combinations.
        """
        corpora = [open_corpus(name, self.data_dir) for name in self.corpora]
        kinds = {corpus.meta.get('kind', 'text') for corpus in corpora}
        if 'preferences' in kinds:
            raise UserError(f'data={self.data}: preferences are for --method=posttrain')
        if 'supervised' in kinds and len(corpora) > 1:
            raise UserError(f'data={self.data}: instructions cannot be mixed with other corpora')
        return supervised_source(self) if 'supervised' in kinds else text_source(self, corpora)

    @property
    def vocab_size(self):
        """
        The vocabulary size of the corpora's tokenizer; a corpus that is not prepared yet counts
        with its default tokenizer's. Raises UserError if the sizes differ.
        """
        # bytes and end-of-text, or GPT-2's encoding
        sizes = {name: 257 if name in OFFLINE else 50257 for name in self.corpora}
        sizes |= {corpus.name: corpus.meta['vocab_size'] for corpus in self.open_corpora()}
        if len(set(sizes.values())) > 1:
            raise UserError(f'the corpora have different vocabularies: {sizes}')
        return max(sizes.values())

    def given_config(self, name):
        """
        Read the GPTConfig of a model (folder or hub name). Raises UserError unless the corpora were
        prepared with its tokenizer.
        """
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
    """
    Shrink a GPTConfig so that it trains in seconds: fewer layers, a short context and widths that
    shrink with head_dim. The number of heads is kept, and larger sizes stay larger.
    """
    head_dim = 4 if config.rotary_fraction == 1 else 8  # so that RoPE rotates an even number
    n_layer = 3 + -(-config.n_layer // 4)  # 3 + a quarter, rounded up
    n_layer += (config.n_layer - n_layer) % 2  # keep even depths even and odd ones odd
    return replace(
        config,
        block_size=min(32, config.block_size),
        head_dim=head_dim,
        n_embd=head_dim * config.n_head,
        n_mlp=max(1, config.n_mlp * head_dim // config.head_dim),
        n_layer=min(config.n_layer, n_layer),
    )


GENTLE = 1e-4  # default peak learning rate when starting from trained weights


@dataclass
class Pretrain:
    """Train one model, from random initialisation or from given weights."""

    size: str = '64x4'  # one of model.SIZES; 64x4, a small Llama; gpt2-64x4, a GPT-2
    init_from: str = ''  # model (folder or hub name) to start from; optimizer and schedule are new
    tokens: NonNegative = 0.0  # training tokens; 0: 20 per parameter, or with init_from one epoch
    epochs: NonNegative = 0.0  # passes over the training data, overriding tokens; 0: use tokens

    def stages(self, run):
        """Yield one stage. Raises UserError if block_size exceeds the model's context."""
        given = self.init_from and not run.toy  # a toy run trains a small random model instead
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
    """
    Tokens in one pass over a run's prepared training data, at most unique_tokens. An instruction
    example counts as a whole sequence, since it is padded to one.
    """
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
if Path(__file__).with_name('extras').is_dir():  # optional: the methods above run without extras/
    from extras.dpo import PostTraining
    from extras.timeseries import TimeSeries

    METHODS |= dict(timeseries=TimeSeries, posttrain=PostTraining)


# ----------------------------------------------------------------------------------------------
# the loop


def train_stage(stage, run, hardware):
    """Train a stage, resume it, or find it finished; returns its Result. Runs on every process."""
    from engine import state  # a slow import (distributed checkpoints) that a plan does not need

    knobs = stage_knobs(run, stage)
    steps, step_tokens = count_steps(knobs, stage), knobs.batch_size * knobs.block_size
    folder = Path(knobs.out_dir) / stage.name

    # 1. Finished already? result.json is written last, so everything else exists if it does.
    assert stage.teaching or not stage.objective, 'teaching must name the objective and its knobs'
    if result := state.finished_before(folder, state.stage_identity(stage, knobs)):
        return result

    # 2. Model and optimizer: as the stage starts, then overwritten by its newest saved state.
    torch.manual_seed(knobs.seed)
    strategy, micro_batch_size = choose_batch(knobs, stage, hardware)
    sharded, model, dtype = strategy == 'fsdp', None, 'float32'
    if hardware.is_main or not sharded:  # a sharded model is built by process 0 and broadcast
        made = stage.model() if stage.model and not state.saved_states(folder) else None
        model = made or GPT(stage.config)
        dtype = str(model.wte.weight.dtype).removeprefix('torch.')
    raw_model = place(model, GPT.on_meta(stage.config) if sharded else None, hardware)
    optimizer = make_optimizer(raw_model, knobs)
    objective, stage.objective = stage.objective or next_token, None  # lets a teacher be freed
    progress = dict(step=0, seconds=0.0, best=-math.inf, dtype=dtype)
    if state.saved_states(folder):
        progress = state.load_state(folder, raw_model, optimizer, objective)
    elif stage.parent and not stage.model:  # resume the parent's last state, optimizer included
        progress['dtype'] = state.load_state(stage.parent.folder, raw_model, optimizer)['dtype']
    start = progress['step']
    # torch has no attribute 'auto': then the dtype of the starting model is used
    save_dtype = getattr(torch, knobs.save_dtype, getattr(torch, progress['dtype']))
    model = wrap(raw_model, strategy, knobs, hardware)  # torch.compile, DDP

    # 3. Data: the order is a function of the position, so no state of it is saved.
    source = stage.source(knobs) if stage.source else knobs.source()
    accumulate = knobs.batch_size // hardware.world_size // micro_batch_size
    first = stage.position // knobs.block_size + start * knobs.batch_size
    data = batches(source.read, first, knobs.batch_size, micro_batch_size, hardware, steps - start)
    own = stage.tokenizer and tokenizer_to_carry(stage.tokenizer)
    # an instruction set's own tokenizer (source.masked) also names the token that ends an answer
    tokenizer = own if own and not source.masked else source.tokenizer

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
    full = micro_batch_size * knobs.block_size  # targets in a micro-batch if none is masked
    uneven = source.masked and accumulate * hardware.world_size > 1  # their number varies
    logged, logged_step = time.time(), start
    started = logged - progress['seconds']  # so that seconds add up across interruptions
    save_at = logged + 60 * knobs.save_minutes
    pause = 1  # steps until the processes next agree on whether to stop or save
    for step in range(start, steps):
        rate = learning_rate(step, steps, knobs)
        for group in optimizer.param_groups:
            group['lr'] = rate
        terms = 0
        for micro in range(accumulate):
            x, y = next(data)
            if hardware.world_size > 1:  # DDP averages gradients once a step, FSDP every time
                model.require_backward_grad_sync = micro == accumulate - 1
            with hardware.autocast:
                loss, count, scalars = objective(model, x, y, Progress(step, steps))
            # if uneven: sum / (full x accumulate); mean_over_terms corrects the denominator
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
                del model  # DDP destroyed at interpreter exit can deadlock with its own thread
                gc.collect()
                exit_saved(f'{stage.name} is saved at step {done:,} of {steps:,}', hardware)
            logged, logged_step = time.time(), done

    # 5. Evaluate and save; result.json comes last.
    if any(gather((folder / 'best').is_dir())):  # prefer the model with the best score
        raw_model.load_state_dict(load(folder / 'best', hardware.device).state_dict())
    val_loss = validation_loss()
    log.bar.close()
    state.save_model(raw_model, folder, tokenizer, save_dtype)
    if knobs.schedule == 'constant':  # a trunk: its branches resume from its final state
        state.save_state(folder, raw_model, optimizer, progress)
    result = Result.of_stage(stage, knobs, steps, val_loss=val_loss, seconds=progress['seconds'])
    result.bits_per_byte = bits_per_byte(val_loss, source.bytes_per_token)
    result.memory = torch.cuda.max_memory_allocated()
    state.save_result(result, keep=knobs.schedule == 'constant')
    return result


def observed(stage, model, hardware, folder, progress):
    """
    Call stage.observe(model) and return its {name: value}; {} if there is none, if the model is
    sharded, and on all processes but 0. The model with the best `score` so far goes to STAGE/best.
    """
    if not stage.observe or is_sharded(model) or not hardware.is_main:
        return {}
    model.eval()
    with hardware.autocast:
        seen = stage.observe(model)
    model.train()
    if progress['step'] and seen.get('score', -math.inf) > progress['best']:  # not at step 0
        model.save(folder / 'best')
        progress['best'] = seen['score']
    return seen


def stage_knobs(run, stage):
    """The run's knobs with the stage's own values, block_size limited to the model's context."""
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
        unique_tokens=min(256, knobs.unique_tokens),  # half a toy stage, so a second epoch begins
        warmup=1,
        log_interval=1,
    )


def count_steps(knobs, stage):
    """
    The optimizer steps of a stage: its tokens / tokens per batch, rounded up; 4 for a toy. A stage
    with 0 tokens takes no step: its starting model is evaluated and saved. Raises UserError above
    1e12 steps.
    """
    if knobs.toy:
        return 4
    if not stage.tokens:
        return 0
    steps = stage.tokens / (knobs.batch_size * knobs.block_size)
    if steps > 1e12:
        raise UserError(f'{stage.name}: {steps:.3g} steps would never end: reduce --tokens')
    return max(1, math.ceil(steps - 1e-9))  # 1e-9: a rounding error must not add a step


# ----------------------------------------------------------------------------------------------
# a run


def stages_of(method, run, train):
    """
    Run a method once per seed, training each stage with `train(stage) -> Result`; yields (stage,
    result). From the second seed on, names get a suffix -s1, -s2, ... Stages marked `once` have no
    suffix and are trained for the first seed only.
    """
    shared = {}  # {name: result} of the stages marked `once`
    for seed in range(run.seeds):
        stages, result = method.stages(replace(run, seed=run.seed + seed)), None
        while True:
            try:
                stage = stages.send(result)  # the first result, None, starts the generator
            except StopIteration:
                break
            if result := shared.get(stage.name):
                continue
            stage.knobs.setdefault('seed', run.seed + seed)
            if not stage.once:
                stage.name += f'-s{seed}' if seed else ''
                stage.labels['seed'] = seed
            if run.toy:  # count the toy model's own compute, not that of the full size
                stage.params = stage.config.num_params(head=True)
                stage.labels.pop('baseline_flops', None)
            result = train(stage)
            if stage.once:
                shared[stage.name] = result
            yield stage, result


def plan(run, method):
    """The stages of a run as a list of Planned, in order, without opening any model."""
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
    """Prepare these corpora if that needs no network. Raises UserError otherwise."""
    for name in names:
        folder = Path(run.data_dir) / name
        # only the default data_dir is created: another one that is missing may be mistyped
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
    *_, name = run.method, *files  # the last config file, or else the method
    run.out_dir = run.out_dir or (f'out/toy/{name}' if run.toy else f'out/{name}')
    if getattr(method, 'init_from', '') and 'learning_rate' not in origins:
        run.learning_rate, origins['learning_rate'] = GENTLE, '--init_from'
    if run.toy:
        given, run = run, shrink(run)
        if not all(corpora_of(run, method).values()):  # use offline corpora, download nothing
            run.data, run.val_data = 'pydocs', ''
            for knob, name in getattr(method, 'toy_corpora', {}).items():
                setattr(method, knob, getattr(method, knob) and name)  # an empty knob stays empty
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
        if not run.toy:  # refuse now what a plan refuses, and what would take months on a CPU
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
