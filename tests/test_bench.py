"""
The benchmark: every variant trains, FLOPs and memory are what they should be, mistakes are one
line.
"""

import re

import pytest
import torch

import bench
from bench import Bench, flops_per_token, peak_memory
from engine.errors import UserError
from model import GPT

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


def test_all_variants_side_by_side(capsys):
    pytest.importorskip('transformers')
    bench.main(
        [f'--{k}={v}' for k, v in TINY.items()] + ['--variants=baseline,let,rkd,transformers']
    )
    out = capsys.readouterr().out
    assert (
        all(f'\n| {name} ' in out for name in ('baseline', 'let', 'rkd', 'transformers'))
        and 'in a matrix product' in out
    )


def test_transformers_model_is_of_our_shape():
    pytest.importorskip('transformers')
    for gpt2 in (False, True):  # transformers' GPT-2 has biases, whatever one says
        options = Bench(**TINY, gpt2=gpt2)
        config = options.config('64x2')
        peer = bench.transformers_peer(config, options)
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


@pytest.mark.parametrize(
    'more, word',
    [
        (['--variants=fast'], "no variant 'fast'"),
        (['--variants=nanogpt'], '--nanogpt=FOLDER'),
        (['--data=random'], 'data must be one of synthetic, real'),
        (['--rounds=0'], 'rounds'),
        (['--what=speed'], 'what must be one of steps, loader'),
    ],
)
def test_mistakes(more, word):
    with pytest.raises(UserError, match=word):
        bench.main([f'--{k}={v}' for k, v in TINY.items()] + more)
