"""
Tokens -> batches. Which tokens stand at which place is a function of (seed, position) alone, where position counts the
sequences drawn so far: nothing about the order is ever saved, it is the same at any number of processes, after any
resume and from stage to stage, and evaluation cannot disturb it.
"""
import contextlib
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checksums import checksum
from configurator import UserError, read_json, write_atomically


@dataclass
class Corpus:
    """A prepared corpus: its meta.json and its two memory-mapped splits, 1-d arrays of token ids."""
    name: str
    meta: dict
    train: np.ndarray
    val: np.ndarray

    @property
    def bytes_per_token(self):
        """Bytes of text to a token, on the validation split."""
        return self.meta['splits']['val']['bytes'] / self.meta['splits']['val']['tokens']


def open_corpus(name, data_dir='data'):
    """The corpus in data_dir/name. Raises UserError when it is not prepared or a file's size is not what meta.json says."""
    folder = Path(data_dir) / name
    try:
        meta = read_json(folder / 'meta.json', splits=dict, dtype=str, tokenizer=str, vocab_size=int)
        sizes = {split: int(meta['splits'][split]['tokens']) for split in ('train', 'val')}
        meta['checksums'] = dict(meta.get('checksums', {}))   # of what else is in the folder
        dtype = dict(uint16=np.dtype('uint16'), uint32=np.dtype('uint32'))[meta['dtype']]
        for split, tokens in sizes.items():
            if not (folder / f'{split}.bin').is_file():
                raise UserError(f'{folder} has lost its {split}.bin: delete {folder} and prepare it again')
            found = (folder / f'{split}.bin').stat().st_size
            if found != tokens * dtype.itemsize:
                raise UserError(f'{folder}/{split}.bin has {found} bytes instead of {tokens * dtype.itemsize}: '
                                f'delete {folder} and prepare it again')
    except FileNotFoundError:
        raise UserError(f'{folder} is not prepared: run  python data/prepare.py {name}') from None
    except UserError as error:
        raise UserError(f'{error}: delete {folder} and prepare it again' if 'meta.json' in str(error) else str(error)) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{folder}/meta.json is damaged ({error!r}): delete {folder} and prepare it again') from None
    return Corpus(name, meta, *(np.memmap(folder / f'{split}.bin', dtype, mode='r') for split in ('train', 'val')))


def verify_corpus(name, data_dir='data'):
    """
    Raise UserError when the content of a corpus is not what was prepared. Reads all of it, but only once: what was whole is
    remembered in verified.json, until a file changes.
    """
    folder, meta = Path(data_dir) / name, open_corpus(name, data_dir).meta
    wanted = {f'{split}.bin': counts['sha256'] for split, counts in meta['splits'].items() if 'sha256' in counts}
    wanted |= meta['checksums']
    now = {file: [path.stat().st_size, path.stat().st_mtime_ns] for file in wanted if (path := folder / file).is_file()}
    with contextlib.suppress(OSError, UserError):
        if read_json(folder / 'verified.json') == now:
            return
    small = sum(size for size, _ in now.values()) < 1e9
    for file in tqdm(wanted, desc=f'verifying {name}', unit='file', leave=False, disable=small):
        if file not in now or checksum(folder / file) != wanted[file]:
            raise UserError(f'{folder / file} is damaged: its checksum is not the one in meta.json; delete {folder} and prepare '
                            'it again')
    with contextlib.suppress(OSError):   # a folder that cannot be written to is verified every time
        write_atomically(folder / 'verified.json', json.dumps(now) + '\n')


def parse_mixture(text):
    """'pydocs:3,pycode:1' -> {'pydocs': 0.75, 'pycode': 0.25}; a lone name has weight 1. Raises UserError."""
    weights = {}
    for part in text.split(','):
        name, _, weight = part.strip().partition(':')
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        if not name or not 0 < weights[name] < float('inf'):
            raise UserError(f'{part!r} in data={text!r} is not NAME or NAME:WEIGHT with a positive weight')
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# order

