"""
Make a chunk of a streamed corpus, which training asks for:  make_chunk.py FOLDER NUMBER

data/chunks.py says what a chunk is. Those before it whose place in the stream is not known yet are
gone through, too.
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine.quick_start  # before torch, whose import it shortens

from data.chunks import chunk_file, write_chunk
from data.corpus import open_corpus
from data.prepare import Preparation, pieces_from, tokenizing_processes
from engine.errors import run_as_program
from engine.files import locked


def prepared_with(folder):
    """The Preparation that a corpus was begun with."""
    meta = open_corpus(folder.name, folder.parent).meta
    found = dict(meta['options'], tokenizer=meta['tokenizer'])
    files = found.pop('files')
    options = Preparation(**found)
    options.files = files
    return options


def main(argv):
    """The command line: a folder and a number."""
    folder, number = Path(argv[0]).resolve(), int(argv[1])
    options = prepared_with(folder)
    with locked(chunk_file(folder, 0), wait=True), tokenizing_processes(options) as workers:
        known = number
        while not chunk_file(folder, known).with_suffix('.json').is_file():
            known -= 1
        for chunk in range(known, number + 1):
            if not chunk_file(folder, chunk).is_file():
                pieces = partial(pieces_from, options=options, workers=workers)
                write_chunk(folder, chunk, options.chunk_tokens, pieces)


if __name__ == '__main__':
    run_as_program(main)
