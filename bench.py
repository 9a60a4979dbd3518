"""
How fast a training step and generation are, beside other implementations of the same shape.
Variants take turns in one process, so that their ratios hold on a noisy machine.

    python bench.py                                                # tokens/s and memory of a step
    python bench.py --variants=baseline,let,rkd,salt               # a teacher's cost (LET, Table 4)
    python bench.py --variants=baseline,baseline+compile,transformers
    python bench.py --gpt2=True --variants=baseline,nanogpt --nanogpt=FOLDER
    python bench.py --what=generation --batch_size=1               # beside transformers'

Every step is one of train.py's with one micro-batch of random tokens. FLOPs per token: 6 N for the
weights of layers and head, and 12 L H D T for attention in full, as MFU is mostly quoted.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import train
from configurator import Count, configure
from engine.errors import UserError, import_extra, run_as_program, unknown
from engine.hugging_face import config_to_hugging_face
from engine.optimizer import make_optimizer
from engine.parallel import find_hardware
from engine.progress import progress_bar
from engine.report import table
from engine.stage import Progress, next_token
from let import Alignment, distil, let, pair_layers
from model import GPT, GPTConfig, load


@dataclass
class Bench:
    """Time our training step, or our generation, beside others."""

    what: Literal['steps', 'generation'] = 'steps'  # what is timed
    variants: tuple[str, ...] = ('baseline',)  # let, rkd, salt, nanogpt, transformers; +compile
    size: str = '256x6'  # a named size, or WIDTHxLAYERS
    head_dim: Count = 64  # of a WIDTHxLAYERS size
    gpt2: bool = False  # a GPT-2 of that width and depth: LayerNorm, GELU, learned positions, tied
    vocab_size: Count = 8192
    block_size: Count = 256  # tokens in a sequence; of generation, with a prompt of 16
    batch_size: Count = 8  # sequences at once
    teacher_size: str = '128x2'  # of let, rkd and salt; the default has a twelfth of size's N
    rounds: Count = 9  # turns of every variant
    nanogpt: str = ''  # folder with nanoGPT's model.py
    device: str = 'auto'  # cuda or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # auto: bfloat16 on a GPU

    def config(self, size):
        """The configuration of a size with the benchmark's vocabulary, context and heads."""
        config = GPTConfig.named(size, vocab_size=self.vocab_size, block_size=self.block_size)
        if 'x' in size and config.n_embd % self.head_dim == 0:
            heads = config.n_embd // self.head_dim
            config = replace(config, n_head=heads, n_kv_head=heads, head_dim=self.head_dim)
        if self.gpt2:
            switches = dict(norm='layer', act='gelu_exact', pos='learned', tied=True)
            config = replace(config, n_mlp=4 * config.n_embd, **switches)
        return config

    def knobs(self):
        """The general knobs of a run like this."""
        names = ('device', 'dtype', 'block_size', 'batch_size')
        return train.Run(compile='False', **{name: getattr(self, name) for name in names})


def flops_per_token(config):
    """Forward and backward: 6 per weight of layers and head, and attention in full."""
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    return 6 * config.num_params(head=True) + attention


# ----------------------------------------------------------------------------------------------
# variants


class Peer(nn.Module):
    """Another implementation, called as ours is; loss_of: (its model, x, y) -> mean loss."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, x, y):
        """What our model returns of the loss."""
        loss = self.loss_of(self.model, x, y)
        return SimpleNamespace(loss=loss, count=(y >= 0).sum())


def transformers_peer(config, options):
    """transformers' model of our shape, randomly initialised."""
    transformers = import_extra('transformers', 'the variant transformers needs')
    fields = config_to_hugging_face(config)
    for name in ('nanofamily', 'architectures', 'torch_dtype'):
        fields.pop(name)
    how = dict(attn_implementation='sdpa', use_cache=False)
    theirs = transformers.AutoConfig.for_model(**fields, **how)
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    return Peer(model, lambda m, x, y: m(input_ids=x, labels=y, shift_labels=y).loss)


def nanogpt_peer(config, options):
    """nanoGPT's model of our shape, from its own file."""
    path = Path(options.nanogpt) / 'model.py'
    if not options.nanogpt or not path.is_file():
        raise UserError('the variant nanogpt needs --nanogpt=FOLDER, with a copy of nanoGPT')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
    fields = {name: getattr(config, name) for name in names}
    return Peer(module.GPT(module.GPTConfig(dropout=0.0, **fields)), lambda m, x, y: m(x, y)[1])


PEERS = {'transformers': transformers_peer, 'nanogpt': nanogpt_peer}
KINDS = ('baseline', 'let', 'rkd', 'salt', *PEERS)


