"""
Data: the order of sequences is a function of seed and position; prepared corpora are whole, or
not there.
"""

import json
import platform
import threading
from functools import partial

import numpy as np
import pytest
from conftest import DOCUMENTS, ROOT, run_command, write_corpus, write_texts

import data.offline as offline
import data.prepare as prepare
from data.corpus import open_corpus
from data.loader import (
    Order,
    Share,
    batches,
    offsets,
    parse_mixture,
    permute,
    sequences,
    split_by_weight,
    validation_batches,
)
from data.vocabulary import load_tokenizer
from engine.errors import UserError
from engine.files import checksum
from engine.hub import within
from engine.tokenizer_files import bytes_encoding

# ----------------------------------------------------------------------------------------------
# order


@pytest.mark.parametrize('n', [1, 2, 3, 7, 100, 1000, 4097])
def test_permute_is_a_permutation_and_depends_on_the_seed(n):
    assert sorted(permute(np.arange(n), n, 1)) == list(range(n))
    assert n < 100 or not np.array_equal(permute(np.arange(n), n, 1), permute(np.arange(n), n, 2))


def test_an_epoch_sees_every_window_once_and_the_next_one_in_another_order():
    first, second = (offsets(np.arange(e * 12, e * 12 + 12), 100, Order(8, seed=5)) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(0, 96, 8)) and not np.array_equal(
        first, second
    )


def test_a_cap_on_unique_tokens_changes_nothing_until_it_is_reached():
    positions = np.arange(40)
    free, capped = (offsets(positions, 1000, Order(8, 'epoch', 5, cap)) for cap in (0, 20 * 8))
    assert np.array_equal(free[:20], capped[:20])
    assert sorted(capped[20:]) == sorted(capped[:20]) and len(set(free)) == 40
    assert not np.array_equal(capped[20:], capped[:20])


def test_fixed_data_reuses_what_earlier_stages_saw_and_nothing_of_its_own():
    stages = np.array([40, 60, 120, 240])  # as in the 8B family, with 320 different windows
    order = Order(1, 'repeat', seed=3, unique_tokens=320)
    ends = stages.cumsum()
    seen = [offsets(np.arange(end - n, end), 500, order) for n, end in zip(stages, ends)]
    earlier, last = np.concatenate(seen[:3]), seen[3]
    assert len(set(last)) == 240 and len(set(earlier) | set(last)) == 320
    assert np.array_equal(last[100:], earlier[:140]) and not set(last[:100]) & set(earlier)


def test_random_order_draws_any_offset_with_replacement():
    starts = offsets(np.arange(20000), 500, Order(8, 'random', seed=1))
    assert starts.min() == 0 and starts.max() == 491 and len(set(starts)) == 492
    capped = offsets(np.arange(2000), 500, Order(8, 'random', seed=1, unique_tokens=40))
    assert len(set(capped)) == 5


def test_a_mixture_keeps_its_weights_and_counts_each_corpus_by_itself():
    which, count = split_by_weight(np.arange(1000), [0.6, 0.3, 0.1])
    assert list(np.bincount(which)) == [600, 300, 100]
    for corpus in range(3):
        assert np.array_equal(count[which == corpus], np.arange((which == corpus).sum()))
    assert np.array_equal(split_by_weight(np.array([500, 501]), [0.6, 0.3, 0.1])[0], which[500:502])


@pytest.mark.parametrize('text', ['a:', 'a:x', 'a:-1', 'a:0', ':1', 'a,,b', 'a:inf', 'a:nan'])
def test_mixtures_that_mean_nothing_are_refused(text):
    if text == 'a:':
        assert parse_mixture(text) == {'a': 1.0}
    else:
        with pytest.raises(UserError, match='WEIGHT'):
            parse_mixture(text)


@pytest.fixture
def numbers(tmp_path):
    """Two corpora whose tokens are their own positions: 0 .. 999 and 10000 .. 10999."""
    for name, start in (('low', 0), ('high', 10000)):
        write_corpus(
            tmp_path / name,
            np.arange(start, start + 1000),
            np.arange(start, start + 100),
            vocab_size=11000,
        )
    return [open_corpus(name, tmp_path) for name in ('low', 'high')]


