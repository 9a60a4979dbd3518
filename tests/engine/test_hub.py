"""Models from the hub, by fresh processes that ask a stand-in server on loopback."""

import socket
import time

import pytest
from conftest import run_command
from stand_in_hub import StandInHub

from model import GPT, GPTConfig

pytest.importorskip('huggingface_hub')


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A hub with a small model, the same one again whose files break off, and a gated one."""
    folder = tmp_path_factory.mktemp('hub')
    model = GPT(GPTConfig.named('16x2', vocab_size=257, block_size=64))
    for name in ('small', 'broken'):
        model.save(folder / 'models' / 'owner' / name, 'bytes')
    (folder / 'models' / 'owner' / 'gated').mkdir()
    with StandInHub(folder) as server:
        yield server


def sample(name, **environment):
    """The finished process of sample.py on a model of this name."""
    arguments = (f'--model={name}', '--prompt=def', '--max_new_tokens=4')
    return run_command('sample.py', *arguments, **environment)


def test_a_model_of_the_hub_is_downloaded_once_and_then_used_offline(hub):
    process = sample('owner/small', **hub.environment)
    assert process.returncode == 0, process.stderr
    downloads = [request for request in hub.requests if 'small/resolve' in request]
    assert any('GET' in request and 'model.safetensors' in request for request in downloads)
    before = len(hub.requests)
    again = sample('owner/small', **hub.environment | dict(HF_HUB_OFFLINE='1'))
    assert again.returncode == 0, again.stderr
    assert len(hub.requests) == before  # nothing was asked


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('owner/gated', 'GatedRepoError'),
        ('owner/missing', 'RepositoryNotFoundError'),
        ('owner/broken', 'RemoteProtocolError'),
    ],
)
def test_what_the_hub_does_not_provide_is_one_line(hub, name, reason):
    process = sample(name, **hub.environment)
    assert process.returncode != 0 and 'Traceback' not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert f'{name} is not a folder, and the hub does not provide it ({reason})' in last


def test_without_a_network_the_error_comes_within_seconds(hub, tmp_path):
    environment = dict(HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path))
    nobody = sample('owner/small', HF_ENDPOINT='http://127.0.0.1:9', **environment)
    assert 'the Hugging Face hub, needed for owner/small, cannot be reached' in nobody.stderr
    with socket.create_server(('127.0.0.1', 0)) as silent:  # accepts connections and says nothing
        endpoint = f'http://127.0.0.1:{silent.getsockname()[1]}'
        started = time.time()
        process = run_command(
            'data/prepare.py',
            'fineweb_edu',
            f'--out={tmp_path}/corpus',
            HF_ENDPOINT=endpoint,
            **environment,
        )
        assert 'cannot be reached' in process.stderr and 'pydocs' in process.stderr
        assert time.time() - started < 40  # ten of them waiting, the others importing


def test_offline_a_name_that_is_not_in_the_cache_is_one_line(tmp_path):
    process = sample('owner/small', HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))
    assert 'owner/small is not a folder, and the hub does not provide it' in process.stderr
    assert 'Traceback' not in process.stderr
