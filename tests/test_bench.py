"""The benchmark: every variant trains, FLOPs are the usual ones, mistakes are one line."""

import pytest
from conftest import succeeds

from bench import Bench, take_turns, transformers_peer
from model import GPT

TINY = 'bench.py --size=64x2 --vocab_size=64 --block_size=32 --batch_size=2 --rounds=2'


def test_all_variants_side_by_side():
    pytest.importorskip('transformers')
    names = ('baseline', 'let', 'rkd', 'salt', 'transformers')
    out = succeeds(f'{TINY} --teacher_size=16x1 --variants={",".join(names)}')
    assert all(f'\n| {name} ' in out for name in names)


@pytest.mark.parametrize('size', ['64x2', 'gpt2-64x2'])
def test_transformers_model_is_of_our_shape(size):
    pytest.importorskip('transformers')
    options = Bench(vocab_size=64, block_size=32)
    config = options.config(size)
    models = GPT(config), transformers_peer(config, options)[0]
    # without biases: transformers' GPT-2 has them, whatever one says
    ours, theirs = (sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in models)
    assert ours == theirs


def test_functions_take_turns_and_ratios_are_of_the_same_round():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in 'ab'}
    first, second = take_turns(calls, 10, 3)
    assert called == ['a', 'b', 'b', 'a', 'a', 'b']
    assert first['ratio'] == 1 and first['range'] == '1.00 to 1.00' and second['tokens/s'] > 0


def test_generation_is_compared_with_transformers_own():
    pytest.importorskip('transformers')
    out = succeeds(f'{TINY} --what=generation')
    assert '100.0% of the tokens are the same' in out and '| transformers ' in out
