"""
What the tests share: a small prepared corpus, and the project's commands, as a person types them.
"""

import argparse
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# before anything imports the hub client: no test needs a network
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest  # noqa: E402
import torch  # noqa: E402

from engine.errors import run_as_program  # noqa: E402

torch.set_num_threads(1)

SLOW = re.compile('crash|parallel|hub|preset|documents|harness|report_and_advice')


def pytest_collection_modifyitems(items):
    """The fast ones first."""
    items.sort(key=lambda item: bool(SLOW.search(item.nodeid)))


@pytest.fixture(autouse=True)
def alike():
    """Every test begins with the same random state, and leaves Ctrl-C to pytest."""
    torch.manual_seed(0)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------
# commands


def call(line, input=''):
    """
    `python LINE` without a new process, which would import torch again: the finished command, with
    what it printed. `input` is typed.
    """
    program, *arguments = shlex.split(line)
    name = arguments.pop(0) if program == '-m' else program.removesuffix('.py').replace('/', '.')
    streams = [
        io.TextIOWrapper(io.BytesIO(text.encode()), 'utf-8', write_through=True)
        for text in (input, '', '')
    ]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        for stream, replaced in zip(('stdin', 'stdout', 'stderr'), streams):
            patch.setattr(sys, stream, replaced)
        patch.setattr(sys, 'argv', [program, *arguments])
        run_as_program(importlib.import_module(name).main)
    output = [stream.buffer.getvalue().decode() for stream in streams[1:]]
    return subprocess.CompletedProcess(line, end.value.code or 0, *output)


def succeeds(line):
    """Call a command that does not fail; returns what it printed."""
    command = call(line)
    assert command.returncode == 0, command.stderr
    return command.stdout


def refuses(line, words):
    """Call a command that ends with one line that holds a pattern, and with exit code 2."""
    command = call(line)
    assert command.returncode == 2 and re.search(words, command.stderr), command
    assert command.stderr.count('\n') == 1, command.stderr


def run_command(line, **environment):
    """`python LINE` in a process of its own; returns it, finished, with its output as text."""
    return subprocess.run(
        [sys.executable, *shlex.split(line)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
    )


def run_processes(number, line):
    """`python LINE` as `number` processes that train together, as torchrun starts them."""
    how = f'--standalone --local-addr=127.0.0.1 --nproc_per_node={number}'
    return run_command(f'-m torch.distributed.run {how} {line}')


def same_weights(one, other):
    """Are two models, or those of two folders, alike to the bit?"""
    from model import load

    one, other = (m if isinstance(m, torch.nn.Module) else load(m) for m in (one, other))
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def flip_a_bit(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# ----------------------------------------------------------------------------------------------
# data


def write_lines(path, rows):
    """Rows as JSON lines; returns the path."""
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return str(path)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """
    Two corpora of real text, files that came with Python, and two sets: what its functions are for,
    as answers (`signatures`) and as preferences.
    """
    from data.prepare import Preparation, prepare

    folder = tmp_path_factory.mktemp('data')
    for name, module in dict(pydocs=argparse, pycode=subprocess).items():
        (folder / f'{name}.txt').write_text(inspect.getsource(module))
    pairs = [
        (name, inspect.getdoc(function).split('\n')[0])
        for module in (argparse, inspect, typing, json, subprocess)
        for name, function in inspect.getmembers(module, callable)
        if inspect.getdoc(function)
    ]
    write_lines(folder / 'signatures.jsonl', [dict(prompt=n, completion=line) for n, line in pairs])
    preferences = [
        dict(prompt=name, chosen=line, rejected=other)
        for (name, line), (_, other) in itertools.pairwise(pairs)
    ]
    write_lines(folder / 'preferences.jsonl', preferences)
    for path in [*folder.iterdir()]:
        how = dict(tokenizer='bytes', prompt='plain', val_fraction=0.125)
        prepare(Preparation(str(path), str(path.with_suffix('')), **how))
    return folder


DOCUMENTS = [
    f'Document number {i} tells of {"apples pears plums"[i % 11 :]} and ends with é{i}.'
    for i in range(300)
]


def write_texts(folder, kind):
    """The documents as local files of one kind; returns a glob of them."""
    folder.mkdir(exist_ok=True)
    if kind == 'txt':
        for i, text in enumerate(DOCUMENTS):
            (folder / f'{i:03d}.txt').write_text(text, encoding='utf-8')
    elif kind == 'jsonl':
        write_lines(folder / 'a.jsonl', [dict(text=text, other=1) for text in DOCUMENTS])
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(dict(body=DOCUMENTS)), folder / 'a.parquet')
    return str(folder / f'*.{kind}')


TEXT = 3 * (
    'Naïve café: 数学は楽しい 🙂🙃! The cat sat on the mat; 12 + 34 = 46.\n'
    '\tdef f(x): return "ß"  # Привет\n'
)


def train_tokenizer(folder, *control, vocab_size=400, change=lambda tokenizer: None):
    """
    Save a small byte-level tokenizer in a folder, as a model's has it, with control tokens besides
    the end-of-text, and changed. Returns the folder's name.
    """
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=byte_level.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT[:60], 'The mat and the cat sat'] * 3, trainer)
    tokenizer.add_special_tokens([*control])
    change(tokenizer)
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    return str(folder)
