"""
Tokens -> batches. The order of the data is a function of (seed, position) alone, where position
counts the sequences drawn so far. So no state of the order needs saving: it is the same on any
number of processes, after any resume and from stage to stage, and evaluation cannot change it.
"""

import contextlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from data.corpus import open_corpus
from engine.errors import UserError
from engine.parallel import to_device


def parse_mixture(text):
    """'pydocs:3,pycode:1' -> {'pydocs': 0.75, 'pycode': 0.25}. Raises UserError."""
    weights = {}
    for part in text.split(','):
        name, _, weight = part.strip().partition(':')
        with contextlib.suppress(ValueError):
            weights[name] = float(weight or 1)
        # a weight that is no number has no entry
        if not name or not 0 < weights.get(name, -1.0) < np.inf:
            raise UserError(f'{part!r} in data={text!r} is no NAME or NAME:WEIGHT, weight above 0')
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


# ----------------------------------------------------------------------------------------------
# order


def hash_key(*numbers):
    """Hash seeds, round numbers and (arrays of) positions into one uint64 array."""
    key = np.uint64(0)
    with np.errstate(over='ignore'):
        for number in numbers:  # splitmix64
            key = key + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key = key ^ (key >> np.uint64(31))
    return key


def permute(index, n, seed, rounds=6):
    """
    A pseudo-random permutation of 0 .. n-1, evaluated at `index` (int64 array) without storing it:
    a Feistel network on the cells (left, right) of an a x b grid with just over n cells. Results
    outside 0 .. n-1 are permuted again until they fall inside (cycle walking).
    """
    a = int(np.ceil(np.sqrt(n)))
    b = -(-n // a)
    index, outside = np.array(index, dtype=np.int64), np.ones(np.shape(index), bool)
    while outside.any():
        left, right = np.divmod(index[outside], b)
        for r in range(0, rounds, 2):
            left = (left + (hash_key(seed, r, right) % np.uint64(a)).astype(np.int64)) % a
            right = (right + (hash_key(seed, r + 1, left) % np.uint64(b)).astype(np.int64)) % b
        index[outside] = left * b + right
        outside = index >= n
    return index


class Order(NamedTuple):
    """How sequences are drawn."""

    block_size: int  # tokens of input; a sequence has one more, the last target
    kind: str = 'epoch'  # epoch, repeat or random: see `offsets`
    seed: int = 0
    unique_tokens: float = 0  # tokens in an epoch at most; 0: the whole corpus


def offsets(positions, n_tokens, order):
    """
    Where in a corpus of n_tokens the sequences at `positions` begin (int64 arrays). kind 'epoch':
    aligned windows, each once per epoch, reshuffled every epoch; 'repeat': every epoch in the order
    of the first; 'random': any offset, drawn with replacement. A cap, unique_tokens, keeps the
    first windows of the shuffled order: until it is reached, a capped run reads what an uncapped
    one reads. Raises UserError if the corpus is shorter than a sequence.
    """
    block_size, seed = order.block_size, order.seed
    used = windows = (n_tokens - 1) // block_size
    if not windows:
        raise UserError(f'{n_tokens} tokens are too few for sequences of {block_size}')
    if order.unique_tokens:
        used = min(windows, max(1, int(order.unique_tokens) // block_size))
    if order.kind == 'random':
        if used == windows:
            return (hash_key(seed, positions) % np.uint64(n_tokens - block_size)).astype(np.int64)
        # under a cap: one of the windows that it keeps
        place = (hash_key(seed, positions) % np.uint64(used)).astype(np.int64)
    elif order.kind == 'repeat':
        place = np.asarray(positions, dtype=np.int64) % used
    else:
        epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), used)
        # later epochs reorder the same places; the last line maps places to windows for all
        for e in np.unique(epoch[epoch > 0]):
            place[epoch == e] = permute(place[epoch == e], used, hash_key(seed, e))
    return permute(place, windows, hash_key(seed, 0)) * block_size


def split_by_weight(positions, weights):
    """
    (corpus, count), int64 arrays: which corpus of a mixture each position draws from, and how many
    sequences were drawn from that corpus before. Proportions are exact and evenly spread: the first
    corpus is due whenever floor(position x weight) increases; the other positions are split among
    the other corpora in the same way.
    """
    corpus = np.zeros_like(positions)
    count = np.array(positions, dtype=np.int64)
    remaining, undecided = 1.0, np.ones(len(positions), bool)
    for i, weight in enumerate(weights[:-1]):
        share = round(weight / remaining * 10**6)  # in millionths: counting is exact in integers
        before, after = count * share // 10**6, (count + 1) * share // 10**6
        mine = undecided & (after > before)
        rest = undecided & (after == before)
        corpus[mine], corpus[rest] = i, i + 1
        count = np.where(mine, before, np.where(rest, count - before, count))
        remaining, undecided = remaining - weight, rest
    return corpus, count


def sequences(corpora, weights, order, positions):
    """
    The sequences at `positions` of a mixture: (len(positions), block_size + 1) int64. A cap on
    unique tokens is divided among the corpora by weight.
    """
    which, count = split_by_weight(np.asarray(positions, dtype=np.int64), weights)
    tokens = np.empty((len(which), order.block_size + 1), np.int64)
    for i, corpus in enumerate(corpora):
        rows = which == i
        if rows.any():
            own = order._replace(
                seed=hash_key(order.seed, i), unique_tokens=order.unique_tokens * weights[i]
            )
            starts = offsets(count[rows], len(corpus.train), own)
            tokens[rows] = corpus.train[starts[:, None] + np.arange(order.block_size + 1)]
    return tokens


# ----------------------------------------------------------------------------------------------
# batches


class Share(NamedTuple):
    """A device and a process's share of the work; engine.parallel.Hardware has the same fields."""

    device: Any = 'cpu'
    rank: int = 0
    world_size: int = 1


def batches(read, position, batch_size, micro_batch_size, share, steps):
    """
    Yield the (x, y) micro-batches of `steps` steps, beginning with the sequence at `position`. The
    batch_size sequences of a step are dealt out to the processes in turn; each reads its own in
    micro-batches of micro_batch_size. read: positions -> sequences, as in `Source`. A thread reads
    the next micro-batch and copies it to the GPU while the current one trains.
    """
    per_process = batch_size // share.world_size

    def make(step, piece):
        rows = np.arange(piece, min(piece + micro_batch_size, per_process))
        first = position + step * batch_size + share.rank
        return to_device(read(first + share.world_size * rows), share.device)

    places = itertools.product(range(steps), range(0, per_process, micro_batch_size))
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for place in places:
            current, ahead = ahead, reader.submit(make, *place)
            if current:
                yield current.result()
        if ahead:
            yield ahead.result()


def some_of(n, block_size, max_tokens):
    """How many of n sequences fit into max_tokens tokens, at least one; all of them if it is 0."""
    return min(n, max(1, max_tokens // block_size)) if max_tokens else n


def fixed_batches(rows, n, batch_size, share):
    """
    Yield (x, y, number of targets other than -100) for n examples, split among the processes. rows:
    numbers of examples -> x, y. The last batches are padded with targets of -100, so that all have
    the same shape and every process has equally many.
    """
    mine = np.arange(n)[share.rank :: share.world_size]
    for i in range(0, -(-n // share.world_size), batch_size):
        chunk = mine[i : i + batch_size]
        x, y = rows(np.resize(chunk, batch_size))  # repeats the chunk; an empty one gives zeros
        y[len(chunk) :] = -100
        yield *to_device((x, y), share.device), int((y != -100).sum())


def validation_batches(tokens, block_size, batch_size, max_tokens, share=Share()):  # noqa: B008
    """
    The fixed_batches of evenly spaced windows of a validation split, at most max_tokens in all
    (0: every window). Raises UserError if the split is shorter than a sequence.
    """
    windows = (len(tokens) - 1) // block_size
    if not windows:
        raise UserError(f'{len(tokens)} tokens are too few for sequences of {block_size}')
    wanted = some_of(windows, block_size, max_tokens)

    def rows(numbers):
        starts = numbers * windows // wanted * block_size
        found = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
        return found[:, :-1], found[:, 1:].copy()  # a copy, as targets may be set to -100

    return fixed_batches(rows, wanted, batch_size, share)


# ----------------------------------------------------------------------------------------------
# what a stage reads


class Source(NamedTuple):
    """What a stage reads: training examples by position, and a validation split."""

    read: Callable  # positions, int64 (n,) -> sequences (n, T+1), or inputs and targets
    validation: Callable  # batch_size, share -> batches of (x, y, number of real targets)
    bytes_per_token: float  # of the validation split
    tokenizer: str  # kept with the model
    masked: bool = False  # some targets are -100, so their number differs between micro-batches


def text_source(knobs, corpora):
    """The Source of text corpora: the mixture of `knobs`, a train.Run, opened as `corpora`."""
    val = open_corpus(knobs.val_data, knobs.data_dir) if knobs.val_data else corpora[0]
    order = Order(knobs.block_size, knobs.order, knobs.seed, knobs.unique_tokens)
    read = partial(sequences, corpora, list(knobs.corpora.values()), order)

    def validation(batch_size, share):
        return validation_batches(val.val, knobs.block_size, batch_size, knobs.eval_tokens, share)

    return Source(read, validation, val.bytes_per_token, val.meta['tokenizer'])
