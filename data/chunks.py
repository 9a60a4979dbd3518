"""
A corpus that is larger than the disk: its training tokens in chunks, which are made while they are
read and removed behind.

    python data/prepare.py fineweb_edu --chunk_tokens=2e8    # the first chunk, and validation
    python train.py --data=fineweb_edu                       # asks for the others as it goes on

What a chunk holds depends on the corpus alone: train-000005.json says where in the stream chunk 5
begins, so that one which is gone is made again, the same to the bit. When the stream has ended it
begins again. One run at a time: two that are elsewhere would remove each other's chunks.
"""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engine.device import processes
from engine.errors import UserError
from engine.files import checksum, commit_file, read_json, write_json
from engine.progress import progress_bar

PROGRAM = Path(__file__).resolve().parent / 'make_chunk.py'


def chunk_file(folder, number):
    """Where the tokens of a chunk are; beside them is its record, .json."""
    return Path(folder) / f'train-{number:06}.bin'


# ----------------------------------------------------------------------------------------------
# reading


class Chunks:
    """
    The training tokens of a corpus in chunks. On the disk are the chunk that is read, the one
    before, for processes that are behind, and the one after, which another process makes.
    """

    def __init__(self, folder, dtype, tokens):
        """tokens: of a chunk."""
        self.folder, self.dtype, self.tokens = Path(folder).resolve(), dtype, tokens
        self.opened = {}  # number: token ids, memory-mapped
        self.maker = None  # the process that makes a chunk

    def read(self, number):
        """The token ids of a chunk, 1-d; waits until it is there. Raises UserError."""
        if number not in self.opened:
            self.wait_for(number)
            self.opened = {n: ids for n, ids in self.opened.items() if abs(n - number) == 1}
            self.opened[number] = self.open(number)
            if processes()[0] == 0:
                for path in self.folder.glob('train-*.bin'):
                    if abs(int(path.stem.split('-')[1]) - number) > 1:
                        path.unlink()
                self.ask_for(number + 1)
        return self.opened[number]

    def open(self, number):
        """The tokens in the file of a chunk. Raises UserError for another file than was made."""
        path = chunk_file(self.folder, number)
        if checksum(path) != read_json(path.with_suffix('.json'), sha256=str)['sha256']:
            raise UserError(f'{path} is damaged: remove it, and the same command makes it again')
        return np.memmap(path, self.dtype, mode='r')

    def ask_for(self, number):
        """Let another process make a chunk, unless it is there or that process is at work."""
        if not self.making() and not chunk_file(self.folder, number).is_file():
            command = [sys.executable, str(PROGRAM), str(self.folder), str(number)]
            with open(self.folder / 'make_chunk.log', 'w', encoding='utf-8') as log:
                # a session of its own: Ctrl-C is the run's, and what is begun is of use later
                how = dict(stdout=log, stderr=log, start_new_session=True)
                self.maker = subprocess.Popen(command, **how)

    def making(self):
        """Whether the process that makes a chunk is at work."""
        return self.maker is not None and self.maker.poll() is None

    def wait_for(self, number):
        """Return when a chunk is there; the first process has it made. Raises UserError."""
        path, tries = chunk_file(self.folder, number), 0
        while not path.is_file():
            if processes()[0] == 0 and not self.making():
                if tries == 2:
                    lines = (self.folder / 'make_chunk.log').read_text().splitlines()
                    raise UserError(f'{path} could not be made ({(lines or [""])[-1]})')
                self.ask_for(number)
                tries += 1
            time.sleep(0.1)


# ----------------------------------------------------------------------------------------------
# writing


def write_chunk(folder, number, tokens, pieces_from):
    """
    Write chunk `number`, of so many tokens, by its record, and the record of the next; with the
    first, its held-out documents as val.bin. pieces_from(state) yields, from there on and without
    end, ({split: (ids, bytes, documents)}, state of the stream before them). Returns the counts of
    each split. Raises UserError if the chunk was another when it was made before.
    """
    path, val = chunk_file(folder, number), Path(folder) / 'val.bin'
    record = read_json(path.with_suffix('.json'), skip=int)
    next_record = chunk_file(folder, number + 1).with_suffix('.json')
    counts = {split: dict(tokens=0, bytes=0, documents=0) for split in ('train', 'val')}
    with ExitStack() as stack:
        files = dict(train=stack.enter_context(open(f'{path}.tmp', 'wb')))
        if number == 0 and not val.exists():
            files['val'] = stack.enter_context(open(val, 'wb'))
        how = dict(desc=path.stem, unit='tok', unit_scale=True)
        bar = stack.enter_context(progress_bar(total=tokens, **how))
        for piece, following in cut(pieces_from(record['stream']), record['skip'], tokens):
            for split, (ids, n_bytes, documents) in piece.items():
                if split in files:
                    files[split].write(ids.tobytes())
                counts[split]['tokens'] += len(ids)
                counts[split]['bytes'] += n_bytes
                counts[split]['documents'] += documents
            written = counts['train']['tokens']
            bar.update(written - bar.n)
            if written == tokens and not next_record.is_file():
                write_json(next_record, following)
    made = counts['train']['sha256'] = checksum(f'{path}.tmp')
    if record.get('sha256', made) != made:
        os.remove(f'{path}.tmp')
        raise UserError(f'{path} would not be what it was: its corpus has changed')
    write_json(path.with_suffix('.json'), record | dict(sha256=made))
    commit_file(f'{path}.tmp', path)
    return counts


def cut(pieces, skip, tokens):
    """
    Of (piece, state before it) all but the first `skip` training tokens, up to so many `tokens`:
    yields the pieces with the record of what would follow, which is a state and what to skip.
    """
    for piece, before in pieces:
        used = 0
        if 'train' in piece:
            ids, *sizes = piece['train']
            first = min(skip, len(ids))
            ids = ids[first : first + tokens]
            skip, tokens, used = skip - first, tokens - len(ids), first + len(ids)
            piece['train'] = ids, *sizes
        yield piece, dict(stream=before, skip=used)
        if not tokens:
            return
