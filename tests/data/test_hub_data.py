"""
Corpora and supervised sets of the hub, prepared by fresh processes from a stand-in server: every
entry of the tables, with the files, columns and types that its card shows.
"""

import json
import random

import numpy as np
import pytest
from conftest import run_command
from stand_in_hub import StandInHub

from data.instruct import SETS, Examples
from data.prepare import HUB

pytest.importorskip('datasets')
zstandard = pytest.importorskip('zstandard')
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402

TEXTS = [f'Document number {i} tells of {"apples pears plums"[i % 11 :]}.' for i in range(40)]
WEB = dict(id='<urn:uuid:1>', dump='CC-MAIN-2024-10', url='http://a', language='en', score=3.1)
REPO = dict(max_stars_repo_path='a.py', max_stars_repo_name='b/c', max_stars_count=1, id='7')
CORPORA = {  # name: (file, the other columns)
    'fineweb_edu': ('data/CC-MAIN-2024-10/train-00000-of-00001.parquet', WEB),
    'openwebtext': ('plain_text/partial-train/0000.parquet', {}),
    'pile': ('train/00.jsonl.zst', dict(meta=dict(pile_set_name='Pile-CC'))),
    'slimpajama': ('train/chunk1/a.jsonl.zst', dict(meta=dict(redpajama_set_name='C4'))),
    'starcoder': ('python/train-00000-of-00001.parquet', REPO),
    'openwebmath': ('data/train-00000-of-00001.parquet', dict(url='a', date='b', metadata='{}')),
    'wikitext': ('wikitext-103-raw-v1/train-00000-of-00001.parquet', {}),
}
ANSWERS = {  # name: (file of a split, a row)
    'dolly': (
        '{}.jsonl',
        dict(instruction='Say {}', context='It is {}', response='Yes {}', category='open_qa'),
    ),
    'boolq': ('data/{}-00000-of-00001.parquet', dict(question='is {}', answer=True, passage='{}')),
    'hellaswag': (
        'data/{}-00000-of-00001.parquet',
        dict(ind=1, activity_label='a', ctx_a='b', ctx_b='c', ctx='Then {}')
        | dict(endings=['a', 'b', 'c', 'd'], source_id='e', split='s', split_type='t', label='2'),
    ),
    'winogrande': (
        'winogrande_xl/{}-00000-of-00001.parquet',
        dict(sentence='The {} saw _', option1='x', option2='y', answer='2'),
    ),
    'mmlu': (
        'all/{}-00000-of-00001.parquet',
        dict(question='What is {}', subject='s', choices=['a', 'b', 'c', 'd'], answer=1),
    ),
    'arc_easy': (
        'ARC-Easy/{}-00000-of-00001.parquet',
        dict(id='Mercury_1', question='Why {}', answerKey='B')
        | dict(choices=dict(text=['a', 'b'], label=['A', 'B'])),
    ),
    'xlsum': (
        'english/{}/0000.parquet',
        dict(id='1', url='u', title='On {}', summary='In short {}', text='At length {}'),
    ),
    'ultrafeedback': (
        'data/{}-00000-of-00001.parquet',
        dict(prompt='p {}', prompt_id='i', messages=[dict(content='no', role='user')])
        | dict(
            chosen=[dict(content='Tell {}', role='user'), dict(content='Good', role='assistant')],
            rejected=[dict(content='Tell {}', role='user'), dict(content='Bad', role='assistant')],
        ),
    ),
    'ultrachat': (
        'data/{}-00000-of-00001.parquet',
        dict(prompt='p {}', prompt_id='i')
        | dict(
            messages=[
                dict(content='Tell {}', role='user'),
                dict(content='Told {}', role='assistant'),
                dict(content='More {}', role='user'),
                dict(content='Told again {}', role='assistant'),
            ]
        ),
    ),
}


