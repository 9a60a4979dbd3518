"""
Corpora in chunks that are made while they are read: the tokens of one that is prepared as a whole,
in an order that nothing disturbs, with three chunks on the disk.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import run_command, run_processes, write_texts
from stand_in_hub import StandInHub
from test_hub_data import write_rows
from test_train import TINY, same

import train
from data import prepare
from data.chunks import chunk_file
from data.corpus import open_corpus, verify_corpus
from data.loader import text_source
from engine.errors import UserError
from engine.stage import Result

CHUNK = 4000  # tokens; the texts have several times as many


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder with one corpus of a file of texts, as a whole and in chunks; to be copied."""
    folder = tmp_path_factory.mktemp('data')
    texts = write_texts(folder / 'texts', 'jsonl')
    for name, more in (('whole', []), ('mine', [f'--chunk_tokens={CHUNK}'])):
        words = ['--tokenizer=bytes', '--val_fraction=0.1', f'--out={folder / name}']
        prepare.main([texts, *words, *more])
    return folder


@pytest.fixture
def data(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / 'data')
    return tmp_path / 'data'


def chunks_in(folder):
    return sorted(int(path.stem[6:]) for path in folder.glob('train-*.bin'))


def knobs(data, block_size=16, **more):
    return train.Run(data='mine', data_dir=str(data), block_size=block_size, **more)


def test_chunks_hold_what_the_whole_corpus_does_and_then_it_again(data):
    whole, chunks = open_corpus('whole', data).train, open_corpus('mine', data).train
    passes = np.concatenate([whole, whole])
    last = len(whole) // CHUNK + 1  # in it the texts begin again
    assert last > 2
    for number in range(last + 1):
        expected = passes[number * CHUNK : (number + 1) * CHUNK]
        np.testing.assert_array_equal(chunks.read(number), expected)
        assert chunks_in(data / 'mine')[-3:] in (
            [number - 1, number],  # the next is being made
            [number - 1, number, number + 1],
            [0],
            [0, 1],
        )
    val = [(data / name / 'val.bin').read_bytes() for name in ('whole', 'mine')]
    assert val[1] and val[0].startswith(val[1])  # what is held out of the first chunk's texts


def test_the_order_is_a_function_of_seed_and_position(data):
    read = text_source(knobs(data)).read
    positions = np.arange(3 * ((CHUNK - 1) // 16))
    sequences = read(positions)
    whole = open_corpus('whole', data).train[: 3 * CHUNK]
    windows = [
        whole[i : i + 17] for n in range(3) for i in range(n * CHUNK, (n + 1) * CHUNK - 16, 16)
    ]
    assert sorted(map(tuple, sequences)) == sorted(map(tuple, windows))  # each once
    assert not np.array_equal(sequences, windows)
    for path in (data / 'mine').glob('train-*.bin'):
        path.unlink()
    some = np.array([250, 3, 124, 700])  # of three chunks, which are made again
    again = text_source(knobs(data)).read(some)
    np.testing.assert_array_equal(again, sequences[some])
    assert not np.array_equal(again, text_source(knobs(data, seed=3)).read(some))


def test_a_run_over_several_chunks_is_continued_and_shared_to_the_bit(data, tmp_path):
    words = [*TINY, '--data=mine', f'--data_dir={data}', '--tokens=9600', '--block_size=16']
    train.main([*words, f'--out_dir={tmp_path / "once"}'])  # 150 steps of 4 sequences
    assert max(chunks_in(data / 'mine')) >= 2 and len(chunks_in(data / 'mine')) <= 3
    with pytest.raises(SystemExit):
        train.main([*words, f'--out_dir={tmp_path / "twice"}', '--max_minutes=1e-9'])
    verify_corpus('mine', data)
    train.main([*words, f'--out_dir={tmp_path / "twice"}'])
    assert same(tmp_path / 'once' / '16x2', tmp_path / 'twice' / '16x2')
    run_processes(2, 'train.py', *words, f'--out_dir={tmp_path / "two"}')
    losses = [Result.of(tmp_path / out / '16x2').val_loss for out in ('once', 'two')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_is_not_as_it_was_is_noticed(data):
    corpus, path = open_corpus('mine', data), chunk_file(data / 'mine', 0)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match='train-000000.bin is damaged: remove it'):
        corpus.train.read(0)
    path.unlink()
    corpus.train.read(0)  # made again
    path.unlink()
    meta, texts = data / 'mine' / 'meta.json', data / 'texts' / 'a.jsonl'
    content = json.loads(meta.read_text())
    content['options']['files'] = {str(texts): texts.stat().st_size}
    meta.write_text(json.dumps(content))
    texts.write_text(texts.read_text().replace('s', 'z'))
    with pytest.raises(UserError, match='could not be made .*its corpus has changed'):
        open_corpus('mine', data).train.read(0)
    assert not path.exists()


def test_mistakes(data, tmp_path):
    with pytest.raises(UserError, match='mine is streamed, chunk after chunk: leave out --order'):
        text_source(knobs(data, order='random'))
    with pytest.raises(UserError, match='nobody knows how long mine is'):
        train.main(['--epochs=1', '--data=mine', f'--data_dir={data}', f'--out_dir={tmp_path}'])
    with pytest.raises(UserError, match='chunks of 4000 tokens are too short for 4096'):
        text_source(knobs(data, block_size=4096)).read(np.arange(2))
    with pytest.raises(UserError, match='--chunk_tokens is for corpora of the hub and files'):
        prepare.main(['pydocs', f'--out={tmp_path / "docs"}', '--chunk_tokens=100'])


def test_a_corpus_of_the_hub_is_streamed_while_it_trains(tmp_path):
    """In fresh processes, which ask a server; that it is gone is said, and later continued."""
    rows = [dict(text=f'text {i}: ' + 'learn ' * (i % 7)) for i in range(2000)]
    folder = tmp_path / 'datasets' / prepare.HUB['openwebmath'][0]
    for i in range(2):
        part = rows[1000 * i : 1000 * (i + 1)]
        write_rows(folder / 'data' / f'train-0000{i}-of-00002.parquet', part)
    data, words = tmp_path / 'data', [*TINY, '--data=math', '--tokens=12800', '--block_size=16']
    words += [f'--data_dir={data}', f'--out_dir={tmp_path / "run"}']
    with StandInHub(tmp_path) as hub:
        how = ['openwebmath', data / 'math', f'--chunk_tokens={CHUNK}']
        process = run_command('tests/programs/prepare_from_hub.py', *how, **hub.environment)
        assert process.returncode == 0, process.stderr
        environment = hub.environment
    process = run_command('train.py', *words, **environment)  # the server is gone
    assert process.returncode == 2 and 'Traceback' not in process.stderr
    assert 'train-000001.bin could not be made (error: ' in process.stderr
    with StandInHub(tmp_path) as hub:
        process = run_command('train.py', *words, **hub.environment)
        assert process.returncode == 0, process.stderr
        assert any('resolve' in request for request in hub.requests)
    assert 3 in chunks_in(data / 'math')
