"""
States: whole or not there, sealed, kept as many as asked for; what is damaged is named, and what
is good is offered.
"""

import json
import pickle
import re
import shutil
import sys

import pytest
import test_train
from conftest import run_command, write_corpus
from test_train import same

import train
from engine.errors import UserError
from engine.files import checksum, find_damage, measure_files, write_manifest
from engine.optimizer import make_optimizer
from engine.state import finished_before, load_state, saved_states
from model import GPT, GPTConfig

SHARD = 'shard-00001-model-00001-of-00001.safetensors'  # what process 0 saves
TINY = [*test_train.TINY, '--tokens=640', '--log_interval=1']  # 10 steps


def arguments(data_dir, out, *more):
    return [f'--data_dir={data_dir}', f'--out_dir={out}', *TINY, *more]


def stopped(data_dir, out, steps, *more):
    """A run that was stopped after each of its first steps, with a state of each."""
    for _ in range(steps):
        with pytest.raises(SystemExit):
            train.main(arguments(data_dir, out, '--max_minutes=1e-9', *more))
    return out / '16x2'


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')
    train.main(arguments(data_dir, out))
    return out / '16x2'


@pytest.fixture(scope='module')
def half(data_dir, tmp_path_factory):
    """A run with states at steps 2 and 3; to be copied."""
    return stopped(data_dir, tmp_path_factory.mktemp('half'), 3)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b'')


DAMAGES = [truncate, flip_a_bit, empty, lambda path: path.unlink()]


# ----------------------------------------------------------------------------------------------
# states


def test_the_last_states_are_kept_and_none_of_a_finished_stage(data_dir, tmp_path, half, whole):
    assert [path.name for path in saved_states(half)] == ['state-000000002', 'state-000000003']
    shutil.copytree(half.parent, tmp_path / 'run')
    folder = tmp_path / 'run' / '16x2'
    train.main(arguments(data_dir, tmp_path / 'run'))
    assert not saved_states(folder) and same(folder, whole)


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', [SHARD, 'checksums.json'])
def test_a_damaged_state_is_named_and_the_one_before_it_offered(
    data_dir, tmp_path, half, whole, name, damage
):
    shutil.copytree(half.parent, tmp_path / 'run')
    folder = tmp_path / 'run' / '16x2'
    damage(folder / 'state-000000003' / name)
    if name == 'checksums.json' and damage is flip_a_bit:
        (folder / 'state-000000003' / name).write_text(
            '{"owner": 3'
        )  # a bit of a text that nobody reads might not matter
    with pytest.raises(UserError) as error:
        train.main(arguments(data_dir, tmp_path / 'run'))
    path = re.search(
        r'Remove (\S+), and the same command continues from state-000000002, which is intact',
        str(error.value),
    )[1]
    assert f'state-000000003/{name}' in str(error.value)
    shutil.rmtree(path)
    train.main(arguments(data_dir, tmp_path / 'run'))
    assert same(folder, whole)


def test_a_bit_of_the_checksums_themselves_is_missed_by_nobody(tmp_path, half):
    content = (half / 'state-000000003' / 'checksums.json').read_text()
    shutil.copytree(half / 'state-000000003', tmp_path / 'state')
    (tmp_path / 'state' / 'checksums.json').write_text(content.replace('"step": 3', '"step": 7'))
    assert '"step": 3' in content and 'checksums.json is damaged' in find_damage(
        tmp_path / 'state', None
    )


def test_a_stage_whose_parent_has_no_known_loss_continues(tmp_path):
    identity = {'before': [['ancestor', float('nan')]]}
    for _ in range(2):
        assert finished_before(tmp_path, identity) is None


def test_a_child_of_another_parent_is_refused(data_dir, tmp_path):
    family = [*test_train.FAMILY, f'--data_dir={data_dir}', f'--out_dir={tmp_path}']
    train.main(family)
    shutil.rmtree(tmp_path / '16x2')
    with pytest.raises(UserError, match='32x2 holds a stage with other settings .before was'):
        train.main([*family, '--learning_rates=0.003,0.001'])


