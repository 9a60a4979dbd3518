"""
Whatever a file or a command line holds: it is read, or there is one clear error. Nothing else,
and nothing is executed.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command, write_texts
from safetensors.torch import load_file, save_file

import expand
import scaling
from data.corpus import open_corpus, verify_corpus
from data.instruct import Examples
from engine.errors import UserError
from engine.files import find_damage, locked, read_json
from engine.log import read_metrics, truncate_metrics
from engine.stage import Result
from engine.state import read_identity
from extras.diagnostics import training_curves
from model import GPT, GPTConfig, load
from train import main

ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float('inf'),
    float('nan'),
    '',
    'x',
    'ü' * 50,
    '../..',
    [],
    {},
    [1],
    [[[]]],
    {'a': None},
]


def odd_json(content, chance):
    """JSON like `content` with one value exchanged for an odd one, or dropped."""
    content = json.loads(json.dumps(content))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        if not (isinstance(place[key], (dict, list)) and place[key]) or chance.random() < 0.3:
            break
        place = place[key]
    if chance.random() < 0.2:
        del place[key]
    else:
        place[key] = chance.choice(ODD)
    return json.dumps(content).encode()


def damaged(content, chance):
    """Some bytes, more or less like `content`."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.randbytes(chance.randrange(200))
    if kind == 1:
        return content[: chance.randrange(len(content) + 1)]
    if kind == 2:
        return b'[' * 100_000
    if kind == 3:
        return chance.choice(
            [b'', b'null', b'[]', b'{}', b'3', b'"text"', b'\xff\xfe', b'\x00' * 64]
        )
    content = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    """Files of every kind that is read: a run's, a corpus's, a fit's."""
    folder = tmp_path_factory.mktemp('files')
    main(
        [
            '--size=16x2',
            '--block_size=16',
            '--batch_size=4',
            '--tokens=128',
            '--eval_tokens=64',
            '--device=cpu',
            f'--data_dir={data_dir}',
            f'--out_dir={folder / "run"}',
            '--log_interval=1',
        ]
    )
    shutil.copytree(folder / 'run' / '16x2', folder / 'stage')
    shutil.copytree(data_dir / 'signatures', folder / 'signatures')
    shutil.copy(
        Path(scaling.__file__).parent / 'data' / 'published_reuse_losses.csv',
        folder / 'results.csv',
    )
    return folder


def read_checksums(folder):
    damage = find_damage(folder / 'stage', None)
    if damage:
        raise UserError(damage)


def read_set(folder):
    return Examples('signatures', folder, 'train').rows([0, 1], 32)


READERS = {
    'stage/result.json': lambda f: Result.of(f / 'stage'),
    'stage/stage.json': lambda f: (read_identity(f / 'stage'), training_curves(f / 'stage')),
    'stage/checksums.json': read_checksums,
    'stage/config.json': lambda f: load(f / 'stage'),
    'stage/model.safetensors': lambda f: load(f / 'stage'),
    'stage/metrics.jsonl': lambda f: (
        truncate_metrics(f / 'stage' / 'metrics.jsonl', 3),
        read_metrics(f / 'stage'),
    ),
    'signatures/meta.json': lambda f: (
        open_corpus('signatures', f),
        verify_corpus('signatures', f),
        read_set(f),
    ),
    'signatures/train.marks': read_set,
    'results.csv': lambda f: scaling.read_results(f / 'results.csv'),
}