def write_rows(path, rows):
    """Rows as .parquet, .jsonl or .jsonl.zst."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
        return
    text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == '.zst' else text)


def numbered(value, i):
    """A value of a row with `i` in its texts."""
    if isinstance(value, str):
        return value.replace('{}', str(i))
    if isinstance(value, list):
        return [numbered(one, i) for one in value]
    if isinstance(value, dict):
        return {key: numbered(one, i) for key, one in value.items()}
    return value


def write_card(repository, configuration, patterns):
    """A README.md that names the files of a configuration, as cards do. patterns: {split: glob}."""
    lines = ['---', 'configs:', f'- config_name: {configuration}', '  data_files:']
    for split, pattern in patterns.items():
        lines += [f'  - split: {split}', f'    path: {pattern}']
    (repository / 'README.md').write_text('\n'.join([*lines, '---', '']))


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A hub with every data set of the tables."""
    root = tmp_path_factory.mktemp('hub')
    for name, (file, more) in CORPORA.items():
        source, column = HUB[name]
        repository, configuration, split, *held_out = source.split()
        folder, texts = root / 'datasets' / repository, TEXTS
        if held_out:  # the Pile's test split; in its training split one is no text
            texts = [*TEXTS[1:], 7]
            write_rows(folder / held_out[0], [{column: TEXTS[0], **more}])
        write_rows(folder / file, [{column: text, **more} for text in texts])
        if configuration not in ('default', 'plain_text', 'python'):
            write_card(folder, configuration, {split: file})
    for name, (file, row) in ANSWERS.items():
        repository, configuration, *splits = SETS[name][0].split()
        folder, patterns = root / 'datasets' / repository, {}
        for split in splits:
            patterns[split] = (
                'databricks-dolly-15k.jsonl' if name == 'dolly' else file.format(split)
            )
            write_rows(folder / patterns[split], [numbered(row, f'{split} {i}') for i in range(20)])
        if configuration != 'default' and name != 'xlsum' or name.startswith('ultra'):
            write_card(folder, configuration, patterns)
    with StandInHub(root) as server:
        yield server


def prepare(hub, *names, **environment):
    """The finished process that prepared (name, out, name, out, ...)."""
    more = hub.environment | environment
    return run_command('tests/programs/prepare_from_hub.py', *names, **more)


def test_every_corpus_and_set_of_the_hub_is_prepared(hub, tmp_path):
    names = [argument for name in [*HUB, *ANSWERS] for argument in (name, tmp_path / name)]
    process = prepare(hub, *names)
    assert process.returncode == 0, process.stderr[-2000:]
    assert '1 rows cannot be used and are left out; the first: pile: ' in process.stdout
    for name in HUB:
        tokens = [
            np.fromfile(tmp_path / name / f'{split}.bin', np.uint16) for split in ('train', 'val')
        ]
        found = bytes(np.concatenate(tokens)[np.concatenate(tokens) < 256].astype(np.uint8))
        assert sorted(found.decode().split('.')) == sorted(''.join(TEXTS).split('.')), name
        if name == 'pile':
            assert len(tokens[1]) == len(TEXTS[0]) + 1  # what is held out is its own
    answers = dict(dolly='Yes', boolq='true', hellaswag='C', winogrande='B', mmlu='B')
    answers |= dict(arc_easy='B', xlsum='In short', ultrachat='Told', ultrafeedback='Good')
    for name in ANSWERS:
        kind = 'preferences' if name == 'ultrafeedback' else 'supervised'
        examples, split = Examples(name, tmp_path, 'train', kind), SETS[name][0].split()[2]
        ids, asked = examples.fit(0)
        assert len(examples) > 5 and f'{split} ' in bytes(ids[~asked].tolist()).decode(), name
        assert bytes(i for i in ids[asked] if i < 256).decode().startswith(answers[name]), name


@pytest.mark.parametrize('name', ['openwebmath', 'pile'])
def test_a_corpus_whose_server_stops_is_continued(tmp_path, name):
    """The same files as one that came through at once, to the byte; the Pile's to a number."""
    draw = random.Random(0)  # what cannot be compressed to a small file
    texts = [f'{text} {draw.randbytes(20).hex()}' for _ in range(500) for text in TEXTS]
    rows = [dict(text=text) for text in texts]
    outcomes, more = {}, ['--max_tokens=1650000'] if name == 'pile' else []
    for second in ('broken', 'whole'):
        folder = tmp_path / second / 'datasets' / HUB[name][0].split()[0]
        suffix = '.jsonl.zst' if name == 'pile' else '.parquet'
        write_rows(folder / 'train' / f'train-00{suffix}', rows[:18_000])
        write_rows(folder / 'train' / f'train-01-{second}{suffix}', rows[18_000:])
        if name == 'pile':
            write_rows(folder / f'test{suffix}', rows[:900:3])
        with StandInHub(tmp_path / second) as hub:
            process = prepare(hub, name, tmp_path / f'{second}-corpus', *more)
            if second == 'broken':
                assert process.returncode == 1 and 'Traceback' not in process.stderr
                assert 'the same command continues' in process.stderr
                unfinished = tmp_path / 'broken-corpus.partial'
                state = json.loads((unfinished / 'progress.json').read_text())
                assert state['counts']['train']['documents'] > 10_000
                hub.mend()
                process = prepare(hub, name, tmp_path / 'broken-corpus', *more)
            assert process.returncode == 0, process.stderr
        files = [tmp_path / f'{second}-corpus' / f'{split}.bin' for split in ('train', 'val')]
        outcomes[second] = [file.read_bytes() for file in files]
    assert outcomes['broken'] == outcomes['whole']
    if name == 'pile':
        held_out = len(''.join(texts[:900:3])) + 300
        assert [len(found) // 2 for found in outcomes['whole']][1] == held_out
