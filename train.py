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
import gc
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import data.prepare
from checkpoint import (claim, damage_in, keep_metrics, load_state, owner_of, record_session, remove_states, save_moments,
                        save_state, saved_states, set_moments)
from checksums import measure, seal
from col import ChainOfLearngene
from configurator import (Progress, Result, Stage, UserError, check_ranges, configure, differences, next_token,
                          run_as_program, unknown)
from data.loader import batches, open_corpus, parse_mixture, text_source, verify_corpus
from evaluate import bits_per_byte, evaluate, report
from expand import GrowthComparison, Progressive
from inheritune import Inheritune
from let import LET
from machine import STOP, agree, attention_kernel, attention_kernels, barrier, catch_signals, find_machine, leave, share_work
from model import GPT, GPTConfig, load
from optimizer import learning_rate, make_optimizer, stable_steps
from parallel import (Meter, choose_micro_batch, choose_parallel, exchanging, load_whole, place, whole, whole_state,
                      wrap)
from plan import print_plan
from sweep import Sweep
from timeseries import TimeSeries


@dataclass
class Run:
    """General knobs, the same for every method."""
    method: str = 'pretrain'          # pretrain, progressive, growth, inheritune, let, timeseries, sweep or col
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
    optimizer_dtype: str = 'float32'  # of AdamW's two moments: float32 or bfloat16, half the bytes
    keep_optimizer: bool = False      # save AdamW's state with the finished model: twice its size, for growth to carry on
    # machine
    device: str = 'auto'              # cuda, mps or cpu
    dtype: str = 'auto'               # bfloat16 (autocast) or float32; auto: bfloat16 on a GPU that has it
    compile: str = 'auto'             # torch.compile: True or False; auto: on a GPU
    parallel: str = 'auto'            # ddp (a replica on every GPU) or fsdp (shards); auto: fsdp when a replica does not fit
    recompute: str = 'none'           # activations made again in the backward pass: none, selective (half of them) or full (all)
    log_interval: int = 10            # steps between lines of metrics.jsonl; also how often the host waits for the GPU
    save_minutes: float = 10.0        # between saved states, from which an interrupted stage goes on
    keep_states: int = 2              # how many of them are kept: should the newest be damaged, the one before it is there
    accept_changes: bool = False      # go on with a stage although knobs have changed since it began
    max_minutes: float = 0.0          # save and stop after so long, to be continued; 0: no limit
    # planning
    dry_run: bool = False             # print the plan and train nothing
    toy: bool = False                 # shrink every model, batch and budget: the same stages and code in seconds
    gpu_tflops: float = 400.0         # TFLOP/s one GPU sustains, for the plan's GPU-hours (an H100: 40% of its peak)

    def check(self):
        """Raise UserError for a knob that is out of its range, before anything is done."""
        for knob, legal in dict(dtype=('auto', 'bfloat16', 'float32'), compile=('auto', 'True', 'False'),
                                order=('epoch', 'random'), schedule=('cosine', 'wsd', 'constant'),
                                parallel=('auto', 'ddp', 'fsdp'), recompute=('none', 'selective', 'full'),
                                optimizer_dtype=('float32', 'bfloat16')).items():
            if getattr(self, knob) not in legal:
                raise unknown(knob, getattr(self, knob), legal)
        check_ranges(self, **{knob: (1, None) for knob in ('block_size', 'batch_size', 'log_interval', 'keep_states')},
                     **{knob: (0, None) for knob in (
                         'unique_tokens', 'eval_tokens', 'eval_interval', 'batch_tokens', 'micro_batch_size', 'warmup', 'eps',
                         'learning_rate', 'weight_decay', 'grad_clip', 'seed', 'save_minutes', 'max_minutes')},
                     **{knob: (0, 1) for knob in ('min_lr_fraction', 'decay_fraction')},
                     beta1=(0, 1 - 1e-9), beta2=(0, 1 - 1e-9), gpu_tflops=(1e-9, None))
        parse_mixture(self.data)

    @property
    def corpora(self):
        """{corpus: weight} of the training mixture."""
        return parse_mixture(self.data)

    @property
    def sequences(self):
        """Sequences in a step, whether the batch is given in sequences or in tokens; a toy's at most 4."""
        sequences = max(1, self.batch_tokens // self.block_size) if self.batch_tokens else self.batch_size
        return min(4, sequences) if self.toy else sequences

    @property
    def vocab_size(self):
        """Of the corpora's tokenizer, which must be one; of a corpus not prepared yet, its default tokenizer's."""
        sizes = {}
        for name in self.corpora:
            if (Path(self.data_dir) / name / 'meta.json').is_file():
                sizes[name] = open_corpus(name, self.data_dir).meta['vocab_size']
            else:
                sizes[name] = 257 if name in (*data.prepare.OFFLINE, 'signatures') else 50257
        if len(set(sizes.values())) > 1:
            raise UserError('the corpora have different vocabularies: ' + ', '.join(f'{k} {v}' for k, v in sizes.items()))
        return next(iter(sizes.values()))

    def model_config(self, size, **changes):
        """The configuration of a named size with this run's vocabulary and block_size; its toy twin when `toy` is set."""
        config = GPTConfig.named(size, **{**dict(vocab_size=self.vocab_size, block_size=self.block_size), **changes})
        if not self.toy:
            return config
        head_dim = 4 if config.rotary_fraction == 1 else 8   # widths stay in proportion, what was deeper stays deeper, even even
        n_layer = 3 + -(-config.n_layer // 4)
        return dataclasses.replace(config, block_size=min(32, config.block_size), head_dim=head_dim,
                                   n_embd=head_dim * config.n_head, n_mlp=max(1, config.n_mlp * head_dim // config.head_dim),
                                   n_layer=min(config.n_layer, n_layer + (config.n_layer - n_layer) % 2))


@dataclass
class Pretrain:
    """Train one model, from random initialisation or from the weights of another run."""
    size: str = '64x4'        # a named size, or WIDTHxLAYERS
    init_from: str = ''       # model folder: start from its weights; steps, schedule and optimizer begin anew
    tokens: float = 0.0       # training tokens; 0: 20 a parameter

    def stages(self, run):
        """One stage."""
        check_ranges(self, tokens=(0, None))
        name, config, start, model = self.size, None, 'random initialisation', None
        if self.init_from:
            name, start = f'{Path(self.init_from).name}-continued', f'weights of {self.init_from}'
            model = partial(load, self.init_from)
            config = model().config
            if config.vocab_size < run.vocab_size:   # larger: padded
                raise UserError(f'{self.init_from} has a vocabulary of {config.vocab_size}, the data one of {run.vocab_size}')
            print(f'starting from the weights in {self.init_from}; step, schedule and optimizer begin anew')
        config = config or run.model_config(self.size)
        params = config.num_params(head=True)
        yield Stage(name, config, self.tokens or 20 * params, params, start=start, model=model)


METHODS = {'pretrain': Pretrain, 'progressive': Progressive, 'growth': GrowthComparison, 'inheritune': Inheritune,
           'let': LET, 'timeseries': TimeSeries, 'sweep': Sweep, 'col': ChainOfLearngene}


# ---------------------------------------------------------------------------------------------------------------------
# what one stage trains with

def stage_knobs(run, stage, world_size=1):
    """The general knobs as they hold for a stage: its own in place of the run's, batches in sequences, toy sizes applied."""
    knobs = dataclasses.replace(run, **stage.knobs)
    knobs.block_size = min(knobs.block_size, stage.config.block_size)
    knobs.batch_size = knobs.sequences
    if knobs.toy:
        knobs.eval_tokens, knobs.warmup = 2048, 1
    if knobs.batch_size % world_size:
        raise UserError(f'{stage.name}: a batch of {knobs.batch_size} sequences cannot be dealt to {world_size} processes')
    return knobs


def count_steps(knobs, stage):
    """Optimizer steps of a stage: its tokens in whole batches, rounded up; 4 for a toy."""
    return 4 if knobs.toy else max(1, math.ceil(stage.tokens / (knobs.batch_size * knobs.block_size) - 1e-9))


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def begin(stage, knobs, folder, how, machine):
    """(model, optimizer, progress) with which a stage begins, or goes on from the newest state in its folder."""
    torch.manual_seed(knobs.seed)
    fresh = not saved_states(folder)   # else weights and moments are read below: no need to make them
    model = place(stage.model() if stage.model and fresh else GPT(stage.config), how, machine)
    optimizer = make_optimizer(model, knobs)
    progress = dict(step=0, seconds=0.0)   # of this stage, over all sessions
    if stage.score:
        progress['best'] = -math.inf
    if stage.moments and fresh:
        set_moments(model, optimizer, stage.moments(), getattr(torch, knobs.optimizer_dtype))
    load_state(folder, model, optimizer, progress)
    return model, optimizer, progress


def finished_before(stage, folder, changes, is_main):
    """
    The Result of a stage that was trained already, or None. A stage that was asked for more tokens goes on from the end of its
    stable phase. Raises UserError for one whose files are damaged.
    """
    if not (folder / 'result.json').is_file():
        return None
    damage = damage_in(folder, owner_of(folder)) if (folder / 'checksums.json').is_file() else ''
    if damage:
        raise UserError(f'{damage}. Remove {folder / "result.json"} to train the stage again, from its last state if it has one')
    result = Result.of(folder)
    stable = any(path.name.startswith('stable') for path in saved_states(folder))
    if any(change.startswith('tokens was') for change in changes) and stage.tokens > result.tokens and stable:
        barrier()   # everyone has seen the result
        if is_main:
            remove_states(folder)   # but the stable ones, if a crash left some
            (folder / 'result.json').unlink()
        barrier()
        return None
    if is_main:
        print(f'{stage.name}: finished before' + f', with other settings ({"; ".join(changes)})' * bool(changes))
        remove_states(folder)
    return result


def announce(stage, knobs, changes, how, machine, progress, steps):
    """Print what is about to be trained, and how."""
    details = [stage.start, f'N = {stage.config.num_params():,}',
               f'{steps:,} steps of {knobs.batch_size} x {knobs.block_size} tokens']
    if progress['step']:
        details.append(f'from step {progress["step"]:,} on')
    if machine.world_size > 1:
        details.append(f'{how} on {machine.world_size} processes')
    if machine.device.type == 'cuda':
        details.append(f'attention by {attention_kernel(stage.config, machine)}')
    print('\n'.join([*(f'{stage.name}: {change}' for change in changes), f'{stage.name}: {", ".join(details)}']), flush=True)


def train_stage(stage, run, machine, record):
    """
    Train one stage, or go on with it, or do nothing where it is finished: returns its Result. `record` is called once the
    folder is known to be this stage's.
    """
    knobs, folder, is_main = stage_knobs(run, stage, machine.world_size), Path(run.out_dir) / stage.name, machine.rank == 0
    corpora = [] if stage.source else [open_corpus(name, knobs.data_dir) for name in knobs.corpora]
    texts = {corpus.name: corpus.meta['splits']['train'].get('sha256') for corpus in corpora}
    changes = claim(folder, stage, knobs, texts, write=is_main)
    result = finished_before(stage, folder, changes, is_main)
    if result:
        return result
    if changes:
        claim(folder, stage, knobs, texts, write=is_main)   # it goes on: from now on this is what it is
    barrier()   # stage.json is there
    how = choose_parallel(knobs, stage.config, machine)
    model, optimizer, progress = begin(stage, knobs, folder, how, machine)
    steps, micro_batch_size = count_steps(knobs, stage), choose_micro_batch(knobs, stage.config, machine)
    if progress['step'] > steps:
        raise UserError(f'{stage.name} is at step {progress["step"]:,} already, beyond the {steps:,} that it is asked for')
    if is_main:
        keep_metrics(folder / 'metrics.jsonl', progress['step'])
        announce(stage, knobs, changes, how, machine, progress, steps)
        record()
    trained = wrap(model, how, knobs, machine)
    share_work(machine.device, stage.config, micro_batch_size * knobs.block_size)
    share = machine.device, machine.rank, machine.world_size
    source = (stage.source or text_source)(knobs)
    before = stage.data_after or stage.parent
    origin = before.position // knobs.block_size if before else 0   # sequences drawn by the stages before
    stream = batches(source.read, origin + progress['step'] * knobs.batch_size, knobs.batch_size, micro_batch_size, *share)

    def watched(batches_):
        for batch in batches_:
            if STOP and machine.world_size == 1:   # the last evaluation may be long; after others the loop looks itself
                save_state(folder, model, optimizer, progress, knobs.keep_states)
                leave(f'{stage.name} is saved at step {progress["step"]:,} of {steps:,}', machine)
            yield batch

    def validate(last=False):
        with machine.forward():
            batches_ = source.validation(micro_batch_size, *share)
            return evaluate(trained, watched(batches_) if last else batches_)

    with contextlib.closing(stream):
        optimise(stage, knobs, machine, folder, model, trained, optimizer, stream, validate, progress, steps,
                 accumulate=knobs.batch_size // machine.world_size // micro_batch_size)
    if stage.score:
        load_whole(model, load(folder / 'best', machine.device).state_dict())
    loss = validate(last=True)
    return finish_stage(stage, knobs, machine, folder, model, optimizer, source, loss, origin, steps * knobs.batch_size, progress)


def keep_best(stage, folder, model, progress, machine):
    """The model's score by its stage; the best so far is saved in `folder`/best."""
    model.eval()
    with machine.forward():
        score = torch.tensor(stage.score(model), device=machine.device)
    model.train()
    if machine.world_size > 1:   # one decision for all
        dist.broadcast(score, 0)
    if score.item() > progress['best']:
        state = whole_state(model)
        if machine.rank == 0:
            model.save(folder / 'best', state=state)
        progress['best'] = score.item()
    barrier()
    return score.item()


def finish_stage(stage, knobs, machine, folder, model, optimizer, source, loss, origin, drawn, progress):
    """
    Save the trained model and what it is sealed with, then its Result, which makes the stage finished; `drawn` sequences after
    the first `origin`.
    """
    result = Result(stage.name, str(folder), stage.config.num_params(), stage.params, tokens=drawn * knobs.block_size,
                    flops=6.0 * stage.params * drawn * knobs.block_size, inherited_flops=stage.inherited_flops,
                    baseline_flops=0.0 if knobs.toy else stage.baseline_flops, val_loss=loss,
                    bits_per_byte=bits_per_byte(loss, source.bytes_per_token), position=(origin + drawn) * knobs.block_size,
                    seconds=progress['seconds'])
    state = whole_state(model)
    try:
        if knobs.keep_optimizer:
            save_moments(folder, model, optimizer)
        if machine.rank == 0:
            model.save(folder, source.tokenizer, state)
            saved = [folder / name for name in ('config.json', 'model.safetensors', 'optimizer.safetensors')]
            seal(folder, measure(filter(Path.is_file, saved)), owner_of(folder), texts={'result.json': result.text()})
            result.write()
            remove_states(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: the trained model could not be saved ({error}); its last state is kept: when there is room '
                        'on the disk, the same command goes on') from error
    barrier()
    return result


def optimise(stage, knobs, machine, folder, model, trained, optimizer, stream, validate, progress, steps, accumulate):
    """
    The hot loop, from progress['step'] to `steps`. `model` is the bare module, `trained` the same one compiled and
    wrapped. When asked to stop it saves the state, says how to go on and ends the program.
    """
    step_tokens, meter, saved, stable = knobs.batch_size * knobs.block_size, Meter(), time.time(), stable_steps(steps, knobs)
    if machine.device.type == 'cuda':   # what is there now stays to the end: looking for garbage in it would make a step wait
        gc.unfreeze()
        gc.collect()
        gc.freeze()
    started, next_check = saved - progress['seconds'], 0
    bar = tqdm(desc=stage.name, total=steps * step_tokens, initial=progress['step'] * step_tokens, unit='tok',
               unit_scale=True, disable=machine.rank > 0, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True)
    if knobs.eval_interval and not progress['step']:
        start = json.dumps(dict(step=0, tokens=0, flops=0.0, val_loss=validate()))
        if machine.rank == 0:
            (folder / 'metrics.jsonl').write_text(start + '\n', encoding='utf-8')
    since = time.time()
    while progress['step'] < steps:
        rate = learning_rate(progress['step'], steps, knobs)
        for group in optimizer.param_groups:
            group['lr'] = rate
        meter.add(train_step(stage.objective or next_token, Progress(progress['step'], steps), knobs, machine, model, trained,
                             optimizer, stream, accumulate))
        progress.update(step=progress['step'] + 1, seconds=time.time() - started)
        done = progress['step']
        bar.update(step_tokens)

        evaluating = knobs.eval_interval and done % knobs.eval_interval == 0 and done < steps
        logging = done % knobs.log_interval == 0 or done == steps or evaluating
        # one process looks at its clock and signals every step; several must agree, a wait, so they do about every 5 seconds
        stop, save = False, False
        if machine.world_size == 1 or done >= next_check:
            stop, save, pause = agree(machine, saved, knobs, step_seconds=(time.time() - since) / max(1, meter.steps))
            next_check = done + pause
        save = save or done == stable
        if logging or save:
            line = line_of(stage, machine, folder, model, meter, done, step_tokens, rate, since)
            if evaluating:
                line['val_loss'] = validate()
            if stage.score and (evaluating or done == steps):
                line['score'] = keep_best(stage, folder, model, progress, machine)
            bar.set_postfix_str(', '.join(f'{k} {line[k]:.3f}' for k in ('loss', 'val_loss') if k in line), refresh=False)
            if machine.rank == 0:
                with open(folder / 'metrics.jsonl', 'a', encoding='utf-8') as metrics:
                    metrics.write(json.dumps(line) + '\n')
            since = time.time()
        if save:
            save_state(folder, model, optimizer, progress, knobs.keep_states, stable=done == stable)
            saved = since = time.time()
        if stop:
            bar.close()
            leave(f'{stage.name} is saved at step {done:,} of {steps:,}', machine)
    bar.close()


def line_of(stage, machine, folder, model, meter, step, step_tokens, rate, since):
    """A line of metrics.jsonl: means of what was measured since the last one. Raises UserError when they are not finite."""
    speed = meter.steps * step_tokens / (time.time() - since)
    line = dict(step=step, tokens=step * step_tokens, flops=6.0 * stage.params * step * step_tokens, lr=rate,
                **meter.read(machine.world_size), param_norm=whole(get_total_norm(model.parameters())).item())
    line['tokens_per_second'] = round(speed)
    if not math.isfinite(line['loss'] + line['grad_norm']):   # before anything is saved
        raise UserError(f'{stage.name}: loss {line["loss"]} and gradient norm {line["grad_norm"]} at step {step}, learning rate '
                        f'{rate:.2g}; the last good state is kept. Try a smaller --learning_rate or a longer --warmup, with '
                        f'another --out_dir or after removing {folder}')
    return line


def train_step(objective, progress, knobs, machine, model, trained, optimizer, stream, accumulate):
    """One optimizer step over `accumulate` micro-batches; returns its scalars as tensors: nothing here waits for the GPU."""
    scalars = {}
    for micro in range(accumulate):
        x, y = next(stream)
        with exchanging(trained, last=micro == accumulate - 1):
            with machine.forward():
                loss, more = objective(trained, x, y, progress)
            with attention_kernels(machine.device):   # recomputed attention must be the forward pass's
                (loss / accumulate).backward()
        for name, value in dict(more, loss=loss).items():
            scalars[name] = scalars.get(name, 0) + value.detach() / accumulate
    scalars['grad_norm'] = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.grad_clip or math.inf))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return scalars


# ---------------------------------------------------------------------------------------------------------------------
# a run

def stages_of(method, run, train):
    """Run a method: every stage goes through `train(stage) -> Result`, whose result it is sent. Yields (stage, result)."""
    stages, result = method.stages(run), None
    with contextlib.suppress(StopIteration):
        while True:
            stage = stages.send(result)
            result = train(stage)
            yield stage, result


def pretend(stage, run):
    """The Result that a stage would have, without its loss: for planning."""
    knobs = stage_knobs(run, stage)
    tokens = count_steps(knobs, stage) * knobs.batch_size * knobs.block_size
    return Result(stage.name, str(Path(run.out_dir) / stage.name), 0, stage.params, tokens, 6.0 * stage.params * stage.tokens,
                  stage.inherited_flops, stage.baseline_flops, val_loss=math.nan, bits_per_byte=math.nan,
                  position=(stage.parent.position if stage.parent else 0) + tokens, seconds=0.0)


def find_corpora(run, method):
    """Make pydocs and pycode if they are used and not there yet. Raises UserError for a corpus that is not prepared or damaged."""
    for name in filter(None, [*run.corpora, run.val_data, *getattr(method, 'corpora', [])]):
        if name in (*data.prepare.OFFLINE, 'signatures') and not (Path(run.data_dir) / name).is_dir():
            style = dict(prompt='plain') if name == 'signatures' else {}   # models on bytes have no room for the paper's
            data.prepare.prepare(data.prepare.Preparation(corpus=name, out=str(Path(run.data_dir) / name), **style))
        verify_corpus(name, run.data_dir)


def main(argv):
    """The command line: train the stages of a method, then report; or, with dry_run, print the plan."""
    run, method, origins = configure(argv, Run, METHODS)
    files = [Path(arg).stem for arg in argv if arg.endswith('.py')]
    run.check()
    run.out_dir = run.out_dir or f'out/{files[-1] if files else run.method}'
    if run.toy and not all((Path(run.data_dir) / name).is_dir() for name in run.corpora):
        run.data, run.val_data = 'pydocs', ''   # a toy need not wait for a download
    for knob, stand_in in getattr(method, 'stand_ins', {}).items() if run.toy else ():
        names = getattr(method, knob) if isinstance(stand_in, tuple) else (getattr(method, knob),)
        if any(name and not (Path(run.data_dir) / name).is_dir() for name in names):
            setattr(method, knob, stand_in)
    if run.dry_run:
        planned = stages_of(method, run, partial(pretend, run=run))
        print_plan(run, [(s, knobs, count_steps(knobs, s), r) for s, r in planned for knobs in [stage_knobs(run, s)]])
        return
    machine = find_machine(run)
    if machine.rank == 0:
        changed = differences(run) | differences(method)
        print('\n'.join(f'{k} = {v!r}  ({origins.get(k, "derived")})' for k, v in changed.items()))
        if getattr(method, 'reads_corpora', True):
            find_corpora(run, method)
    record = cache(partial(record_session, run.out_dir, run, method, origins, argv, machine.device, machine.world_size))
    barrier()
    STOP.clear()
    catch_signals()
    results = [result for _, result in stages_of(method, run, partial(train_stage, run=run, machine=machine, record=record))]
    if machine.rank == 0:
        summary = method.summary(results) if hasattr(method, 'summary') else ''
        print(f'\n{report(run.out_dir, summary)}\n\nmodels, metrics, report.md and report.png are in {run.out_dir}/')
    if machine.world_size > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    run_as_program(main)
