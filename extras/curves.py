"""
How cost grows with size: a step's with the batch, the block size and the depth, the loader's with
the corpus, that of growth and interpolation on disk with what they write.

    python bench.py --what=curves --rounds=3 --steps=1       # a quarter of an hour on two CPU cores
    python bench.py --what=curves --parts=files              # one of them again

Where cost is proportional to work, a rate is a level line. A part leaves its records in
out/NAME.json; curves.md and curves.png show all that are there.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data.loader import batches, text_source
from engine.device import find_hardware
from engine.errors import UserError, unknown
from engine.files import read_json, write_atomically, write_json
from engine.progress import progress_bar
from engine.report import Line, Panel, draw_panels, render
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 8192  # in a step, while the block size varies


def run(*words):
    """Run a command of ours; returns its seconds, the start of Python included. UserError."""
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f'{words[0]} failed: {ended.stderr.strip()[-500:]}')
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------
# parts: Bench -> records


def steps_against(knob, values, options):
    """A training step, as bench.py measures it, for each value of a knob."""
    records = []
    names = ('size', 'head_dim', 'layers', 'gpt2', 'vocab_size', 'block_size', 'batch_size')
    names += ('rounds', 'steps', 'device', 'dtype', 'peak_tflops')
    for value in progress_bar(values[:1] if options.toy else values, desc=knob):
        knobs = {name: getattr(options, name) for name in names} | {knob: value}
        if knob == 'block_size':
            knobs['batch_size'] = 2 if options.toy else TOKENS // value
        words = [f'--{name}={setting}' for name, setting in knobs.items()]
        with tempfile.TemporaryDirectory() as folder:
            run('bench.py', *words, f'--save={folder}/found.json')
            found = read_json(f'{folder}/found.json', records=list)['records'][0]
        kept = ('tokens/s', 'GFLOP/s', 'of peak', 'memory')
        records.append({knob: value} | {name: found[name] for name in kept})
    return records


def loader(options):
    """The loader alone on corpora of 10^6 to 10^10 tokens, sparse files: no disk is read."""
    records, hardware = [], find_hardware(options.knobs())
    size, sizes = options.batch_size, [10**k for k in range(6, 8 if options.toy else 11)]
    with tempfile.TemporaryDirectory() as folder:
        for n in progress_bar(sizes, desc='corpora'):
            make_sparse_corpus(Path(folder) / f'{n}', n)
            start = time.perf_counter()
            source = text_source(options.knobs(data=f'{n}', data_dir=folder))
            stream = batches(source.read, 0, size, size, hardware)
            next(stream)
            first = time.perf_counter() - start
            start, count = time.perf_counter(), 300
            for _ in range(count):
                tokens = next(stream)[0].numel()
            rate = count * tokens / (time.perf_counter() - start)
            stream.close()
            record = {'corpus, tokens': n, 'ms to the first batch': 1e3 * first}
            records.append(record | {'tokens/s': rate})
    return records


def make_sparse_corpus(folder, n):
    """A corpus of n zeros that takes no room."""
    folder.mkdir()
    splits = {}
    for split, tokens in (('train', n), ('val', 10**5)):
        with open(folder / f'{split}.bin', 'wb') as file:
            file.truncate(tokens * np.dtype('uint16').itemsize)
        splits[split] = dict(tokens=tokens, bytes=4 * tokens, documents=1)
    meta = dict(splits=splits, dtype='uint16', tokenizer='gpt2', vocab_size=50257)
    write_json(folder / 'meta.json', meta)


def files(options):
    """
    A model deepened to twice its layers by expand.py, and one between the two by col.py, as
    commands: a Llama of width 1024 in float32, a layer 50 MB.
    """
    records, width = [], 64 if options.toy else 1024
    for layers in progress_bar((2,) if options.toy else (1, 3, 10, 30, 100), desc='files'):
        with tempfile.TemporaryDirectory(dir=Path(options.out).resolve()) as folder:
            config = GPTConfig.named(f'{width}x{layers}', vocab_size=8192)
            heads = dict(n_head=width // 64, n_kv_head=width // 64, head_dim=64)
            GPT(replace(config, **heads)).save(f'{folder}/chain/small')
            small, large, made = (f'{folder}/{name}' for name in ('chain/small', 'chain/l', 'made'))
            middle = f'--to={width}x{(3 * layers + 1) // 2}'
            for words in (
                ('expand.py', small, large, '--to=stk2'),
                ('col.py', f'{folder}/chain', made, middle),
            ):
                took = run(*words)
                written = sum(path.stat().st_size for path in Path(words[2]).glob('*.safetensors'))
                record = {'command': words[0], 'GB written': written / 1e9, 'seconds': took}
                records.append(record)
    return records


PARTS = {
    'batch': partial(steps_against, 'batch_size', (1, 2, 4, 8, 16, 32, 64)),
    'block': partial(steps_against, 'block_size', (128, 256, 512, 1024, 2048, 4096, 8192)),
    'depth': partial(steps_against, 'layers', (1, 2, 4, 8, 16, 32)),
    'loader': loader,
    'files': files,
}


# ----------------------------------------------------------------------------------------------
# all parts


STEP = ('of peak', 1, "a step's rate / a matrix product's")
RATES = {  # part: what varies, the rate, its unit, in words
    'batch': ('batch_size', *STEP),
    'block': ('block_size', *STEP),
    'depth': ('layers', *STEP),
    'loader': ('corpus, tokens', 'tokens/s', 1e6, "the loader's million tokens/s"),
}


def panels_of(found):
    """A Panel for each part that is there, {name: records}."""
    panels = []
    for name, (knob, rate, unit, words) in RATES.items():
        if name in found:
            x = [record[knob] for record in found[name]]
            y = [record[rate] / unit for record in found[name]]
            panel = Panel(knob.replace('_', ' '), words, [Line(x, y, '', 'o-')], log='x')
            panel.ylim = (0, 1.2 * max(y))
            panels.append(panel)
    if 'files' in found:
        panel = Panel('GB written', 'seconds')
        for command in ('expand.py', 'col.py'):
            of = [record for record in found['files'] if record['command'] == command]
            x, y = ([record[key] for record in of] for key in ('GB written', 'seconds'))
            panel.lines.append(Line(x, y, command, 'o-'))
        panels.append(panel)
    return panels


def measure(options):
    """Measure the parts that `options`, bench.py's knobs, ask for; print, save and draw them."""
    for name in options.parts:
        if name not in PARTS:
            raise unknown('part', name, PARTS)
    out, found = Path(options.out), {}
    out.mkdir(parents=True, exist_ok=True)
    for name in options.parts or PARTS:
        write_json(out / f'{name}.json', dict(records=PARTS[name](options)))
    for name in PARTS:
        with suppress(FileNotFoundError):
            found[name] = read_json(out / f'{name}.json', records=list)['records']
    text = render([block for name, records in found.items() for block in (f'## {name}', records)])
    print(text)
    write_atomically(out / 'curves.md', f'{text}\n')
    draw_panels(panels_of(found), out / 'curves.png')
    print(f'\ncurves.md and curves.png are in {out}')
