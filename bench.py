"""
How fast a training step is: variants take turns in one process, so that their ratios hold on a noisy machine.

    python bench.py                                                     # this machine's speed: tokens/s, MFU, memory
    python bench.py --variants=baseline,let,rkd                         # what a teacher costs while it teaches (paper 002)
    python bench.py --variants=baseline,compile,transformers            # against transformers' model of the same shape
    python bench.py --gpt2=True --variants=baseline,nanogpt --nanogpt=FOLDER      # against a copy of nanoGPT in FOLDER
    python bench.py --size=gpt2 --vocab_size=50257 --block_size=1024 --batch_size=32 --data=real
    python bench.py --what=loader                                       # batches a second against what the model takes
    python bench.py --what=preparation --tokenizer=gpt2                 # data/prepare.py against the bare tokenizer
    python bench.py --what=fits                                         # the fits of laws.py against a loop over scipy's

A variant is `baseline`, an objective (let, rkd: what SALT is while it lasts), another implementation (transformers, nanogpt), with
`+compile` behind it for torch.compile (`compile` alone is baseline+compile), `+selective` or `+full` for recomputed activations,
`+compact` for moments in bfloat16. Every step is train.py's own train_step: objective, backward, clipping, AdamW. FLOPs a token:
6 N for the N weights of layers and head, and for attention 12 L H D T in full, as MFU is mostly quoted, or half of it, which is
what causal attention needs. The peak is what a large matrix product reaches here, measured in every round as the variants are,
or what the device's data sheet says (peak_tflops).
"""
import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import train
from configurator import Progress, UserError, check_ranges, configure, next_token, run_as_program, unknown
from data.loader import batches, open_corpus, text_source
from data.prepare import load_tokenizer
from evaluate import count, table
from let import distil, let, pair_layers
from machine import find_machine
from model import GPT, GPTConfig
from optimizer import make_optimizer
from parallel import wrap


HOW = ('compile', 'selective', 'full', 'compact')   # behind a variant: the knobs compile, recompute, optimizer_dtype


@dataclass
class Bench:
    """Time training steps of a shape, variants side by side."""
    what: str = 'steps'          # steps, loader, preparation or fits
    variants: tuple[str, ...] = ('baseline',)   # baseline, let, rkd, transformers, nanogpt; + how
    size: str = '256x6'          # a named size, or WIDTHxLAYERS
    head_dim: int = 64           # of a WIDTHxLAYERS size
    gpt2: bool = False           # the same width and depth as a GPT-2: LayerNorm, GELU, learned positions, tied head
    vocab_size: int = 8192
    block_size: int = 256
    batch_size: int = 8          # sequences a step
    teacher_size: str = '128x2'  # of let and rkd; the default has a twelfth of size's N
    data: str = 'synthetic'      # synthetic (random tokens, made beforehand) or real (through the loader)
    corpus: str = 'pydocs'       # prepared corpus of --data=real
    data_dir: str = 'data'       # where it is
    rounds: int = 9              # turns of every variant
    steps: int = 2               # steps in a turn
    nanogpt: str = ''            # folder with nanoGPT's model.py
    peak_tflops: float = 0.0     # TFLOP/s of which the percentages are; 0: what a matrix product reaches in each round
    tokenizer: str = 'gpt2'      # of --what=preparation: gpt2, another of tiktoken's, or bytes
    megabytes: float = 50.0      # of --what=preparation: so much text, the corpus over and over
    device: str = 'auto'         # cuda or cpu
    dtype: str = 'auto'          # bfloat16 or float32; auto: bfloat16 on a GPU


def shape(options, size):
    """The configuration of a size with the benchmark's vocabulary, context and heads."""
    config = GPTConfig.named(size, vocab_size=options.vocab_size, block_size=options.block_size)
    if 'x' in size and config.n_embd % options.head_dim == 0:
        heads = config.n_embd // options.head_dim
        config = replace(config, n_head=heads, n_kv_head=heads, head_dim=options.head_dim)
    if options.gpt2:
        config = replace(config, n_mlp=4 * config.n_embd, norm='layer', act='gelu_exact', pos='learned', tied=True)
    return config


def flops_per_token(config, causal):
    """Forward and backward: 6 for every weight of layers and head, and attention, counted in full or causally."""
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    return 6 * config.num_params(head=True) + attention / (2 if causal else 1)


