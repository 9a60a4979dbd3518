"""
What the tests share: a small prepared corpus, and a way to run the project's commands as a person
does.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault(
    'HF_HUB_OFFLINE', '1'
)  # before anything imports the hub client: no test needs a network

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from engine.files import checksum  # noqa: E402

torch.set_num_threads(1)


def write_corpus(folder, train, val, vocab_size=257):
    """Write token arrays as a prepared corpus into `folder`."""
    folder.mkdir(parents=True)
    splits, checksums = {}, {}
    for split, tokens in (('train', train), ('val', val)):
        file = folder / f'{split}.bin'
        np.asarray(tokens, np.uint16).tofile(file)
        splits[split] = dict(tokens=len(tokens), bytes=len(tokens), documents=1)
        checksums[file.name] = checksum(file)
    meta = dict(corpus=folder.name, tokenizer='bytes', vocab_size=vocab_size, dtype='uint16')
    (folder / 'meta.json').write_text(json.dumps(meta | dict(splits=splits, checksums=checksums)))


def write_examples(folder, rows, kind='supervised'):
    """A prepared set of bytes, of rows (where, record, is it for validation)."""
    from data.instruct import encode_examples, example_encoder, refuse
    from data.prepare import Preparation, fresh_counts, write_corpus

    options = Preparation(corpus=folder.name, tokenizer='bytes', prompt='plain')
    examples = encode_examples(rows, options, refuse, example_encoder(options))
    write_corpus([(examples, None)], kind, options, folder, dict(counts=fresh_counts(), read=None))


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """
    A folder of two corpora of real text that need not be made: some of the files that came with
    Python.
    """
    folder = tmp_path_factory.mktemp('data')
    for name, modules in dict(
        pydocs=[argparse, inspect, typing], pycode=[json.decoder, subprocess]
    ).items():
        text = np.frombuffer(
            b'\n'.join(Path(module.__file__).read_bytes() for module in modules), np.uint8
        )
        write_corpus(folder / name, text[4000:], text[:4000])
    pairs = [  # and of instructions: names of Python's own functions -> their documentation
        (name, inspect.getdoc(function).split('\n')[0])
        for module in (argparse, inspect, typing, json, subprocess)
        for name, function in inspect.getmembers(module, callable)
        if inspect.getdoc(function)
    ]
    rows = [
        ('', dict(prompt=name, completion=line), i % 8 == 0) for i, (name, line) in enumerate(pairs)
    ]
    write_examples(folder / 'signatures', rows)
    rows = [
        ('', dict(prompt=name, chosen=line, rejected=other), len(name) % 8 == 0)
        for (name, line), (_, other) in itertools.pairwise(pairs)
    ]
    write_examples(folder / 'preferences', rows, 'preferences')
    return folder


def run_command(*arguments, timeout=120, input='', **environment):
    """
    Run `python ARGUMENTS` in the project's folder, `input` typed; returns the finished process
    with its output as text.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        input=input,
        text=True,
        timeout=timeout,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
    )


def free_port():
    """
    A port where processes can meet: below those that the system hands out by itself, which a test
    on another core could get between this choice and its use.
    """
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(('127.0.0.1', port))
            return port


def run_processes(number, *arguments, timeout=120, **environment):
    """
    Run `python ARGUMENTS` as `number` processes that train together; returns their outputs. None
    of them may fail; to be saved and stopped (75) is no failure.
    """
    port = str(free_port())
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONFAULTHANDLER': '1',
        'WORLD_SIZE': str(number),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': port,
        **environment,
    }
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
        )
        for rank in range(number)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.send_signal(signal.SIGABRT)  # each prints where it hangs
        outputs = [process.communicate(timeout=20)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode in (0, 75) for process in started), '\n'.join(outputs)
    return outputs


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
        (folder / 'a.jsonl').write_text(
            ''.join(json.dumps(dict(text=t, other=1)) + '\n' for t in DOCUMENTS), encoding='utf-8'
        )
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(dict(body=DOCUMENTS)), folder / 'a.parquet')
    return str(folder / f'*.{kind}')


TEXT = 3 * (
    'Naïve café: 数学は楽しい 🙂🙃! The cat sat on the mat; 12 + 34 = 46.\n'
    '\tdef f(x): return "ß"  # Привет\n'
)


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """T^2 KL(teacher / T || student / T) of logits (..., V), the mean over positions."""
    from engine.loss import kl_of_logits

    teacher = teacher_logits.detach() / temperature
    return temperature**2 * kl_of_logits(teacher, student_logits / temperature).mean()


def train_tokenizer(kind, folder, vocab_size=400):
    """Save a small tokenizer in a folder, as a model's has it: byte-level, or lowercase."""
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if kind == 'lowercase':  # forgets capitals
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=byte_level.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT[:60], 'The mat and the cat sat'] * 3, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    return str(folder)
