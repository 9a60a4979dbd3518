"""
How fast a training step is: variants take turns in one process, so that their ratios hold on a
noisy machine.

    python bench.py                                                  # tokens/s, MFU, memory
    python bench.py --variants=baseline,let,rkd                      # the cost of a teacher
    python bench.py --variants=baseline,compile,transformers         # against transformers
    python bench.py --gpt2=True --variants=baseline,nanogpt --nanogpt=FOLDER
    python bench.py --size=gpt2 --vocab_size=50257 --block_size=1024 --batch_size=32 --data=real
    python bench.py --what=loader                                    # the loader alone
    python bench.py --what=profile                                   # where a step's time goes
    python bench.py --what=fits                                      # scaling laws, beside scipy
    python bench.py --what=generation                                # beside transformers'
    python bench.py --what=saving                                    # how long a save is waited for
    python bench.py --what=curves                                    # how cost grows with size
    python bench.py --what=gpu                                       # all of it on a GPU, one table

A variant is `baseline`, an objective (let; rkd, which SALT is while it lasts), another loss over
our layers (logits, all at once; linear_cross_entropy, torch's own) or another implementation
(transformers, nanogpt). Behind it, `+compile`, `+selective` or `+full` (recomputed activations),
`+compact` (moments in bfloat16), `+fp8` (the blocks' products), `+ddp` or `+fsdp` (gradients or
shards exchanged by a group of this process alone); `compile` alone is baseline+compile. One that
fails leaves the others alone.
Every step is train.py's own train_step. FLOPs per token: 6 N for the weights of layers and head,
and for attention 12 L H D T in full, as MFU is mostly quoted, or half of it, which causal attention
needs. The peak is what a large matrix product reaches here in the same round, or peak_tflops.
"""

import os
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import engine.quick_start  # before torch, whose import it shortens

import torch

import scaling
import train
from configurator import Count, Natural, NonNegative, Range, configure
from data.corpus import verify_corpus
from data.loader import batches, text_source
from engine.device import find_hardware
from engine.errors import UserError, first_line, import_extra, run_as_program
from engine.files import write_json
from engine.minimise import huber
from engine.plan import all_params, estimate_memory
from engine.progress import progress_bar
from engine.report import format_count, table
from extras.timing import matrix_product_rate, synchronise
from extras.variants import knobs_of, make_variant, parse_variant
from model import GPTConfig

WHAT = ('steps', 'loader', 'profile', 'fits', 'generation', 'saving', 'curves', 'gpu')


@dataclass
class Bench:
    """Time training steps of a shape, variants side by side."""

    what: Literal[*WHAT] = 'steps'  # what to measure
    variants: tuple[str, ...] = ('baseline',)  # baseline, let, rkd, transformers, nanogpt; + how
    size: str = '256x6'  # a named size, or WIDTHxLAYERS
    head_dim: Count = 64  # of a WIDTHxLAYERS size
    layers: Natural = 0  # cut or deepen size to so many; 0: its own
    gpt2: bool = False  # a GPT-2 of that width and depth: LayerNorm, GELU, learned positions, tied
    vocab_size: Count = 8192
    block_size: Count = 256
    batch_size: Count = 8  # sequences per step
    teacher_size: str = '128x2'  # of let and rkd; the default has a twelfth of size's N
    data: Literal['synthetic', 'real'] = 'synthetic'  # random tokens, or through the loader
    corpus: str = 'pydocs'  # prepared corpus of --data=real
    data_dir: str = 'data'  # where it is
    rounds: Annotated[int, Range(1, 10000)] = 9  # turns of every variant
    steps: Annotated[int, Range(1, 10000)] = 2  # in a turn
    nanogpt: str = ''  # folder with nanoGPT's model.py
    peak_tflops: NonNegative = 0.0  # of which percentages are; 0: of a matrix product's rate
    device: str = 'auto'  # cuda or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # auto: bfloat16 on a GPU
    save: str = ''  # also write what is printed to this JSON file
    parts: tuple[str, ...] = ()  # of gpu or curves; empty: all
    out: str = 'out/bench'  # folder of their tables
    toy: bool = False  # small: gpu on a CPU, generation, saving and curves in a test

    def config(self, size):
        """The configuration of a size with the benchmark's vocabulary, context and heads."""
        sizes = dict(vocab_size=self.vocab_size, block_size=self.block_size)
        config = GPTConfig.named(size, **sizes)
        if self.layers and size == self.size:
            config = replace(config, n_layer=self.layers)
        if 'x' in size and config.n_embd % self.head_dim == 0:
            heads = config.n_embd // self.head_dim
            config = replace(config, n_head=heads, n_kv_head=heads, head_dim=self.head_dim)
        if self.gpt2:
            switches = dict(norm='layer', act='gelu_exact', pos='learned', tied=True)
            config = replace(config, n_mlp=4 * config.n_embd, **switches)
        return config

    def knobs(self, **changes):
        """The general knobs of a run like this."""
        same = {
            name: getattr(self, name) for name in ('device', 'dtype', 'block_size', 'batch_size')
        }
        same |= dict(compile='False', data=self.corpus, data_dir=self.data_dir)
        return train.Run(**same | changes)


