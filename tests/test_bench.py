"""The benchmark: every variant trains, FLOPs are the usual ones, mistakes are one line."""

import pytest

import bench
from bench import Bench, take_turns, transformers_peer
from engine.errors import UserError
from model import GPT

WORDS = ['--size=64x2', '--vocab_size=64', '--block_size=32', '--batch_size=2']
WORDS += ['--teacher_size=16x1', '--rounds=2', '--device=cpu']


def test_all_variants_side_by_side(capsys):
    pytest.importorskip('transformers')
    bench.main([*WORDS, '--variants=baseline,let,rkd,salt,transformers'])
    out = capsys.readouterr().out
    for name in ('baseline', 'let', 'rkd', 'salt', 'transformers'):
        assert f'\n| {name} ' in f'\n{out}'


def test_transformers_model_is_of_our_shape():
    pytest.importorskip('transformers')
    for size in ('64x2', 'gpt2-64x2'):  # transformers' GPT-2 has biases, whatever one says
        options = Bench(vocab_size=64, block_size=32)
        config = options.config(size)
        peer, _ = transformers_peer(config, options)
        sizes = [p.numel() for p in peer.parameters() if p.ndim > 1]
        assert sum(sizes) == sum(p.numel() for p in GPT(config).parameters() if p.ndim > 1)


def test_functions_take_turns_and_ratios_are_of_the_same_round():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in 'ab'}
    first, second = take_turns(calls, 10, 3)
    assert called == ['a', 'b', 'b', 'a', 'a', 'b']
    assert first['ratio'] == 1 and first['range'] == '1.00 to 1.00' and second['tokens/s'] > 0


def test_generation_is_compared_with_transformers_own(capsys):
    pytest.importorskip('transformers')
    bench.main([*WORDS, '--what=generation'])
    out = capsys.readouterr().out
    assert '100.0% of the tokens are the same' in out and '| transformers ' in out


@pytest.mark.parametrize(
    'more, word',
    [
        ('--variants=fast', "no variant 'fast'"),
        ('--variants=let+fast', "no variant 'let.fast'"),
        ('--variants=nanogpt', '--nanogpt=FOLDER'),
        ('--rounds=0', 'rounds'),
        ('--what=speed', 'what must be one of steps, generation'),
    ],
)
def test_mistakes(more, word):
    with pytest.raises(UserError, match=word):
        bench.main([*WORDS, more])
