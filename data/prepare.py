"""
Text -> tokens on disk:  python data/prepare.py NAME [--key=value ...]

NAME is one of
  - pydocs, pycode, signatures, preferences: made from installed packages (data/offline.py), without
    a network;
  - a corpus on the Hugging Face hub (HUB below), or a set of answers or preferences there (SETS in
    data/instruct.py), streamed with `datasets`;
  - a file or glob of your own, .txt, .jsonl, .json or .parquet, with texts, answers or preferences:
    python data/prepare.py 'books/*.txt'

The result is a folder data/NAME/ with train.bin and val.bin (one unsigned integer per token,
documents separated by the end-of-text token) and meta.json (tokenizer, dtype, counts, source,
checksums). It is built in data/NAME.partial/ and renamed when complete. If interrupted, a
preparation from the hub or from parquet files continues where it stopped; others start again.
"""

import contextlib
import glob
import json
import math
import os
import re
import shutil
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, product, takewhile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':  # a script's imports are searched in its own folder, data/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import Natural, Range, configure
from data.corpus import OFFLINE, SPLITS
from data.instruct import (
    SETS,
    encode_examples,
    example_encoder,
    file_records,
    filled,
    kind_of,
    leave_out,
    offline_rows,
)
from data.offline import offline_documents, other_versions, versions
from data.vocabulary import encode_texts, load_tokenizer
from engine.errors import UserError, first_line, run_as_program, unknown
from engine.files import checksum, locked, read_json, write_json
from engine.hub import WAY_OUT, hub_source, reach_hub
from engine.tokenizer_files import is_encoding, read_settings, write_tokenizer

HUB = {  # name: ('repository configuration training-split [validation-split]', text column);
    # a split is given by its name or by a pattern of its files
    'fineweb_edu': ('HuggingFaceFW/fineweb-edu default train', 'text'),
    'openwebtext': ('Skylion007/openwebtext plain_text train', 'text'),
    'pile': ('monology/pile-uncopyrighted default train/*.zst test.jsonl.zst', 'text'),
    'slimpajama': ('cerebras/SlimPajama-627B default train', 'text'),
    'starcoder': ('bigcode/starcoderdata python train', 'content'),  # Python only
    'openwebmath': ('open-web-math/open-web-math default train', 'text'),
    'wikitext': ('Salesforce/wikitext wikitext-103-raw-v1 train', 'text'),
}
SOURCES = HUB | SETS
SUFFIXES = {'.txt', '.jsonl', '.json', '.parquet', '.csv'}
FEW = 100  # of fewer text files the end of each is held out; of more, some whole files
ROWS, SAVE_EVERY = 256, 64  # rows tokenized at once; such batches between saves of the progress


@dataclass
class Preparation:
    """
    What to turn into tokens, and how. Instructions are written in the chat template of the
    tokenizer (--prompt=auto; plain without one), as bare text (plain), or in the prompts of
    Chain-of-Learngene, Appendix C (paper).
    """

    corpus: str = 'pydocs'  # an offline corpus, one on the hub, or files of your own
    out: str = ''  # folder of the result; empty: data/CORPUS
    tokenizer: str = ''  # bytes, gpt2, or a folder with one; empty: gpt2 for the hub, else bytes
    text_column: str = 'text'  # column of .jsonl, .json and .parquet files that holds the text
    max_tokens: Natural = 0  # stop after this many training tokens; 0: the whole corpus
    val_fraction: Annotated[float, Range(0, 0.5)] = 0.0  # held out; 0: 5%, from the hub 0.05%
    prompt: Literal['auto', 'plain', 'paper'] = 'auto'  # how instructions are written, see above
    bad_rows: Literal['skip', 'stop'] = 'skip'  # rows that cannot be used: count them, or fail

    def folder(self):
        """Fill in defaults that depend on the corpus. Returns the folder of the result, a Path."""
        own = self.corpus not in (*OFFLINE, *SOURCES)
        self.files = {path: os.path.getsize(path) for path in own_files(self.corpus) if own}
        self.tokenizer = self.tokenizer or ('bytes' if own or self.corpus in OFFLINE else 'gpt2')
        if self.corpus in HUB:
            *_, self.text_column = HUB[self.corpus]
        self.val_fraction = self.val_fraction or (0.0005 if self.corpus in HUB else 0.05)
        name = local_name(self.corpus) if own else self.corpus
        return Path(self.out or os.path.relpath(Path(__file__).parent / name))

    def holds_out(self, text):
        """Whether a text is for validation, by a hash of it that is the same on every machine."""
        key = text.encode('utf-8', 'replace')  # a lone surrogate has no UTF-8
        return zlib.crc32(key) < self.val_fraction * 2**32


