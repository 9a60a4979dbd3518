"""
Whatever a file or a command line holds: it is read, or there is one clear error. Nothing else,
and nothing is executed.
"""

import json
import random
import shutil
from pathlib import Path

import pytest

import extras.bridge as bridge
import scaling
from configurator import configure
from data import prepare
from data.corpus import open_corpus, verify_corpus
from data.instruct import Examples, file_examples
from engine.checkpoint import read_identity
from engine.errors import UserError
from engine.files import find_damage, read_json
from engine.metrics import read_metrics, truncate_metrics
from engine.stage import Result
from extras.diagnostics import training_curves
from model import load
from train import METHODS, Run, main

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
    law = scaling.LAWS['multiplicative']
    fitted = dict(
        law='multiplicative',
        parameters=dict.fromkeys(law.parameters, 0.5),
        intervals={},
        samples=[],
        rms=0.1,
        leave_one_out=0.1,
        seen={},
    )
    (folder / 'fit.json').write_text(json.dumps(dict(cpt=fitted)))
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
    'signatures/train.spans.npy': read_set,
    'signatures/train.jsonl': lambda f: bridge.read_examples(f / 'signatures' / 'train.jsonl'),
    'signatures/val.jsonl': lambda f: list(
        file_examples(
            prepare.Preparation(corpus=str(f / 'signatures' / 'val.jsonl'), val_fraction=0.1)
        )
    ),
    'signatures/verified.json': lambda f: verify_corpus('signatures', f),
    'results.csv': lambda f: scaling.read_results(f / 'results.csv'),
    'fit.json': lambda f: scaling.read_fits(f / 'fit.json'),
}


@pytest.mark.parametrize('name', READERS)
def test_files_of_any_content_are_read_or_named(run, tmp_path, name):
    chance, read = random.Random(name), READERS[name]
    shutil.copytree(run, tmp_path / 'f')
    (tmp_path / 'f' / 'signatures' / 'verified.json').write_text('{"train.bin": [1, 2]}')
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
            assert path.name in str(error) or path.parent.name in str(error), error
            refused += 1
    assert refused > 20 or name in (
        'stage/metrics.jsonl',
        'signatures/verified.json',
    )  # what only saves work is ignored when damaged


def test_commands_of_any_text_are_understood_or_refused(tmp_path):
    chance, names = (
        random.Random(0),
        [
            *Run.__dataclass_fields__,
            *(f for m in METHODS.values() for f in m.__dataclass_fields__),
            'nonsense',
        ],
    )
    values = [
        '',
        '1',
        '-1',
        '1e400',
        'nan',
        'None',
        '()',
        '(1,',
        '[' * 500,
        '1' * 5000,
        '__import__("os")',
        'True',
        "'",
        '\\x00',
        'ü',
        '1,2,,',
        '0x',
        '1_0',
        '9' * 400,
    ]
    for _ in range(2000):
        value = (
            chance.choice(values)
            if chance.random() < 0.7
            else chance.randbytes(chance.randrange(20)).decode('latin-1')
        )
        argv = [
            f'--method={chance.choice([*METHODS, "x"])}',
            f'--{chance.choice(names)}={value}',
        ] + ['--' + value] * (chance.random() < 0.1)
        try:
            configure(argv, Run, METHODS)
        except UserError as error:
            assert '\n' not in str(error) or '\n' in value


def test_config_files_of_any_content_are_read_or_named(tmp_path):
    chance, path = random.Random(0), tmp_path / 'c.py'
    for _ in range(200):
        path.write_bytes(damaged(b'seed = 3\nlearning_rate = 1e-3\nsizes = (1, 2)\n', chance))
        try:
            configure([str(path)], Run, METHODS)
        except UserError as error:
            assert 'c.py' in str(error)


def test_read_json_says_what_is_wrong(tmp_path):
    (tmp_path / 'a.json').write_text('{"n": "3"}')
    assert read_json(tmp_path / 'a.json') == dict(n='3')
    with pytest.raises(UserError, match="a.json is damaged .*n is '3'"):
        read_json(tmp_path / 'a.json', n=int)
