"""
Killed at random moments, by the system or by a scheduler, and started again by the same command:
the result is bit for bit that of an undisturbed run.

    KILLS=200 python -m pytest -n 0 -s tests/engine/test_crash.py    # 3 of each kind by default
"""

import contextlib
import os
import random
import time
import traceback
from multiprocessing import get_context
from signal import SIGKILL, SIGTERM

import pytest
import torch
from conftest import same_weights, write_texts

import train
from data import prepare
from engine.log import read_metrics
from engine.stage import Result
from engine.state import saved_states

KILLS = int(os.environ.get('KILLS', 3))
FAMILY = '--method=progressive --sizes=16x2,32x2 --scratch_tokens=320,640 --schedule=wsd'
FAMILY += ' --block_size=16 --batch_size=4 --eval_tokens=512 --eval_interval=7 --save_minutes=1e-9'


def work(log, function, argument):
    """In a process of its own: call a function, say nothing, write what goes wrong to a file."""
    torch.set_num_threads(1)
    with open(log, 'a') as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            function(argument)
        except SystemExit as stopped:
            os._exit(stopped.code)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)


def train_family(out):
    train.main([*FAMILY.split(), f'--data_dir={out.parent / "data"}', f'--out_dir={out}'])


def prepare_corpus(out):
    prepare.ROWS, prepare.SAVE_EVERY = 4, 2
    texts = str(out.parent / 'texts' / '*.parquet')
    prepare.prepare(prepare.Preparation(texts, str(out), 'bytes', text_column='body'))


def family(out):
    """What a family is, and its curves: those of a run in which no step is missing or twice."""
    for name, states in (('16x2-trunk', 1), ('16x2', 0), ('32x2', 0)):
        steps = [line['step'] for line in read_metrics(out / name)]
        assert steps == sorted(set(steps)) and len(saved_states(out / name)) == states
    return [Result.of(out / name).val_loss for name in ('16x2-trunk', '16x2', '32x2')]


def corpus(out):
    return [(out / f'{split}.bin').read_bytes() for split in ('train', 'val')]


@pytest.mark.parametrize(
    'function, outcome, kill',
    [
        (train_family, family, SIGKILL),
        (train_family, family, SIGTERM),
        (prepare_corpus, corpus, SIGKILL),
    ],
)
def test_the_same_command_goes_on_after_a_kill_at_any_moment(
    data_dir, tmp_path, function, outcome, kill
):
    (tmp_path / 'data').symlink_to(data_dir)
    write_texts(tmp_path / 'texts', 'parquet')
    context = get_context('forkserver')  # processes are forked from one that has imported torch
    context.set_forkserver_preload(['train', 'datasets', 'matplotlib.pyplot'])
    log, chance, kills, saved = tmp_path / 'log', random.Random(1), 0, 0

    def run(out, seconds=None):
        """The exit code of the function, which is killed after so many seconds."""
        process = context.Process(target=work, args=(log, function, out))
        process.start()
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, kill)
        process.join()
        assert process.exitcode in (0, -kill, 128 + kill), log.read_text()[-3000:]
        return process.exitcode

    run(tmp_path / 'first')  # imports
    start = time.time()
    run(tmp_path / 'whole')
    seconds, number = time.time() - start, 0
    while kills < KILLS:
        out, number = tmp_path / f'run{number}', number + 1
        while code := run(out, chance.uniform(0.1, 0.7) * seconds if kills < KILLS else None):
            kills, saved = kills + 1, saved + (code > 0)
        assert outcome(out) == outcome(tmp_path / 'whole')
        if function is train_family:
            assert same_weights(out / '32x2', tmp_path / 'whole' / '32x2')
    assert saved > 0 or kill == SIGKILL  # a scheduler's signal is heard, and the step saved
    print(f'\n{kills} kills in {number} runs of {seconds:.1f} s')