def flops_per_token(config, causal):
    """Forward and backward: 6 per weight of layers and head, and attention in full or causal."""
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    return 6 * config.num_params(head=True) + attention / (2 if causal else 1)


# ----------------------------------------------------------------------------------------------
# timing


def peak_memory(function, device):
    """Bytes that a call allocates at its peak, above what was held before."""
    if device.type == 'cuda':
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def count_waits(function):
    """How often a call on a GPU makes the host wait for it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            function()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchroniz' in str(warning.message) for warning in caught)


@dataclass
class Measured:
    """What was measured of a variant."""

    held: int  # bytes between steps
    peak: int  # bytes at a step's peak, above that
    first_step: float  # seconds; it compiles
    breaks: int  # of the graph, where it is compiled
    waits: int | None  # of the host for the GPU in a step
    speeds: list  # tokens per second, of every round


def begin(name, options, hardware, stream):
    """(what train_step needs for a variant, warm; its Measured, without speeds)."""
    breaks = torch._dynamo.utils.counters['graph_break']
    breaks.clear()
    variant, held = make_variant(name, options, hardware)
    variant.batches = stream
    step = partial(train.train_step, variant)
    start = time.perf_counter()
    step()
    synchronise(hardware.device)
    first = time.perf_counter() - start
    step()
    peak = peak_memory(step, hardware.device)
    waits = count_waits(step) if hardware.device.type == 'cuda' else None
    return variant, Measured(held, peak, first, sum(breaks.values()), waits, [])


def begin_all(options, hardware):
    """({variant: what train_step needs}, {variant: Measured}, {variant: why it failed})."""
    shape = (2, options.batch_size, options.block_size)
    pair = torch.randint(options.vocab_size, shape, device=hardware.device).unbind()
    stream = iter(lambda: pair, None)
    if options.data == 'real':
        verify_corpus(options.corpus, options.data_dir)
        read, size = text_source(options.knobs()).read, options.batch_size
        stream = batches(read, 0, size, size, hardware)
    variants, found, failed = {}, {}, {}
    torch._dynamo.config.cache_size_limit = 8 * len(options.variants)  # all share GPT's code
    for name in options.variants:
        parse_variant(name)
        try:
            variants[name], found[name] = begin(name, options, hardware, stream)
        except (UserError, RuntimeError) as error:  # out of memory, a compiler's errors
            failed[name] = str(error) if isinstance(error, UserError) else first_line(error)
        if failed and hardware.device.type == 'cuda':
            torch.cuda.empty_cache()
    if not variants:
        raise UserError('; '.join(failed.values()))
    return variants, found, failed


def check_fits(options, hardware):
    """Raise UserError for a shape that needs more memory than there is."""
    needed = sum(estimate_memory(options.config(options.size), options.knobs(), options.batch_size))
    if needed > hardware.memory:
        found = f'of which {hardware.memory / 1e9:.1f} GB are free'
        raise UserError(f'{options.size} needs {needed / 1e9:.1f} GB to be trained, {found}')


def measure(options):
    """({variant: Measured}, {variant: why it failed}, a product's FLOP/s each round, hardware)."""
    hardware = find_hardware(options.knobs())
    check_fits(options, hardware)
    variants, found, failed = begin_all(options, hardware)
    rates, tokens = [], options.steps * options.batch_size * options.block_size
    for turn in progress_bar(range(options.rounds), desc='measuring'):
        rates.append(matrix_product_rate(hardware.device, hardware.dtype))
        names = list(variants)
        if turn % 2:
            names.reverse()
        for name in names:
            synchronise(hardware.device)
            start = time.perf_counter()
            for _ in range(options.steps):
                train.train_step(variants[name])
            synchronise(hardware.device)
            found[name].speeds.append(tokens / (time.perf_counter() - start))
    return found, failed, rates, hardware


def estimated_memory(name, options):
    """What engine/plan.py expects one of our variants to take, in bytes; None for others."""
    kind, changes = parse_variant(name)
    if kind != 'baseline' or 'fsdp' in changes:
        return None
    knobs = knobs_of(changes, options)
    return sum(estimate_memory(options.config(options.size), knobs, options.batch_size))


def steps(options):
    """(records of the variants, what they were measured on in words)."""
    found, failed, rates, hardware = measure(options)
    config, on_gpu = options.config(options.size), hardware.device.type == 'cuda'
    dtype = str(hardware.dtype).removeprefix('torch.')
    if options.peak_tflops:
        rates = [options.peak_tflops * 1e12] * len(rates)
    full = flops_per_token(config, causal=False)
    causal = flops_per_token(config, causal=True)
    first, records = next(iter(found.values())), []
    for name, one in found.items():
        speed = statistics.median(one.speeds)
        share = statistics.median(a / b for a, b in zip(one.speeds, rates))
        memory = one.held + one.peak
        record = {'variant': name, 'tokens/s': speed}
        record['ratio'] = statistics.median(a / b for a, b in zip(one.speeds, first.speeds))
        record |= {'GFLOP/s': speed * full / 1e9, 'of peak': share * full}
        record |= {'of peak, causal': share * causal, 'memory': memory}
        record['memory ratio'] = memory / (first.held + first.peak)
        if on_gpu:
            record['estimate'] = estimated_memory(name, options)
            record |= {'first step, s': one.first_step, 'graph breaks': one.breaks}
            record['host waits'] = one.waits
        records.append(record)
    where = f'{torch.get_num_threads()} CPU threads'
    if on_gpu:
        where = torch.cuda.get_device_name()
    prefixes = ('MALLOC_', 'PYTORCH_CUDA_ALLOC', 'LD_PRELOAD')
    allocator = {k: v for k, v in os.environ.items() if k.startswith(prefixes)} or 'default'
    source = 'of the data sheet' if options.peak_tflops else 'in a matrix product'
    reasons = ''.join(f'{name} failed: {why}\n' for name, why in failed.items())
    return records, (
        f'{reasons}{options.size}: N = {format_count(config.num_params())}, '
        f'{format_count(all_params(config))} with embeddings; {options.batch_size} x '
        f'{options.block_size} tokens per step, vocabulary {config.vocab_size}; {full / 1e6:.1f} '
        f'MFLOP per token (attention in full), {causal / 1e6:.1f} (causal)\n{where}, {dtype}, '
        f'torch {torch.__version__}, allocator {allocator}; '
        f'peak: {statistics.median(rates) / 1e9:,.0f} '
        f'GFLOP/s {source}; medians of {options.rounds} rounds and of their ratios'
    )


def profile(options):
    """(records of the operators, or a GPU's kernels, that a step's time goes to; in words)."""
    hardware = find_hardware(options.knobs())
    check_fits(options, hardware)
    name = options.variants[0]
    variants, _, _ = begin_all(replace(options, variants=(name,)), hardware)
    on_gpu = hardware.device.type == 'cuda'
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=kinds) as found:
        start = time.perf_counter()
        for _ in range(options.steps):
            train.train_step(variants[name])
        synchronise(hardware.device)
        wall = 1e6 * (time.perf_counter() - start)  # microseconds, as the profiler counts
    spent = {}  # operator or kernel: (microseconds, calls)
    for event in found.key_averages():
        of_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if of_gpu == on_gpu and not event.is_user_annotation:
            time_of = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[event.key] = time_of, event.count
    records, total = [], sum(microseconds for microseconds, _ in spent.values())
    for key, (microseconds, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:25]:
        record = {'kernel' if on_gpu else 'operator': key[:90], 'calls': count / options.steps}
        record |= {'ms': microseconds / options.steps / 1e3, 'of the time': microseconds / total}
        records.append(record)
    per_step = f'{wall / options.steps / 1e3:.1f} ms a step of {name}'
    return records, f'{per_step}, of which {total / wall:.0%} in what is listed or shorter'