def matrix_product_rate(device, dtype, n=0):
    """FLOP/s of the product of two n x n matrices, the best of three."""
    n = n or (8192 if device.type == 'cuda' else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float('inf')
    for _ in range(4):   # the first may have to choose a kernel
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def synchronise(device):
    """Wait for the GPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# other implementations, called as ours is: model(x, y).loss

def transformers_model(config):
    """transformers' model of our shape, randomly initialised."""
    try:
        import transformers
    except ImportError:
        raise UserError('the variant transformers needs: pip install -r requirements-extras.txt') from None
    from hugging_face import config_to_hugging_face
    fields = {k: v for k, v in config_to_hugging_face(config).items() if k not in ('nanofamily', 'architectures', 'torch_dtype')}
    theirs = transformers.AutoConfig.for_model(**fields, attn_implementation='sdpa', use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(theirs).float()

    class Theirs(torch.nn.Module):
        """The loss of given targets, which transformers would shift by one."""
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            """Mean cross entropy."""
            return SimpleNamespace(loss=self.model(input_ids=x, labels=y, shift_labels=y).loss)
    return Theirs()


def nanogpt_model(config, folder):
    """nanoGPT's model of our shape, from its own file."""
    path = Path(folder) / 'model.py'
    if not folder or not path.is_file():
        raise UserError('the variant nanogpt needs --nanogpt=FOLDER, where a copy of nanoGPT is')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
                                        n_head=config.n_head, n_embd=config.n_embd, dropout=0.0, bias=config.bias))

    class Theirs(torch.nn.Module):
        """Its second value as the loss."""
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            """Mean cross entropy."""
            return SimpleNamespace(loss=self.model(x, y)[1])
    return Theirs()


# ---------------------------------------------------------------------------------------------------------------------
# timing

def make_variant(name, options, machine, knobs):
    """(a function that trains one step on what a stream yields, bytes it holds between steps)."""
    kind, *how = name.split('+') if name.split('+')[0] not in HOW else ['baseline', *name.split('+')]
    if kind not in ('baseline', 'let', 'rkd', 'transformers', 'nanogpt') or not set(how) <= set(HOW):
        raise unknown('variant', name, ('baseline', 'let', 'rkd', 'transformers', 'nanogpt', *(f'baseline+{h}' for h in HOW)))
    knobs = replace(knobs, recompute=next((h for h in how if h in ('selective', 'full')), 'none'),
                    optimizer_dtype='bfloat16' if 'compact' in how else 'float32', compile=str('compile' in how))
    torch.manual_seed(0)
    config = shape(options, options.size)
    make = dict(transformers=lambda: transformers_model(config), nanogpt=lambda: nanogpt_model(config, options.nanogpt))
    model, objective, teacher = make.get(kind, lambda: GPT(config))().to(machine.device), next_token, None
    if kind in ('let', 'rkd'):
        teacher = GPT(shape(replace(options, gpt2=False), options.teacher_size)).to(machine.device, machine.dtype)
        teacher = teacher.eval().requires_grad_(False)
        theirs, ours = pair_layers('L2E', teacher.config.n_layer, config.n_layer)
        objective = let(teacher, ours, theirs) if kind == 'let' else distil(teacher, 0.5)
    optimizer = make_optimizer(model, knobs)
    trained = wrap(model, 'ddp', knobs, machine._replace(compile='compile' in how, world_size=1))
    held = sum(p.numel() * p.element_size() for m in (model, teacher) if m is not None for p in m.parameters())
    held += sum((4 if 'compact' in how else 8) * p.numel() for p in model.parameters())   # AdamW's moments
    step = partial(train.train_step, objective, Progress(0, 1000), knobs, machine, model, trained, optimizer, accumulate=1)
    return step, held


def peak_memory(step, stream, device):
    """Bytes that one step allocates at its height, over what is held between steps."""
    if device.type == 'cuda':
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(stream)
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(stream)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def measure(options):
    """
    {variant: (tokens a second in each round, bytes held, bytes at a step's height)}; FLOP/s of a matrix product in each round; the
    machine.
    """
    knobs = train.Run(device=options.device, dtype=options.dtype, compile='False', block_size=options.block_size,
                      batch_size=options.batch_size, data=options.corpus, data_dir=options.data_dir)
    machine = find_machine(knobs)
    if options.data == 'real':
        stream = batches(text_source(knobs).read, 0, options.batch_size, options.batch_size, machine.device)
    else:
        made = torch.randint(options.vocab_size, (2, options.batch_size, options.block_size), device=machine.device)
        stream = iter(partial(lambda: (made[0], made[1])), None)
    variants = {name: make_variant(name, options, machine, knobs) for name in options.variants}
    for step, _ in tqdm(variants.values(), desc='warming up', leave=False):
        step(stream)
        step(stream)
    heights = {name: peak_memory(step, stream, machine.device) for name, (step, _) in variants.items()}
    speeds, peaks = {name: [] for name in variants}, []
    for turn in tqdm(range(options.rounds), desc='measuring', leave=False):
        peaks.append(matrix_product_rate(machine.device, machine.dtype))
        names = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in names:
            synchronise(machine.device)
            start = time.perf_counter()
            for _ in range(options.steps):
                variants[name][0](stream)
            synchronise(machine.device)
            speeds[name].append(options.steps * options.batch_size * options.block_size / (time.perf_counter() - start))
    return {name: (speeds[name], variants[name][1], heights[name]) for name in variants}, peaks, machine


