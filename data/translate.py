"""
The same text in another tokenizer's tokens, for a teacher whose vocabulary is not its student's
(LET with mismatched tokenizers, Table 5).

Both tokenizers cut the same bytes. A token of the student covers the bytes [a, b), one of the
teacher's ends at some d. A position of the student is paired with the last token of the teacher
that ends inside it, a < d <= b: there the teacher has read nothing that the student has not.
Positions in which no token of the teacher ends have no partner.
"""

import codecs
import json
import re
from functools import cache
from pathlib import Path

import numpy as np

from data.vocabulary import load_tokenizer
from engine.errors import UserError
from engine.tokenizer_files import byte_letters, find_encoding, is_encoding

LETTERS = {character: byte for byte, character in byte_letters().items()}
PROBE = 'A naïve café — 数学 and 🙂:\n\tdef f(x): return x  # 1234'


def keep_length(error):
    """Decode text that is cut inside a character with one '?' per byte."""
    return '?' * (error.end - error.start), error.end


codecs.register_error('keep_length', keep_length)


@cache
def token_bytes(name):
    """The bytes of each token of a tokenizer, a tuple by id; empty for special and unused ids."""
    table = [b''] * load_tokenizer(name).vocab_size
    if is_encoding(name):
        for token, i in find_encoding(name)._mergeable_ranks.items():
            table[i] = token
        return tuple(table)
    description = json.loads((Path(name) / 'tokenizer.json').read_text(encoding='utf-8'))
    vocabulary = description['model']['vocab']
    added = description.get('added_tokens', [])
    if not isinstance(vocabulary, dict):  # a list of (token, score)
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    byte_level = 'ByteLevel' in json.dumps(description.get('decoder'))
    special = {token['id'] for token in added if token['special']}
    for token, i in vocabulary.items():
        if i not in special:
            table[i] = from_byte_level(token) if byte_level else from_sentence_piece(token)
    for token in added:  # runs of spaces and the like, written as they are
        if not token['special']:
            table[token['id']] = token['content'].encode()
    return tuple(table)


def from_byte_level(token):
    """The bytes of a token of byte-level BPE."""
    return bytes(LETTERS[character] for character in token)


def from_sentence_piece(token):
    """The bytes of a token of SentencePiece."""
    if match := re.fullmatch(r'<0x([0-9A-Fa-f]{2})>', token):
        return bytes([int(match[1], 16)])
    return token.replace('▁', ' ').encode()


def check_alignable(student, teacher):
    """Raise UserError unless both tokenizers reproduce every byte of a text."""
    for name in (student, teacher):
        table = token_bytes(name)
        text = b''.join(table[int(i)] for i in load_tokenizer(name).encode(PROBE))
        if text.removeprefix(b' ') != PROBE.encode():
            raise UserError(
                f'the tokenizers {student} and {teacher} cannot be aligned: {name} does not keep '
                'every byte of a text'
            )


def translate(ids, student, teacher, max_length):
    """
    ids: (B, T) integers of the tokenizer `student`. Returns, of the tokenizer `teacher`, (ids
    (B, T'), the place of each of the student's positions' partner (B, T), whether it has one
    (B, T)). T' is at most max_length; what comes later has no partner.
    """
    rows = [translate_row(row, student, teacher) for row in np.asarray(ids)]
    longest = min(max_length, max(len(theirs) for theirs, _, _ in rows))
    padded = np.zeros((len(rows), longest), np.int64)
    for row, (theirs, _, _) in zip(padded, rows):
        row[: min(len(theirs), longest)] = theirs[:longest]
    place = np.stack([place for _, place, _ in rows])
    partnered = np.stack([found for _, _, found in rows]) & (place < longest)
    return padded, np.where(partnered, place, 0), partnered


def translate_row(ids, student, teacher):
    """(the teacher's ids, place of each position's partner, whether it has one) of one row."""
    table, end = token_bytes(student), load_tokenizer(student).end
    their_end = load_tokenizer(teacher).end
    theirs, start = [], 0  # the teacher's ids, and the bytes before the current document
    places, ends = [], []  # tokens that may be partners, and where they end
    for document in np.split(ids, np.flatnonzero(ids == end) + 1):
        text = b''.join(table[i] for i in document)
        found, spans = encode_spans(text, teacher)
        if spans.sum() == len(text):  # else the tokenizer has changed the text: no partners
            partners = np.flatnonzero(spans)
            places += list(len(theirs) + partners)
            ends += list(start + np.cumsum(spans)[partners])
        theirs += found
        start += len(text)
        if len(document) and document[-1] == end:  # end-of-text counts one byte
            start += 1
            places.append(len(theirs))
            ends.append(start)
            theirs.append(their_end)
    if not places:
        return theirs or [their_end], np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    lengths = np.array([1 if i == end else len(table[i]) for i in ids])
    after = np.cumsum(lengths)
    last = np.searchsorted(np.array(ends), after, side='right') - 1
    inside = np.array(ends)[np.maximum(last, 0)] > after - lengths
    return theirs, np.array(places)[np.maximum(last, 0)], (last >= 0) & inside


def encode_spans(text, teacher):
    """(the teacher's ids of some bytes, the number of bytes that each covers)."""
    table = token_bytes(teacher)
    encoded = load_tokenizer(teacher).encode(text.decode('utf-8', 'keep_length'))
    ids = [int(i) for i in encoded]
    spans = np.array([len(table[i]) for i in ids], np.int64)
    if ids and spans.sum() == len(text) + 1 and table[ids[0]][:1] == b' ':
        spans[0] -= 1  # SentencePiece writes a space before a text
    return ids, spans
