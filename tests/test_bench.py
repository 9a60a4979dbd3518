"""
The benchmark: every variant trains, FLOPs and memory are what they should be, mistakes are one
line.
"""

import json
import re
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_command, write_texts

import bench
from bench import Bench, flops_per_token, peak_memory
from data.prepare import Preparation, prepare
from engine.errors import UserError
from extras import gpu
from extras.variants import PEERS, transformers_peer
from model import GPT, GPTConfig

TINY = dict(
    size='64x2',
    vocab_size=64,
    block_size=32,
    batch_size=2,
    teacher_size='16x1',
    head_dim=16,
    rounds=2,
    steps=1,
    device='cpu',
)


WORDS = [f'--{k}={v}' for k, v in TINY.items()]


def test_all_variants_side_by_side(capsys):
    pytest.importorskip('transformers')
    bench.main([*WORDS, '--variants=baseline,let,rkd,transformers'])
    out = capsys.readouterr().out
    assert (
        all(f'\n| {name} ' in out for name in ('baseline', 'let', 'rkd', 'transformers'))
        and 'in a matrix product' in out
    )


def test_fits_beside_scipys(capsys):
    """Side by side they take less time than one after the other."""
    pytest.importorskip('scipy')
    bench.main(['--what=fits'])
    ratios = re.findall(r"scipy's BFGS.*\| +([\d.]+) \|", capsys.readouterr().out)
    assert len(ratios) == 2 and min(map(float, ratios)) > 5


def test_transformers_model_is_of_our_shape():
    pytest.importorskip('transformers')
    for gpt2 in (False, True):  # transformers' GPT-2 has biases, whatever one says
        options = Bench(**TINY, gpt2=gpt2)
        config = options.config('64x2')
        peer = transformers_peer(config, options)
        sizes = [p.numel() for p in peer.parameters() if p.ndim > 1]
        assert sum(sizes) == sum(p.numel() for p in GPT(config).parameters() if p.ndim > 1)


def test_real_data_go_through_the_loader(data_dir):
    options = Bench(**{**TINY, 'vocab_size': 257}, data='real', data_dir=str(data_dir))
    found, _, _, _ = bench.measure(options)
    measured = found['baseline']
    assert len(measured.speeds) == 2 and min(measured.speeds) > 0
    config = options.config('64x2')
    assert measured.held == 12 * config.num_params(
        embedding=True, head=True
    )  # float32 weights and two moments


