"""
Everything that only a GPU can answer, in one command and one table:

    python bench.py --what=gpu --nanogpt=FOLDER
    python bench.py --what=gpu --parts=attention,generation
    python bench.py --what=gpu --toy=True            # the same parts, small, on a CPU

Every part is a process of its own, so that the others survive its failure, and what failed says
why. A part leaves its records in out/NAME.json, and gpu.md shows all that are there: a part that is
measured again replaces its own. Most parts are commands of bench.py, the others functions here.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import engine.quick_start  # before torch, whose import it shortens

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import configure, with_positionals
from engine.checkpoint import Saver
from engine.device import attention_kernel, choose_device, find_hardware
from engine.errors import (
    UserError,
    first_line,
    import_extra,
    last_line,
    run_as_program,
    unknown,
)
from engine.files import read_json, write_atomically, write_json
from engine.loss import evaluate
from engine.report import render
from engine.run_folder import saved_states
from expand import grow
from extras.timing import matrix_product_rate, seconds_of
from model import GPT, GPTConfig, load

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """A part of the table."""

    title: str
    limit: int  # seconds
    words: str = ''  # of bench.py; empty: the function of the part's name


GPT2 = '--size=gpt2 --vocab_size=50304 --block_size=1024 --batch_size=32 '
LONG = '--vocab_size=50304 --block_size=4096 --batch_size=4 --variants=compile '
BLOCK = '--vocab_size=50304 --block_size=1024 --batch_size=8 --head_dim=64 '
WIDE = f'{BLOCK}--size=1536x4 --teacher_size=768x2 '
TAUGHT = 'compile,let+compile,rkd+compile,selective+compile,full+compile,compact+compile'
OTHERS = 'nanogpt+compile,logits+compile,linear_cross_entropy+compile,baseline'
PARTS = {
    'machine': Part('What it was measured on', 60),
    'gpt2': Part('GPT-2 124M', 240, f'{GPT2}--variants=compile,{OTHERS}'),
    'profile': Part(
        'Where a step of GPT-2 124M goes', 120, f'{GPT2}--variants=compile --what=profile --steps=3'
    ),
    'llama_1b': Part('Llama 1B', 150, f'{LONG}--size=1b'),
    'fp8': Part('Llama 1B in FP8', 150, f'{LONG}--size=1b --variants=fp8+compile'),
    'llama_8b': Part(
        'Llama 8B, 4 of its layers', 120, f'{LONG}--size=8b --layers=4 --batch_size=2'
    ),
    'taught': Part('With a teacher, and in less memory', 240, f'{WIDE}--variants={TAUGHT}'),
    'processes': Part(
        'With a group of one process',
        120,
        f'{BLOCK}--size=768x2 --variants=compile,compile+ddp,compile+fsdp',
    ),
    'attention': Part('Attention, forward and backward', 60),
    'generation': Part('Generation', 120),
    'saving': Part('Saved states', 120),
    'growth': Part('Growth and evaluation', 120),
    'commands': Part('Commands', 240),
}
TOY = '--size=64x2 --vocab_size=257 --block_size=32 --batch_size=2 --head_dim=16 '
TOY += '--teacher_size=16x1 --layers=0 --rounds=2 --steps=1'


# ----------------------------------------------------------------------------------------------
# parts that are functions: (a toy's?, Hardware) -> (records, words)


def copy_rate(toy, hardware):
    """Bytes a second that a copy reads and writes."""
    size = 2**20 if toy else 2**30 if hardware.device.type == 'cuda' else 2**26
    source = torch.ones(size, device=hardware.device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / seconds_of(lambda: target.copy_(source), hardware.device)


def machine(toy, hardware):
    """The device, its memory, and the rates of a matrix product and of a copy."""
    product = matrix_product_rate(hardware.device, hardware.dtype, 20)
    record = {'device': hardware.name, 'memory': hardware.memory, 'torch': str(torch.__version__)}
    record |= {'TFLOP/s in a product': product / 1e12}
    record |= {'GB/s in a copy': copy_rate(toy, hardware) / 1e9}
    return [record], f'CUDA {torch.version.cuda}, {hardware.dtype}'


def attention(toy, hardware):
    """The kernels that compute attention, at the shapes of GPT-2 and of a Llama."""
    shapes = [(32, 12, 12, 1024, 64), (4, 32, 8, 4096, 128)]
    if toy:
        shapes = [(1, 4, 2, 32, 16)]
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    kernels += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    records, reasons = [], []
    for B, H, K, T, D in shapes:
        how = dict(device=hardware.device, dtype=hardware.dtype, requires_grad=True)
        q, k, v = (torch.randn(B, heads, T, D, **how) for heads in (H, K, K))
        ones = torch.ones_like(q)

        def both(q=q, k=k, v=v, ones=ones):
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape != k.shape
            )
            torch.autograd.grad(y, (q, k, v), ones)

        config = GPTConfig(n_head=H, n_kv_head=K, head_dim=D, n_embd=H * D, block_size=T)
        chosen = attention_kernel(config, hardware)
        for kernel in kernels:
            name = kernel.name.lower()
            if name == 'math' and T > 1024:
                continue  # it would hold B H T T numbers
            try:
                with sdpa_kernel(kernel):
                    seconds = seconds_of(both, hardware.device)
            except RuntimeError as error:
                reasons.append(f'{name}: {first_line(error)}')
                continue
            flops = 3.5 * 2 * B * H * T * T * D  # 2 products forward, 5 backward, half of each
            record = {'shape': f'{B}x{H}({K})x{T}x{D}', 'kernel': name, 'ms': 1e3 * seconds}
            record |= {'TFLOP/s': flops / seconds / 1e12, 'chosen': 'x' if name == chosen else ''}
            records.append(record)
    return records, '\n'.join(reasons)


def generation(toy, hardware):
    """Tokens a second of SmolLM2-135M's shape, ours and transformers', against the bandwidth."""
    config = GPTConfig.named('64x2' if toy else 'smollm2-135m', vocab_size=257 if toy else 49152)
    new, records = 8 if toy else 64, []
    transformers = import_extra('transformers', 'the part generation needs')
    with tempfile.TemporaryDirectory() as folder:
        GPT(config).save(folder, dtype=hardware.dtype)
        ours = load(folder, hardware.device).eval()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=hardware.dtype)
    theirs = theirs.to(hardware.device).eval()
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    limit = copy_rate(toy, hardware) / weights
    for batch in (1, 8):
        prompt = torch.randint(config.vocab_size, (batch, 16), device=hardware.device)
        calls = {'ours': lambda p=prompt: ours.generate(p, new, temperature=0)}
        calls['transformers'] = lambda p=prompt: greedy(theirs, p, new)
        speeds = {}
        for name, call in calls.items():
            speeds[name] = batch * new / seconds_of(call, hardware.device, 2)
            record = {'batch': batch, 'generate of': name, 'tokens/s': speeds[name]}
            record['ratio'] = speeds[name] / speeds['ours']
            records.append(record | {'of the bandwidth': speeds[name] / batch / limit})
    alike = same_tokens(ours.float(), theirs.float(), prompt[:1])
    return records, (
        f'{limit:,.0f} tokens a second would read every weight once for each; in float32, '
        f'{alike} of 32 greedy tokens are the same'
    )


def saving(toy, hardware):
    """How long a step waits for a saved state: written at once, and in the background."""
    on_gpu = hardware.device.type == 'cuda'
    config = GPTConfig.named('64x2' if toy else 'gpt2-medium' if on_gpu else 'smollm2-135m')
    model = GPT(config).to(hardware.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randint(config.vocab_size, (1, 64), device=hardware.device)

    def step():
        model(x, x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    alone, records = seconds_of(step, hardware.device), []
    for background in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(folder, background=background)
            for name in ('first', 'next', 'next'):
                start, steps = time.perf_counter(), 0
                saver.save(model, optimizer, dict(step=0))
                waited = time.perf_counter() - start
                record = {'save': name, 'in the background': 'x' if background else ''}
                record['training waits, s'] = waited
                while background and not saver.written.done():
                    step()
                    steps += 1
                saver.wait()
                took = time.perf_counter() - start
                record['until it is written, s'] = took
                if steps:
                    record['speed of steps meanwhile'] = steps * alone / (took - waited)
                records.append(record)
            size = sum(path.stat().st_size for path in saved_states(folder)[0].iterdir())
    return records, f'a state of {size / 1e9:.2f} GB; a step alone takes {alone:.2f} s'


def greedy(theirs, prompt, new):
    """The prompt and `new` tokens by transformers' own generation."""
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return theirs.generate(prompt, **how)


