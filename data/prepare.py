"""
Text -> tokens on disk:  python data/prepare.py NAME [--key=value ...]

NAME is one of
  - pydocs, pycode, signatures: made from what is installed (data/offline.py), without a network;
  - a corpus of the Hugging Face hub (HUB below), streamed with `datasets`, or a supervised set
    (data/instruct.py);
  - a file or glob of your own, .txt, .jsonl or .parquet: python data/prepare.py 'books/*.txt'

The result is a folder data/NAME/ with train.bin and val.bin (one unsigned integer per token,
documents separated by the end-of-text token) and meta.json (tokenizer, dtype, counts, source,
checksums). It is built in data/NAME.partial/ and renamed when it is complete; an interrupted
preparation continues where it stopped (hub and files) or starts again (offline).
"""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import sys
from collections import deque
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import Natural, Range, configure
from data.corpus import OFFLINE, SPLITS, finish_corpus
from data.instruct import SETS, is_supervised, prepare_supervised
from data.offline import is_held_out, offline_documents
from data.preferences import HUB_NAME, is_preferences, prepare_preferences
from data.vocabulary import load_tokenizer
from engine.errors import UserError, first_line, import_extra, nearest, run_as_program
from engine.files import locked, read_json, write_atomically
from engine.hub import WAY_OUT, hub_source, reach_hub

HUB = {  # name: (repository, configuration, split, column with the text)
    'fineweb_edu': ('HuggingFaceFW/fineweb-edu', 'default', 'train', 'text'),
    'openwebtext': ('Skylion007/openwebtext', 'plain_text', 'train', 'text'),
    'pile': ('monology/pile-uncopyrighted', None, 'train', 'text'),
    'slimpajama': ('cerebras/SlimPajama-627B', None, 'train', 'text'),
    'starcoder': ('bigcode/starcoderdata', 'python', 'train', 'content'),  # of its languages
    'openwebmath': ('open-web-math/open-web-math', None, 'train', 'text'),
    'wikitext': ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'train', 'text'),
}
BUILDERS = {'.txt': 'text', '.jsonl': 'json', '.json': 'json', '.parquet': 'parquet'}  # by suffix
FEW = 100  # text files: of fewer each gives its end to validation, instead of some as a whole


@dataclass
class Preparation:
    """What to turn into tokens, and how."""

    corpus: str = 'pydocs'  # one of data/corpus.py's OFFLINE, of the hub, or files of your own
    out: str = ''  # folder of the result; empty: data/CORPUS
    tokenizer: str = ''  # bytes, gpt2, or a folder with tokenizer.json; empty: gpt2 from the hub
    text_column: str = 'text'  # column of .jsonl and .parquet files that holds the text
    max_tokens: Natural = 0  # stop after this many training tokens; 0: the whole corpus
    val_fraction: Annotated[float, Range(0, 0.5)] = 0.0  # held out; 0: 5%, from the hub 0.05%
    prompt: Literal['paper', 'plain'] = 'paper'  # of instructions: Appendix C of CoL, or bare
    packages: Literal['project', 'all'] = 'project'  # offline: dependencies, or all installed
    processes: Natural = 0  # 0: one per core

    def folder(self):
        """Fill in what depends on the corpus; returns the folder of the result."""
        own = self.corpus not in (*OFFLINE, *HUB, *SETS, HUB_NAME)
        name = local_name(self.corpus) if own else self.corpus
        self.files = {}  # of one's own: {path: bytes}
        if own:
            self.files = {path: os.path.getsize(path) for path in matching(self.corpus)}
        self.tokenizer = self.tokenizer or ('bytes' if own or name in OFFLINE else 'gpt2')
        self.val_fraction = self.val_fraction or (0.0005 if name in HUB and not own else 0.05)
        return Path(self.out or os.path.relpath(Path(__file__).parent / name))


# ----------------------------------------------------------------------------------------------
# tokenizing in parallel