def test_a_sequence_is_a_window_and_the_token_after_it(numbers):
    tokens = sequences(numbers, [0.75, 0.25], Order(10), np.arange(16))
    assert (
        tokens.shape == (16, 11)
        and (np.diff(tokens) == 1).all()
        and (tokens[:, 0] >= 10000).sum() == 4
    )


def collect(numbers, position, micro, count, share=Share()):  # noqa: B008
    """The first tokens of the sequences in some micro-batches, of batches of 8."""
    read = partial(sequences, numbers, [0.5, 0.5], Order(10))
    steps = count * micro * share.world_size // 8
    pieces = list(batches(read, position, 8, micro, share, steps))
    assert all((x[:, 1:] == y[:, :-1]).all() for x, y in pieces)
    return [row for x, _ in pieces for row in x[:, 0].tolist()]


def test_the_same_sequences_at_any_number_of_processes_micro_batches_and_after_a_resume(numbers):
    whole = collect(numbers, 0, 8, 3)
    assert collect(numbers, 0, 2, 12) == whole
    assert collect(numbers, 16, 8, 1) == whole[16:]
    by_rank = [collect(numbers, 0, 2, 6, Share('cpu', rank, 2)) for rank in (0, 1)]
    assert [by_rank[i % 2][i // 2] for i in range(24)] == whole


def test_validation_windows_are_fixed_and_padded_with_nothing_to_predict(numbers):
    found = list(validation_batches(numbers[0].val, 10, 4, 0))
    assert [count for *_, count in found] == [40, 40, 10] and [x.shape for x, *_ in found] == [
        (4, 10)
    ] * 3
    assert (found[-1][1][1:] == -100).all() and (found[-1][1][0] >= 0).all()
    assert sum(count for *_, count in validation_batches(numbers[0].val, 10, 4, 50)) == 50
    shares = [Share('cpu', rank, 2) for rank in (0, 1)]
    split = [list(validation_batches(numbers[0].val, 10, 4, 0, share)) for share in shares]
    assert sum(count for part in split for *_, count in part) == 90


def change_meta(folder, key, value):
    """Replace what a corpus says of its training split."""
    meta = json.loads((folder / 'meta.json').read_text())
    meta['splits']['train'][key] = value
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.mark.parametrize(
    'damage, word',
    [
        (lambda f: (f / 'meta.json').unlink(), 'is not prepared'),
        (lambda f: (f / 'meta.json').write_text('{"splits": 3}'), 'meta.json is damaged'),
        (lambda f: change_meta(f, 'tokens', None), 'is damaged .*TypeError'),
        (lambda f: (f / 'train.bin').write_bytes(b'12345'), 'train.bin is not of'),
        (lambda f: (f / 'val.bin').unlink(), 'val.bin is missing'),
    ],
)
def test_a_damaged_corpus_is_refused(tmp_path, damage, word):
    write_corpus(tmp_path / 'c', range(50), range(50))
    damage(tmp_path / 'c')
    with pytest.raises(UserError, match=word):
        open_corpus('c', tmp_path)


def test_a_corpus_shorter_than_a_sequence_is_refused(numbers):
    for use in (
        lambda: offsets(np.arange(2), 10, Order(10)),
        lambda: next(validation_batches(numbers[0].val, 100, 1, 0)),
    ):
        with pytest.raises(UserError, match='too few'):
            use()


# ----------------------------------------------------------------------------------------------
# preparation


def decoded(corpus):
    """The documents of both splits of a corpus of bytes."""

    def text(tokens):
        return [
            '' + bytes(d.astype(np.uint8)).decode('utf-8')
            for d in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
            for d in [d[:-1]]
        ]

    return text(np.asarray(corpus.train)), text(np.asarray(corpus.val))


@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'parquet'])
def test_local_files_become_tokens(tmp_path, kind):
    options = prepare.Preparation(
        corpus=write_texts(tmp_path / 'texts', kind),
        out=str(tmp_path / 'c'),
        tokenizer='bytes',
        text_column='body' if kind == 'parquet' else 'text',
    )
    prepare.prepare(options)
    corpus = open_corpus('c', tmp_path)
    train, val = decoded(corpus)
    assert sorted(train + val) == sorted(DOCUMENTS) and 3 < len(val) < 40
    assert corpus.meta['checksums']['val.bin'] == checksum(tmp_path / 'c' / 'val.bin')
    assert corpus.bytes_per_token == pytest.approx(1, abs=0.05) and not list(
        tmp_path.glob('*.partial')
    )


