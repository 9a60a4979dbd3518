"""
The same text in another tokenizer's tokens, for a teacher whose vocabulary is not its student's (LET with mismatched
tokenizers, paper 002, Table 5).

Both tokenizers cut the same bytes. A token of the student covers the bytes [a, b), one of the teacher's ends at some d. A
position of the student is paired with the last token of the teacher that ends inside it, a < d <= b: there the teacher has
read nothing that the student has not. Positions in which no token of the teacher ends have no partner.
"""
import codecs
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError
from data.prepare import bytes_encoding, load_tokenizer

PROBE = 'A naïve café — 数学 and 🙂:\n\tdef f(x): return x  # 1234'
codecs.register_error('keep_length', lambda error: ('?' * (error.end - error.start), error.end))   # text cut inside a letter


@cache
def token_bytes(name):
    """The bytes that each token of a tokenizer stands for, a tuple by id; empty for special tokens and unused ids."""
    encoding = bytes_encoding() if name == 'bytes' else None
    if name in tiktoken.list_encoding_names():
        load_tokenizer(name)   # within its deadline, with its message
        encoding = tiktoken.get_encoding(name)
    if encoding:
        ranks = encoding._mergeable_ranks
        table = [b''] * encoding.n_vocab
        for token, i in ranks.items():
            table[i] = token
        return tuple(table)
    vocab_size = load_tokenizer(name)[2]
    description = json.loads((Path(name) / 'tokenizer.json').read_text(encoding='utf-8'))
    vocabulary = description['model']['vocab']
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((token, i) for i, (token, _) in enumerate(vocabulary))
    added = description.get('added_tokens', [])
    special = {token['id'] for token in added if token['special']}
    spell = _byte_level if 'ByteLevel' in json.dumps(description.get('decoder')) else _sentence_piece
    table = [b''] * vocab_size
    for token, i in pairs:
        table[i] = b'' if i in special else spell(token)
    for token in added:   # runs of spaces and the like, written as they are
        if not token['special']:
            table[token['id']] = token['content'].encode()
    return tuple(table)


@cache
def _byte_alphabet():
    """{character: byte} of byte-level BPE: printable bytes stand for themselves, the others follow from 256 on."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token):
    return bytes(_byte_alphabet()[character] for character in token)


def _sentence_piece(token):
    if match := re.fullmatch(r'<0x([0-9A-Fa-f]{2})>', token):
        return bytes([int(match[1], 16)])
    return token.replace('▁', ' ').encode()


def check_alignable(student, teacher):
    """Raise UserError unless both tokenizers give every byte of a text back, which aligning them needs."""
    for name in (student, teacher):
        ids = [int(i) for i in load_tokenizer(name)[0](PROBE)]
        text = b''.join(token_bytes(name)[i] for i in ids)
        if text.removeprefix(b' ') != PROBE.encode():
            raise UserError(f'the tokenizers {student} and {teacher} cannot be aligned: {name} does not keep every byte of a text')


def same_tokenizer(one, other):
    """Whether two names stand for the same tokens."""
    return one == other or token_bytes(one) == token_bytes(other)


def translate(ids, student, teacher, max_length):
    """
    ids: (B, T) integers of the tokenizer `student`. Returns, of the tokenizer `teacher`, (ids (B, T'), for each of the
    student's positions the place of its partner (B, T), whether it has one (B, T)). T' is at most max_length; what comes
    later has no partner.
    """
    table, end = token_bytes(student), load_tokenizer(student)[3]
    rows = [_translate_row(row, table, end, teacher) for row in np.asarray(ids)]
    longest = min(max_length, max(len(theirs) for theirs, _, _ in rows))
    padded = np.zeros((len(rows), longest), np.int64)
    for row, (theirs, _, _) in zip(padded, rows):
        row[:min(len(theirs), longest)] = theirs[:longest]
    place, partnered = np.stack([place for _, place, _ in rows]), np.stack([found for _, _, found in rows])
    partnered &= place < longest
    return padded, np.where(partnered, place, 0), partnered


def _translate_row(ids, table, end, teacher):
    """One sequence: (the teacher's ids, place of each position's partner, whether it has one). End-of-text counts one byte."""
    encode, _, _, their_end = load_tokenizer(teacher)
    their_bytes, theirs, start = token_bytes(teacher), [], 0
    where, ends = [], []   # tokens that may be partners, and where they end
    lengths = np.array([len(table[i]) if i != end else 1 for i in ids])
    for document in np.split(ids, np.flatnonzero(ids == end) + 1):
        text = b''.join(table[i] for i in document)
        found = [int(i) for i in encode(text.decode('utf-8', 'keep_length'))]
        spans = np.array([len(their_bytes[i]) for i in found], np.int64)
        if spans.sum() == len(text) + 1 and found and their_bytes[found[0]][:1] == b' ':
            spans[0] -= 1   # SentencePiece writes a space before a text
        if spans.sum() == len(text):   # else the tokenizer has changed the text: no partners here
            partners = np.flatnonzero(spans)
            where += list(len(theirs) + partners)
            ends += list(start + np.cumsum(spans)[partners])
        theirs += found
        start += len(text)
        if len(document) and document[-1] == end:
            start += 1
            where.append(len(theirs))
            ends.append(start)
            theirs.append(their_end)
    after = np.cumsum(lengths)
    if not where:
        return theirs or [their_end], np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    last = np.searchsorted(np.array(ends), after, side='right') - 1
    found = (last >= 0) & (np.array(ends)[np.maximum(last, 0)] > after - lengths)
    return theirs, np.array(where)[np.maximum(last, 0)], found