def tokenize(name, documents):
    """
    [(text, is_validation), ...] -> {split: (ids, 1-d, each text followed by end-of-text; bytes of
    text; documents)}, with the tokenizer of this name.
    """
    tokenizer = load_tokenizer(name)
    ending = np.array([tokenizer.end], tokenizer.dtype)
    pieces = {split: [] for split in SPLITS}
    sizes = {split: [0, 0] for split in SPLITS}
    for text, is_val in documents:
        split = SPLITS[is_val]
        pieces[split] += [np.asarray(tokenizer.encode(text), tokenizer.dtype), ending]
        sizes[split][0] += len(text) if text.isascii() else len(text.encode('utf-8'))
        sizes[split][1] += 1
    return {split: (np.concatenate(ids), *sizes[split]) for split, ids in pieces.items() if ids}


@contextlib.contextmanager
def tokenizing_processes(options):
    """A pool of processes that tokenize, of their own start: the caller may have threads."""
    pool = contextlib.nullcontext()
    if options.tokenizer != 'bytes' or options.corpus in OFFLINE:
        how = dict(initializer=ignore_interrupts)
        pool = get_context('spawn').Pool(options.processes or os.cpu_count(), **how)
    with pool as workers:
        yield workers


def wait_for(pool, workers, pending):
    """The result of a worker; UserError if one was killed: its result would never come."""
    while not pending.ready():
        pending.wait(1)
        if {process.pid for process in pool._pool} != workers:
            raise UserError(
                'a worker process was killed, perhaps out of memory: --processes=1 needs less, and '
                'the same command continues'
            )
    return pending.get()


def in_parallel(pool, tokenizer, batches):
    """
    Yield (tokenize's result, state) for (documents, state) in batches, in their order, reading
    only a few batches ahead: a corpus may be larger than memory. pool None: in this process.
    """
    pending = deque()
    workers = {process.pid for process in pool._pool} if pool else set()
    for documents, state in batches:
        if tokenizer == 'bytes':  # handing them to workers would take longer
            yield tokenize(tokenizer, documents), state
            continue
        pending.append((pool.apply_async(tokenize, (tokenizer, documents)), state))
        if len(pending) > 4 * pool._processes:
            result, state = pending.popleft()
            yield wait_for(pool, workers, result), state
    for result, state in pending:
        yield wait_for(pool, workers, result), state


def ignore_interrupts():
    """In a worker process: Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------
# the hub, and files of your own


def open_stream(options):
    """The `datasets` stream of a hub corpus or of local files, and the column of its text."""
    if options.corpus in HUB:
        repository, configuration, split, column = HUB[options.corpus]
        source = hub_source(repository, configuration, split)
        reach_hub(options.corpus)
        if options.corpus in ('pile', 'slimpajama'):
            import_extra('zstandard', f'{options.corpus} is compressed: it needs zstandard')
    else:
        source = local_files(options.corpus, list(options.files))
        column = options.text_column
    import datasets  # takes a second, and the offline corpora do not need it

    try:
        stream = datasets.load_dataset(**source, streaming=True)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f'{options.corpus} cannot be read: {error}') from error
    except Exception as error:  # the system's, or those of whichever HTTP client it uses
        reason = type(error).__name__
        raise UserError(f'{options.corpus} cannot be reached ({reason}); {WAY_OUT}') from error
    return stream.with_format('arrow'), column  # Python objects take ten times as long


def matching(pattern):
    """The files of a path, folder or glob, or of several with commas between, sorted."""
    found = set()
    for part in [pattern] if os.path.exists(pattern) else pattern.split(','):
        inside = os.path.isdir(part)  # it may hold other files, too
        paths = glob.glob(os.path.join(part, '**', '*') if inside else part, recursive=True)
        paths = [path for path in paths if not inside or Path(path).suffix in BUILDERS]
        found |= set(filter(os.path.isfile, paths))
    return sorted(found)


def local_name(pattern):
    """What a corpus of one's own files is called: book.txt -> book, novels/*.txt -> novels."""
    path = Path(pattern.split(',')[0])
    own = path.name if path.is_dir() else path.stem
    for part in (own, *reversed(path.parts[:-1])):
        if name := part.strip('*?_-./'):
            return name
    return 'local'


