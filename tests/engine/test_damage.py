"""
Whatever a file holds: it is read, or there is one clear error that names it. Nothing else, and
nothing is executed.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, flip_a_bit, refuses, succeeds, write_texts
from safetensors.torch import load_file, save_file

import scaling
from data.corpus import open_corpus, verify_corpus
from data.instruct import Examples
from engine.errors import UserError
from engine.files import find_damage, locked
from engine.log import read_metrics, truncate_metrics
from engine.stage import Result
from engine.state import read_identity
from extras.diagnostics import training_curves
from model import GPT, GPTConfig, load

TINY = 'train.py --size=16x2 --block_size=16 --batch_size=4 --tokens=128 --eval_tokens=64'


@pytest.fixture(scope='module')
def files(data_dir, tmp_path_factory):
    """Files of every kind that is read: a run's, a set's, a fit's."""
    folder = tmp_path_factory.mktemp('files')
    succeeds(f'{TINY} --log_interval=1 --data_dir={data_dir} --out_dir={folder}/run')
    succeeds(f'expand.py {folder}/run/16x2 {folder}/run/16x4 --to=16x4')
    shutil.copytree(data_dir / 'signatures', folder / 'signatures')
    shutil.copy(ROOT / 'data' / 'published_reuse_losses.csv', folder / 'results.csv')
    return folder


# ----------------------------------------------------------------------------------------------
# any content

ODD = [None, True, -1, 0, 10**30, 1e308, float('inf'), float('nan'), '', 'x', 'ü' * 50, '../..']
ODD += [[], {}, [1], [[[]]], {'a': None}]
TEXTS = [b'', b'null', b'[]', b'{}', b'3', b'"text"', b'\xff\xfe', b'\x00' * 64, b'[' * 100_000]


def odd_json(content, chance):
    """JSON like `content` with one value exchanged for an odd one, or dropped."""
    content = place = json.loads(content)
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key]) or chance.random() < 0.3:
            break
        place = place[key]
    place[key] = chance.choice(ODD)
    if chance.random() < 0.2:
        del place[key]
    return json.dumps(content).encode()


def damaged(content, chance):
    """Some bytes, more or less like `content`."""
    content = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    cut = content[: chance.randrange(len(content) + 1)]
    return bytes(chance.choice([content, content, cut, chance.choice(TEXTS)]))


def read_manifest(folder):
    damage = find_damage(folder / 'run' / '16x2', None)
    if damage:
        raise UserError(damage)


def read_set(folder):
    return Examples('signatures', folder, 'train').rows([0, 1], 32)


READERS = {
    'run/16x2/result.json': lambda f: Result.of(f / 'run/16x2'),
    'run/16x2/stage.json': lambda f: (
        read_identity(f / 'run/16x2'),
        training_curves(f / 'run/16x2'),
    ),
    'run/16x2/checksums.json': read_manifest,
    'run/16x2/config.json': lambda f: load(f / 'run/16x2'),
    'run/16x2/model.safetensors': lambda f: load(f / 'run/16x2'),
    'run/16x2/metrics.jsonl': lambda f: (
        truncate_metrics(f / 'run/16x2/metrics.jsonl', 3),
        read_metrics(f / 'run/16x2'),
    ),
    'signatures/meta.json': lambda f: (
        open_corpus('signatures', f),
        verify_corpus('signatures', f),
        read_set(f),
    ),
    'signatures/train.marks': read_set,
    'results.csv': lambda f: scaling.read_results(f / 'results.csv'),
}


@pytest.mark.parametrize('name', READERS)
def test_files_of_any_content_are_read_or_named(files, tmp_path, name):
    chance, read, refused = random.Random(name), READERS[name], 0
    shutil.copytree(files, tmp_path / 'f')
    path = tmp_path / 'f' / name
    content = path.read_bytes()
    read(tmp_path / 'f')
    for i in range(100):
        change = odd_json if name.endswith('.json') and i % 2 else damaged
        path.write_bytes(change(content, chance))
        try:
            read(tmp_path / 'f')
        except UserError as error:
            named = (path.name, path.parent.name, 'no tokenizer')  # which meta.json names
            assert any(name in str(error) for name in named), error
            refused += 1
    assert refused > 15 or path.name == 'metrics.jsonl'  # of which good lines are kept