def own_files(pattern):
    """The files of a path, folder or glob, or of several, separated by commas; sorted."""
    found = set()
    for part in [pattern] if os.path.exists(pattern) else pattern.split(','):
        inside = os.path.isdir(part)  # it may hold other files, too
        paths = Path(part).rglob('*') if inside else map(Path, glob.glob(part, recursive=True))
        found |= {str(p) for p in paths if p.is_file() and (not inside or p.suffix in SUFFIXES)}
    return sorted(found)


def local_name(pattern):
    """The name of a corpus of your own files: book.txt -> book, novels/*.txt -> novels."""
    path = Path(re.split('[*?,]', pattern)[0])
    return (path.stem if path.suffix in SUFFIXES else path.name) or 'local'


# ----------------------------------------------------------------------------------------------
# reading: rows are (where, record, is_val), as in data/instruct.py


def own_rows(options, bad):
    """
    Yield the rows of .txt, .jsonl and .json files. options: a Preparation; bad: called with (where,
    error) for what cannot be read.
    """
    for path in options.files:
        if not path.endswith('.txt'):
            yield from ((*found, None) for found in file_records(path, bad))
            continue
        try:
            text = Path(path).read_text(encoding='utf-8-sig')
        except ValueError as error:
            bad(path, error)
            continue
        # the end is held out: from the next line on, else the next word, else right there
        span = int(len(text) * (1 - options.val_fraction)), len(text.rstrip())
        cut = text.find('\n', *span) + 1 or text.find(' ', *span) + 1 or span[0]
        parts = [(text[:cut], False), (text[cut:], True)]
        for part, is_val in parts if len(options.files) < FEW else [(text, None)]:
            yield path, {options.text_column: part}, is_val


def stream_rows(options, state):
    """
    Yield (rows, state of the stream after them) of a corpus or set on the hub, or of parquet files,
    continuing from `state` (None: the beginning). A validation split comes first, with a state of
    None. Raises UserError.
    """
    name, columns = options.corpus, ()
    way_out = '' if options.files else f': the same command continues; {WAY_OUT}'
    try:
        import datasets  # takes a second, and the offline corpora do not need it
        from pyarrow.parquet import read_metadata

        if options.files:  # datasets cannot read files without rows
            files = [file for file in options.files if read_metadata(file).num_rows]
            sources = [dict(path='parquet', data_files=files, split='train')]
        else:
            reach_hub(name)
            source, *columns = SOURCES[name]
            repository, configuration, *splits = source.split()
            sources = [hub_source(repository, configuration, split) for split in splits]
        for source in reversed(sources):  # the validation split, if there is one, is the last
            is_val = source is sources[-1] if sources[1:] else None
            if is_val and state:  # a state comes from training, so validation is complete
                continue
            stream = datasets.load_dataset(**source, streaming=True)
            if state:
                stream.load_state_dict(state)
            for batch in stream.iter(ROWS):
                rows = (dict(zip(batch, values)) for values in zip(*batch.values()))
                rows = [
                    (name, filled(row, *columns) if columns[1:] else row, is_val) for row in rows
                ]
                yield rows, None if is_val else stream.state_dict()
    except UserError:
        raise
    except Exception as error:  # damage, or any HTTP client's error when the network is lost
        raise UserError(f'{name} cannot be read ({first_line(error)}){way_out}') from error


