"""
One text in two tokenizers: partners have read the same bytes, whatever the alphabet, and wherever
a sequence is cut.
"""

import numpy as np
import pytest
from conftest import TEXT, train_tokenizer

from data.vocabulary import encode_spans, load_tokenizer, same_tokenizer, token_bytes, translate
from let import PROBE

tokenizers = pytest.importorskip('tokenizers')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return {
        kind: train_tokenizer(kind, tmp_path_factory.mktemp('tokenizers') / kind)
        for kind in ('byte-level', 'lowercase')
    } | {'bytes': 'bytes'}


def encode(name, text):
    return np.array([int(i) for i in load_tokenizer(name).encode(text)])


@pytest.mark.parametrize(
    'student, teacher',
    [
        ('bytes', 'byte-level'),
        ('byte-level', 'bytes'),
        ('byte-level', 'byte-level'),
        ('bytes', 'bytes'),
    ],
)
def test_partners_have_read_the_same_text_and_nothing_more(folders, student, teacher):
    student, teacher = folders[student], folders[teacher]
    ours = encode(student, TEXT)[:240]
    for cut in range(6):  # wherever the sequence begins, within a letter too
        row = ours[cut : cut + 200]
        theirs, place = translate(row, student, teacher)
        partnered = place >= 0
        text = b''.join(token_bytes(student)[i] for i in row)
        assert partnered.any()
        a = b = 0
        for position, i in enumerate(row):
            a, b = b, b + len(token_bytes(student)[i])
            read = sum(len(token_bytes(teacher)[j]) for j in theirs[: place[position] + 1])
            assert a < read <= b if partnered[position] else True
        assert len(text) == b


def test_every_position_has_itself_as_partner_in_the_same_tokenizer(folders):
    row = encode(folders['byte-level'], 'The cat sat on the mat; 12 + 34 = 46. ' * 5)[:50]
    theirs, place = translate(row, folders['byte-level'], folders['byte-level'])
    assert (place == np.arange(50)).all() and theirs[:50] == row.tolist()


def test_bytes_of_a_letter_wait_for_its_last(folders):
    row = np.frombuffer('a数b'.encode(), np.uint8).astype(np.int64)
    theirs, place = translate(row, 'bytes', folders['byte-level'])
    spans = [len(token_bytes(folders['byte-level'])[i]) for i in theirs]
    assert (place >= 0).nonzero()[0].tolist() == (np.cumsum(spans) - 1).tolist()


def test_documents_meet_at_their_end(folders):
    end, their_end = 256, load_tokenizer(folders['byte-level']).end
    row = np.concatenate([encode('bytes', 'The cat'), [end], encode('bytes', 'sat')])
    theirs, place = translate(row, 'bytes', folders['byte-level'])
    assert theirs[place[7]] == their_end and place[10] == len(theirs) - 1


def test_a_text_that_the_tokenizer_changes_has_no_partners(folders):
    # lower case has as many bytes, so only the check before training can tell
    assert (translate(encode('bytes', 'a cat sat'), 'bytes', folders['lowercase'])[1] >= 0).any()
    kept = {kind: encode_spans(PROBE, name)[1].sum() for kind, name in folders.items()}
    assert kept == {'byte-level': len(PROBE), 'lowercase': 0, 'bytes': len(PROBE)}


def test_sentencepiece_spaces_and_byte_fallback(tmp_path):
    pieces = [
        '<unk>',
        '</s>',
        *(f'<0x{i:02X}>' for i in range(256)),
        '▁',
        *'abcdefghijklmnopqrstuvwxyzA',
        'at',
        'th',
        '▁c',
        '▁cat',
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[('a', 't'), ('t', 'h'), ('▁', 'c'), ('▁c', 'at')],
            unk_token='<unk>',
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(['<unk>', '</s>'])
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace('▁', ' '),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    ids, spans = encode_spans(PROBE, str(tmp_path))
    assert b''.join(token_bytes(str(tmp_path))[i] for i in ids) == b' ' + PROBE
    assert spans.sum() == len(PROBE)
    theirs, place = translate(encode('bytes', 'the cat'), 'bytes', str(tmp_path))
    assert [pieces[i] for i in theirs] == ['▁', 'th', 'e', '▁cat']
    assert place.tolist() == [-1, 1, 2, -1, -1, -1, 3]


def test_the_same_tokenizer_under_two_names(folders, tmp_path):
    (tmp_path / 'copy').mkdir()
    (tmp_path / 'copy' / 'tokenizer.json').write_bytes(
        open(f'{folders["byte-level"]}/tokenizer.json', 'rb').read()
    )
    assert same_tokenizer(folders['byte-level'], str(tmp_path / 'copy')) and not same_tokenizer(
        'bytes', folders['byte-level']
    )


def test_a_document_that_the_tokenizer_changes_lends_no_future_to_the_one_before(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        tokenizers.normalizers.NFC(),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ['abc xyz'],
        tokenizers.trainers.BpeTrainer(
            special_tokens=['<|endoftext|>'],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_tokens(['  '])  # a run of spaces, as GPT-NeoX has them: not special
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    row = np.concatenate(
        [
            encode('bytes', 'abc'),
            [256],
            encode('bytes', 'e\u0301tude'),
            [256],
            encode('bytes', 'xyz'),
        ]
    )
    theirs, place = translate(row, 'bytes', str(tmp_path))
    end = load_tokenizer(str(tmp_path)).end
    assert theirs[place[3]] == end and place[3] == theirs.index(end)
    assert (place[4:11] < 0).all() and place[11] >= 0 and place[-1] >= 0
    assert token_bytes(str(tmp_path))[-1] == b'  '
