"""Models from the hub, by fresh processes that ask a stand-in server on loopback."""

import json
import socket
import time

import pytest
import torch
from conftest import ROOT, run_command
from safetensors.torch import load_file
from stand_in_hub import StandInHub

import engine.hugging_face
from model import GPT, GPTConfig

pytest.importorskip('huggingface_hub')


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """
    A hub with a small model, whole, in several files, as a pickle, without an owner, and again with
    files that break off; and a gated one.
    """
    folder = tmp_path_factory.mktemp('hub')
    model = GPT(GPTConfig.named('16x2', vocab_size=257, block_size=64))
    for name in ('owner/small', 'owner/broken', 'owner/pickled', 'gpt2'):
        model.save(folder / 'models' / name, 'bytes')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.hugging_face, 'SHARD_BYTES', 20_000)
        model.save(folder / 'models' / 'owner' / 'sharded', 'bytes')
    weights = folder / 'models' / 'owner' / 'pickled' / 'model.safetensors'
    torch.save(load_file(weights), weights.parent / 'pytorch_model.bin')
    weights.unlink()
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


@pytest.mark.parametrize('name', ['owner/sharded', 'owner/pickled', 'gpt2'])
def test_names_as_people_write_them_and_repositories_of_every_kind(hub, name):
    process = sample(name, **hub.environment)
    assert process.returncode == 0, process.stderr
    folder = sample(hub.server.folder / 'models' / 'owner' / 'small')
    written = [text.stdout.split('\n|')[0] for text in (process, folder)]  # without speeds
    assert written[0] == written[1]


def test_a_hub_model_is_grown_and_evaluated_and_leaves_no_folder_of_its_name(
    hub, data_dir, tmp_path
):
    knobs = ('--to=stk2', '--width=lossless', '--depth=identity')
    grow = run_command('expand.py', 'owner/sharded', tmp_path / 'grown', *knobs, **hub.environment)
    assert grow.returncode == 0, grow.stderr
    assert (tmp_path / 'grown' / 'tokenizer.json').is_file()
    losses = []
    for model in ('owner/small', tmp_path / 'grown'):
        knobs = (f'--data_dir={data_dir}', '--eval_tokens=256', f'--out={tmp_path}/evaluation')
        process = run_command('evaluate.py', model, *knobs, **hub.environment)
        assert process.returncode == 0, process.stderr
        outcome = json.loads((tmp_path / 'evaluation' / 'evaluation.json').read_text())
        losses += [row['val loss'] for row in outcome['models']]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not (ROOT / 'owner').exists()


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
