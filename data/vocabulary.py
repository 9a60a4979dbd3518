"""Tokenizers: bytes (nothing to download), tiktoken's, or a pretrained model's tokenizer.json."""

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from engine.errors import UserError, import_extra, unknown
from engine.files import read_json
from engine.hub import model_folder, within

ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>')


class Tokenizer(NamedTuple):
    """Text to ids and back."""

    encode: Any  # text -> 1-d array or list of ids
    decode: Any  # list of ids -> text
    vocab_size: int
    end: int  # the end-of-text token

    @property
    def dtype(self):
        """The integer type that holds its ids."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def text(self, ids):
        """The text of ids, without end-of-text and ids that only pad the vocabulary."""
        return self.decode([i for i in ids if i != self.end and i < self.vocab_size])


def bytes_encoding():
    """The 256 bytes and <|endoftext|> = 256 as a tiktoken Encoding."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {'<|endoftext|>': 256}
    return tiktoken.Encoding(
        'bytes', pat_str=r'[\s\S]{1,16}', mergeable_ranks=ranks, special_tokens=special
    )


def encode_bytes(text):
    """The ids that bytes_encoding gives, two hundred times faster."""
    return np.frombuffer(text.encode('utf-8'), np.uint8)


def _encode_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@cache
def load_tokenizer(name):
    """
    The Tokenizer `bytes`, of a tiktoken encoding (`gpt2`), or of a folder with a tokenizer.json
    (needs the package tokenizers). Raises UserError.
    """
    if name == 'bytes':
        return Tokenizer(encode_bytes, bytes_encoding().decode, 257, 256)
    if name in tiktoken.list_encoding_names():
        what = f'the vocabulary of the tokenizer {name}, downloaded at its first use,'
        found = within(30, lambda: tiktoken.get_encoding(name), what)
        return Tokenizer(found.encode_ordinary, found.decode, found.n_vocab, found.eot_token)
    file = Path(name) / 'tokenizer.json'
    if not file.is_file():
        known = ['bytes', *tiktoken.list_encoding_names(), 'folders with a tokenizer.json']
        raise unknown('tokenizer', name, known)
    tokenizers = import_extra('tokenizers', f'{file} needs the package tokenizers')
    found = tokenizers.Tokenizer.from_file(str(file))
    ends = [found.token_to_id(end) for end in ENDS]
    ends = [i for i in ends if i is not None]
    if not ends:
        raise UserError(f'{file} has no known end-of-text token')
    return Tokenizer(partial(_encode_ids, found), found.decode, found.get_vocab_size(), ends[0])


def check_tokenizer(tokenizer, config):
    """Raise UserError if a Tokenizer has more tokens than a model of this configuration."""
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f'{tokenizer.vocab_size} tokens, the model {config.vocab_size}'
        raise UserError(f'the tokenizer has {sizes}: choose with --tokenizer=')


def tokenizer_of_model(name):
    """The tokenizer that a model's folder names or holds, for load_tokenizer. UserError: none."""
    folder = model_folder(name)
    try:
        named = read_json(folder / 'config.json').get('nanofamily_tokenizer')
    except (OSError, UserError):
        named = None
    if not named and not (folder / 'tokenizer.json').is_file():
        raise UserError(f'{name} does not name its tokenizer: choose with --tokenizer=')
    return named or str(folder)
