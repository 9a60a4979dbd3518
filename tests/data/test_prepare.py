"""Prepared corpora are whole, or not there; rows that cannot be used are left out and named."""

import json

import numpy as np
import pytest
from conftest import DOCUMENTS, ROOT, refuses, succeeds, write_texts

import data.offline as offline
from data import prepare
from data.corpus import open_corpus
from data.prepare import Preparation
from engine.files import checksum


def documents(folder):
    """The documents of both splits of a corpus of bytes."""
    corpus = open_corpus(folder.name, folder.parent)
    texts = [
        [bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(tokens, ends + 1)]
        for tokens in map(np.asarray, (corpus.train, corpus.val))
        for ends in [np.flatnonzero(tokens == 256)[:-1]]
    ]
    return texts[0], texts[1]


@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'parquet'])
def test_local_files_become_tokens(tmp_path, kind):
    texts = write_texts(tmp_path / 'texts', kind)
    column = 'body' if kind == 'parquet' else 'text'
    prepare.prepare(Preparation(texts, str(tmp_path / 'c'), 'bytes', text_column=column))
    train, val = documents(tmp_path / 'c')
    assert sorted(train + val) == sorted(DOCUMENTS) and 3 < len(val) < 40
    corpus = open_corpus('c', tmp_path)
    assert corpus.meta['checksums']['val.bin'] == checksum(tmp_path / 'c' / 'val.bin')
    assert corpus.bytes_per_token == pytest.approx(1, abs=0.05)
    assert not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize('words', ['texts/book.txt', 'texts', 'texts/book.txt texts/more/b.txt'])
def test_files_of_ones_own_become_a_corpus(tmp_path, words, monkeypatch):
    """Everybody's first corpus: one text file. Its end is for validation, from a line's start."""
    text = ''.join(f'This is line {i} of the book.\n' for i in range(200))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'texts' / 'more').mkdir(parents=True)
    (tmp_path / 'texts' / 'book.txt').write_text(text)
    (tmp_path / 'texts' / 'more' / 'b.txt').write_text(text.replace('book', 'play'))
    (tmp_path / 'texts' / 'picture.png').write_bytes(b'\x89PNG')
    succeeds(f'data/prepare.py {words} --out=own')
    assert open_corpus('own', '.').meta['tokenizer'] == 'bytes'  # what works offline
    train, val = (''.join(part) for part in documents(tmp_path / 'own'))
    if words == 'texts/book.txt':
        assert train + val == text and val.startswith('This is line')
        assert 0.04 < len(val) / len(text) < 0.06
    else:
        assert '199 of the book' in val and '199 of the play' in val
        assert '0 of the book' in train and '0 of the play' in train


def test_what_cannot_be_prepared_is_refused(tmp_path):
    (tmp_path / 'a.csv').write_text('text\nhello\n')
    (tmp_path / 'b.parquet').write_bytes(b'damage')
    for words, error in (
        ('pydoc', 'did you mean pydocs'),
        ('nothing/*.txt', 'no corpus, and no file,'),
        ('pydocs --tokenizer=gpt-2', 'did you mean gpt2'),
        (f'{ROOT}/*.py', 'all files must be'),
        (f'{tmp_path}/a.csv', 'read_csv'),
        (f'{tmp_path}/b.parquet', 'cannot be read'),
        ('fineweb_edu --tokenizer=bytes', 'pydocs'),  # the way out where there is no network
    ):
        refuses(f'data/prepare.py {words} --out={tmp_path}/c', error)


# ----------------------------------------------------------------------------------------------
# rows

GOOD = [json.dumps(dict(text=f'document {i} ' * 9)).encode() for i in range(100)]
BAD = {
    'surrogate': b'{"text": "bad \\ud800 here"}',
    'cut': b'{"text": "cut',
    'null': b'{"text": null}',
    'Latin-1': '{"text": "naïve"}'.encode('latin-1'),
}


@pytest.mark.parametrize('kind', BAD)
def test_a_bad_row_is_left_out_counted_and_named(tmp_path, kind):
    path = tmp_path / 'mine.jsonl'
    path.write_bytes(b'\n'.join([b'\xef\xbb\xbf' + GOOD[0], BAD[kind], b'', BAD[kind], *GOOD[1:]]))
    line = f'data/prepare.py {path} --tokenizer=bytes --out={tmp_path}'
    words = f'2 rows cannot be used and are left out; the first: {path}, line 2: '
    assert words in succeeds(f'{line}/c')
    train, val = documents(tmp_path / 'c')
    assert sorted(train + val) == sorted(json.loads(row)['text'] for row in GOOD)
    refuses(f'{line}/d --bad_rows=stop', 'mine.jsonl, line 2: ')


def test_empty_answers_and_inputs_of_null(tmp_path):
    rows = [dict(instruction=f'Do {i}', input=None, output=f'done {i}') for i in range(40)]
    rows += [dict(instruction='Say nothing', input='', output=' '), dict(instruction='a', output=3)]
    path = tmp_path / 'alpaca.json'
    path.write_text(json.dumps(rows), encoding='utf-8-sig')
    out = succeeds(f'data/prepare.py {path} --out={tmp_path}/c --tokenizer=bytes')
    assert f'2 rows cannot be used and are left out; the first: {path}, record 41: ' in out


# ----------------------------------------------------------------------------------------------
# the offline corpora

MODULE = '''# Copyright 2020 Somebody. All rights reserved.
"""What this module is for, said in more than forty characters."""
import os


class Thing:
    """A thing,

        indented as people indent, and long enough to be kept.

    And on.
    """
    def method(self):
        """short"""
        return os.getcwd()  # a comment that stays because it is part of the code
        # and another one, so that what remains of this file has more than
        # the two hundred characters that are asked for



def licensed():
    """Licensed under some licence, with all the words that people put there."""
'''


def test_documentation_and_code_of_a_file(tmp_path):
    file = tmp_path / 'module.py'
    file.write_text(MODULE)
    assert offline.read_source('pydocs', file) == [
        'What this module is for, said in more than forty characters.',
        'A thing,\n\n    indented as people indent, and long enough to be kept.\n\nAnd on.',
    ]
    (code,) = offline.read_source('pycode', file)
    assert code.startswith('import os') and 'def licensed' in code
    assert 'Copyright' not in code and 'indented as people' not in code
    file.write_text('print "python 2"')
    assert offline.read_source('pydocs', file) == []


def test_near_duplicates_go_and_the_first_copy_stays():
    text = ' '.join(f'word{chr(97 + i % 26)}{chr(97 + i // 26)}' for i in range(60))
    changed, other = text.replace('wordba', 'wordzz'), ' '.join(reversed(text.split()))
    seen, texts = set(), [text, text, changed, text.upper() + ' 12', other]
    assert [offline.is_new(one, seen) for one in texts] == [True, False, False, False, True]


def test_offline_corpus_is_deterministic_and_split_by_file(tmp_path, monkeypatch):
    files = [f for f in offline.source_files() if f[0].startswith('python/a')]
    monkeypatch.setattr(offline, 'source_files', lambda: files)
    for name in 'ab':
        prepare.prepare(Preparation('pydocs', str(tmp_path / name)))
    assert documents(tmp_path / 'a') == documents(tmp_path / 'b')
    train, val = documents(tmp_path / 'a')
    assert len(train) > 100 and val and not set(train) & set(val)
