"""
Benchmark a training step, or generation, against other implementations of the same model. Variants
take turns in one process, so that their speed ratios are reliable even on a noisy machine.

    python bench.py                                                # tokens/s and memory of a step
    python bench.py --variants=baseline,let,rkd,salt               # a teacher's cost (LET, Table 4)
    python bench.py --variants=baseline,baseline+compile,transformers
    python bench.py --size=gpt2 --variants=baseline,nanogpt --nanogpt=FOLDER
    python bench.py --what=generation --batch_size=1               # against transformers

A step does the work of a step of train.py, on one micro-batch of random tokens.
"""

import os
import runpy
import tempfile
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from configurator import Count, configure
from engine.errors import UserError, import_extra, run_as_program, unknown
from engine.hugging_face import config_to_hugging_face
from engine.log import progress_bar
from engine.optimizer import make_optimizer
from engine.parallel import attention_kernels, find_hardware
from engine.report import table
from engine.stage import Progress, next_token
from let import Alignment, distil, let_objective, pair_layers
from model import GPT, GPTConfig, load
from train import Run


@dataclass
class Bench:
    """Compare the speed of our training step or generation with other implementations."""

    what: Literal['steps', 'generation'] = 'steps'  # what to time
    variants: tuple[str, ...] = ('baseline',)  # or let, rkd, salt, nanogpt, transformers; +compile
    size: str = '256x6'  # a named size, or (gpt2-)WIDTHxLAYERS, here with heads of 64 dimensions
    vocab_size: Count = 8192  # tokens in the vocabulary
    block_size: Count = 256  # tokens in a sequence; in generation, including a prompt of 16
    batch_size: Count = 8  # sequences per step
    teacher_size: str = '128x2'  # for let, rkd and salt; the default has a twelfth of size's N
    rounds: Count = 9  # measurements per variant
    nanogpt: str = 'nanoGPT'  # folder with nanoGPT's model.py
    device: str = 'auto'  # cuda or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # auto: bfloat16 on a GPU

    def config(self, size):
        """The configuration of a size with the benchmark's vocabulary, context and heads."""
        config = GPTConfig.named(size, vocab_size=self.vocab_size, block_size=self.block_size)
        if config.act == 'gelu':
            config = replace(config, act='gelu_exact')  # as in nanoGPT
        if config.head_dim == 16:  # WIDTHxLAYERS: use heads of 64 instead
            config = replace(config, n_head=max(1, config.n_embd // 64))
        return config


# ----------------------------------------------------------------------------------------------
# variants


def transformers_peer(config, options):
    """
    (transformers' model of the same shape, a function (model, x, y) -> mean loss). Raises UserError
    if transformers is not installed.
    """
    transformers = import_extra('transformers', 'the variant transformers needs')
    shape = transformers.AutoConfig.for_model(**config_to_hugging_face(config), use_cache=False)
    theirs = transformers.AutoModelForCausalLM.from_config(shape)
    return theirs, lambda m, x, y: m(input_ids=x, labels=y, shift_labels=y).loss


def nanogpt_peer(config, options):
    """
    (nanoGPT's model of the same shape, a function (model, x, y) -> mean loss), from its model.py.
    Raises UserError if that file is missing.
    """
    path = f'{options.nanogpt}/model.py'
    if not os.path.isfile(path):
        raise UserError('the variant nanogpt needs --nanogpt=FOLDER, with a copy of nanoGPT')
    theirs = runpy.run_path(path)
    sizes = config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd
    shape = theirs['GPTConfig'](*sizes, dropout=0.0, bias=config.bias)
    return theirs['GPT'](shape), lambda m, x, y: m(x, y)[1]


PEERS = {'transformers': transformers_peer, 'nanogpt': nanogpt_peer}
KINDS = ('baseline', 'let', 'rkd', 'salt', *PEERS)


def objective_of(kind, options, config, hardware):
    """The objective of one of our variants; a teacher has teacher_size and random weights."""
    if kind == 'baseline':
        return next_token
    teacher = GPT(options.config(options.teacher_size))
    teacher = teacher.to(hardware.device, hardware.dtype).eval().requires_grad_(False)
    if kind == 'let':
        pair = pair_layers('L2E', teacher.config.n_layer, config.n_layer)
        return let_objective(teacher, Alignment(*pair))
    return distil(teacher, 0.5)  # rkd; salt is the same until its s_stop


def make_step(name, options, hardware):
    """
    A function that runs one training step of a variant: one of KINDS, optionally with +compile.
    Raises UserError for an unknown one.
    """
    kind = name.removesuffix('+compile')
    if kind not in KINDS:
        raise unknown('variant', name, KINDS)
    config = options.config(options.size)
    if kind in PEERS:
        model, loss_of = PEERS[kind](config, options)
    else:
        model, objective = GPT(config), objective_of(kind, options, config, hardware)
        loss_of = lambda m, x, y: objective(m, x, y, Progress(0, 1000))[0]
    model = model.to(hardware.device, torch.float32)
    shape = (2, options.batch_size, options.block_size)
    pair = torch.randint(options.vocab_size, shape, device=hardware.device).unbind()
    called = model if name == kind else torch.compile(model)
    optimizer = make_optimizer(model, Run())

    def step():
        with hardware.autocast:
            loss = loss_of(called, *pair)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step


# ----------------------------------------------------------------------------------------------
# timing


def take_turns(calls, tokens, rounds):
    """
    Time functions, {name: call}, in `rounds` rounds. Each call processes `tokens` tokens and must
    wait for the device. Returns a record per name: the median tokens per second, and the median and
    range over the rounds of its speed relative to the first function's.
    """
    speeds = {name: [] for name in calls}
    for turn in progress_bar(range(rounds), desc='measuring'):
        # every other round in reverse, so that drift of the machine's speed cancels
        for name in list(calls)[:: (-1) ** turn]:
            start = time.perf_counter()
            calls[name]()
            speeds[name].append(tokens / (time.perf_counter() - start))
    records, first = [], next(iter(speeds.values()))
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(found, first)]
        records.append(
            {
                'variant': name,
                'tokens/s': median(found),
                'ratio': median(ratios),
                'range': f'{min(ratios):.2f} to {max(ratios):.2f}',
            }
        )
    return records


def steps(options, hardware):
    """Time a training step of each variant; on a GPU, records also have its peak memory."""
    calls, memory, on_gpu = {}, {}, hardware.device.type == 'cuda'
    for name in options.variants:
        before = torch.cuda.memory_allocated()  # 0 without a GPU
        calls[name] = make_step(name, options, hardware)
        for _ in range(3):  # warm-up: compilation, the optimizer's state
            calls[name]()
        if on_gpu:
            memory[name] = torch.cuda.max_memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()
    records = take_turns(calls, options.batch_size * options.block_size, options.rounds)
    for record in records if on_gpu else ():
        record['memory'] = memory[record['variant']]
    return records


def generation(options, hardware):
    """
    Time greedy generation, ours and transformers', from a prompt of 16 tokens. Raises UserError if
    transformers is not installed.
    """
    transformers = import_extra('transformers', 'generation is compared with transformers')
    with tempfile.TemporaryDirectory() as folder:
        GPT(options.config(options.size)).save(folder, dtype=hardware.dtype)
        ours = load(folder, hardware.device).eval()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=hardware.dtype)
    theirs = theirs.to(hardware.device).eval()
    prompt = torch.randint(options.vocab_size, (options.batch_size, 16), device=hardware.device)
    new = options.block_size - 16
    calls = {
        'ours': lambda: ours.generate(prompt, new, temperature=0).cpu(),
        'transformers': lambda: theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        ).cpu(),
    }
    same = (calls['ours']() == calls['transformers']()).double().mean().item()
    print(f'{same:.1%} of the tokens are the same')
    return take_turns(calls, options.batch_size * new, options.rounds)


def main(argv):
    """The command line: time the variants, or generation, and print a table."""
    options, _, _ = configure(argv, Bench, program='bench.py')
    hardware = find_hardware(Run(device=options.device, dtype=options.dtype))
    measure = generation if options.what == 'generation' else steps
    with attention_kernels(hardware.device):
        print(table(measure(options, hardware)))
    print(f'\n{options.size}, {options.batch_size} x {options.block_size} tokens; {hardware.name},')
    print(f'{torch.get_num_threads()} CPU threads, {hardware.dtype}, torch {torch.__version__}')


if __name__ == '__main__':
    run_as_program(main)
