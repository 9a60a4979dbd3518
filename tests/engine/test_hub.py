"""Models from the hub, by fresh processes that ask a stand-in server on loopback."""

import pytest
import torch
from conftest import call, run_command
from safetensors.torch import load_file
from stand_in_hub import StandInHub

from model import GPT, GPTConfig

pytest.importorskip('huggingface_hub')
SAMPLE = 'sample.py --prompt=def --max_new_tokens=4'


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A hub with a small model, whole, as a pickle, without an owner; others cannot be had."""
    folder = tmp_path_factory.mktemp('hub')
    model = GPT(GPTConfig.named('16x2', vocab_size=257, block_size=64))
    for name in ('owner/small', 'owner/broken', 'owner/pickled', 'gpt2'):
        model.save(folder / 'models' / name, 'bytes')
    weights = folder / 'models' / 'owner' / 'pickled' / 'model.safetensors'
    torch.save(load_file(weights), weights.parent / 'pytorch_model.bin')
    weights.unlink()
    (folder / 'models' / 'owner' / 'gated').mkdir()
    with StandInHub(folder) as server:
        yield server


def sample(name, **environment):
    """The finished process of sample.py on a model of this name."""
    return run_command(f'{SAMPLE} --model={name}', **environment)


def test_a_model_of_the_hub_is_downloaded_once_and_then_used_offline(hub):
    process = sample('owner/small', **hub.environment)
    assert process.returncode == 0, process.stderr
    asked = len(hub.requests)
    again = sample('owner/small', **hub.environment | dict(HF_HUB_OFFLINE='1'))
    assert again.returncode == 0 and len(hub.requests) == asked > 0  # nothing was asked


@pytest.mark.parametrize('name', ['owner/pickled', 'gpt2'])
def test_names_as_people_write_them_and_repositories_of_every_kind(hub, name):
    process = sample(name, **hub.environment)
    folder = call(f'{SAMPLE} --model={hub.folder}/models/owner/small')
    one, other = (text.stdout.split('\n|')[0] for text in (process, folder))  # without speeds
    assert one == other != '', process.stderr


@pytest.mark.parametrize(
    'name, reason',
    [
        ('owner/gated', 'GatedRepoError'),
        ('owner/missing', 'RepositoryNotFoundError'),
        ('owner/broken', 'RemoteProtocolError'),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, name, reason):
    process = sample(name, **hub.environment)
    assert process.returncode == 2 and 'Traceback' not in process.stderr
    words = f'{name} is not a folder, and the hub does not provide it ({reason})'
    assert words in process.stderr.strip().splitlines()[-1]


def test_without_a_network_the_error_is_one_line(tmp_path):
    environment = dict(HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path))
    nobody = sample('owner/small', HF_ENDPOINT='http://127.0.0.1:9', **environment)
    assert 'the Hugging Face hub, needed for owner/small, cannot be reached' in nobody.stderr
