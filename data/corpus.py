"""
Prepared corpora on disk: a folder data/NAME/ with train.bin and val.bin, one unsigned integer per
token, and meta.json, which describes them. Missing and damaged files are reported at opening.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.vocabulary import check_tokenizer, same_tokenizer, tokenizer_in
from engine.errors import UserError
from engine.files import damage_of, read_json
from engine.log import progress_bar

SPLITS = ('train', 'val')
OFFLINE = ('pydocs', 'pycode', 'signatures', 'preferences')  # corpora that need no network


@dataclass
class Corpus:
    """A prepared corpus: its meta.json and its splits, memory-mapped 1-d uint16 or uint32 ids."""

    name: str
    meta: dict
    train: np.ndarray
    val: np.ndarray
    bytes_per_token: float  # bytes of text per token, on the validation split
    sha256: str  # of the training tokens

    def check_vocabulary(self, config, model):
        """
        Raise UserError, with a remedy, unless the corpus was made with the tokenizer of `model`, a
        folder or hub name; if that holds none, unless `config`, a GPTConfig, covers all token ids.
        """
        tokenizer, wanted = self.meta['tokenizer'], tokenizer_in(model)
        if wanted and not same_tokenizer(tokenizer, wanted):
            raise UserError(
                f'{model} has another tokenizer than {self.name} ({tokenizer}): prepare it by  '
                f'python data/prepare.py {self.meta.get("corpus", self.name)} --tokenizer={wanted} '
                f'--out=data/NAME  and use --data=NAME'
            )
        check_tokenizer(tokenizer, config)


def open_corpus(name, data_dir='data'):
    """
    The Corpus in data_dir/name. Checks the sizes of its files, not their checksums. Raises
    UserError if it is not prepared or is damaged.
    """
    folder = Path(data_dir) / name
    try:
        meta = read_json(folder / 'meta.json', checksums=dict, tokenizer=str, vocab_size=int)
        if (folder / 'tokenizer.json').is_file():  # its own copy, which moves with the folder
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
    # Training reads short pieces at random places. By default the system reads ahead, mostly 128 KB
    # a piece: for a corpus larger than memory, hundreds of times what is needed.
    if hasattr(mmap, 'MADV_RANDOM'):  # not on Windows
        arrays[0].base.madvise(mmap.MADV_RANDOM)
    return Corpus(name, meta, *arrays, *rest)


def verify_corpus(name, data_dir='data'):
    """
    The Corpus in data_dir/name, after comparing all files with their checksums, which reads all of
    it. Raises UserError if one differs.
    """
    folder, corpus = Path(data_dir) / name, open_corpus(name, data_dir)
    for file, expected in progress_bar(
        corpus.meta['checksums'].items(), desc=f'verifying {name}', unit='file'
    ):
        if damage := damage_of(folder / file, expected):
            raise UserError(f'{damage}; delete {folder} and prepare it again')
    return corpus
