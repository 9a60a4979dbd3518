"""
Text -> tokens on disk:  python data/prepare.py NAME [--key=value ...]

NAME is one of
  - pydocs, pycode: the documentation and the source of Python and of the packages this project depends on. They need no
    network, are the same wherever the same packages are installed, and are the default of every tiny preset;
  - a corpus of the Hugging Face hub (HUB below), streamed with `datasets`;
  - a file or glob of your own, .txt, .jsonl or .parquet, read by the same code: python data/prepare.py 'books/*.txt'

The result is a folder data/NAME/ with train.bin and val.bin (one unsigned integer a token, documents separated by the
end-of-text token) and meta.json (tokenizer, dtype, counts, source, checksums). It is built in data/NAME.partial/ and
renamed when it is whole; an interrupted preparation goes on where it stopped (hub and files) or starts again (offline).
"""
import ast
import contextlib
import glob
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if __name__ == '__main__':   # run as a file, Python looks beside it, not in the project's root
    sys.path.insert(0, str(ROOT))
from checksums import checksum   # noqa: E402
from configurator import (UserError, check_ranges, configure, nearest, read_json, run_as_program, unknown,   # noqa: E402
                          write_atomically)
from hugging_face import WAY_OUT, model_folder, reach_hub, within   # noqa: E402

HUB = {   # name: (repository, configuration, split, column with the text)
    'fineweb_edu': ('HuggingFaceFW/fineweb-edu', 'default', 'train', 'text'),
    'openwebtext': ('Skylion007/openwebtext', None, 'train', 'text'),
    'pile': ('monology/pile-uncopyrighted', None, 'train', 'text'),
    'slimpajama': ('cerebras/SlimPajama-627B', None, 'train', 'text'),
    'starcoder': ('bigcode/starcoderdata', None, 'train', 'content'),
    'openwebmath': ('open-web-math/open-web-math', None, 'train', 'text'),
    'wikitext': ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'train', 'text'),
}
OFFLINE = ('pydocs', 'pycode')


@dataclass
class Preparation:
    """What to turn into tokens, and how."""
    corpus: str = 'pydocs'         # pydocs, pycode, signatures, a hub corpus or set, or a glob of .txt, .jsonl or .parquet
    out: str = ''                  # folder of the result; empty: data/CORPUS
    tokenizer: str = ''            # bytes, gpt2, or a folder with tokenizer.json; empty: bytes offline, else gpt2
    text_column: str = ''          # column of .jsonl and .parquet files that holds the text; empty: text
    max_tokens: int = 0            # stop after this many training tokens; 0: the whole corpus
    val_fraction: float = 0.0      # share of documents (offline: of files) held out; 0: 5%, from the hub 0.05%
    prompt: str = 'paper'          # of instructions: paper (Appendix C of paper 004) or plain
    packages: str = 'project'      # offline corpora: those the project depends on, or all that are installed
    processes: int = 0             # 0: one a core


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def bytes_encoding():
    """The 256 bytes and <|endoftext|> = 256 as a tiktoken Encoding: nothing to learn, nothing to download."""
    return tiktoken.Encoding('bytes', pat_str=r'[\s\S]{1,16}', mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={'<|endoftext|>': 256})


