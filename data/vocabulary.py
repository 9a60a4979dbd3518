"""
Tokenizers: bytes (nothing to download), tiktoken's, or a pretrained model's own; and the alignment
of one text's tokens in two of them.
"""

import codecs
import json
import re
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from engine.errors import UserError, first_line, import_extra, unknown
from engine.hub import model_folder
from engine.tokenizer_files import (
    byte_letters,
    end_ids,
    find_encoding,
    fingerprint,
    is_encoding,
    is_tokenizer,
    read_settings,
    tokenizer_files,
    tokenizer_json,
    vocabulary,
)


class Tokenizer(NamedTuple):
    """Text to ids and back. Control tokens spelled out in a text are read as plain characters."""

    encode: Any  # text -> the ids of `begin` and of the text, a 1-d array or a list
    decode: Any  # list of ids -> text
    vocab_size: int
    ends: tuple  # ids that end a text or an answer; the first is the one to write
    encode_batch: Any  # texts -> encode() of each, in parallel where that is slow
    begin: tuple = ()  # ids that encode() puts before a text: a BOS, if the tokenizer uses one

    @property
    def end(self):
        """The end-of-text token."""
        return self.ends[0]

    @property
    def dtype(self):
        """The integer type that holds its ids."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode_rest(self, text):
        """The ids of a text that follows another: without a BOS."""
        return self.encode(text)[len(self.begin) :]

    def text(self, ids, prompt=()):
        """
        The text of `ids` that follow those of `prompt`, without end tokens and ids that only pad
        the vocabulary. Both are decoded together, as SentencePiece drops a text's first space.
        """
        known = [i for i in ids if i not in self.ends and i < self.vocab_size]
        return self.decode([*prompt, *known])[len(self.decode([*prompt])) :]


def encode_bytes(text):
    """
    The ids of the tokenizer `bytes`, uint8 (n,), two hundred times faster than tiktoken gives them.
    A lone surrogate, which has no UTF-8, becomes a question mark.
    """
    return np.frombuffer(text.encode('utf-8', 'replace'), np.uint8)


def open_tokenizer(folder):
    """
    The tokenizers.Tokenizer in a model's folder, with truncation and padding turned off. Raises
    UserError without the package tokenizers, or for a damaged file.
    """
    tokenizers = import_extra('tokenizers', f'{folder} needs the package tokenizers')
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(folder)))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f'{folder}/tokenizer.json is damaged ({first_line(error)})') from None
    found.no_truncation()
    found.no_padding()
    return found


@cache
def load_tokenizer(name):
    """
    The Tokenizer of this name: `bytes`, a tiktoken encoding (`gpt2`), or a folder with
    tokenizer.json, or vocab.json and merges.txt (needs the package tokenizers). Raises UserError.
    """
    if is_encoding(name):
        found = find_encoding(name)
        encode, encode_batch = found.encode_ordinary, found.encode_ordinary_batch
        if name == 'bytes':
            encode, encode_batch = encode_bytes, partial(map, encode_bytes)
        return Tokenizer(encode, found.decode, found.n_vocab, (found.eot_token,), encode_batch)
    if not is_tokenizer(name):
        if tokenizer_files(name):
            made = f'AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r})'
            raise UserError(f'{name} has no tokenizer.json; transformers makes it: {made}')
        raise unknown(
            'tokenizer', name, ['bytes', *tiktoken.list_encoding_names(), 'folders that hold one']
        )
    found = open_tokenizer(name)
    found.encode_special_tokens = True  # special tokens in a text are encoded as characters
    # `begin` is what the tokenizer adds before a text
    alone, text = found.encode('a').ids, found.encode('a', add_special_tokens=False).ids
    begin = tuple(alone[: alone.index(text[0])] if text else ())

    def encode(text):
        return [*begin, *found.encode(text, add_special_tokens=False).ids]

    def encode_batch(texts):
        return [[*begin, *e.ids] for e in found.encode_batch(texts, add_special_tokens=False)]

    size, ends = max(vocabulary(name).values()) + 1, tuple(end_ids(name))
    if not ends:
        raise UserError(f'{name} has no known end-of-text token')
    return Tokenizer(encode, found.decode, size, ends, encode_batch, begin)


def encode_texts(rows, options, bad):
    """
    [(ids, b'', bytes of the text, is_val), ...] of rows (where, record, is_val) with a text in
    options.text_column, as encode_examples in data/instruct.py, but without marks. Ids are 1-d
    arrays that end with end-of-text; blank texts are left out. options: a Preparation; bad: called
    with (where, error) for rows that cannot be used.
    """
    tokenizer, texts = load_tokenizer(options.tokenizer), []
    for where, row, is_val in rows:
        try:
            text = row[options.text_column]
            size = len(text.encode())  # raises for a lone surrogate
            is_val = options.holds_out(text) if is_val is None else is_val
            texts += [(text, size, is_val)] * bool(text.strip())
        except Exception:
            bad(where, ValueError(f'no text in --text_column={options.text_column}: {row!s:.80}'))
    encoded = tokenizer.encode_batch([text for text, *_ in texts])
    return [(np.append(ids, tokenizer.end), b'', *rest) for ids, (_, *rest) in zip(encoded, texts)]


def check_tokenizer(name, config):
    """Raise UserError, with a remedy, if a tokenizer has ids beyond a GPTConfig's vocabulary."""
    rows = config.vocab_size
    if load_tokenizer(name).vocab_size > rows:
        beyond = [token for token, i in vocabulary(name).items() if i >= rows]
        raise UserError(
            f'the tokenizer {name} has {len(beyond)} tokens for which the model, of {rows}, has no '
            f'row ({beyond[0]}): use another --tokenizer or --data; or, if they were added to it '
            'later, delete them from "added_tokens" in its tokenizer.json, and prepare again what '
            'was made with it'
        )


