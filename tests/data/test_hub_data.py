"""Corpora and sets of the hub, prepared by fresh processes from a stand-in server."""

import json
import random

import numpy as np
import pytest
from conftest import run_command, write_lines
from stand_in_hub import StandInHub

from data.instruct import Examples
from data.prepare import HUB

pytest.importorskip('datasets')
zstandard = pytest.importorskip('zstandard')

PREPARE = """
import sys, time
import datasets
from data import prepare
from engine.errors import run_as_program

# a connection that breaks is given up at once, not after minutes; and rows are saved often
datasets.config.STREAMING_READ_MAX_RETRIES, time.sleep = 1, lambda seconds: None
prepare.ROWS, prepare.SAVE_EVERY = 16, 2
run_as_program(prepare.main)
"""


def prepare(hub, name):
    """The finished process that prepared a set in the folder made/NAME."""
    (hub.folder / 'prepare.py').write_text(PREPARE)
    line = f'{hub.folder}/prepare.py {name} --out={hub.folder}/made/{name} --tokenizer=bytes'
    return run_command(line, **hub.environment, PYTHONPATH='.')


def write_rows(path, rows):
    """Rows as .jsonl.zst, the format of the Pile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(map(json.dumps, rows))
    path.write_bytes(zstandard.compress(text.encode()))


def test_a_configuration_of_a_card_is_prepared(tmp_path):
    """Winogrande: of many configurations one, of whose splits two, and two choices."""
    folder = tmp_path / 'datasets' / 'allenai' / 'winogrande'
    folder.mkdir(parents=True)
    card = ['---', 'configs:', '- config_name: winogrande_xl', '  data_files:']
    for split in ('train', 'validation'):
        card += [f'  - split: {split}', f'    path: {split}.jsonl']
        row = dict(sentence=f'{split} _', option1='x', option2='y', answer='2')
        write_lines(folder / f'{split}.jsonl', [row] * 20)
    (folder / 'README.md').write_text('\n'.join([*card, '---', '']))
    with StandInHub(tmp_path) as hub:
        process = prepare(hub, 'winogrande')
    assert process.returncode == 0, process.stderr
    for split, words in (('train', 'train _'), ('val', 'validation _')):
        examples = Examples('winogrande', tmp_path / 'made', split)
        ids, asked = examples.fit(0)
        assert len(examples) == 20 and words in bytes(ids[~asked].tolist()).decode()
        assert bytes(ids[asked][:-1].tolist()) == b'B'


def test_a_corpus_whose_server_stops_is_continued(tmp_path):
    """The same files as one that came through at once, to the byte; what is no text is left out."""
    draw, outcomes = random.Random(0), []  # what cannot be compressed to a small file
    rows = [dict(text=f'{i} {draw.randbytes(20).hex()}') for i in range(800)]
    for second in ('broken', 'whole'):
        folder = tmp_path / second / 'datasets' / HUB['pile'][0].split()[0]
        write_rows(folder / 'train' / 'train-00.jsonl.zst', [*rows[:400], dict(text=7)])
        write_rows(folder / 'train' / f'train-01-{second}.jsonl.zst', rows[400:])
        write_rows(folder / 'test.jsonl.zst', rows[:90])
        with StandInHub(tmp_path / second) as hub:
            process, made = prepare(hub, 'pile'), hub.folder / 'made' / 'pile'
            if second == 'broken':
                assert process.returncode == 2 and 'the same command continues' in process.stderr
                progress = json.loads((made.with_suffix('.partial') / 'progress.json').read_text())
                assert progress['counts']['train']['documents'] > 200
                hub.repaired = True
                process = prepare(hub, 'pile')
        assert '1 rows cannot be used and are left out' in process.stdout, process.stderr
        outcomes.append([np.fromfile(made / f'{s}.bin', np.uint16) for s in ('train', 'val')])
    assert all(map(np.array_equal, *outcomes))
    for tokens, texts in zip(outcomes[0], (rows, rows[:90])):
        assert len(tokens) == sum(len(row['text']) + 1 for row in texts)
