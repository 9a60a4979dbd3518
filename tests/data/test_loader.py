"""The order of sequences is a function of seed and position, whoever reads them."""

from functools import partial

import numpy as np
import pytest

from data.corpus import Corpus
from data.loader import (
    Order,
    Share,
    batches,
    offsets,
    parse_mixture,
    permute,
    sequences,
    split_by_weight,
    text_source,
    validation_batches,
)
from engine.errors import UserError
from train import Run


@pytest.mark.parametrize('text', ['a:x', 'a:-1', 'a:0', ':1', 'a,,b', 'a:inf', 'a:nan'])
def test_mixtures_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match='WEIGHT'):
        parse_mixture(text)
    assert parse_mixture('a:3,b') == dict(a=0.75, b=0.25)


@pytest.mark.parametrize('n', [1, 2, 3, 7, 100, 4097])
def test_permute_is_a_permutation_and_depends_on_the_seed(n):
    assert sorted(permute(np.arange(n), n, 1)) == list(range(n))
    assert n < 100 or not np.array_equal(permute(np.arange(n), n, 1), permute(np.arange(n), n, 2))


def test_an_epoch_sees_every_window_once_and_the_next_one_in_another_order():
    first, second = (offsets(np.arange(e * 12, e * 12 + 12), 100, Order(8, seed=5)) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(0, 96, 8))
    assert not np.array_equal(first, second)


def test_fixed_data_reuses_what_earlier_stages_saw_and_repeats_nothing_of_its_own():
    stages = np.array([40, 60, 120, 240])  # as in the 8B family, with 320 different windows
    order = Order(1, 'repeat', seed=3, unique_tokens=320)
    ends = stages.cumsum()
    seen = [offsets(np.arange(end - n, end), 500, order) for n, end in zip(stages, ends)]
    earlier, last = np.concatenate(seen[:3]), seen[3]
    assert len(set(last)) == 240 and len(set(earlier) | set(last)) == 320
    assert np.array_equal(last[100:], earlier[:140]) and not set(last[:100]) & set(earlier)


def test_random_order_draws_any_offset_with_replacement():
    starts = offsets(np.arange(20000), 500, Order(8, 'random', seed=1))
    assert starts.min() == 0 and starts.max() == 491 and len(set(starts)) == 492


def test_a_mixture_keeps_its_weights_and_counts_each_corpus_by_itself():
    which, count = split_by_weight(np.arange(1000), [0.6, 0.3, 0.1])
    assert list(np.bincount(which)) == [600, 300, 100]
    for corpus in range(3):
        assert np.array_equal(count[which == corpus], np.arange((which == corpus).sum()))
    assert np.array_equal(split_by_weight(np.array([500, 501]), [0.6, 0.3, 0.1])[0], which[500:502])


@pytest.fixture
def numbers():
    """Two corpora whose tokens are their own positions: 0 .. 999 and 10000 .. 10999."""
    tokens = np.arange(1000), np.arange(10000, 11000)
    return [Corpus('numbers', dict(tokenizer='bytes'), t, t[:100], 1.0, '') for t in tokens]


def collect(numbers, position, micro, count, share=Share()):  # noqa: B008
    """The first tokens of the sequences in some micro-batches, of batches of 8."""
    read = partial(sequences, numbers, [0.5, 0.5], Order(10))
    pieces = list(batches(read, position, 8, micro, share, count * micro * share.world_size // 8))
    assert all((x[:, 1:] == y[:, :-1]).all() for x, y in pieces)
    return [row for x, _ in pieces for row in x[:, 0].tolist()]


def test_the_same_sequences_at_any_number_of_processes_micro_batches_and_after_a_resume(numbers):
    whole = collect(numbers, 0, 8, 3)
    assert sum(first >= 10000 for first in whole) == 12  # of equal weights
    assert collect(numbers, 0, 2, 12) == whole
    assert collect(numbers, 16, 8, 1) == whole[16:]
    by_rank = [collect(numbers, 0, 2, 6, Share('cpu', rank, 2)) for rank in (0, 1)]
    assert [by_rank[i % 2][i // 2] for i in range(24)] == whole


def test_validation_windows_are_fixed_and_padded_with_nothing_to_predict(numbers):
    tokens = numbers[0].val
    found = list(validation_batches(tokens, 10, 4, 0))
    assert [(tuple(x.shape), count) for x, _, count in found] == [
        ((4, 10), n) for n in (40, 40, 10)
    ]
    assert (found[-1][1][1:] == -100).all() and (found[-1][1][0] >= 0).all()
    ((x, *_),) = validation_batches(tokens, 10, 4, 30)  # of nine windows three, evenly spaced
    assert x[:3, 0].tolist() == [0, 30, 60]
    split = [validation_batches(tokens, 10, 4, 0, Share('cpu', rank, 2)) for rank in (0, 1)]
    assert sum(count for part in split for *_, count in part) == 90


def test_knobs_decide_what_is_read(numbers):
    knobs = dict(order='random', seed=3, unique_tokens=40.0)
    found = text_source(Run(data='low', block_size=10, **knobs), numbers[:1]).read(np.arange(9))
    order = Order(10, 'random', 3, 40.0)
    assert np.array_equal(found, sequences(numbers[:1], [1.0], order, np.arange(9)))


def test_a_corpus_shorter_than_a_sequence_is_refused(numbers):
    with pytest.raises(UserError, match='too few'):
        offsets(np.arange(2), 10, Order(10))
    with pytest.raises(UserError, match='too few'):
        next(validation_batches(numbers[0].val, 100, 1, 0))
