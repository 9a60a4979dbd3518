"""Tokenizers: bytes (nothing to download), tiktoken's, or a pretrained model's tokenizer.json."""

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from engine.errors import UserError, first_line, import_extra, unknown
from engine.files import read_json
from engine.hub import model_folder
from engine.tokenizer_files import (
    ENDS,
    bytes_encoding,
    find_encoding,
    fingerprint,
    is_encoding,
    tokenizer_files,
)


class Tokenizer(NamedTuple):
    """Text to ids and back."""

    encode: Any  # text -> 1-d array or list of ids
    decode: Any  # list of ids -> text
    vocab_size: int
    end: int  # the end-of-text token
    encode_batch: Any  # texts -> encode() of each; where it takes long, in parallel

    @property
    def dtype(self):
        """The integer type that holds its ids."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def text(self, ids):
        """The text of ids, without end-of-text and ids that only pad the vocabulary."""
        return self.decode([i for i in ids if i != self.end and i < self.vocab_size])


def encode_bytes(text):
    """
    The ids that bytes_encoding gives, two hundred times faster; a lone surrogate, which is no
    character, becomes a question mark.
    """
    return np.frombuffer(text.encode('utf-8', 'replace'), np.uint8)


def _encode_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def _encode_batch(tokenizer, texts):
    return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


@cache
def load_tokenizer(name):
    """
    The Tokenizer `bytes`, of a tiktoken encoding (`gpt2`), or of a folder with a tokenizer.json
    (needs the package tokenizers). Raises UserError.
    """
    if name == 'bytes':
        each = partial(map, encode_bytes)
        return Tokenizer(encode_bytes, bytes_encoding().decode, 257, 256, each)
    if is_encoding(name):
        found = find_encoding(name)
        ids, each = (found.n_vocab, found.eot_token), found.encode_ordinary_batch
        return Tokenizer(found.encode_ordinary, found.decode, *ids, each)
    file = Path(name) / 'tokenizer.json'
    if not file.is_file():
        known = ['bytes', *tiktoken.list_encoding_names(), 'folders with a tokenizer.json']
        raise unknown('tokenizer', name, known)
    tokenizers = import_extra('tokenizers', f'{file} needs the package tokenizers')
    try:
        found = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f'{file} is damaged ({first_line(error)})') from None
    ends = [found.token_to_id(end) for end in ENDS]
    ends = [i for i in ends if i is not None]
    if not ends:
        raise UserError(f'{file} has no known end-of-text token')
    ids, each = (found.get_vocab_size(), ends[0]), partial(_encode_batch, found)
    return Tokenizer(partial(_encode_ids, found), found.decode, *ids, each)


def check_tokenizer(tokenizer, config):
    """Raise UserError if a Tokenizer has more tokens than a model of this configuration."""
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f'{tokenizer.vocab_size} tokens, the model {config.vocab_size}'
        raise UserError(f'the tokenizer has {sizes}: choose with --tokenizer=')


def tokenizer_in(name):
    """The tokenizer that a model's folder names or holds, for load_tokenizer, or ''."""
    folder = model_folder(name)
    try:
        named = read_json(folder / 'config.json').get('nanofamily_tokenizer')
    except (OSError, UserError):
        named = None
    if isinstance(named, str) and is_encoding(named):
        return named
    if (folder / 'tokenizer.json').is_file():
        return str(folder)
    return ''


def tokenizer_to_carry(name):
    """The tokenizer that goes with what is made of a model, also one that only others can use."""
    folder = model_folder(name)
    return tokenizer_in(name) or (str(folder) if tokenizer_files(folder) else '')


def tokenizer_of_model(name):
    """The tokenizer of a model. Raises UserError where there is none."""
    found = tokenizer_in(name)
    if not found:
        raise UserError(f'{name} does not name its tokenizer: choose with --tokenizer=')
    return found


def same_tokenizer(one, other):
    """Whether two tokenizers, names or folders, have the same vocabulary and merges."""
    return one == other or fingerprint(one) == fingerprint(other)


def share_tokenizer(one, other):
    """Whether two models, folders or hub names, have one tokenizer, as far as both name theirs."""
    found = [tokenizer_in(one), tokenizer_in(other)]
    return not all(found) or same_tokenizer(*found)
