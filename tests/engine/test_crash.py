"""
kill -9 at random moments, and the same command again: the result is bit for bit that of an
undisturbed run.

    KILLS=200 python -m pytest -n 0 -s tests/engine/test_crash.py    # 4 of each kind by default
"""

import contextlib
import json
import os
import random
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import train
from data import prepare
from engine.stage import Result
from engine.state import saved_states
from model import load

KILLS = int(os.environ.get('KILLS', 4))
pytestmark = pytest.mark.skipif(
    not hasattr(os, 'fork'), reason='processes are forked from one that has imported torch'
)


def call(log, function, *arguments):
    """In a process of its own: call a function, say nothing, write what goes wrong to a file."""
    torch.set_num_threads(1)
    with open(log, 'a') as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)


def prepare_in_small_pieces(options):
    prepare.ROWS, prepare.SAVE_EVERY = 4, 2
    prepare.prepare(prepare.Preparation(**options))


@pytest.fixture(scope='module')
def processes():
    """Makes processes that need not import torch again: they are forked from one that has."""
    context = get_context('forkserver')
    context.set_forkserver_preload(['train', 'datasets'])
    return context


def disturb(processes, log, out, seconds, chance, function, *arguments):
    """
    Kill the function after a random part of `seconds`, what it takes, again and again, until it has
    come through or, after four times, is left in peace; returns the number of kills, and how many
    of them left a file half written below `out`. It may never fail by itself.
    """
    kills = halves = 0
    while True:
        process = processes.Process(target=call, args=(log, function, *arguments))
        process.start()
        process.join(chance.uniform(0.3, 0.9) * seconds if kills < 4 else None)
        alive = process.is_alive()
        if alive:
            process.kill()
        process.join()
        if not alive:
            assert process.exitcode == 0, Path(log).read_text()[-3000:]
            return kills, halves
        kills += 1
        halves += any(out.parent.glob(f'{out.name}/**/*.tmp'))


def timed(processes, log, function, *arguments):
    """Seconds that the function takes when nobody disturbs it."""
    start = time.time()
    process = processes.Process(target=call, args=(log, function, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, Path(log).read_text()[-3000:]
    return time.time() - start


def same_as_undisturbed(out, whole):
    """The family in a folder against that of a run that nobody disturbed: bit for bit."""
    for name, states in (('16x2-trunk', 1), ('16x2', 0), ('32x2', 0)):
        ours, theirs = (load(folder / name).state_dict().values() for folder in (out, whole))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert Result.of(out / name).val_loss == Result.of(whole / name).val_loss
        lines = (out / name / 'metrics.jsonl').read_text().splitlines()
        steps = [json.loads(line)['step'] for line in lines]
        assert steps == sorted(set(steps)) and len(saved_states(out / name)) == states


def test_training_survives_kills_anywhere(processes, data_dir, tmp_path):
    family = [
        '--method=progressive',
        '--sizes=16x2,32x2',
        '--scratch_tokens=1280,2560',
        '--block_size=16',
        '--batch_size=4',
        '--eval_tokens=512',
        '--eval_interval=7',
        '--schedule=wsd',
        '--device=cpu',
        '--save_minutes=1e-9',
        f'--data_dir={data_dir}',
    ]
    log, whole = tmp_path / 'log', tmp_path / 'whole'
    first = [*family, f'--out_dir={tmp_path / "first"}']
    timed(processes, log, train.main, first)  # imports, and compiles bytecode
    seconds = timed(processes, log, train.main, [*family, f'--out_dir={whole}'])
    chance = random.Random(1)
    kills = runs = halves = 0
    while kills < KILLS:
        runs += 1
        out = tmp_path / f'run{runs}'
        how = (out, seconds, chance, train.main, [*family, f'--out_dir={out}'])
        more, torn = disturb(processes, log, *how)
        kills, halves = kills + more, halves + torn
        same_as_undisturbed(out, whole)
    print(f'\n{kills} kills in {runs} runs of {seconds:.1f} s, {halves} of them during a write')


def test_preparation_survives_kills_anywhere(processes, tmp_path):
    from conftest import write_texts

    options = dict(corpus=write_texts(tmp_path / 'texts', 'parquet'), tokenizer='bytes')
    options['text_column'] = 'body'
    timed(
        processes,
        tmp_path / 'log',
        prepare_in_small_pieces,
        options | dict(out=str(tmp_path / 'first')),
    )
    whole = timed(
        processes,
        tmp_path / 'log',
        prepare_in_small_pieces,
        options | dict(out=str(tmp_path / 'whole')),
    )
    chance, kills, runs = random.Random(2), 0, 0
    while kills < KILLS:
        runs += 1
        out = tmp_path / f'run{runs}'
        kills += disturb(
            processes,
            tmp_path / 'log',
            out,
            whole,
            chance,
            prepare_in_small_pieces,
            options | dict(out=str(out)),
        )[0]
        for split in ('train', 'val'):
            assert (out / f'{split}.bin').read_bytes() == (
                tmp_path / 'whole' / f'{split}.bin'
            ).read_bytes()
    print(f'\n{kills} kills in {runs} preparations of {whole:.1f} s')
