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
preparation of the hub's continues where it stopped, others start again.
"""

import contextlib
import glob
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import Natural, Range, configure
from data.corpus import OFFLINE, SPLITS, finish_corpus
from data.instruct import SETS, file_records, is_supervised, prepare_supervised
from data.offline import is_held_out, offline_documents
from data.preferences import HUB_NAME, is_preferences, prepare_preferences
from data.vocabulary import load_tokenizer
from engine.errors import UserError, first_line, run_as_program, unknown
from engine.files import locked, read_json, write_json
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
SUFFIXES = {'.txt', '.jsonl', '.json', '.parquet'}
FEW = 100  # text files: of fewer each gives its end to validation, instead of some as a whole
ROWS = 256  # documents that are tokenized at once


@dataclass
class Preparation:
    """What to turn into tokens, and how."""

    corpus: str = 'pydocs'  # one of data/corpus.py's OFFLINE, of the hub, or files of your own
    out: str = ''  # folder of the result; empty: data/CORPUS
    tokenizer: str = ''  # bytes, gpt2, or a folder with tokenizer.json; empty: gpt2 from the hub
    text_column: str = 'text'  # column of .jsonl, .json and .parquet files that holds the text
    max_tokens: Natural = 0  # stop after this many training tokens; 0: the whole corpus
    val_fraction: Annotated[float, Range(0, 0.5)] = 0.0  # held out; 0: 5%, from the hub 0.05%
    prompt: Literal['paper', 'plain'] = 'paper'  # of instructions: Appendix C of CoL, or bare

    def folder(self):
        """Fill in what depends on the corpus; returns the folder of the result."""
        own = self.corpus not in (*OFFLINE, *HUB, *SETS, HUB_NAME)
        self.files = {path: os.path.getsize(path) for path in own_files(self.corpus) if own}
        self.tokenizer = self.tokenizer or ('bytes' if own or self.corpus in OFFLINE else 'gpt2')
        self.val_fraction = self.val_fraction or (0.0005 if self.corpus in HUB else 0.05)
        name = local_name(self.corpus) if own else self.corpus
        return Path(self.out or os.path.relpath(Path(__file__).parent / name))


def own_files(pattern):
    """The files of a path, folder or glob, or of several with commas between, sorted."""
    found = {}
    for part in [pattern] if os.path.exists(pattern) else pattern.split(','):
        inside = os.path.isdir(part)  # it may hold other files, too
        paths = glob.glob(os.path.join(part, '**') if inside else part, recursive=True)
        for path in sorted(paths, key=len, reverse=True):
            if os.path.isfile(path) and (not inside or Path(path).suffix in SUFFIXES):
                found[os.path.realpath(path)] = path  # once, though a link may lead around
    return sorted(found.values())


def local_name(pattern):
    """What a corpus of one's own files is called: book.txt -> book, novels/*.txt -> novels."""
    path = Path(pattern.split(',')[0])
    names = path.name if path.is_dir() else path.stem, *reversed(path.parts[:-1])
    return next(filter(None, (name.strip('*?_-./') for name in names)), 'local')


# ----------------------------------------------------------------------------------------------
# reading: documents are (text, is it for validation)


def no_text(where, column, row):
    """The UserError for a row, a dict, or the names in it, without text in a column."""
    found = ', '.join(row) if isinstance(row, dict | list) else row
    return UserError(f'{where} has no text in {column!r}; it has {found}: see --text_column')


def own_documents(options):
    """Yield the documents of .txt, .jsonl and .json files. Raises UserError."""
    fraction, column = options.val_fraction, options.text_column
    for path in options.files:
        if path.endswith('.txt'):
            try:
                text = Path(path).read_text(encoding='utf-8')
            except ValueError as error:
                raise UserError(f'{path} cannot be read ({first_line(error)})') from None
            span = int(len(text) * (1 - fraction)), len(text.rstrip())
            cut = text.find('\n', *span) + 1 or text.find(' ', *span) + 1 or span[0]
            parts = (text[:cut], False), (text[cut:], True)
            yield from [(text, is_held_out(text, fraction))] if len(options.files) >= FEW else parts
            continue
        for number, row in file_records(path):
            if not isinstance(row, dict) or not isinstance(row.get(column, 0), str | None):
                raise no_text(f'{path}, record {number},', column, row)
            yield row[column] or '', is_held_out(row[column] or '', fraction)


def stream_batches(options, state):
    """
    Yield (documents, state of the stream behind them) of a corpus of the hub or of parquet files,
    read on from a state. Raises UserError.
    """
    column, what = options.text_column, 'be reached'
    source = dict(path='parquet', data_files=list(options.files), split='train')
    if options.corpus in HUB:
        *where, column = HUB[options.corpus]
        source = hub_source(*where)
        reach_hub(options.corpus)
    try:
        import datasets  # takes a second, and the offline corpora do not need it

        stream = datasets.load_dataset(**source, streaming=True).with_format('arrow')
        if state:
            stream.load_state_dict(state)
        for rows in stream.iter(ROWS):
            what = 'be read further'
            names = rows.column_names
            texts = rows[column].to_pylist() if column in names else [0]
            if not all(isinstance(text, str | None) for text in texts):
                raise no_text(options.corpus, column, names)
            documents = [(t, is_held_out(t, options.val_fraction)) for t in texts if t]
            yield documents, stream.state_dict()
    except UserError:
        raise
    except Exception as error:  # damage, or a lost network by any HTTP client's name
        raise UserError(
            f'{options.corpus} cannot {what} ({first_line(error)}): the same command continues; '
            f'{WAY_OUT}'
        ) from error


