"""
Prepared corpora on disk: a folder data/NAME/ with train.bin and val.bin, one unsigned integer per
token, and meta.json, which says what they are. Damage is reported before anything is read.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.offline import other_versions, versions
from data.vocabulary import check_tokenizer, load_tokenizer, same_tokenizer, tokenizer_in
from engine.errors import UserError
from engine.files import checksum, damage_of, read_json, write_json
from engine.progress import progress_bar
from engine.tokenizer_files import is_encoding, read_settings, write_tokenizer

SPLITS = ('train', 'val')
OFFLINE = ('pydocs', 'pycode', 'signatures', 'preferences')  # corpora that need no network


@dataclass
class Corpus:
    """A prepared corpus: its meta.json and its memory-mapped splits, 1-d arrays of token ids."""

    name: str
    meta: dict
    train: np.ndarray
    val: np.ndarray
    bytes_per_token: float  # bytes of text per token, on the validation split
    sha256: str  # of the training tokens


def open_corpus(name, data_dir='data'):
    """The corpus in data_dir/name. Raises UserError if it is not prepared or a file is damaged."""
    folder = Path(data_dir) / name
    try:
        meta = read_json(folder / 'meta.json', checksums=dict, tokenizer=str, vocab_size=int)
        if (folder / 'tokenizer.json').is_file():  # wherever the folder is now
            meta['tokenizer'] = str(folder)
        dtype, arrays = np.dtype(dict(uint16=np.uint16, uint32=np.uint32)[meta['dtype']]), []
        for split in SPLITS:
            path, counts = folder / f'{split}.bin', meta['splits'][split]
            if path.stat().st_size != counts['tokens'] * dtype.itemsize:
                raise ValueError(f'{path} is not of {counts}')
            arrays.append(np.memmap(path, dtype, mode='r'))
        rest = counts['bytes'] / max(1, counts['tokens']), str(meta['checksums']['train.bin'])
    except FileNotFoundError as error:
        raise UserError(
            f'{folder} is not prepared: run  python data/prepare.py {name}  ({error.filename} is '
            'missing; delete what is left)'
        ) from None
    except Exception as error:  # damage takes many forms
        raise UserError(f'{folder} is damaged ({error!r}): delete it, prepare it again') from None
    # Training reads short pieces from anywhere. Told nothing, the system would read around each,
    # 128 KB mostly: of a corpus larger than memory, hundreds of times what is asked for.
    if hasattr(mmap, 'MADV_RANDOM'):  # not on Windows
        arrays[0].base.madvise(mmap.MADV_RANDOM)
    return Corpus(name, meta, *arrays, *rest)


def verify_corpus(name, data_dir='data'):
    """
    The corpus in data_dir/name. Raises UserError when it is not what was prepared; reads all of it
    for that.
    """
    folder, corpus = Path(data_dir) / name, open_corpus(name, data_dir)
    for file, expected in progress_bar(
        corpus.meta['checksums'].items(), desc=f'verifying {name}', unit='file'
    ):
        if damage := damage_of(folder / file, expected):
            raise UserError(f'{damage}; delete {folder} and prepare it again')
    return corpus


def check_vocabulary(corpus, config, model):
    """
    Raise UserError, with the way out, unless a corpus was made with the tokenizer of `model`, a
    folder or hub name, or, where that holds none, has ids that a model of this shape knows.
    """
    ours, theirs = corpus.meta['tokenizer'], tokenizer_in(model)
    if theirs and not same_tokenizer(ours, theirs):
        raise UserError(
            f'{model} has another tokenizer than {corpus.name} ({ours}): prepare its text with  '
            f'python data/prepare.py {corpus.meta.get("corpus", corpus.name)} --tokenizer={theirs} '
            f'--out=data/NAME  and use --data=NAME'
        )
    check_tokenizer(ours, config)


def finish_corpus(unfinished, out, counts, options, kind):
    """Write meta.json and give a complete corpus its name. Raises UserError for an empty split."""
    if bad := counts.get('bad'):
        print(f'{bad["rows"]:,} rows cannot be used and are left out; the first: {bad["first"]}')
    for split in SPLITS:
        if not counts[split]['tokens']:
            raise UserError(
                f'{options.corpus} gave no {split} documents: there must be several, of which '
                f'--val_fraction={options.val_fraction} are held out'
            )
    (unfinished / 'progress.json').unlink(missing_ok=True)
    tokenizer = load_tokenizer(options.tokenizer)
    if not is_encoding(options.tokenizer):
        write_tokenizer(options.tokenizer, unfinished)
        end = int(np.memmap(unfinished / 'val.bin', tokenizer.dtype)[-1])
        settings = read_settings(unfinished, 'generation_config.json')
        if end not in np.ravel(settings.get('eos_token_id')):  # say what a model learns to end with
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