def objective_of(kind, options, config, hardware):
    """What a variant minimises; a teacher is random, of teacher_size."""
    if kind not in ('let', 'rkd', 'salt'):
        return next_token
    teacher = GPT(replace(options, gpt2=False).config(options.teacher_size))
    teacher = teacher.to(hardware.device, hardware.dtype).eval().requires_grad_(False)
    if kind == 'let':
        return let(teacher, Alignment(*pair_layers('L2E', teacher.config.n_layer, config.n_layer)))
    return distil(teacher, 0.5, s_stop=1.0 if kind == 'salt' else None)


def make_step(name, options, hardware):
    """A function that makes one training step of a variant. Raises UserError."""
    kind, _, how = name.partition('+')
    if kind not in KINDS or how not in ('', 'compile'):
        raise unknown('variant', name, [*KINDS, *(f'{kind}+compile' for kind in KINDS)])
    config, knobs = options.config(options.size), options.knobs()
    torch.manual_seed(0)
    model = PEERS[kind](config, options) if kind in PEERS else GPT(config)
    model = model.to(hardware.device, torch.float32)
    shape = (2, options.batch_size, options.block_size)
    pair = torch.randint(options.vocab_size, shape, device=hardware.device).unbind()
    called, optimizer = torch.compile(model) if how else model, make_optimizer(model, knobs)
    objective = objective_of(kind, options, config, hardware)

    def step():
        with hardware.autocast:
            loss, *_ = objective(called, *pair, Progress(0, 1000))
        loss.backward()
        clip_grad_norm_(model.parameters(), knobs.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ----------------------------------------------------------------------------------------------
# timing


def synchronise(device):
    """Wait for the GPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def take_turns(calls, tokens, rounds, device):
    """
    Records of functions {name: call} that take so many tokens each: the median of tokens per second
    and of the ratio to the first, round by round, with the range of that.
    """
    speeds = {name: [] for name in calls}
    for turn in progress_bar(range(rounds), desc='measuring'):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            synchronise(device)
            start = time.perf_counter()
            calls[name]()
            synchronise(device)
            speeds[name].append(tokens / (time.perf_counter() - start))
    records, first = [], next(iter(speeds.values()))
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(found, first)]
        record = {'variant': name, 'tokens/s': statistics.median(found)}
        record['ratio'] = statistics.median(ratios)
        records.append(record | {'range': f'{min(ratios):.2f} to {max(ratios):.2f}'})
    return records


def steps(options, hardware):
    """Records of the training steps of the variants, on a GPU with their memory at the peak."""
    calls, memory, on_gpu = {}, {}, hardware.device.type == 'cuda'
    for name in options.variants:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        calls[name] = make_step(name, options, hardware)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # the first compiles and fills the optimizer's state
            calls[name]()
        memory[name] = torch.cuda.max_memory_allocated() - before if on_gpu else None
    tokens = options.batch_size * options.block_size
    records = take_turns(calls, tokens, options.rounds, hardware.device)
    flops = flops_per_token(options.config(options.size))
    for record in records:
        record['GFLOP/s'] = record['tokens/s'] * flops / 1e9
        if on_gpu:
            record['memory'] = memory[record['variant']]
    return records


def generation(options, hardware):
    """Records of greedy generation, ours and transformers', from a prompt of 16 tokens."""
    transformers = import_extra('transformers', 'generation is compared with transformers')
    with tempfile.TemporaryDirectory() as folder:
        GPT(options.config(options.size)).save(folder, dtype=hardware.dtype)
        ours = load(folder, hardware.device).eval()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=hardware.dtype)
    theirs = theirs.to(hardware.device).eval()
    prompt = torch.randint(options.vocab_size, (options.batch_size, 16), device=hardware.device)
    new, mask = options.block_size - 16, torch.ones_like(prompt)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    calls = {
        'ours': lambda: ours.generate(prompt, new, temperature=0),
        'transformers': lambda: theirs.generate(prompt, attention_mask=mask, **how),
    }
    same = (calls['ours']() == calls['transformers']()).double().mean().item()
    print(f'{same:.1%} of the tokens are the same')
    return take_turns(calls, options.batch_size * new, options.rounds, hardware.device)


def main(argv):
    """Command line: knobs only."""
    options, _, _ = configure(argv, Bench, program='bench.py')
    if not options.variants:
        raise UserError('variants: which? See --help')
    hardware = find_hardware(options.knobs())
    measure = dict(steps=steps, generation=generation)[options.what]
    print(table(measure(options, hardware)))
    where = f'{torch.get_num_threads()} CPU threads'
    if hardware.device.type == 'cuda':
        where = torch.cuda.get_device_name()
    shape = f'{options.size}, {options.batch_size} x {options.block_size} tokens'
    print(f'\n{shape}; {where}, {hardware.dtype}, torch {torch.__version__}')


if __name__ == '__main__':
    run_as_program(main)