def tokenizer_in(name):
    """The tokenizer that a model's folder names or holds, as for load_tokenizer; '' if none."""
    folder = model_folder(name)
    named = read_settings(folder, 'config.json').get('nanofamily_tokenizer')
    if isinstance(named, str) and is_encoding(named):
        return named
    return str(folder) if is_tokenizer(folder) else ''


def tokenizer_to_carry(name):
    """The tokenizer to copy to models made from this one, even if only other tools read it."""
    folder = model_folder(name)
    return tokenizer_in(name) or (str(folder) if tokenizer_files(folder) else '')


def tokenizer_of_model(name):
    """The tokenizer of a model. Raises UserError where there is none."""
    found = tokenizer_to_carry(name)
    if not found:
        raise UserError(
            f'{name} has no tokenizer: put its files there, or name one with --tokenizer='
        )
    return found


def same_tokenizer(one, other):
    """Whether two tokenizers have equal vocabularies and merges; True if one is '', unknown."""
    return not (one and other) or one == other or fingerprint(one) == fingerprint(other)


# ----------------------------------------------------------------------------------------------
# the same text in another tokenizer's tokens, where teacher and student differ in vocabulary
# (Late-to-Early Training with mismatched tokenizers, Table 5)

# decodes every invalid byte to one '?', so that byte positions stay the same
codecs.register_error('one ? a byte', lambda error: ('?' * (error.end - error.start), error.end))


@cache
def token_bytes(name):
    """The bytes of each token of a tokenizer, a list by id; empty for control and unused ids."""
    content, table = tokenizer_json(name), [b''] * load_tokenizer(name).vocab_size
    letters = {letter: byte for byte, letter in byte_letters().items()}
    byte_level = 'ByteLevel' in json.dumps(content.get('decoder'))
    added = {token['content']: token['special'] for token in content['added_tokens']}
    for token, i in vocabulary(name).items():
        if token in added:  # control tokens; also runs of spaces and the like, spelled as they are
            table[i] = b'' if added[token] else token.encode()
        elif byte_level:
            table[i] = bytes(letters[letter] for letter in token)
        elif match := re.fullmatch('<0x([0-9A-Fa-f]{2})>', token):  # SentencePiece's single bytes
            table[i] = bytes.fromhex(match[1])
        else:
            table[i] = token.replace('▁', ' ').encode()
    return table


def encode_spans(text, name):
    """
    (ids, spans), int64 (n,), of `text`, bytes, in the tokenizer `name`: how many of the bytes each
    token covers; all 0 if the tokens do not spell the same bytes, as after a normalisation.
    """
    shown = text.decode('utf-8', 'one ? a byte')
    ids = np.array(load_tokenizer(name).encode(shown), np.int64)
    tokens = [token_bytes(name)[i] for i in ids]
    spans, found = np.array([len(token) for token in tokens], np.int64), b''.join(tokens)
    if spaced := found == b' ' + shown.encode():  # SentencePiece adds a space at the beginning
        spans[np.flatnonzero(spans)[0]] -= 1
    return ids, spans * (spaced or found == shown.encode())


def translate(ids, student, teacher):
    """
    A student's tokens in those of its teacher: ids (T,) of the tokenizer `student` -> (ids of the
    tokenizer `teacher`, a list; for each of the T positions the index in it of its partner, or -1).

    Both tokenize the same bytes. If a student's token covers the bytes [a, b), its partner is the
    last token of the teacher that ends at a byte d with a < d <= b: the teacher has then read
    nothing that the student has not. Without such a token there is no partner:

        student 'The' 're' ' is', teacher 'There' ' i' 's': the partners are none, 'There', 's'
    """
    table, end = token_bytes(student), load_tokenizer(student).end
    output, ends, start = [], [], 0  # the teacher's ids; the byte at which each of them ends
    for document in np.split(ids, np.flatnonzero(ids == end) + 1):
        text = b''.join(table[i] for i in document)
        found, spans = encode_spans(text, teacher)
        output += [*found, load_tokenizer(teacher).end]  # end-of-text counts as one byte
        ends += [*np.where(spans > 0, start + spans.cumsum(), -1), start + len(text) + 1]
        start = ends[-1]
    after = np.cumsum([len(table[i]) + (i == end) for i in ids])  # where the student's tokens end
    ends = np.array(ends)
    places = np.flatnonzero(ends >= 0)  # tokens that cover bytes: no BOS, nothing normalised
    ends, places = np.append(0, ends[places]), np.append(-1, places)
    last = np.searchsorted(ends, after, side='right') - 1  # the last to end at or before `after`
    # the last document is unfinished: its end-of-text goes, unless nothing else is left
    return output[:-1] or output, np.where(ends[last] > np.append(0, after[:-1]), places[last], -1)