def test_metrics_without_a_line_are_damaged(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('')
    with pytest.raises(UserError, match='metrics.jsonl is damaged'):
        read_metrics(tmp_path)


@pytest.mark.parametrize('name', READERS)
def test_files_of_any_content_are_read_or_named(run, tmp_path, name):
    chance, read = random.Random(name), READERS[name]
    shutil.copytree(run, tmp_path / 'f')
    path = tmp_path / 'f' / name
    content = path.read_bytes()
    read(tmp_path / 'f')
    refused = 0
    for i in range(150):
        path.write_bytes(
            odd_json(json.loads(content), chance)
            if name.endswith('.json') and i % 2
            else damaged(content, chance)
        )
        try:
            read(tmp_path / 'f')
        except UserError as error:
            named = (path.name, path.parent.name, 'no tokenizer')  # which meta.json names
            assert any(name in str(error) for name in named), error
            refused += 1
    assert refused > 20 or name == 'stage/metrics.jsonl'  # of which good lines are kept


def test_read_json_says_what_is_wrong(tmp_path):
    (tmp_path / 'a.json').write_text('{"n": "3"}')
    assert read_json(tmp_path / 'a.json') == dict(n='3')
    with pytest.raises(UserError, match="a.json is damaged .*n is '3'"):
        read_json(tmp_path / 'a.json', n=int)


# ----------------------------------------------------------------------------------------------
# models that are used although something is wrong with them


def flip_a_bit(path):
    """Change one bit in the middle of a file, and neither its size nor its time."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data_dir):
    """A trained model in its run's folder."""
    out = tmp_path_factory.mktemp('trained')
    knobs = ['--size=16x2', '--tokens=512', '--block_size=32', f'--data_dir={data_dir}']
    main([*knobs, f'--out_dir={out}'])
    return out / '16x2'


COMMANDS = [
    ('evaluate.py', '{}', '--eval_tokens=64'),
    ('sample.py', '--model={}', '--max_new_tokens=2'),
    ('expand.py', '{}', '{}-grown', '--to=stk2'),
    ('inheritune.py', '{}', '--samples=2', '--out={}-attention'),
    ('inheritune.py', '{}', '{}-child', '--n=1'),
    ('train.py', '--init_from={}', '--block_size=32', '--tokens=64', '--out_dir={}-run'),
]


@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: f'{c[0]}-{len(c)}')
def test_a_flipped_bit_in_a_model_is_found_by_every_command(trained, tmp_path, data_dir, command):
    folder = tmp_path / 'model'
    shutil.copytree(trained, folder)
    flip_a_bit(folder / 'model.safetensors')
    more = (
        []
        if command[0] in ('sample.py', 'expand.py') or '--n=1' in command
        else [f'--data_dir={data_dir}']
    )
    process = run_command(*[part.format(folder) for part in command], *more)
    assert process.returncode == 2, process.stdout
    assert 'model.safetensors is damaged' in process.stderr and 'Traceback' not in process.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if 'run' not in path.name) == ['model']


def test_weights_that_cannot_be_right_are_refused_in_memory_and_on_disk(tmp_path):
    model = GPT(GPTConfig.named('16x2', vocab_size=257, block_size=32))
    model.save(tmp_path / 'good', 'bytes')
    whole = load_file(tmp_path / 'good' / 'model.safetensors')
    name = 'model.layers.1.mlp.up_proj.weight'
    damages = {
        'nan': whole[name].index_fill(0, torch.tensor([3]), float('nan')),
        'short': whole[name][:-1].clone(),
        'long': torch.cat((whole[name], whole[name][:1])),
        'whole numbers': whole[name].to(torch.int8),
    }
    words = dict(nan='not finite', short='has shape', long='has shape')
    for kind, tensor in damages.items():
        folder = tmp_path / kind
        shutil.copytree(tmp_path / 'good', folder)
        save_file(whole | {name: tensor}, folder / 'model.safetensors')
        expected = words.get(kind, 'is int8, not one of')
        with pytest.raises(UserError, match=expected):
            load(folder)
        with pytest.raises(UserError, match=expected):
            expand.main([str(folder), str(tmp_path / f'{kind}-grown'), '--to=stk2'])
        assert not (tmp_path / f'{kind}-grown').exists()


def test_a_model_of_mixed_precision_has_that_of_its_embeddings(tmp_path):
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=32)).save(tmp_path)
    mixed = load_file(tmp_path / 'model.safetensors')
    for name in mixed:
        if 'norm' not in name:
            mixed[name] = mixed[name].bfloat16()
    save_file(mixed, tmp_path / 'model.safetensors')
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}


def test_nothing_is_written_over_a_model(trained, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(trained, run / '16x2')
    expand.main([str(trained), str(run / '32x2'), '--to=32x2'])
    before = (run / '32x2' / 'model.safetensors').read_bytes()
    for command in (
        ('col.py', run, run / '32x2', '--to=32x2'),
        ('expand.py', run / '16x2', run / '32x2', '--to=32x2'),
        ('inheritune.py', run / '16x2', run / '32x2', '--n=1'),
    ):
        process = run_command(*command)
        assert process.returncode == 2 and '32x2 exists' in process.stderr
    assert (run / '32x2' / 'model.safetensors').read_bytes() == before


def test_two_processes_do_not_write_to_one_folder(tmp_path, data_dir):
    """A corpus is waited for; a run that another process trains is refused."""
    texts = write_texts(tmp_path / 'texts', 'txt')
    command = ['data/prepare.py', texts, f'--out={tmp_path}/corpus', '--tokenizer=bytes']
    start = lambda *arguments: subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    both = [start(*command) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any('is prepared already' in out for out, _ in outputs)
    verify_corpus('corpus', tmp_path)
    with locked(tmp_path / 'run'):
        knobs = ['--size=16x1', '--tokens=64', '--block_size=16', f'--data_dir={data_dir}']
        process = run_command('train.py', *knobs, f'--out_dir={tmp_path}/run')
        assert process.returncode == 2
        assert 'run is being written by another process' in process.stderr
    process = run_command('train.py', *knobs, f'--out_dir={tmp_path}/run')
    assert process.returncode == 0, process.stderr