def local_files(pattern, files):
    """The arguments of datasets.load_dataset for files of one's own. Raises UserError."""
    known = [*OFFLINE, *HUB]
    if not files:
        close, corpora = nearest(pattern, known), ', '.join(known)
        raise UserError(
            f'{pattern!r} is not a corpus and matches no file{close}; there are {corpora}'
        )
    suffixes = {Path(file).suffix for file in files}
    builder = BUILDERS.get(suffixes.pop()) if len(suffixes) == 1 else None
    if builder is None:
        raise UserError(f'{pattern}: all files must be .txt, or all .jsonl, .json or .parquet')
    for file in files if builder == 'json' else ():
        with open(file, 'rb') as opened:  # at which the reader would crash the whole program
            if re.match(rb'[\s[]*null', opened.read(1024)):
                raise UserError(f'{file} begins with null, not with a record')
    source = dict(path=builder, data_files=files, split='train')
    if builder == 'text':
        source['sample_by'] = 'document'  # a file is a document, not each of its lines
    return source


def parted(text, val_fraction):
    """[(the beginning of a text, False), (its last lines, True)], the end for validation."""
    cut = int(len(text) * (1 - val_fraction))
    for end in '\n ':  # of a line, or else of a word
        if found := text.find(end, cut, len(text.rstrip())) + 1:
            cut = found
            break
    return [(part, is_val) for part, is_val in ((text[:cut], False), (text[cut:], True)) if part]


def stream_batches(stream, column, options, rows=256):
    """Yield ([(text, is_validation), ...], state of the stream behind it). Raises UserError."""
    try:
        for found in stream.iter(rows):
            names = found.column_names
            texts = found[column].to_pylist() if column in names else [0]
            if not all(isinstance(text, str | None) for text in texts):
                raise UserError(
                    f'{options.corpus} has no text in a column {column!r}; it has '
                    f'{", ".join(names)}: choose with --text_column='
                )
            texts = [text for text in texts if (text or '').strip()]
            if 0 < len(options.files) < FEW and all(
                path.endswith('.txt') for path in options.files
            ):
                documents = [part for text in texts for part in parted(text, options.val_fraction)]
            else:
                documents = [(text, is_held_out(text, options.val_fraction)) for text in texts]
            yield documents, stream.state_dict()
    except UserError:
        raise
    except Exception as error:  # bad JSON or UTF-8, a lost network by any HTTP client's name
        raise UserError(
            f'{options.corpus} cannot be read further ({first_line(error)}); the same command '
            'continues from what is prepared'
        ) from error


# ----------------------------------------------------------------------------------------------
# writing


def prepare(options):
    """Make the corpus that `options` describe, unless it exists; returns its folder."""
    out = options.folder()
    if out.exists():
        return prepared_before(out, options)
    with locked(out, wait=True):
        return prepared_before(out, options) if out.exists() else make(options, out)


def make(options, out):
    """Make the corpus that `options` describe in the folder `out`; returns it."""
    load_tokenizer(options.tokenizer)  # complain before reading anything
    if is_preferences(options.corpus):
        return prepare_preferences(options, out)
    if is_supervised(options.corpus):
        return prepare_supervised(options, out)
    offline = options.corpus in OFFLINE
    stream = None if offline else open_stream(options)
    unfinished = Path(f'{out}.partial')
    state = read_progress(unfinished, options) if stream else None
    if state is None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        counts = {split: dict(tokens=0, bytes=0, documents=0) for split in SPLITS}
        state = dict(options=vars(options), stream=None, counts=counts)
    with tokenizing_processes(options) as workers:
        if offline:
            name, packages, held_out = options.corpus, options.packages, options.val_fraction
            documents = list(offline_documents(name, packages, held_out, workers))
            batches = ((documents[i : i + 256], None) for i in range(0, len(documents), 256))
        else:
            if state['stream']:
                stream[0].load_state_dict(state['stream'])
            batches = stream_batches(*stream, options)
        write_tokens(unfinished, in_parallel(workers, options.tokenizer, batches), state, options)
    return finish_corpus(unfinished, out, state['counts'], options)