def rows_of(options, state, bad):
    """
    Yield (rows, state of the stream after them) of any corpus, in batches; without a stream the
    state is None. A row is (where, record, is_val), as in data/instruct.py. Raises UserError.
    """
    corpus, suffixes = options.corpus, {Path(file).suffix for file in options.files}
    if corpus in SOURCES or suffixes == {'.parquet'}:
        yield from stream_rows(options, state)
        return
    if corpus in ('pydocs', 'pycode'):
        rows = (('', {options.text_column: t}, is_val) for t, is_val in offline_documents(options))
    elif corpus in OFFLINE:
        rows = offline_rows(options)
    elif suffixes and suffixes <= {'.txt', '.jsonl', '.json'}:
        rows = own_rows(options, bad)
    elif suffixes:
        raise UserError(
            f'{corpus}: all files must be .txt, .jsonl or .json, or .parquet. To convert:  '
            "python -c \"import pandas as p; p.read_csv('A.csv').to_json('A.jsonl', "
            "orient='records', lines=True)\""
        )
    else:
        raise unknown('corpus, and no file,', corpus, [*OFFLINE, *SOURCES])
    while batch := list(islice(rows, ROWS)):
        yield batch, None


# ----------------------------------------------------------------------------------------------
# writing


def prepare(options):
    """
    Prepare the corpus that `options`, a Preparation, describe, unless it exists. Returns its
    folder. Raises UserError if it cannot be made, or exists with other options.
    """
    out = options.folder()
    with locked(out, wait=True):
        if not out.exists():
            return make(options, out)
        found = read_json(out / 'meta.json', options=dict)['options']
    changed = [k for k, v in vars(options).items() if k != 'out' and found.get(k, v) != v]
    if changed:
        raise UserError(f'{out} was prepared with other {changed}: remove it, or use another --out')
    print(f'{out} is prepared already')
    return out


def prepare_offline(name, out):
    """Prepare the offline corpus `name` with default options in the folder `out`; returns it."""
    style = 'plain' if name == 'signatures' else 'paper'  # in bytes the paper's prompt is long
    return prepare(Preparation(name, str(out), prompt=style))


def make(options, out):
    """
    Prepare the corpus that `options` describe in the folder `out`, or continue an interrupted
    preparation with the same options. Returns `out`.
    """
    load_tokenizer(options.tokenizer)  # complain before reading anything
    unfinished, state = Path(f'{out}.partial'), {}
    with contextlib.suppress(OSError, UserError):
        state = read_json(unfinished / 'progress.json')
    # compared as JSON gives them back; they hold the files' sizes, so changed files start again
    if state.get('options') != json.loads(json.dumps(vars(options))):
        state = dict(options=vars(options), read=None, counts=fresh_counts())
        shutil.rmtree(unfinished, ignore_errors=True)
    bad = partial(leave_out, options, state['counts'])
    rows = rows_of(options, state['read'], bad)
    first = next(rows, ([], None))
    kinds = {kind_of(row) for _, row, _ in first[0]} - {'text'}  # bad rows look like text
    kind = state.setdefault('kind', min(kinds, default='text'))
    encode = encode_texts
    if kind != 'text':
        encode = partial(encode_examples, encode=example_encoder(options))
    batches = (
        (encode(some, options=options, bad=bad), read) for some, read in chain([first], rows)
    )
    return write_corpus(batches, kind, options, out, state)


def fresh_counts():
    """The counts of a corpus that is still empty: {split: {tokens, bytes, documents}}."""
    return {split: dict(tokens=0, bytes=0, documents=0) for split in SPLITS}