def test_interrupted_preparation_goes_on_and_gives_the_same_corpus(tmp_path, monkeypatch):
    how = dict(corpus=write_texts(tmp_path / 'texts', 'parquet'), text_column='body')

    def run(name):
        out = str(tmp_path / name)
        return prepare.prepare(prepare.Preparation(**how, out=out, tokenizer='bytes'))

    monkeypatch.setattr(prepare, 'ROWS', 16)
    monkeypatch.setattr(prepare, 'SAVE_EVERY', 2)
    run('whole')
    tokenized = []

    class Power(Exception):
        pass

    def update(bar, n=1):  # the progress bar sees every batch, so the plug is pulled there
        tokenized.append(n)
        if len(tokenized) == 11:
            raise Power

    with monkeypatch.context() as patch:
        patch.setattr(prepare.tqdm, 'update', update)
        with pytest.raises(Power):
            run('broken')
    assert not (tmp_path / 'broken').exists()
    progress = json.loads((tmp_path / 'broken.partial' / 'progress.json').read_text())
    assert 0 < progress['counts']['train']['documents'] < 150
    with pytest.raises(UserError, match='not prepared'):
        open_corpus('broken', tmp_path)
    run('broken')
    for split in ('train', 'val'):
        assert (tmp_path / 'broken' / f'{split}.bin').read_bytes() == (
            tmp_path / 'whole' / f'{split}.bin'
        ).read_bytes()


@pytest.mark.parametrize('most', [1, 3000])
def test_max_tokens_ends_a_preparation_with_a_document(tmp_path, most):
    source, out = write_texts(tmp_path / 'texts', 'jsonl'), str(tmp_path / 'c')
    how = dict(corpus=source, out=out, tokenizer='bytes', max_tokens=most)
    prepare.prepare(prepare.Preparation(**how))
    longest = max(map(len, DOCUMENTS)) + 1
    assert most <= len(open_corpus('c', tmp_path).train) < most + longest


@pytest.mark.parametrize(
    'arguments, word',
    [
        (dict(corpus='pydoc'), 'did you mean pydocs'),
        (dict(corpus='nothing/*.txt'), 'no corpus, and no file,'),
        (dict(tokenizer='gpt-2'), 'did you mean gpt2'),
        (dict(corpus=str(ROOT / '*.py')), 'all files must be'),
    ],
)
def test_what_cannot_be_prepared_is_refused(tmp_path, arguments, word):
    with pytest.raises(UserError, match=word):
        prepare.prepare(
            prepare.Preparation(**{**dict(tokenizer='bytes', out=str(tmp_path / 'c')), **arguments})
        )


def test_without_a_network_the_error_names_the_way_out():
    process = run_command('data/prepare.py', 'fineweb_edu', '--tokenizer=bytes', '--out=data/never')
    assert (
        process.returncode == 2 and 'pydocs' in process.stderr and process.stderr.count('\n') == 1
    ), process.stderr


def test_within_gives_up_on_a_call_that_hangs():
    with pytest.raises(UserError, match='the moon cannot be reached .no answer within 0.1 s.'):
        within(0.1, threading.Event().wait, 'the moon cannot be reached')
    assert within(5, lambda: 7, 'the moon') == 7