def prepare_offline(name, out):
    """Make pydocs, pycode or signatures with its defaults in the folder `out`."""
    prompt = 'plain' if name == 'signatures' else 'paper'  # a model on bytes has little room
    return prepare(Preparation(corpus=name, out=str(out), prompt=prompt))


def prepared_before(out, options):
    """The folder `out` if it holds the corpus that the options describe. Raises UserError."""
    try:
        found = read_json(out / 'meta.json', options=dict)['options']
    except (OSError, UserError):
        raise UserError(
            f'{out} exists and is not a prepared corpus: remove it, or choose another --out'
        ) from None
    changed = []
    for key, value in vars(options).items():
        if key == 'files' and found.get(key, value) != value:
            changed.append('its files were others')
        elif key not in ('out', 'processes') and found.get(key, value) != value:
            changed.append(f'{key} was {found[key]!r}, now {value!r}')
    if changed:
        raise UserError(
            f'{out} was prepared with other options ({"; ".join(changed)}): remove it, or choose '
            'another --out'
        )
    print(f'{out} is prepared already')
    return out


def read_progress(unfinished, options):
    """What an interrupted preparation of the same options and files had written, or None."""
    try:
        types = dict(options=dict, counts=dict, stream=dict)
        state = read_json(unfinished / 'progress.json', **types)
        same = dict(state['options'], processes=0) == dict(vars(options), processes=0)
        for split in SPLITS:
            size = state['counts'][split]['tokens'] * token_bytes(options)
            same &= (unfinished / f'{split}.bin').stat().st_size >= size
    except (OSError, UserError, KeyError, TypeError):
        return None
    if not same:
        print(f'{unfinished} was begun with other options or files, or is damaged: starting anew')
    return state if same else None


def token_bytes(options):
    """Bytes of a token on disk."""
    return np.dtype(load_tokenizer(options.tokenizer).dtype).itemsize


def write_tokens(unfinished, pieces, state, options, save_every=64):
    """Append tokens to {train,val}.bin; progress.json says how much of them is good."""
    counts = state['counts']
    with contextlib.ExitStack() as stack:
        files = {}
        for split in SPLITS:
            file = files[split] = stack.enter_context(open(unfinished / f'{split}.bin', 'ab'))
            file.truncate(counts[split]['tokens'] * token_bytes(options))  # drop what is unrecorded
        sizes = dict(initial=counts['train']['tokens'], total=options.max_tokens or None)
        how = dict(unit='tok', unit_scale=True, disable=None)
        bar = stack.enter_context(tqdm(desc=f'writing {options.corpus}', **sizes, **how))
        for i, (piece, state['stream']) in enumerate(pieces, 1):
            for split, (ids, n_bytes, documents) in piece.items():
                files[split].write(ids.tobytes())
                counts[split]['tokens'] += len(ids)
                counts[split]['bytes'] += n_bytes
                counts[split]['documents'] += documents
            bar.update(counts['train']['tokens'] - bar.n)
            if state['stream'] and i % save_every == 0:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                write_atomically(unfinished / 'progress.json', json.dumps(state))
            if options.max_tokens and counts['train']['tokens'] >= options.max_tokens:
                break


def main(argv):
    """Command line: a corpus name or files first, knobs after it."""
    names = list(takewhile(lambda arg: arg[:1] != '-', argv))
    argv = [f'--corpus={",".join(names)}'] * bool(names) + argv[len(names) :]
    options, _, _ = configure(argv, Preparation, None, 'data/prepare.py')
    prepare(options)


if __name__ == '__main__':
    run_as_program(main)