def batches_of(options, state):
    """Yield (documents, state) of any corpus; only streams have a state. Raises UserError."""
    suffixes = {Path(file).suffix for file in options.files}
    if options.corpus in HUB or suffixes == {'.parquet'}:
        yield from stream_batches(options, state)
        return
    if options.corpus not in OFFLINE and not suffixes:
        raise unknown('corpus, and no file,', options.corpus, [*OFFLINE, *HUB])
    if not suffixes <= SUFFIXES - {'.parquet'}:
        raise UserError(f'{options.corpus}: all files must be .txt, .jsonl or .json, or .parquet')
    read = offline_documents if options.corpus in OFFLINE else own_documents
    documents = read(options)
    while batch := list(islice(documents, ROWS)):
        yield batch, None


# ----------------------------------------------------------------------------------------------
# writing


def prepare(options):
    """Make the corpus that `options` describe, unless it exists; returns its folder."""
    out = options.folder()
    with locked(out, wait=True):
        return same_options(out, options) if out.exists() else make(options, out)


def prepare_offline(name, out):
    """Make pydocs, pycode or signatures with its defaults in the folder `out`."""
    prompt = 'plain' if name == 'signatures' else 'paper'  # a model on bytes has little room
    return prepare(Preparation(corpus=name, out=str(out), prompt=prompt))


def same_options(out, options):
    """The folder `out` if it holds the corpus that the options describe. Raises UserError."""
    try:
        found = read_json(out / 'meta.json', options=dict)['options']
    except (OSError, UserError):
        raise UserError(
            f'{out} exists and is not a prepared corpus: remove it, or choose another --out'
        ) from None
    changed = [k for k, v in vars(options).items() if k != 'out' and found.get(k, v) != v]
    if changed:
        raise UserError(
            f'{out} was prepared with other options ({", ".join(changed)}): remove it, or choose '
            'another --out'
        )
    print(f'{out} is prepared already')
    return out


def make(options, out):
    """Make the corpus that `options` describe in the folder `out`; returns it."""
    tokenizer = load_tokenizer(options.tokenizer)  # complain before reading anything
    if is_preferences(options.corpus):
        return prepare_preferences(options, out)
    if is_supervised(options.corpus):
        return prepare_supervised(options, out)
    unfinished, state = Path(f'{out}.partial'), {}
    with contextlib.suppress(OSError, UserError):
        state = read_json(unfinished / 'progress.json')
    if state.get('options') != json.loads(json.dumps(vars(options))):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        counts = {split: dict(tokens=0, bytes=0, documents=0) for split in SPLITS}
        state = dict(options=vars(options), read=None, counts=counts)
    batches = batches_of(options, state['read'])
    write_tokens(unfinished, batches, tokenizer, state, options.max_tokens or math.inf)
    return finish_corpus(unfinished, out, state['counts'], options)


def write_tokens(unfinished, batches, tokenizer, state, most, save_every=64):
    """Append tokens to {train,val}.bin; progress.json says how much of them is good."""
    counts, dtype, files = state['counts'], np.dtype(tokenizer.dtype), {}
    with contextlib.ExitStack() as stack:
        for split in SPLITS:
            file = files[split] = stack.enter_context(open(unfinished / f'{split}.bin', 'ab'))
            file.truncate(counts[split]['tokens'] * dtype.itemsize)  # drop what is unrecorded
        bar = tqdm(desc=f'writing {unfinished.stem}', unit='tok', unit_scale=True, disable=None)
        for i, (documents, state['read']) in enumerate(batches, 1):
            documents = [(text, is_val) for text, is_val in documents if text.strip()]
            encoded = tokenizer.encode_batch([text for text, _ in documents])
            for ids, (text, is_val) in zip(encoded, documents):
                count = counts[SPLITS[is_val]]
                if count['tokens'] < most:
                    files[SPLITS[is_val]].write(np.append(ids, tokenizer.end).astype(dtype))
                    count['tokens'] += len(ids) + 1
                    count['bytes'] += len(text.encode('utf-8', 'replace'))
                    count['documents'] += 1
            bar.update(counts['train']['tokens'] - bar.n)
            if counts['train']['tokens'] >= most:
                break
            if state['read'] and i % save_every == 0:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                write_json(unfinished / 'progress.json', state)
        bar.close()


def main(argv):
    """Command line: a corpus name or files first, knobs after it."""
    names = list(takewhile(lambda arg: arg[:1] != '-', argv))
    argv = [f'--corpus={",".join(names)}'] * bool(names) + argv[len(names) :]
    prepare(configure(argv, Preparation, None, 'data/prepare.py')[0])


if __name__ == '__main__':
    run_as_program(main)