def test_a_state_is_tensors_and_runs_nothing_that_its_files_say(tmp_path, half):
    class Evil:
        def __reduce__(self):
            return (tmp_path / 'ran').mkdir, ()

    state = shutil.copytree(half, tmp_path / '16x2') / 'state-000000003'
    with open(state / '.metadata', 'wb') as file:  # where torch's other format has a pickle
        pickle.dump(Evil(), file)
    model = GPT(load_config(half))
    assert load_state(tmp_path / '16x2', model, make_optimizer(model, train.Run()))['step'] == 3
    shutil.copy(state / '.metadata', state / SHARD)  # a valid manifest around a foreign pickle
    sealed = json.loads((state / 'checksums.json').read_text())
    write_manifest(
        state,
        measure_files([state / name for name in sealed['files']]),
        sealed['owner'],
        progress=sealed['progress'],
    )
    with pytest.raises(UserError, match='is intact but cannot be read'):
        load_state(tmp_path / '16x2', model, make_optimizer(model, train.Run()))
    assert not (tmp_path / 'ran').exists()


def load_config(folder):

    stage = json.loads((folder / 'stage.json').read_text())
    fields = {key[6:]: value for key, value in stage.items() if key.startswith('model.')}
    return GPTConfig(**fields | dict(rope_scaling=tuple(fields['rope_scaling'])))


@pytest.mark.skipif(sys.platform == 'win32', reason='no limits on file sizes')
@pytest.mark.parametrize(
    'case',
    [
        (20_000, 'state-000000004 could not be saved', ['--save_minutes=1e-9']),
        (50_000, 'the trained model could not be saved', []),
    ],
)
def test_a_full_disk_stops_with_a_clear_message_and_spoils_nothing(
    data_dir, tmp_path, half, whole, case
):
    limit, word, more = case
    shutil.copytree(half.parent, tmp_path / 'run')
    folder = tmp_path / 'run' / '16x2'
    process = run_command(
        'tests/programs/full_disk.py',
        limit,
        *arguments(data_dir, tmp_path / 'run', *more),
    )
    assert (
        process.returncode == 2
        and word in process.stderr
        and 'the same command continues' in process.stderr
        and 'Traceback' not in process.stderr
    )
    assert [path.name for path in saved_states(folder)] == ['state-000000002', 'state-000000003']
    assert (
        not find_damage(folder / 'state-000000003', None)
        and not list(folder.glob('*.tmp/*'))
        and not (folder / 'result.json').exists()
    )
    train.main(arguments(data_dir, tmp_path / 'run'))
    assert same(folder, whole)


# ----------------------------------------------------------------------------------------------
# finished stages


@pytest.mark.parametrize(
    'name', ['model.safetensors', 'config.json', 'result.json', 'checksums.json']
)
@pytest.mark.parametrize('damage', DAMAGES[:3])
def test_a_damaged_model_of_a_finished_stage_is_named(data_dir, tmp_path, whole, name, damage):
    shutil.copytree(whole.parent, tmp_path / 'run')
    damage(tmp_path / 'run' / '16x2' / name)
    if name in ('checksums.json', 'result.json') and damage is flip_a_bit:
        (tmp_path / 'run' / '16x2' / name).write_text('[]')  # a bit of a text may not matter
    with pytest.raises(UserError, match=f'{name} is damaged'):
        train.main(arguments(data_dir, tmp_path / 'run'))


# ----------------------------------------------------------------------------------------------
# the text


def test_another_text_under_the_same_name_is_refused(data_dir, tmp_path):
    write_corpus(tmp_path / 'data' / 'mine', range(60), range(40), vocab_size=61)
    corpus = tmp_path / 'data' / 'mine'
    meta = json.loads((corpus / 'meta.json').read_text())

    def prepare(first):
        (corpus / 'train.bin').write_bytes(bytes([first, 0] * 60))
        meta['checksums']['train.bin'] = checksum(corpus / 'train.bin')
        (corpus / 'meta.json').write_text(json.dumps(meta))

    prepare(1)
    stopped(tmp_path / 'data', tmp_path / 'run', 1, '--data=mine')
    prepare(2)
    with pytest.raises(UserError, match='text of mine was'):
        train.main(arguments(tmp_path / 'data', tmp_path / 'run', '--data=mine'))
    (tmp_path / 'data' / 'mine' / 'train.bin').write_bytes(
        bytes([3, 0] * 60)
    )  # of the right length
    with pytest.raises(UserError, match='train.bin is damaged: it does not match'):
        train.main(arguments(tmp_path / 'data', tmp_path / 'run', '--data=mine', '--verify=True'))
