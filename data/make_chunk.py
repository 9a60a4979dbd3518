"""
Make a chunk of a streamed corpus, which training asks for:  make_chunk.py FOLDER NUMBER

data/chunks.py says what a chunk is. Those before it whose place in the stream is not known yet are
made, too, and removed.
"""

import os
import sys
from functools import partial
from pathlib import Path

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine.quick_start  # before torch, whose import it shortens

from data.chunks import BEGINNING, chunk_file, record_of, write_chunk
from data.corpus import open_corpus
from data.prepare import Preparation, pieces_from, tokenizing_processes
from engine.errors import UserError, run_as_program
from engine.files import locked, write_json


def prepared_with(folder):
    """The Preparation that a corpus was begun with. Raises UserError if its files have changed."""
    meta = open_corpus(folder.name, folder.parent).meta
    found = dict(meta['options'], tokenizer=meta['tokenizer'])
    files = found.pop('files')
    options = Preparation(**found)
    options.files = files
    for path, size in files.items():
        if os.path.getsize(path) != size:
            raise UserError(f'{path} is not what it was when {folder} was prepared')
    return options


def main(argv):
    """The command line: a folder and a number."""
    folder, number = Path(argv[0]).resolve(), int(argv[1])
    options = prepared_with(folder)
    with locked(chunk_file(folder, 0), wait=True), tokenizing_processes(options) as workers:
        pieces = partial(pieces_from, options=options, workers=workers)
        records = [record_of(chunk_file(folder, n)) for n in range(number + 2)]
        if not records[0].is_file():
            write_json(records[0], BEGINNING)
        known = max(n for n in range(number + 1) if records[n].is_file())
        for n in range(known, number + 1):
            was_there = chunk_file(folder, n).is_file()
            if not was_there or not records[n + 1].is_file():
                write_chunk(folder, n, options.chunk_tokens, pieces)
            if n < number and not was_there:
                chunk_file(folder, n).unlink()


if __name__ == '__main__':
    run_as_program(main)