def loader(options):
    """(records of what the loader gives in tokens per second; what the model takes in words)."""
    taken = replace(options, variants=options.variants[:1], data='real')
    found, _, _, hardware = measure(taken)
    speed = statistics.median(found[options.variants[0]].speeds)
    size, records = options.batch_size, []
    torch.set_num_threads(1)
    for order in ('epoch', 'random'):
        stream = batches(text_source(options.knobs(order=order)).read, 0, size, size, hardware)
        tokens, start = 0, time.perf_counter()
        for _ in range(options.rounds * 100):
            tokens += next(stream)[0].numel()
        synchronise(hardware.device)
        rate = tokens / (time.perf_counter() - start)
        records.append(
            {'order': order, 'tokens/s': rate, 'over the model': f'{rate / speed:,.0f}x'}
        )
    return records, f'{options.size} takes {speed:,.0f} tokens/s'


def fit_with_scipy(law, x, target, problems, how):
    """
    Let scipy's BFGS solve one problem after the other: pairs of a start (P,) and weights (n,) that
    add up to 1. how: 'autograd' for the gradient, or 'differences'.
    """
    minimize = import_extra('scipy.optimize', 'its fits need scipy').minimize

    def function(theta, weight):
        theta = torch.tensor(theta, requires_grad=how == 'autograd')
        value = weight @ huber((scaling.log_loss(law, theta, x) - target) / scaling.DELTA)
        if how == 'differences':
            return value.item()
        return value.item(), torch.autograd.grad(value, theta)[0].numpy()

    for start, weight in progress_bar(problems, desc=how):
        jac = how == 'autograd' or None
        minimize(function, start.numpy(), method='BFGS', jac=jac, args=(weight,))