def time_loader(options):
    """Print what the loader gives in tokens a second, and what the model takes."""
    measured, _, machine = measure(replace(options, variants=options.variants[:1], data='real'))
    taken = statistics.median(next(iter(measured.values()))[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [['order', 'loader, tokens/s', 'over the model']]
    for order in ('epoch', 'random'):
        knobs = train.Run(block_size=options.block_size, batch_size=options.batch_size, data=options.corpus,
                          data_dir=options.data_dir, order=order)
        stream = batches(text_source(knobs).read, 0, options.batch_size, options.batch_size, machine.device)
        given, start = [], time.perf_counter()
        while len(given) < options.rounds * 100:
            given.append(next(stream)[0].numel())
        synchronise(machine.device)
        rate = sum(given) / (time.perf_counter() - start)
        rows.append([order, f'{rate:,.0f}', f'{rate / taken:,.0f} x'])
    torch.set_num_threads(threads)
    print(table(rows) + f'\n\n{options.size} takes {taken:,.0f} tokens/s; {options.batch_size} x {options.block_size} tokens of '
          f'{options.corpus}')


def time_preparation(options):
    """Print how fast data/prepare.py is, whole and as a command, and how fast the bare tokenizer is on the same texts."""
    corpus = open_corpus(options.corpus, options.data_dir)
    if corpus.meta['tokenizer'] != 'bytes':
        raise UserError(f'{options.corpus} is in tokens of {corpus.meta["tokenizer"]}: its text is needed, a corpus in bytes')
    ends = np.flatnonzero(corpus.train == 256)
    texts = [piece[:-1].astype(np.uint8).tobytes().decode('utf-8', 'replace') for piece in np.split(corpus.train, ends + 1)[:-1]]
    size = sum(len(text.encode()) for text in texts)
    texts *= max(1, round(options.megabytes * 1e6 / size))
    size, processes = sum(len(text.encode()) for text in texts), os.cpu_count() or 1
    encode, _, _, _ = load_tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / 'texts.jsonl'
        lines.write_text(''.join(json.dumps(dict(text=text)) + '\n' for text in texts), encoding='utf-8')
        start = time.perf_counter()
        if options.tokenizer == 'bytes':
            for text in texts:
                encode(text)
        else:
            tiktoken.get_encoding(options.tokenizer).encode_ordinary_batch(texts, num_threads=processes)
        bare, start = time.perf_counter() - start, time.perf_counter()
        command = [sys.executable, Path(__file__).parent / 'data' / 'prepare.py', lines, f'--out={folder}/tokens',
                   f'--tokenizer={options.tokenizer}']
        process, height = subprocess.Popen(command, stdout=subprocess.DEVNULL), 'unknown'
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):   # Linux says how high its memory went
                height = re.findall(r'VmHWM:\s*(.*)', Path(f'/proc/{process.pid}/status').read_text())[0]
            time.sleep(0.02)
        whole = time.perf_counter() - start
        if process.returncode:
            raise UserError('data/prepare.py failed: see above')
    print(table([['', 'seconds', 'MB/s', 'ratio'], ['bare tokenizer', f'{bare:.1f}', f'{size / bare / 1e6:.1f}', '1'],
                 ['data/prepare.py', f'{whole:.1f}', f'{size / whole / 1e6:.1f}', f'{bare / whole:.2f}']]))
    print(f'\n{size / 1e6:,.0f} MB of {options.corpus} as .jsonl, tokenizer {options.tokenizer}, {processes} threads or processes'
          f'; memory of data/prepare.py, without its workers: {height}')


def time_fits(options, problems=60):
    """
    Seconds for all starts and leave-one-out folds of Eq. 6 on a 5 x 5 grid with noise: laws.solve, and scipy's BFGS in a loop over
    every n-th of the same problems, scaled up; with our gradient, and with the finite differences it takes by default.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError('--what=fits compares with scipy: pip install scipy') from None
    import laws
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = [9.2275e9 / 2 ** i for i in range(5)]
    data = dict(zip(('D1', 'D2'), zip(*((a, b) for a in tokens for b in tokens))), N=[98_323_840] * 25)
    theta = [[0.515 * 21.4 + (0.35 - 0.017 * 21.4) * 21.4, 0.515, 0.35, 0.017, 0.2]]
    noise = 1e-3 * torch.randn(25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data['loss'] = (laws.predict('multiplicative', theta, data)[0] * (1 + noise)).tolist()
    folds = torch.cat([torch.ones(1, 25), 1 - torch.eye(25)]).double()
    start = time.perf_counter()
    _, values, _, _ = laws.solve('multiplicative', data, folds)
    ours, law = time.perf_counter() - start, laws.LAWS['multiplicative']
    target = torch.tensor(data['loss'], dtype=torch.float64).log()
    logs, _, _ = laws._centred(law, laws.logarithms(data))
    starts = laws.starts_of(law, target)
    total, rows = len(starts) * len(folds), [['all starts and folds', 'seconds', 'ratio'], ['laws.solve', f'{ours:.2f}', '1']]
    chosen = [(fold, s) for fold in range(len(folds)) for s in range(len(starts))][::total // problems]
    for gradient in (True, False):
        start, best = time.perf_counter(), float('inf')
        for fold, s in tqdm(chosen, desc='scipy', leave=False):
            weight = folds[fold:fold + 1] / folds[fold].sum()

            def function(x):
                value, slope = laws.huber(law, torch.from_numpy(x)[None], logs, target, weight)
                return (value.item(), slope[0].numpy()) if gradient else value.item()
            found = minimize(function, starts[s].numpy(), jac=gradient, method='BFGS')
            best = min(best, found.fun / values[fold].item())
        theirs = (time.perf_counter() - start) / len(chosen) * total
        how = 'our gradient' if gradient else 'its differences'
        rows.append([f'scipy in a loop, {how}', f'{theirs:.0f}', f'{theirs / ours:.0f}'])
        rows.append(['  its lowest value over ours, of these problems', f'{best:.7f}', ''])
    print(table(rows) + f'\n\n{total:,} problems; scipy timed on {len(chosen)} of them; {torch.get_num_threads()} CPU threads')


def print_steps(options, measured, peaks, machine):
    """Print the table of the variants, and what they were measured on."""
    config, dtype = shape(options, options.size), machine.dtype
    if options.peak_tflops:
        peaks = [options.peak_tflops * 1e12] * len(peaks)
    full, causal = (flops_per_token(config, which) for which in (False, True))
    first = measured[options.variants[0]]
    rows = [['variant', 'tokens/s', 'ratio', 'GFLOP/s', 'of peak, full', 'of peak, causal', 'memory', 'ratio']]
    for name, (speeds, held, height) in measured.items():
        speed = statistics.median(speeds)
        ratio = statistics.median(a / b for a, b in zip(speeds, first[0]))
        share = statistics.median(a / b for a, b in zip(speeds, peaks))
        rows.append([name, f'{speed:,.0f}', f'{ratio:.3f}', f'{speed * full / 1e9:,.0f}', f'{share * full:.1%}',
                     f'{share * causal:.1%}', f'{(held + height) / 1e6:,.1f} MB', f'{(held + height) / sum(first[1:]):.3f}'])
    where = torch.cuda.get_device_name() if machine.device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    allocator = {k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'PYTORCH_CUDA_ALLOC', 'LD_PRELOAD'))}
    source = 'of the data sheet' if options.peak_tflops else 'in a matrix product'
    print(table(rows))
    print(f'\n{options.size}: N = {count(config.num_params())}, {count(config.num_params(embedding=True, head=True))} with '
          f'embeddings; {options.batch_size} x {options.block_size} tokens a step, vocabulary {config.vocab_size}; '
          f'{full / 1e6:.1f} MFLOP a token (attention in full), {causal / 1e6:.1f} (causal)')
    print(f'{where}, {str(dtype).removeprefix("torch.")}, torch {torch.__version__}, allocator {allocator or "as it comes"}; '
          f'peak: {statistics.median(peaks) / 1e9:,.0f} GFLOP/s {source}; medians of {options.rounds} rounds and of '
          'their ratios')


def main(argv):
    """Command line: knobs only."""
    options, _, _ = configure(argv, Bench, program='bench.py')
    check_ranges(options, **{k: (1, None) for k in ('vocab_size', 'block_size', 'batch_size', 'rounds', 'steps', 'head_dim')})
    others = dict(loader=time_loader, preparation=time_preparation, fits=time_fits)
    if options.what not in ('steps', *others):
        raise unknown('measurement', options.what, ('steps', *others))
    if options.data not in ('synthetic', 'real'):
        raise unknown('data', options.data, ('synthetic', 'real'))
    if options.what in others:
        return others[options.what](options)
    print_steps(options, *measure(options))


if __name__ == '__main__':
    run_as_program(main)