def test_a_flipped_bit_of_a_corpus_is_found(tmp_path):
    texts, out = write_texts(tmp_path / 'texts', 'jsonl'), tmp_path / 'mine'
    prepare(Preparation(texts, str(out), tokenizer='bytes', processes=1))
    content = bytearray((out / 'train.bin').read_bytes())
    content[len(content) // 2] ^= 1
    (out / 'train.bin').write_bytes(content)
    words = [*WORDS, '--data=real', '--vocab_size=257', f'--data_dir={tmp_path}', '--corpus=mine']
    with pytest.raises(UserError, match='train.bin is damaged'):
        bench.main(words)


def test_flops_of_gpt2_are_those_that_everyone_quotes():
    config = Bench(size='gpt2', vocab_size=50304, block_size=1024).config('gpt2')
    assert flops_per_token(config, causal=False) == pytest.approx(
        854.7e6, rel=2e-3
    ) and flops_per_token(config, causal=True) == pytest.approx(798e6, rel=2e-3)


def test_peak_memory_sees_what_is_there_at_once():
    def step():
        a = torch.empty(2**20)
        b = torch.empty(2**20)
        del a, b
        torch.empty(2**19)

    assert peak_memory(step, torch.device('cpu')) == pytest.approx(2 * 2**22, rel=0.01)


def test_the_loader_outruns_the_model(data_dir, capsys):
    bench.main(
        [f'--{k}={v}' for k, v in {**TINY, 'vocab_size': 257, 'size': '64x4'}.items()]
        + ['--what=loader', f'--data_dir={data_dir}']
    )
    out = capsys.readouterr().out
    assert all(f'| {order} ' in out for order in ('epoch', 'random')) and re.search(
        r'64x4 takes [\d,]+ tokens/s', out
    )


def test_a_variant_that_fails_leaves_the_others(capsys):
    bench.main([*WORDS, '--variants=nanogpt,baseline,baseline+ddp,baseline+fsdp'])
    out = capsys.readouterr().out
    assert 'nanogpt failed: the variant nanogpt needs --nanogpt=FOLDER' in out
    assert all(f'\n| {name} ' in out for name in ('baseline', 'baseline+ddp', 'baseline+fsdp'))


def test_other_losses_over_our_layers_are_the_same_loss():
    options, x = Bench(**TINY), torch.randint(64, (2, 32))
    torch.manual_seed(0)
    ours = GPT(options.config('64x2'))
    for name in ('logits', 'linear_cross_entropy'):
        if name == 'logits' or hasattr(torch.nn.functional, name):
            peer = PEERS[name](options.config('64x2'), options)
            peer.model.load_state_dict(ours.state_dict())
            torch.testing.assert_close(peer(x, x).loss, ours(x, x).loss)


def test_a_profile_says_where_a_step_goes(capsys, tmp_path):
    bench.main([*WORDS, '--what=profile', f'--save={tmp_path / "profile.json"}'])
    out = capsys.readouterr().out
    assert re.search(r'\| aten::mm +\|', out) and 'ms a step of baseline' in out
    saved = json.loads((tmp_path / 'profile.json').read_text())['records']
    times = [record['ms'] for record in saved]
    assert times == sorted(times, reverse=True)
    assert 0.3 < sum(record['of the time'] for record in saved) <= 1


def test_all_that_a_gpu_is_asked_is_asked_at_toy_size(tmp_path):
    """In processes, as there; commands and generation take longest, and have their own tests."""
    parts = ['machine', 'gpt2', 'profile', 'taught', 'processes', 'attention', 'saving', 'growth']
    how = ['--what=gpu', '--toy=True', '--device=cpu', f'--out={tmp_path}']
    found = run_command('bench.py', *how, f'--parts={",".join(parts)}')
    assert found.returncode == 0, found.stderr
    text = (tmp_path / 'gpu.md').read_text(encoding='utf-8')
    for name in parts:
        part = json.loads((tmp_path / f'{name}.json').read_text())
        assert f'## {gpu.PARTS[name].title}' in text and part['records'], part['words']
    assert 'nanogpt failed: ' in text and '| fsdp ' in text and '| rkd ' in text


def test_how_cost_grows_is_asked_at_toy_size(tmp_path):
    parts = '--parts=block,loader,files'
    bench.main([*WORDS, '--what=curves', '--toy=True', parts, f'--out={tmp_path}'])
    (step,) = json.loads((tmp_path / 'block.json').read_text())['records']
    assert step['block_size'] == 128 and step['tokens/s'] > 0 and 0 < step['of peak'] < 1
    made = json.loads((tmp_path / 'files.json').read_text())['records']
    assert [record['command'] for record in made] == ['expand.py', 'col.py']
    config = GPTConfig(n_layer=4, n_head=1, n_embd=64, n_mlp=168, vocab_size=8192)
    expected = 4e-9 * config.num_params(embedding=True, head=True)
    assert made[0]['GB written'] == pytest.approx(expected, rel=1e-2)
    opened = json.loads((tmp_path / 'loader.json').read_text())['records']
    assert [record['corpus, tokens'] for record in opened] == [10**6, 10**7]
    assert (tmp_path / 'curves.png').is_file() and '## loader' in (
        tmp_path / 'curves.md'
    ).read_text()
    with pytest.raises(UserError, match="no part 'speed'"):
        bench.main([*WORDS, '--what=curves', '--parts=speed'])


def test_generation_is_compared_with_transformers_own(capsys):
    pytest.importorskip('transformers')
    bench.main([*WORDS, '--what=generation', '--toy=True'])
    out = capsys.readouterr().out
    assert '32 of 32 greedy tokens are the same' in out and out.count('| transformers ') == 2


def test_a_part_that_takes_too_long_ends_with_all_that_it_started(tmp_path, monkeypatch):
    """Its grandchild says its number and sleeps: a minute later it would still be there."""
    told = tmp_path / 'number'
    sleep = f"import os, time; print(os.getpid(), file=open({str(told)!r}, 'w')); time.sleep(60)"
    start = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {sleep!r}])'
    monkeypatch.setattr(gpu, 'words_of', lambda *_: ['-c', start])
    monkeypatch.setitem(gpu.PARTS, 'growth', gpu.PARTS['growth']._replace(limit=3))
    options = Bench(what='gpu', toy=True, device='cpu', out=str(tmp_path), parts=('growth',))
    assert 'more than 3 seconds' in gpu.run_part('growth', options, tmp_path)['words']
    grandchild, deadline = Path(f'/proc/{int(told.read_text())}/stat'), time.monotonic() + 5
    with suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        while grandchild.read_text().split()[2] != 'Z':  # or has ended, and nobody has asked
            assert time.monotonic() < deadline, 'it still sleeps'


def test_a_part_that_fails_says_why(tmp_path, monkeypatch, capsys):
    options = Bench(what='gpu', toy=True, device='cpu', out=str(tmp_path), parts=('growth',))
    monkeypatch.setitem(gpu.PARTS, 'growth', gpu.PARTS['growth']._replace(limit=0.1))
    gpu.measure(options)
    assert 'failed: it took more than 0.1 seconds' in capsys.readouterr().out
    monkeypatch.setitem(gpu.PARTS, 'growth', gpu.PARTS['gpt2']._replace(words='--variants=none'))
    gpu.measure(options)
    assert "failed with exit code 2: error: no variant 'none'" in capsys.readouterr().out
    with pytest.raises(UserError, match='no GPU here: --toy=True'):
        gpu.measure(replace(options, toy=False))


@pytest.mark.parametrize(
    'more, word',
    [
        (['--variants=fast'], "no variant 'fast'"),
        (['--variants=nanogpt'], '--nanogpt=FOLDER'),
        (['--data=random'], 'data must be one of synthetic, real'),
        (['--rounds=0'], 'rounds'),
        (['--what=speed'], 'what must be one of steps, loader, profile, fits, generation'),
        (['--what=gpu', '--parts=speed'], "no part 'speed'"),
    ],
)
def test_mistakes(more, word):
    with pytest.raises(UserError, match=word):
        bench.main([f'--{k}={v}' for k, v in TINY.items()] + more)