# ----------------------------------------------------------------------------------------------
# commands


def empty(path):
    path.write_bytes(b'')


def remove(path):
    path.unlink()


AGAIN = f'{TINY} --log_interval=1 --data_dir=. --out_dir=run'


@pytest.mark.parametrize(
    'name, damage, line',
    [
        ('run/16x2/model.safetensors', flip_a_bit, 'evaluate.py run/16x2 --data_dir=.'),
        ('run/16x2/model.safetensors', flip_a_bit, 'sample.py --model=run/16x2'),
        ('run/16x2/model.safetensors', flip_a_bit, 'expand.py run/16x2 new --to=stk2'),
        ('run/16x2/model.safetensors', flip_a_bit, 'inheritune.py run/16x2 --data_dir=.'),
        ('run/16x2/model.safetensors', flip_a_bit, 'inheritune.py run/16x2 new --n=1'),
        ('run/16x2/model.safetensors', flip_a_bit, 'col.py run new --to=16x3'),
        ('run/16x2/model.safetensors', flip_a_bit, f'{TINY} --init_from=run/16x2 --data_dir=.'),
        ('run/16x2/model.safetensors', flip_a_bit, AGAIN),
        ('run/16x2/config.json', flip_a_bit, AGAIN),
        ('run/16x2/result.json', empty, AGAIN),
        ('run/16x2/checksums.json', empty, AGAIN),
        ('run/16x2/config.json', remove, 'sample.py --model=run/16x2'),
        ('pydocs/train.bin', flip_a_bit, f'{TINY} --data_dir=. --verify=True --out_dir=new'),
        ('pydocs/val.bin', remove, f'{TINY} --data_dir=. --out_dir=new'),
        ('pydocs/train.bin', lambda path: path.write_bytes(b'123'), f'{TINY} --data_dir=.'),
        ('pydocs/meta.json', empty, 'evaluate.py run/16x2 --data_dir=.'),
    ],
)
def test_damage_is_found_by_every_command(
    files, data_dir, tmp_path, monkeypatch, name, damage, line
):
    shutil.copytree(files / 'run', tmp_path / 'run')
    shutil.copytree(data_dir / 'pydocs', tmp_path / 'pydocs')
    damage(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    command = call(line)
    assert command.returncode == 2 and command.stderr.count('\n') == 1, command
    assert Path(name).name in command.stderr and not (tmp_path / 'new').exists()


def test_weights_that_cannot_be_right_are_refused(tmp_path):
    model = GPT(GPTConfig.named('16x2', vocab_size=257, block_size=32))
    model.save(tmp_path, 'bytes')
    path, name = tmp_path / 'model.safetensors', 'model.layers.1.mlp.up_proj.weight'
    whole = load_file(path)
    for tensor, words in (
        (whole[name].index_fill(0, torch.tensor([3]), float('nan')), 'not finite'),
        (whole[name][:-1].clone(), 'has shape'),
        (whole[name].to(torch.int8), 'is int8, not one of'),
    ):
        save_file(whole | {name: tensor}, path)
        refuses(f'expand.py {tmp_path} {tmp_path}/grown --to=stk2', words)


def test_nothing_is_written_over_a_model(files, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(files / 'run' / '16x2', run / '16x2')
    succeeds(f'expand.py {run}/16x2 {run}/32x2 --to=32x2')
    before = (run / '32x2' / 'model.safetensors').read_bytes()
    for line in (
        f'col.py {run} {run}/32x2 --to=32x2',
        f'expand.py {run}/16x2 {run}/32x2 --to=32x2',
        f'inheritune.py {run}/16x2 {run}/32x2 --n=1',
    ):
        refuses(line, '32x2 exists')
    assert (run / '32x2' / 'model.safetensors').read_bytes() == before


def test_two_processes_do_not_write_to_one_folder(tmp_path, data_dir):
    """A corpus is waited for; a run that another process trains is refused."""
    texts = write_texts(tmp_path / 'texts', 'txt')
    line = f'data/prepare.py {texts} --out={tmp_path}/corpus --tokenizer=bytes'
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, *line.split()], **how) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any('is prepared already' in output for output in outputs)
    verify_corpus('corpus', tmp_path)
    with locked(tmp_path / 'run'):
        line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path}/run'
        refuses(line, 'run is being written by another process')
    succeeds(line)
