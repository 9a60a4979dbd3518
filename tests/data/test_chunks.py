"""
Corpora in chunks that are made while they are read: the tokens of one that is prepared as a whole,
in an order that nothing disturbs, with three chunks on the disk.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_command, run_processes, write_texts
from stand_in_hub import StandInHub
from test_hub_data import write_rows
from test_train import TINY, same

import train
from data import prepare
from data.chunks import Chunks, NoData, chunk_file
from data.corpus import open_corpus, verify_corpus
from data.loader import text_source
from engine.errors import UserError
from engine.files import locked
from engine.run_folder import saved_states
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


def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it does not come'
        time.sleep(0.1)


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
        wait_until(lambda n=number: n + 1 in chunks_in(data / 'mine'))  # it is made ahead
        assert chunks_in(data / 'mine') == list(range(max(0, number - 1), number + 2))
    val = [(data / name / 'val.bin').read_bytes() for name in ('whole', 'mine')]
    assert val[1] and val[0].startswith(val[1])  # what is held out of the first chunk's texts


def test_the_order_is_a_function_of_seed_and_position(data):
    read, windows = text_source(knobs(data)).read, (CHUNK - 1) // 16
    sequences = read(np.arange(2 * windows))
    whole = open_corpus('whole', data).train
    expected = [
        whole[n * CHUNK + 16 * i : n * CHUNK + 16 * i + 17]
        for n in range(2)
        for i in range(windows)
    ]
    assert sorted(map(tuple, sequences)) == sorted(map(tuple, expected))  # each once
    assert not np.array_equal(sequences, expected)
    some = np.array([windows + 3, 7, 124, windows])
    np.testing.assert_array_equal(text_source(knobs(data)).read(some), sequences[some])
    assert not np.array_equal(text_source(knobs(data, seed=3)).read(some), sequences[some])


WORDS = [*TINY, '--data=mine', '--tokens=9600', '--block_size=16']  # 150 steps of 4 sequences


def test_chunks_and_records_that_are_gone_are_made_again_and_nothing_is_left(data):
    whole = open_corpus('whole', data).train
    for path in (data / 'mine').glob('train-*'):
        path.unlink()
    chunks = open_corpus('mine', data).train
    np.testing.assert_array_equal(chunks.read(3), whole[3 * CHUNK : 4 * CHUNK])  # by way of others
    wait_until(lambda: 4 in chunks_in(data / 'mine'))
    assert chunks_in(data / 'mine') == [3, 4]
    np.testing.assert_array_equal(chunks.read(0), whole[:CHUNK])
    assert set(chunks_in(data / 'mine')) <= {0, 1}


def test_what_is_not_as_it_was_is_noticed(data, monkeypatch):
    monkeypatch.setattr(Chunks, 'pauses', (0.1,))
    chunks, path = open_corpus('mine', data).train, chunk_file(data / 'mine', 0)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match='train-000000.bin is damaged: remove it'):
        chunks.read(0)
    path.unlink()
    meta, texts = data / 'mine' / 'meta.json', data / 'texts' / 'a.jsonl'
    content = json.loads(meta.read_text())
    content['options']['files'] = {str(texts): texts.stat().st_size}
    meta.write_text(json.dumps(content))
    texts.write_text(texts.read_text().replace('s', 'z'))
    with pytest.raises(NoData, match='could not be made .*its corpus has changed'):
        chunks.read(0)
    texts.write_text('{"text": "short"}\n')
    with pytest.raises(NoData, match='a.jsonl is not what it was when'):
        open_corpus('mine', data).train.read(0)
    assert not list((data / 'mine').glob('train-000000.bin*'))


def test_a_corpus_without_text_is_refused_in_chunks_too(tmp_path):
    (tmp_path / 'blank.jsonl').write_text('{"text": " "}\n' * 9)
    words = [str(tmp_path / 'blank.jsonl'), f'--out={tmp_path}/blank', '--chunk_tokens=100']
    with pytest.raises(UserError, match='gave no train documents'):
        prepare.main(words)


def test_mistakes(data, tmp_path):
    with pytest.raises(UserError, match='mine is streamed, chunk after chunk: leave out --order'):
        text_source(knobs(data, order='random'))
    with pytest.raises(UserError, match='nobody knows how long mine is'):
        train.main(['--epochs=1', '--data=mine', f'--data_dir={data}', f'--out_dir={tmp_path}'])
    with pytest.raises(UserError, match='chunks of 4000 tokens, less than two batches'):
        text_source(knobs(data, block_size=4096))
    with pytest.raises(UserError, match='--chunk_tokens is for texts of the hub and files'):
        prepare.main(['pydocs', f'--out={tmp_path / "docs"}', '--chunk_tokens=100'])


def test_a_corpus_of_the_hub_is_streamed_while_it_trains(tmp_path, monkeypatch):
    """Where the server goes, what is trained so far is saved; when it is back, the run goes on."""
    monkeypatch.setattr(Chunks, 'pauses', (0.1,))
    rows = [dict(text=f'text {i}: ' + 'learn ' * (i % 7)) for i in range(2000)]
    folder = tmp_path / 'datasets' / prepare.HUB['openwebmath'][0]
    for i in range(2):
        part = rows[1000 * i : 1000 * (i + 1)]
        write_rows(folder / 'data' / f'train-0000{i}-of-00002.parquet', part)
    data, words = tmp_path / 'data', [*TINY, '--data=math', '--tokens=6400', '--block_size=16']
    words += [f'--data_dir={data}', f'--out_dir={tmp_path / "run"}']
    with StandInHub(tmp_path) as hub:
        how = ['openwebmath', data / 'math', f'--chunk_tokens={CHUNK}']
        process = run_command('tests/programs/prepare_from_hub.py', *how, **hub.environment)
        assert process.returncode == 0, process.stderr
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(NoData, match='train-000001.bin could not be made .error: '):
        train.main(words)
    windows = (CHUNK - 1) // 16
    assert saved_states(tmp_path / 'run' / '16x2')[-1].name == f'state-{windows // 4:09}'
    with StandInHub(tmp_path) as hub:
        process = run_command('train.py', *words, **hub.environment)
        assert process.returncode == 0, process.stderr
        assert f'from step {windows // 4}' in process.stdout
    assert 1 in chunks_in(data / 'math')


def test_a_run_is_interrupted_continued_and_shared_and_comes_to_the_same(data, tmp_path):
    """Interrupted while a chunk is made, which never comes: its maker waits for our lock."""
    words = [*WORDS, f'--data_dir={data}']
    stopped = [*words, f'--out_dir={tmp_path / "stopped"}']
    with locked(chunk_file(data / 'mine', 0)):
        command = [sys.executable, 'train.py', *stopped]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        log = data / 'mine' / 'make_chunk.log'
        metrics = tmp_path / 'stopped' / '16x2' / 'metrics.jsonl'
        wait_until(lambda: log.is_file() and 'waiting' in log.read_text())
        wait_until(lambda: '"step": 62,' in metrics.read_text())  # the first chunk is trained on
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT and 'is saved at step 62 of 150' in said
    train.main(stopped)
    assert max(chunks_in(data / 'mine')) >= 2  # the run needs three
    run_processes(2, 'train.py', *words, f'--out_dir={tmp_path / "two"}')
    train.main([*words, f'--out_dir={tmp_path / "once"}'])
    assert same(tmp_path / 'stopped' / '16x2', tmp_path / 'once' / '16x2')
    losses = [Result.of(tmp_path / out / '16x2').val_loss for out in ('once', 'two')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    verify_corpus('mine', data)