def fits(options):
    """(records of what a problem of a fit takes, here and with scipy's BFGS; in words)."""
    truth = dict(logA=5.0, alpha1=0.2, alpha2=0.3, alpha3=0.007, logE=0.2)
    D = [1e7 * 2.0**i for i in range(7)]
    data = dict(N=[1e6] * 49, D1=[D1 for D1 in D for _ in D], D2=D * 7)
    noise = 2e-3 * torch.randn(49, generator=torch.Generator().manual_seed(0))
    losses = scaling.predict('multiplicative', [list(truth.values())], data)[0]
    data['loss'] = (losses * noise.exp()).tolist()
    law, x = scaling.LAWS['multiplicative'], scaling.logarithms(data)
    target = torch.tensor(data['loss'], dtype=torch.float64).log()
    starts = scaling.starts_of(law, x, target)
    everything = torch.ones(1, 49, dtype=torch.float64)
    weights = scaling.resampled(49, 200, 0)
    start = time.perf_counter()
    (found,), _ = scaling.solve(law, data, everything, starts)
    scaling.solve(law, data, weights, found[:1])
    problems = [(theta, everything[0] / 49) for theta in starts]
    problems += [(found[0], weight / 49) for weight in weights]
    seconds = (time.perf_counter() - start) / len(problems)
    records = [{'how': 'side by side (engine/minimise.py)', 'ms a problem': 1e3 * seconds}]
    few = problems[::20]
    for how in ('autograd', 'differences'):
        start = time.perf_counter()
        fit_with_scipy(law, x, target, few, how)
        theirs = (time.perf_counter() - start) / len(few)
        record = {'how': f"scipy's BFGS, gradient by {how}", 'ms a problem': 1e3 * theirs}
        records.append(record | {'times as long': theirs / seconds})
    words = f'{len(starts)} starts and {len(weights)} resamplings of 49 points'
    where = f'{torch.get_num_threads()} CPU threads'
    return records, f'{words}; {where}; scipy solves every twentieth problem'


def main(argv):
    """Command line: knobs only."""
    options, _, _ = configure(argv, Bench, program='bench.py')
    if options.what in ('gpu', 'curves'):
        from extras import curves, gpu

        dict(curves=curves, gpu=gpu)[options.what].measure(options)
        return
    if not options.variants:
        raise UserError('variants: which? See --help')
    measured = dict(steps=steps, profile=profile, loader=loader, fits=fits)
    if options.what in measured:
        records, words = measured[options.what](options)
    else:  # generation, saving
        from extras import gpu

        records, words = gpu.FUNCTIONS[options.what](options.toy, find_hardware(options.knobs()))
    print(f'{table(records)}\n\n{words}')
    if options.save:
        write_json(options.save, dict(records=records, words=words))


if __name__ == '__main__':
    run_as_program(main)