def write_corpus(batches, kind, options, out, state):
    """
    Append `batches`, ([(ids, marks, bytes, is_val), ...], state of what they were read from), to
    the files of an unfinished corpus, then finish it. progress.json records how much of the files
    is valid. Returns the folder `out`.
    """
    counts, unfinished = state['counts'], Path(f'{out}.partial')
    dtype, most = load_tokenizer(options.tokenizer).dtype, options.max_tokens or math.inf
    unfinished.mkdir(parents=True, exist_ok=True)
    names, files = ('bin',) if kind == 'text' else ('bin', 'marks'), {}
    with contextlib.ExitStack() as stack:
        for split, name in product(SPLITS, names):
            file = stack.enter_context(open(unfinished / f'{split}.{name}', 'ab'))
            size = dtype().itemsize if name == 'bin' else 1
            file.truncate(counts[split]['tokens'] * size)  # drop what progress.json does not count
            files[split, name] = file
        bar = tqdm(desc=f'writing {unfinished.stem}', unit='tok', unit_scale=True, disable=None)
        for i, (batch, state['read']) in enumerate(batches, 1):
            for ids, marks, size, is_val in batch:
                # the second text is held out if none is so far: small corpora need some, too
                second = counts['train']['documents'] == 1 and not counts['val']['documents']
                split = SPLITS[is_val or second and kind == 'text']
                count = counts[split]
                if count['tokens'] < most:
                    for name, content in zip(names, (np.asarray(ids, dtype), marks)):
                        files[split, name].write(content)
                    count['tokens'] += len(ids)
                    count['bytes'] += size
                    count['documents'] += 1
            bar.update(counts['train']['tokens'] - bar.n)
            if counts['train']['tokens'] >= most:
                break
            if state['read'] and i % SAVE_EVERY == 0:
                for file in files.values():  # on disk before progress.json counts it
                    file.flush()
                    os.fsync(file.fileno())
                write_json(unfinished / 'progress.json', state)
        bar.close()
    return finish_corpus(unfinished, out, counts, options, kind)


def finish_corpus(unfinished, out, counts, options, kind):
    """Write meta.json and rename the corpus to `out`. Raises UserError if a split is empty."""
    if bad := counts.get('bad'):
        print(f'{bad["rows"]:,} rows cannot be used and are left out; the first: {bad["first"]}')
    for split in SPLITS:
        if not counts[split]['tokens']:
            raise UserError(
                f'{options.corpus} gave no {split} documents: of few, hold out a larger part than '
                f'--val_fraction={options.val_fraction}, such as 0.2; one is not enough'
            )
    (unfinished / 'progress.json').unlink(missing_ok=True)
    tokenizer = load_tokenizer(options.tokenizer)
    if not is_encoding(options.tokenizer):
        write_tokenizer(options.tokenizer, unfinished)
        # generation must stop at the token that ends examples, which is the last of the split
        end = int(np.memmap(unfinished / 'val.bin', tokenizer.dtype)[-1])
        settings = read_settings(unfinished, 'generation_config.json')
        if end not in np.ravel(settings.get('eos_token_id')):
            write_json(unfinished / 'generation_config.json', settings | dict(eos_token_id=end))
    offline = options.corpus in OFFLINE
    if offline and (others := other_versions()):
        print(f'made from {", ".join(others)}: another corpus than that of the docs')
    meta = dict(
        corpus=options.corpus,
        tokenizer=options.tokenizer,
        vocab_size=tokenizer.vocab_size,
        dtype=np.dtype(tokenizer.dtype).name,
        options=vars(options),
        versions=versions() if offline else {},
        splits=counts,
        checksums={path.name: checksum(path) for path in sorted(unfinished.iterdir())},
        kind=kind,
    )
    write_json(unfinished / 'meta.json', meta)
    os.replace(unfinished, out)
    train, val = (f'{counts[split]["tokens"]:,} {split}' for split in SPLITS)
    print(f'{out}: {train} and {val} tokens ({options.tokenizer})')
    return out


def main(argv):
    """Command line: a corpus name or files first, knobs after it."""
    names = list(takewhile(lambda arg: arg[:1] != '-', argv))
    argv = [f'--corpus={",".join(names)}'] * bool(names) + argv[len(names) :]
    prepare(configure(argv, Preparation, None, 'data/prepare.py')[0])


if __name__ == '__main__':
    run_as_program(main)