def test_bytes_tokenizer_is_the_tiktoken_encoding_it_says_it_is():
    encode, decode, vocab_size, (end,), *_ = load_tokenizer('bytes')
    text = 'naïve 漢字 🙂\n'
    assert (
        list(encode(text)) == bytes_encoding().encode_ordinary(text)
        and decode(list(encode(text))) == text
    )
    assert (vocab_size, end, bytes_encoding().eot_token) == (257, 256, 256)


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
    assert (
        code.startswith('import os')
        and 'Copyright' not in code
        and 'indented as people' not in code
        and 'def licensed' in code
    )
    file.write_text('print "python 2"')
    assert offline.read_source('pydocs', file) == []


def test_near_duplicates_go_and_the_first_copy_stays():
    text = ' '.join(f'word{chr(97 + i % 26)}{chr(97 + i // 26)}' for i in range(60))
    changed, other = text.replace('wordba', 'wordzz'), ' '.join(reversed(text.split()))
    seen = set()
    texts = [text, text, changed, text.upper() + ' 12', other]
    assert [offline.is_new(one, seen) for one in texts] == [True, False, False, False, True]


def test_offline_sources_leave_out_tests_and_vendored_copies_and_are_named_alike_everywhere():
    names = [name for name, _ in offline.source_files()]
    assert (
        names == sorted(names)
        and len(names) > 2000
        and not any(name.startswith('/') for name in names)
    )
    assert any(name.startswith('torch/') for name in names) and 'python/textwrap.py' in names
    assert not any('/tests/' in name or '/_vendor/' in name or '/test_' in name for name in names)


def test_other_versions_make_another_corpus_which_is_said(monkeypatch):
    monkeypatch.setattr(offline, 'PYTHON', '3.0.0')
    assert offline.other_versions()[-1] == f'python {platform.python_version()}'
    assert offline.versions().keys() == {*offline.PACKAGES, 'python'}


def test_offline_corpus_is_deterministic_and_split_by_file(tmp_path, monkeypatch):
    files = [
        f for f in offline.source_files() if f[0].startswith('python/') and f[0].count('/') == 1
    ]
    monkeypatch.setattr(offline, 'source_files', lambda: files)
    for name in ('one', 'two'):
        prepare.prepare(prepare.Preparation(corpus='pydocs', out=str(tmp_path / name)))
    one, two = (
        (tmp_path / name / 'train.bin').read_bytes() + (tmp_path / name / 'val.bin').read_bytes()
        for name in ('one', 'two')
    )
    assert one == two
    train, val = decoded(open_corpus('one', tmp_path))
    assert len(train) > 500 and len(val) > 10 and not set(train) & set(val)


def prepared(*arguments):
    """The corpus `own` that data/prepare.py makes of files here; its two texts."""
    prepare.main([*arguments, '--out=own'])
    corpus = open_corpus('own', '.')
    return (
        corpus,
        bytes(i for i in corpus.train if i < 256),
        bytes(i for i in corpus.val if i < 256),
    )


@pytest.mark.parametrize('what', ['book.txt', 'folder', 'two files'])
def test_files_of_ones_own_become_a_corpus(tmp_path, what, monkeypatch):
    """Everybody's first corpus: one text file. Its end is for validation, from a line's start."""
    text = ''.join(f'This is line {i} of the book.\n' for i in range(200))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'texts' / 'more').mkdir(parents=True)
    (tmp_path / 'texts' / 'book.txt').write_text(text)
    (tmp_path / 'texts' / 'more' / 'b.txt').write_text(text.replace('book', 'play'))
    (tmp_path / 'texts' / 'picture.png').write_bytes(b'\x89PNG')
    words = {'book.txt': ['texts/book.txt'], 'folder': ['texts']}
    words['two files'] = ['texts/book.txt', 'texts/more/b.txt']
    corpus, train, val = prepared(*words[what])
    assert corpus.meta['tokenizer'] == 'bytes'  # what works offline
    if what == 'book.txt':
        assert (train + val).decode() == text and val.startswith(b'This is line')
        assert 0.04 < len(val) / len(text) < 0.06
    else:
        assert b'199 of the book' in val and b'199 of the play' in val
        assert b'0 of the book' in train and b'0 of the play' in train