def _mix(x):
    """A well-mixed hash of uint64 numbers (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*numbers):
    """One uint64 array out of seeds, round numbers and (arrays of) positions."""
    key = np.uint64(0)
    with np.errstate(over='ignore'):
        for number in numbers:
            key = _mix(key + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(index, n, seed, rounds=6):
    """
    A pseudo-random permutation of 0 .. n-1, evaluated at `index` (int64 array) without storing it: a Feistel network on
    the pairs (left, right) of an a x b grid just larger than n; what falls outside n goes through again until it is inside.
    """
    a = int(np.ceil(np.sqrt(n)))
    b = -(-n // a)
    index, outside = np.array(index, dtype=np.int64), np.ones(np.shape(index), bool)
    while outside.any():
        left, right = np.divmod(index[outside], b)
        for r in range(0, rounds, 2):
            left = (left + (_key(seed, r, right) % np.uint64(a)).astype(np.int64)) % a
            right = (right + (_key(seed, r + 1, left) % np.uint64(b)).astype(np.int64)) % b
        index[outside] = left * b + right
        outside = index >= n
    return index


def offsets(positions, n_tokens, block_size, order, seed, unique_tokens=0):
    """
    Where in a corpus of n_tokens the sequences at `positions` begin (int64 arrays). A sequence is block_size + 1 tokens.
    order 'epoch': aligned windows, each once an epoch, shuffled anew every epoch. order 'random': any start, with
    replacement. unique_tokens caps the data: only the first so many tokens of the shuffled order are ever used, then the
    second epoch begins, so a capped run sees what an uncapped one sees until the cap is reached.
    """
    windows = (n_tokens - 1) // block_size
    if windows < 1:
        raise UserError(f'a corpus of {n_tokens} tokens is too short for sequences of {block_size} and one more')
    used = min(windows, max(1, int(unique_tokens) // block_size)) if unique_tokens else windows
    if order == 'random':
        if used == windows:
            return (_key(seed, positions) % np.uint64(n_tokens - block_size)).astype(np.int64)
        window = (_key(seed, positions) % np.uint64(used)).astype(np.int64)
        return permute(window, windows, _key(seed, 0)) * block_size
    epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), used)
    for e in np.unique(epoch[epoch > 0]):   # epoch 0 keeps the base order
        place[epoch == e] = permute(place[epoch == e], used, _key(seed, e))
    return permute(place, windows, _key(seed, 0)) * block_size


def split_by_weight(positions, weights):
    """
    Which corpus of a mixture is drawn at each position, and how many were drawn from it before: (corpus, count), int64.
    Exact proportions, evenly spread: the first corpus is due whenever floor(position x weight) moves on; the rest is
    split the same way among the others.
    """
    corpus, count = np.zeros_like(positions), np.array(positions, dtype=np.int64)
    remaining, undecided = 1.0, np.ones(len(positions), bool)
    for i, weight in enumerate(weights[:-1]):
        share = round(weight / remaining * 10 ** 6)          # in millionths, so that counting is exact in integers
        before, after = count * share // 10 ** 6, (count + 1) * share // 10 ** 6
        mine, rest = undecided & (after > before), undecided & (after == before)
        corpus[mine], corpus[rest] = i, i + 1
        count = np.where(mine, before, np.where(rest, count - before, count))
        remaining, undecided = remaining - weight, rest
    return corpus, count


def sequences(corpora, weights, positions, block_size, order='epoch', seed=0, unique_tokens=0):
    """
    The sequences at `positions` of the mixture: (len(positions), block_size + 1) int64. unique_tokens caps the mixture, each
    corpus by its weight.
    """
    which, count = split_by_weight(np.asarray(positions, dtype=np.int64), weights)
    tokens = np.empty((len(which), block_size + 1), np.int64)
    for i, corpus in enumerate(corpora):
        rows = which == i
        if rows.any():
            starts = offsets(count[rows], len(corpus.train), block_size, order, _key(seed, i), unique_tokens * weights[i])
            tokens[rows] = corpus.train[starts[:, None] + np.arange(block_size + 1)]
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# batches

def to_device(examples, device):
    """
    Inputs x and targets y on the device; to a GPU asynchronously, from pinned memory. examples: sequences (n, T+1), whose
    targets are the next tokens, (n, T) int64; or the two arrays (x, y).
    """
    arrays = [torch.from_numpy(array) for array in (examples if isinstance(examples, tuple) else (examples,))]
    if torch.device(device).type == 'cuda':
        arrays = [array.pin_memory().to(device, non_blocking=True) for array in arrays]
    if len(arrays) == 2:
        return tuple(arrays)
    return arrays[0][:, :-1].contiguous(), arrays[0][:, 1:].contiguous()


def batches(read, position, batch_size, micro_batch_size, device, rank=0, world_size=1):
    """
    Endlessly yield (x, y) micro-batches from sequence `position` on. A batch is the batch_size sequences behind position,
    dealt to the processes like cards; each process gets batch_size / world_size of them in pieces of micro_batch_size.
    `read`: positions -> what to_device takes. The next micro-batch is read and copied to the GPU while the current one trains.
    """
    per_process = batch_size // world_size

    def make(step, piece):
        rows = np.arange(piece, min(piece + micro_batch_size, per_process))
        return to_device(read(position + step * batch_size + rank + world_size * rows), device)

    plan = ((step, piece) for step in itertools.count() for piece in range(0, per_process, micro_batch_size))
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(make, *next(plan))
        while True:
            current, ahead = ahead.result(), reader.submit(make, *next(plan))
            yield current


def validation_batches(tokens, block_size, batch_size, max_tokens, device, rank=0, world_size=1):
    """
    Yield (x, y, number of real targets) over fixed, evenly spaced windows of a validation split, at most max_tokens in
    all (0: every window). The last batch is filled up with targets of -100, so that all have the same shape, and every process
    has as many.
    """
    windows = (len(tokens) - 1) // block_size
    if windows < 1:
        raise UserError(f'a validation split of {len(tokens)} tokens is too short for sequences of {block_size} and one more')
    wanted = min(windows, max(1, max_tokens // block_size)) if max_tokens else windows
    starts = (np.arange(wanted) * windows // wanted * block_size)[rank::world_size]
    for i in range(0, -(-wanted // world_size), batch_size):
        chunk = starts[i:i + batch_size]
        x, y = to_device(tokens[np.resize(chunk, batch_size)[:, None] + np.arange(block_size + 1)].astype(np.int64), device)
        y = torch.where(torch.arange(batch_size, device=y.device)[:, None] < len(chunk), y, -100)   # x may share y's memory
        yield x, y, len(chunk) * block_size


# ---------------------------------------------------------------------------------------------------------------------
# what a stage reads

class Source(NamedTuple):
    """Training examples by position, and a validation split: what a stage trains on."""
    read: Callable          # positions, int64 (n,) -> sequences (n, T+1), or inputs and targets (x, y)
    validation: Callable    # batch_size, device, rank, world_size -> batches of (x, y, number of real targets)
    bytes_per_token: float  # of the validation split
    tokenizer: str          # kept with the model


def text_source(knobs):
    """
    The Source of a run's corpora, text or instructions; knobs: train.Run. Raises UserError for a corpus that is not prepared.
    """
    if 'supervised' in (kinds := {open_corpus(name, knobs.data_dir).meta.get('kind', 'text') for name in knobs.corpora}):
        if len(knobs.corpora) > 1:
            raise UserError(f'data={knobs.data}: instructions are not mixed with other corpora ({", ".join(sorted(kinds))})')
        from data.instruct import supervised_source
        return supervised_source(knobs)
    corpora = [open_corpus(name, knobs.data_dir) for name in knobs.corpora]
    val = open_corpus(knobs.val_data, knobs.data_dir) if knobs.val_data else corpora[0]
    read = partial(sequences, corpora, list(knobs.corpora.values()), block_size=knobs.block_size, order=knobs.order,
                   seed=knobs.seed, unique_tokens=knobs.unique_tokens)
    return Source(read, lambda *share: validation_batches(val.val, knobs.block_size, share[0], knobs.eval_tokens, *share[1:]),
                  val.bytes_per_token, val.meta['tokenizer'])