@cache
def load_tokenizer(name):
    """
    (encode, decode, vocabulary size, end-of-text id) of `bytes`, of a tiktoken encoding (`gpt2`), or of a folder with a
    tokenizer.json (needs the package tokenizers). encode: text -> 1-d array of ids; decode: list of ids -> text.
    """
    if name == 'bytes':
        encoding = bytes_encoding()   # encoding by numpy gives the same ids, two hundred times faster
        return (lambda text: np.frombuffer(text.encode('utf-8'), np.uint8)), encoding.decode, 257, 256
    if name in tiktoken.list_encoding_names():
        what = f'the vocabulary of the tokenizer {name} (downloaded at its first use)'
        encoding = within(30, lambda: tiktoken.get_encoding(name), what)
        return encoding.encode_ordinary, encoding.decode, encoding.n_vocab, encoding.eot_token
    file = Path(name) / 'tokenizer.json'
    if not file.is_file():
        raise unknown('tokenizer', name, ['bytes', *tiktoken.list_encoding_names(), 'folders with a tokenizer.json'])
    try:
        import tokenizers
    except ImportError:
        raise UserError(f'{file} needs the package tokenizers: pip install -r requirements-extras.txt') from None
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    ends = [i for i in map(tokenizer.token_to_id, ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>')) if i is not None]
    if not ends:
        raise UserError(f'{file} has no end-of-text token that is known here')
    return partial(_encode_ids, tokenizer), tokenizer.decode, tokenizer.get_vocab_size(), ends[0]


def _encode_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def tokenizer_of_model(name):
    """The tokenizer that a model's folder names or holds, for load_tokenizer. Raises UserError when there is none."""
    folder = model_folder(name)
    try:
        named = read_json(folder / 'config.json').get('nanofamily_tokenizer')
    except (OSError, UserError):
        named = None
    if not named and not (folder / 'tokenizer.json').is_file():
        raise UserError(f'{name} does not say which tokenizer it was trained with: choose with --tokenizer=')
    return named or str(folder)


def token_dtype(vocab_size):
    """The integer type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2 ** 16 else np.uint32


def tokenize(name, documents):
    """[(text, is_validation), ...] -> {split: (ids, 1-d, every text ending with end-of-text; bytes of text; documents)}."""
    encode, _, vocab_size, end = load_tokenizer(name)
    dtype, ids, sizes = token_dtype(vocab_size), dict(train=[], val=[]), dict(train=[0, 0], val=[0, 0])
    ending = np.array([end], dtype)
    for text, is_val in documents:
        split = 'val' if is_val else 'train'
        ids[split] += [np.asarray(encode(text), dtype), ending]
        sizes[split][0] += len(text) if text.isascii() else len(text.encode('utf-8'))
        sizes[split][1] += 1
    return {split: (np.concatenate(pieces), *sizes[split]) for split, pieces in ids.items() if pieces}


def in_parallel(pool, tokenizer, batches):
    """
    Yield (what tokenize makes of it, state) for (documents, state) in batches, in their order. Reads a few batches ahead of what
    is asked for, and no more: a corpus may be larger than memory. Bytes need no workers: handing them over would take longer.
    """
    pending, workers = deque(), {process.pid for process in pool._pool} if pool else set()

    def outcome(done):
        while not done.ready():   # for the result of a worker that was killed one would wait for ever
            done.wait(1)
            if {process.pid for process in pool._pool} != workers:
                raise UserError('a worker process was killed, perhaps for want of memory: --processes=1 needs less of it, and the '
                                'same command goes on')
        return done.get()
    for documents, state in batches:
        if tokenizer == 'bytes':
            yield tokenize(tokenizer, documents), state
            continue
        pending.append((pool.apply_async(tokenize, (tokenizer, documents)), state))
        if len(pending) > 4 * pool._processes:
            done, state = pending.popleft()
            yield outcome(done), state
    for done, state in pending:
        yield outcome(done), state


# ---------------------------------------------------------------------------------------------------------------------
# the offline corpora

SKIPPED_FOLDERS = {'test', 'tests', 'testing', 'idle_test', '_vendor', 'vendor', 'vendored', '_vendored', 'third_party',
                   'externals', 'extern', 'site-packages', '__pycache__', 'lib2to3', 'encodings'}
LICENCE = re.compile(r'copyright|licen[cs]ed? |all rights reserved|redistribution', re.IGNORECASE)


def project_packages():
    """Names of the installed packages that requirements.txt asks for and, in turn, those they ask for, sorted."""
    def name_of(requirement):
        return re.match(r'[A-Za-z0-9._-]+', requirement)[0].lower().replace('_', '-')
    lines = (line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines())
    found, queue = set(), deque(name_of(line) for line in lines if line)
    while queue:
        name = queue.popleft()
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            queue.extend(name_of(r) for r in wanted if 'extra ==' not in r)
    return sorted(found)


def source_files(packages):
    """
    [(name that is the same on every machine, path)] of the .py files of Python's library and of the packages, without tests
    and vendored copies.
    """
    library = Path(sysconfig.get_paths()['stdlib'])
    files = {f'python/{p.relative_to(library).as_posix()}': p for p in library.rglob('*.py')}
    installed = {distribution.metadata['Name'].lower() for distribution in importlib.metadata.distributions()}
    for name in project_packages() if packages == 'project' else sorted(installed):
        for file in importlib.metadata.files(name) or []:
            if file.suffix == '.py' and '..' not in file.parts:
                files[f'{name}/{file.as_posix()}'] = Path(file.locate())
    return [(name, path) for name, path in sorted(files.items())
            if not SKIPPED_FOLDERS & set(Path(name).parts[1:-1]) and not re.match(r'test_|.*_test\.py|conftest', path.name)]


def documentation(tree):
    """(docstring node, its text) of a module and everything defined in it, in the order of the source."""
    body = tree.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        if isinstance(body[0].value.value, str):
            yield body[0], body[0].value.value
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from documentation(node)


def read_source(job):
    """(corpus, path) -> the texts one file gives: its documentation strings for pydocs, its code without them for pycode."""
    corpus, path = job
    try:
        source = Path(path).read_text(encoding='utf-8')
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):   # not every installed file is Python of this version
        return []
    if corpus == 'pydocs':
        texts = [inspect.cleandoc(text) for _, text in documentation(tree)]
        if Path(path).parts[-2:] == ('pydoc_data', 'topics.py'):   # help('if'), help('yield'), ...: prose in a dict
            texts += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return [text for text in texts if len(text) >= 40 and not LICENCE.search(text)]
    lines = source.split('\n')
    for node, _ in documentation(tree):
        lines[node.lineno - 1:node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    code = '\n'.join(line.rstrip() for line in lines if line is not None)
    header = re.match(r'(?:#[^\n]*\n|\s)*', code)[0]
    code = (code[len(header):] if LICENCE.search(header) else code).strip()
    return [code] if len(code) >= 200 else []


def without_near_duplicates(documents):
    """
    Drop every text of which more than a third has been seen before: all runs of 8 words are remembered, so that copies,
    slightly changed copies and boilerplate go, and nothing of what comes first (the validation split) returns later.
    """
    seen = set()
    for text, is_val in documents:
        words = re.sub(r'[\W\d_]+', ' ', text.lower()).encode().split()
        runs = {zlib.crc32(b' '.join(words[i:i + 8])) for i in range(max(1, len(words) - 7))}
        if 3 * len(runs & seen) <= len(runs):
            seen |= runs
            yield text, is_val


def offline_documents(options, pool):
    """Yield (text, is_validation) of pydocs or pycode, validation first; the split is by file, by a hash of its name."""
    files = source_files(options.packages)
    texts = pool.imap(read_source, [(options.corpus, str(path)) for _, path in files], chunksize=16)
    texts = list(tqdm(texts, total=len(files), desc=f'reading {options.corpus}', unit='file', leave=False))
    held_out = [zlib.crc32(name.encode()) < options.val_fraction * 2 ** 32 for name, _ in files]
    yield from without_near_duplicates((text, is_val) for is_val in (True, False)
                                       for of_file, held in zip(texts, held_out) if held == is_val for text in of_file)


# ---------------------------------------------------------------------------------------------------------------------
# the hub, and files of your own

def open_stream(options):
    """The `datasets` stream of a hub corpus or of local files, and the column that holds its text."""
    local = options.corpus not in HUB
    if local:
        files = sorted(glob.glob(options.corpus, recursive=True))
        if not files:
            known = [*OFFLINE, *HUB]
            raise UserError(f'{options.corpus!r} is no corpus and matches no file{nearest(options.corpus, known)}; '
                            f'there are {", ".join(known)}')
        kinds = {Path(f).suffix for f in files}
        builder = {'.txt': 'text', '.jsonl': 'json', '.parquet': 'parquet'}.get(kinds.pop() if len(kinds) == 1 else '')
        if builder is None:
            raise UserError(f'{options.corpus}: all files must be .txt, or all .jsonl, or all .parquet')
        source = dict(path=builder, data_files=files, split='train')
        if builder == 'text':
            source['sample_by'] = 'document'   # a file is a document, not each of its lines
        column = options.text_column or 'text'
    else:
        repository, configuration, split, column = HUB[options.corpus]
        source = dict(path=repository, name=configuration, split=split)
        reach_hub(options.corpus)
    import datasets   # takes a second, and the offline corpora do not need it
    try:
        stream = datasets.load_dataset(**source, streaming=True).with_format('arrow')   # Python objects take ten times as long
    except OSError as error:
        raise UserError(f'{options.corpus} cannot be reached ({type(error).__name__}); {WAY_OUT}') from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f'{options.corpus} cannot be read: {error}') from error
    return stream, column


def readable(stream, name, rows):
    """Tables of so many rows of a stream. Raises UserError when they cannot be read to the end."""
    try:
        yield from stream.iter(rows)
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError) as error:   # bad JSON or UTF-8, an empty file, a network that went away
        raise UserError(f'{name} cannot be read on ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}); '
                        'the same command goes on from what is prepared') from error


def stream_batches(stream, column, options, rows=256):
    """Yield ([(text, is_validation), ...], state of the stream behind it); the split is decided by a hash of the text."""
    for found in readable(stream, options.corpus, rows):
        texts = found[column].to_pylist() if column in found.column_names else [None]
        if not all(isinstance(text, str) for text in texts if text is not None) or column not in found.column_names:
            raise UserError(f'{options.corpus} has no text in a column {column!r}; it has {", ".join(found.column_names)}: '
                            'choose with --text_column=')
        texts = [text for text in texts if (text or '').strip()]   # empty: nothing to learn, and all would fall into one split
        held_out = options.val_fraction * 2 ** 32
        yield [(text, zlib.crc32(text.encode('utf-8')) < held_out) for text in texts], stream.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# writing

def prepare(options):
    """Make the corpus that `options` describe, unless it is there; returns its folder."""
    check_ranges(options, val_fraction=(0, 0.5), max_tokens=(0, None), processes=(0, None))
    if options.packages not in ('project', 'all'):
        raise unknown('choice of packages', options.packages, ('project', 'all'))
    from data.instruct import is_supervised, prepare_supervised
    supervised, is_offline = is_supervised(options.corpus), options.corpus in (*OFFLINE, 'signatures')
    known = is_offline or options.corpus in HUB or supervised and '.' not in options.corpus
    name = options.corpus if known else Path(options.corpus).stem.strip('*_-.') or 'local'
    out = Path(options.out or os.path.relpath(Path(__file__).parent / name))
    options.tokenizer = options.tokenizer or ('bytes' if is_offline else 'gpt2')
    options.val_fraction = options.val_fraction or (0.0005 if options.corpus in HUB else 0.05)
    if out.exists():
        return prepared_before(out, options)
    if supervised:
        return prepare_supervised(options, out)
    stream = None if is_offline else open_stream(options)
    _, _, vocab_size, end = load_tokenizer(options.tokenizer)
    unfinished = Path(f'{out}.partial')
    state = read_progress(unfinished, options) if stream else None
    if state is None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        counts = {split: dict(tokens=0, bytes=0, documents=0) for split in ('train', 'val')}
        state = dict(options=vars(options), files=sorted(glob.glob(options.corpus, recursive=True)), stream=None, counts=counts)
    # spawn, not fork: the caller may have threads; workers leave Ctrl-C to this process
    alone = options.tokenizer == 'bytes' and not is_offline
    with contextlib.nullcontext() if alone else get_context('spawn').Pool(
            options.processes or os.cpu_count(), initializer=ignore_interrupts) as pool:
        if is_offline:
            documents = list(offline_documents(options, pool))
            batches = ((documents[i:i + 256], None) for i in range(0, len(documents), 256))
        else:
            if state['stream']:
                stream[0].load_state_dict(state['stream'])
            batches = stream_batches(*stream, options)
        write_tokens(unfinished, batches, state, options, pool)
    for split in ('train', 'val'):
        if not state['counts'][split]['tokens']:
            raise UserError(f'{options.corpus} gave no {split} documents: there must be some, several of them, and '
                            f'--val_fraction={options.val_fraction} of them are held out')
    meta = dict(corpus=options.corpus, tokenizer=options.tokenizer, vocab_size=vocab_size, end_of_text=end,
                dtype=np.dtype(token_dtype(vocab_size)).name, options=vars(options), python=platform.python_version(),
                packages={n: importlib.metadata.version(n) for n in project_packages()} if is_offline else {},
                splits={split: counts | dict(sha256=checksum(unfinished / f'{split}.bin'))
                        for split, counts in state['counts'].items()})
    (unfinished / 'progress.json').unlink(missing_ok=True)
    write_atomically(unfinished / 'meta.json', json.dumps(meta, indent=1) + '\n')
    os.replace(unfinished, out)
    train, val = meta['splits']['train'], meta['splits']['val']
    print(f'{out}: {train["tokens"]:,} training and {val["tokens"]:,} validation tokens ({options.tokenizer}) '
          f'of {train["documents"] + val["documents"]:,} documents')
    return out


def prepared_before(out, options):
    """The folder `out`, which is there already, if it is the corpus that the options ask for. Raises UserError if not."""
    try:
        found = read_json(out / 'meta.json', options=dict)['options']
    except (OSError, UserError):
        raise UserError(f'{out} is there already and is no prepared corpus: remove it, or choose another --out') from None
    changed = [f'{k} was {found[k]!r}, now {v!r}' for k, v in vars(options).items()
               if k not in ('out', 'processes') and k in found and found[k] != v]
    if changed:
        raise UserError(f'{out} was prepared otherwise ({"; ".join(changed)}): remove it, or choose another --out')
    print(f'{out} is prepared already')
    return out


def ignore_interrupts():
    """In a worker process: Ctrl-C is the parent's to handle."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_progress(unfinished, options):
    """What an interrupted preparation with the same options and files had written, or None: then it starts anew."""
    try:
        state = read_json(unfinished / 'progress.json', options=dict, counts=dict, files=list, stream=dict)
        same = dict(state['options'], processes=0) == dict(vars(options), processes=0)
        size = np.dtype(token_dtype(load_tokenizer(options.tokenizer)[2])).itemsize
        there = all((unfinished / f'{s}.bin').stat().st_size >= state['counts'][s]['tokens'] * size for s in ('train', 'val'))
        if same and there and state['files'] == sorted(glob.glob(options.corpus, recursive=True)):
            return state
        print(f'{unfinished} was begun with other options or files, or is damaged: starting anew')
    except (OSError, UserError, KeyError, TypeError):
        pass
    return None


def write_tokens(unfinished, batches, state, options, pool, save_every=64):
    """Tokenize in parallel and append to {train,val}.bin; every few batches progress.json says how much of them is good."""
    counts = state['counts']
    bytes_per_token = np.dtype(token_dtype(load_tokenizer(options.tokenizer)[2])).itemsize
    files = {split: open(unfinished / f'{split}.bin', 'ab') for split in counts}
    try:
        for split, file in files.items():   # an interrupted run may have written more than it recorded
            file.truncate(counts[split]['tokens'] * bytes_per_token)
        bar = tqdm(desc=f'writing {options.corpus}', unit='tok', unit_scale=True, initial=counts['train']['tokens'],
                   total=options.max_tokens or None)
        for i, (pieces, state['stream']) in enumerate(in_parallel(pool, options.tokenizer, batches), 1):
            for split, (ids, n_bytes, documents) in pieces.items():
                files[split].write(ids.tobytes())
                for key, more in dict(tokens=len(ids), bytes=n_bytes, documents=documents).items():
                    counts[split][key] += more
                bar.update(len(ids) if split == 'train' else 0)
            if state['stream'] and i % save_every == 0:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                write_atomically(unfinished / 'progress.json', json.dumps(state))
            if options.max_tokens and counts['train']['tokens'] >= options.max_tokens:
                break
        bar.close()
    finally:
        for file in files.values():
            file.close()


def main(argv):
    """Command line: a corpus name first, knobs after it."""
    if argv and not argv[0].startswith('-') and not argv[0].endswith('.py'):
        argv = [f'--corpus={argv[0]}', *argv[1:]]
    options, _, _ = configure(argv, Preparation, program='data/prepare.py')
    prepare(options)


if __name__ == '__main__':
    run_as_program(main)
