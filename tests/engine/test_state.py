"""
States: whole or not there, sealed, kept as many as asked for; what is damaged is named, and what
is good is offered.
"""

import re
import shutil

import pytest
from conftest import call, flip_a_bit, run_command, same_weights, succeeds

from engine.state import saved_states

SHARD = 'shard-00001-model-00001-of-00001.safetensors'  # what process 0 saves
TINY = '--size=16x2 --block_size=16 --batch_size=4 --eval_tokens=512 --learning_rate=0.01'
TINY = f'train.py {TINY} --tokens=640 --log_interval=1'  # 10 steps


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """The folder of a run that was never interrupted."""
    out = tmp_path_factory.mktemp('whole')
    succeeds(f'{TINY} --data_dir={data_dir} --out_dir={out}')
    return out / '16x2'


@pytest.fixture(scope='module')
def stopped(data_dir, tmp_path_factory):
    """The folder of a run with states at steps 2 and 3."""
    out = tmp_path_factory.mktemp('stopped')
    for _ in range(3):
        line = f'{TINY} --data_dir={data_dir} --out_dir={out} --max_minutes=1e-9'
        assert call(line).returncode == 75
    return out / '16x2'


@pytest.fixture
def copy(stopped, data_dir, tmp_path):
    """(the folder of a copy of the stopped run, the command that continues it)."""
    shutil.copytree(stopped, tmp_path / 'run' / '16x2')
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path}/run'
    return tmp_path / 'run' / '16x2', line


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def another_step(path):
    path.write_text(path.read_text().replace('"step": 3', '"step": 7'))


@pytest.mark.parametrize(
    'name, damage',
    [
        (SHARD, truncate),
        (SHARD, flip_a_bit),
        (SHARD, lambda path: path.unlink()),
        ('checksums.json', truncate),
        ('checksums.json', another_step),
        ('checksums.json', lambda path: path.unlink()),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_it_offered(copy, whole, name, damage):
    folder, line = copy
    assert [path.name for path in saved_states(folder)] == ['state-000000002', 'state-000000003']
    damage(folder / 'state-000000003' / name)
    error = call(line).stderr
    offer = 'and the same command continues from state-000000002, which is intact'
    path = re.search(rf'state-000000003/{name}.*Remove (\S+), {offer}', error)[1]
    shutil.rmtree(path)
    succeeds(line)
    assert not saved_states(folder) and same_weights(folder, whole)


def test_a_child_of_another_parent_is_refused(data_dir, tmp_path):
    line = 'train.py --method=progressive --sizes=16x2,32x2 --scratch_tokens=640,1280'
    line += f' --block_size=16 --eval_tokens=512 --data_dir={data_dir} --out_dir={tmp_path}'
    succeeds(line)
    shutil.rmtree(tmp_path / '16x2')
    words = '32x2 holds a stage with other settings .before was'
    assert re.search(words, call(f'{line} --learning_rates=0.003,0.001').stderr)


FULL_DISK = """
import resource, sys, train
from engine.errors import run_as_program

limit = int(sys.argv.pop(1))  # a write fails in the middle, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_as_program(train.main)
"""


@pytest.mark.parametrize(
    'limit, knob, words',
    [
        (20_000, '--save_minutes=1e-9', 'state-000000004 could not be saved'),
        (50_000, '', 'the trained model could not be saved'),
    ],
)
def test_a_full_disk_stops_with_a_clear_message_and_spoils_nothing(
    copy, whole, tmp_path, limit, knob, words
):
    folder, line = copy
    (tmp_path / 'full_disk.py').write_text(FULL_DISK)
    line = line.replace('train.py', f'{tmp_path}/full_disk.py {limit}')
    process = run_command(f'{line} {knob}', PYTHONPATH='.')
    assert process.returncode == 2 and words in process.stderr, process.stderr
    assert 'the same command continues' in process.stderr and 'Trace' not in process.stderr
    assert not list(folder.glob('*.tmp/*')) and not (folder / 'result.json').exists()
    succeeds(copy[1])
    assert same_weights(folder, whole)


def test_another_text_under_the_same_name_is_refused(tmp_path):
    corpus = tmp_path / 'data' / 'mine'
    line = f'{TINY} --data=mine --data_dir={tmp_path}/data --out_dir={tmp_path}/run'
    for text in ('one text\n', 'another\n'):
        (tmp_path / 'mine.txt').write_text(1000 * text)
        shutil.rmtree(corpus, ignore_errors=True)
        succeeds(f'data/prepare.py {tmp_path}/mine.txt --out={corpus}')
        stopped = call(f'{line} --max_minutes=1e-9')
    assert 'text of mine was' in stopped.stderr
    flip_a_bit(corpus / 'train.bin')
    words = 'train.bin is damaged: it does not match'
    assert words in call(f'{line} --verify=True').stderr