def same_tokens(ours, theirs, prompt):
    """Of 32 greedy tokens, those before the first that differs from transformers' own."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    ours.build_rope(prompt.device)
    alike = ours.generate(prompt, 32, temperature=0) == greedy(theirs, prompt, 32)
    torch.set_float32_matmul_precision(precision)
    return alike.int().cumprod(-1).sum().item() - prompt.shape[1]


@torch.no_grad()
def growth(toy, hardware):
    """What a lossless growth, 768x6 to 1536x12, changes in float32 and bfloat16."""
    small, large = ('32x2', '64x4') if toy else ('768x6', '1536x12')
    sizes = dict(vocab_size=257 if toy else 50304, block_size=32 if toy else 1024)
    model = GPT(GPTConfig.named(small, **sizes))
    start = time.perf_counter()
    grown = grow(model, GPTConfig.named(large, **sizes), 'lossless', 'identity')
    took = time.perf_counter() - start
    model, grown = model.to(hardware.device).eval(), grown.to(hardware.device).eval()
    shape = (4 if toy else 8, sizes['block_size'])
    x = torch.randint(sizes['vocab_size'], shape, device=hardware.device)
    data = [(x, x.roll(-1, 1), x.numel())] * 4
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        with hardware._replace(dtype=dtype).forward():
            change = (model(x[:1]).logits - grown(x[:1]).logits).abs().max().item()
            losses = [evaluate(m, data) for m in (model, grown)]
            seconds = seconds_of(lambda: evaluate(grown, data), hardware.device, 2)
        record = {'dtype': str(dtype).removeprefix('torch.'), 'loss before': losses[0]}
        record |= {'loss after': losses[1], 'largest change of a logit': change}
        records.append(record | {'tokens/s': 4 * x.numel() / seconds})
    return records, f'growing {small} to {large} in memory took {took:.2f} s'


CORPUS = '--data_dir=OUT/data --block_size=64 --eval_tokens=20000'
COMMANDS = (
    'data/prepare.py pydocs --out=OUT/data/pydocs',
    f'train.py --method=progressive --sizes=64x2,128x4 --tokens=4e4,4e4 --out_dir=OUT/run {CORPUS}',
    'evaluate.py OUT/run --kl_examples=4 --eval_tokens=20000 --data_dir=OUT/data',
    'sample.py --model=OUT/run/128x4 --draft=OUT/run/64x2 --max_new_tokens=32',
)


def commands(toy, hardware):
    """Commands of a first hour: whether they end well, in how many seconds."""
    records, reasons = [], []
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            words = command.replace('OUT', folder).split()
            if not command.startswith('data/'):
                words.append(f'--device={hardware.device.type}')
            start, how = time.perf_counter(), dict(cwd=ROOT, capture_output=True, text=True)
            found = subprocess.run([sys.executable, *words], **how)
            record = {'command': command.split(' --')[0], 'exit code': found.returncode}
            records.append(record | {'seconds': time.perf_counter() - start})
            if found.returncode:
                reasons.append(f'{command}: {last_line(found.stderr)}')
    return records, '\n'.join(reasons)


FUNCTIONS = dict(
    machine=machine,
    attention=attention,
    generation=generation,
    saving=saving,
    growth=growth,
    commands=commands,
)


# ----------------------------------------------------------------------------------------------
# all parts


def words_of(name, options, file):
    """The command, after python, that measures a part and writes its records to a file."""
    part = PARTS[name]
    common = [f'--device={options.device}', f'--dtype={options.dtype}']
    if not part.words:
        return ['extras/gpu.py', name, str(file), f'--toy={options.toy}', *common]
    words = part.words.split() + [f'--peak_tflops={options.peak_tflops}', f'--save={file}']
    if options.nanogpt:
        words.append(f'--nanogpt={Path(options.nanogpt).resolve()}')
    if options.toy:  # what a compiler does on a CPU says nothing of a GPU
        words = [word.replace('+compile', '').replace('compile+', '') for word in words]
        words = [word.replace('=compile', '=baseline') for word in words] + TOY.split()
    return ['bench.py', *words, *common]


def run_part(name, options, out):
    """Measure a part in a process of its own: {records, words, seconds}, also in out/NAME.json."""
    file = out / f'{name}.json'
    file.unlink(missing_ok=True)
    start, found = time.perf_counter(), {}
    command, limit = [sys.executable, *words_of(name, options, file)], PARTS[name].limit
    how = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, start_new_session=True, **how) as process:
        try:
            _, said = process.communicate(timeout=limit)
            why = f'failed with exit code {process.returncode}: {last_line(said)}'
        except subprocess.TimeoutExpired:
            why = f'failed: it took more than {limit} seconds'
        finally:
            process.kill()
            with suppress(ProcessLookupError, AttributeError):  # Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)  # what it started holds memory, too
    with suppress(OSError, UserError):
        found = read_json(file, records=list, words=str)
    found = found or dict(records=[], words=why)
    found['seconds'] = time.perf_counter() - start
    write_json(file, found)
    return found


def blocks_of(name, found):
    """A part of the table, as engine.report.render takes it."""
    title = f'## {PARTS[name].title}'
    return [title, found['records'], f'{found["words"]}\n\n({found["seconds"]:.0f} s)'.strip()]


def measure(options):
    """Measure the parts that `options`, bench.py's knobs, ask for; print and save the table."""
    for name in options.parts:
        if name not in PARTS:
            raise unknown('part', name, PARTS)
    if not options.toy and choose_device(options.device).type != 'cuda':
        raise UserError('there is no GPU here: --toy=True measures the parts at a size for a CPU')
    out, blocks = Path(options.out).resolve(), ['# On a GPU']
    out.mkdir(parents=True, exist_ok=True)
    for name in options.parts or PARTS:
        found = run_part(name, options, out)
        print(render(blocks_of(name, found)), flush=True)
        print(flush=True)
    for name in PARTS:
        with suppress(OSError, UserError):
            found = read_json(out / f'{name}.json', records=list, words=str, seconds=float)
            blocks += blocks_of(name, found)
    write_atomically(out / 'gpu.md', f'{render(blocks)}\n')
    print(f'gpu.md is in {out}')


@dataclass
class Measurement:
    """Measure one part that is no command of bench.py: gpu.py PART FILE."""

    part: str = 'machine'  # machine, attention, generation, saving, growth or commands
    file: str = 'part.json'  # where its records go
    toy: bool = False  # small
    device: str = 'auto'  # cuda or cpu
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # auto: bfloat16 on a GPU


def main(argv):
    """The command line: a part and its file."""
    argv = with_positionals(argv, 'part', 'file')
    options, _, _ = configure(argv, Measurement, program='extras/gpu.py')
    if options.part not in FUNCTIONS:
        raise unknown('part', options.part, FUNCTIONS)
    how = dict(device=options.device, dtype=options.dtype, compile='False', max_minutes=0)
    hardware = find_hardware(SimpleNamespace(**how))
    records, words = FUNCTIONS[options.part](options.toy, hardware)
    write_json(options.file, dict(records=records, words=words))


if __name__ == '__main__':
    run_as_program(main)
