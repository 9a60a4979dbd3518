"""
A corpus that is larger than the disk: its training tokens in chunks, which are made while they are
read and removed behind.

    python data/prepare.py fineweb_edu --chunk_tokens=2e8    # the first chunk, and validation
    python train.py --data=fineweb_edu                       # asks for the others as it goes on

What a chunk holds depends on the corpus alone: train-000005.json says where in the stream chunk 5
begins, so that one which is gone is made again, the same to the bit. When the stream has ended it
begins again. One run at a time: two would remove each other's chunks.
"""

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engine.device import SIGNALS, processes
from engine.errors import UserError, last_line
from engine.files import checksum, commit_file, read_json, write_json
from engine.progress import progress_bar

PROGRAM = Path(__file__).resolve().parent / 'make_chunk.py'
BEGINNING = dict(stream=None, skip=0)  # the record of chunk 0 before it is made


def chunk_file(folder, number):
    """Where the tokens of a chunk are."""
    return Path(folder) / f'train-{number:06}.bin'


def record_of(path):
    """
    The file beside a chunk that says from which state of the stream on it is made, how many tokens
    are skipped there, which the chunk before holds, and its checksum once it is made.
    """
    return path.with_suffix('.json')


# ----------------------------------------------------------------------------------------------
# reading


class NoData(UserError):
    """A chunk cannot be had, or not now: what is trained so far can be saved."""


class Chunks:
    """
    The training tokens of a corpus in chunks. On the disk are the chunk that is read, the one
    before, for processes that are behind, and the one after, which another process makes.
    """

    pauses = 1, 10, 60, 300  # seconds before a chunk is tried again: a network may come back

    def __init__(self, folder, dtype, tokens):
        """tokens: of a chunk."""
        self.folder, self.dtype, self.tokens = Path(folder).resolve(), dtype, tokens
        self.opened = {}  # number: token ids, memory-mapped
        self.is_main = processes()[0] == 0  # it has chunks made and removed
        self.maker, self.asked = None, -1  # the process that makes a chunk; which one

    def read(self, number):
        """The token ids of a chunk, 1-d; waits until it is there. Raises UserError."""
        if number not in self.opened:
            if self.is_main:
                for path in self.folder.glob('train-*.bin'):
                    if abs(int(path.stem.split('-')[1]) - number) > 1:
                        path.unlink()
            self.wait_for(number)
            self.opened = {n: ids for n, ids in self.opened.items() if abs(n - number) == 1}
            self.opened[number] = self.open(number)
            if self.is_main:
                self.ask_for(number + 1)
        return self.opened[number]

    def open(self, number):
        """The tokens in the file of a chunk. Raises UserError for another file than was made."""
        path = chunk_file(self.folder, number)
        try:
            made = read_json(record_of(path), sha256=str)['sha256']
        except FileNotFoundError:
            made = ''
        if checksum(path) != made:
            raise UserError(f'{path} is damaged: remove it, and the same command makes it again')
        return np.memmap(path, self.dtype, mode='r')

    def ask_for(self, number):
        """Let another process make a chunk, unless it is there or being made."""
        at_work = self.asked == number and self.maker.poll() is None
        if not at_work and not chunk_file(self.folder, number).is_file():
            command = [sys.executable, str(PROGRAM), str(self.folder), str(number)]
            with open(self.folder / 'make_chunk.log', 'w', encoding='utf-8') as log:
                # a session of its own: Ctrl-C is the run's, and what is begun is of use later
                how = dict(stdout=log, stderr=log, start_new_session=True)
                self.maker, self.asked = subprocess.Popen(command, **how), number

    def wait_for(self, number):
        """
        Return when a chunk is there. Raises NoData at Ctrl-C (of several processes, which save
        together or not at all, at the second), and when it could not be made again and again.
        """
        path, failures, again = chunk_file(self.folder, number), 0, 0.0
        several = processes()[1] > 1
        while not path.is_file():
            if len(SIGNALS) > several:
                raise NoData(f'stopped while {path} was being made')
            failed = self.asked == number and self.maker.poll() not in (None, 0)
            if failed and again == 0:
                if failures == len(self.pauses):
                    said = (self.folder / 'make_chunk.log').read_text(encoding='utf-8')
                    raise NoData(f'{path} could not be made ({last_line(said)})')
                again = time.time() + self.pauses[failures]
                failures += 1
            if self.is_main and time.time() > again:
                self.ask_for(number)
                again = 0.0
            time.sleep(0.1)


# ----------------------------------------------------------------------------------------------
# writing


def write_chunk(folder, number, tokens, pieces_from):
    """
    Write chunk `number`, of so many tokens, by its record, and the record of the next; with the
    first, its held-out documents as val.bin. pieces_from(state) yields, from there on and without
    end, ({split: (ids, bytes, documents)}, state of the stream before them). Returns the counts of
    each split, with all of a document of which it holds a part. Raises UserError if the chunk was
    another when it was made before.
    """
    path, val = chunk_file(folder, number), Path(folder) / 'val.bin'
    record = read_json(record_of(path), skip=int)
    next_record = record_of(chunk_file(folder, number + 1))
    counts = {split: dict(tokens=0, bytes=0, documents=0) for split in ('train', 'val')}
    with ExitStack() as stack:
        stack.callback(Path(f'{path}.tmp').unlink, missing_ok=True)  # however it ends
        files = dict(train=stack.enter_context(open(f'{path}.tmp', 'wb')))
        if number == 0 and not val.exists():
            files['val'] = stack.enter_context(open(val, 'wb'))
        how = dict(desc=path.stem, unit='tok', unit_scale=True)
        bar = stack.enter_context(progress_bar(total=tokens, **how))
        for piece, following in cut(pieces_from(record['stream']), record['skip'], tokens):
            append(piece, files, counts)
            written = counts['train']['tokens']
            bar.update(written - bar.n)
            if written == tokens and not next_record.is_file():
                write_json(next_record, following)
        files['train'].flush()
        made = counts['train']['sha256'] = checksum(f'{path}.tmp')
        if record.get('sha256', made) != made:
            raise UserError(f'{path} would not be what it was: its corpus has changed')
        write_json(record_of(path), record | dict(sha256=made))
        commit_file(f'{path}.tmp', path)
    return counts


def append(piece, files, counts):
    """Add {split: (ids, bytes, documents)} to counts, and to the files that are open."""
    for split, (ids, n_bytes, documents) in piece.items():
        if split in files:
            files[split].write(ids.tobytes())
        counts[split]['tokens'] += len(ids)
        counts[split]['bytes'] += n_bytes
        counts[split]['documents'] += documents


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
