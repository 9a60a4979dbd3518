"""
Tokenizers as they are out there; and one text in two of them: partners have read the same bytes,
whatever the alphabet, and wherever a sequence is cut.
"""

import json

import numpy as np
import pytest
from conftest import TEXT, refuses, succeeds, train_tokenizer, write_lines

from data.prepare import Preparation, prepare
from data.vocabulary import encode_spans, load_tokenizer, token_bytes, translate
from engine.tokenizer_files import bytes_encoding
from let import PROBE
from model import GPT, GPTConfig

tokenizers = pytest.importorskip('tokenizers')


def test_bytes_tokenizer_is_the_tiktoken_encoding_it_says_it_is():
    encode, decode, vocab_size, (end,), *_ = load_tokenizer('bytes')
    assert list(encode(TEXT)) == bytes_encoding().encode_ordinary(TEXT)
    assert decode(list(encode(TEXT))) == TEXT
    assert (vocab_size, end, bytes_encoding().eot_token) == (257, 256, 256)


def test_truncation_and_padding_of_a_file_are_not_obeyed(tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(16)
        tokenizer.enable_padding(length=1000)

    tokenizer = load_tokenizer(train_tokenizer(tmp_path / 't', change=change))
    assert tokenizer.decode(list(tokenizer.encode(TEXT))) == TEXT
    assert [len(ids) for ids in tokenizer.encode_batch([TEXT, 'a'])][1] == 1


@pytest.mark.parametrize('text', ['it ends with <|endoftext|> here', '<|im_end|>'])
def test_control_tokens_that_a_text_mentions_are_characters(tmp_path, text):
    name = train_tokenizer(tmp_path / 't', '<|im_end|>')
    for tokenizer in (load_tokenizer(name), load_tokenizer('bytes')):
        assert not {0, 256, 400} & {*tokenizer.encode(text)}
        assert tokenizer.decode([int(i) for i in tokenizer.encode(text)]) == text


def test_a_bos_is_written_once_and_at_the_beginning(tmp_path):
    def change(tokenizer):
        template = tokenizers.processors.TemplateProcessing
        ids = [('<s>', tokenizer.token_to_id('<s>'))]
        tokenizer.post_processor = template('<s> $A', special_tokens=ids)

    name = train_tokenizer(tmp_path / 't', '<s>', change=change)
    bos = tokenizers.Tokenizer.from_file(f'{name}/tokenizer.json').token_to_id('<s>')
    path = write_lines(tmp_path / 'a.jsonl', [dict(text=f'cat {i}') for i in range(40)])
    out = prepare(Preparation(path, f'{path}.out', name, val_fraction=0.2))
    ids = np.fromfile(out / 'train.bin', np.uint16)
    ends = np.flatnonzero(ids == 0)
    assert np.flatnonzero(ids == bos).tolist() == [0, *(ends[:-1] + 1)]


E_OF_S = '<｜end▁of▁sentence｜>'  # DeepSeek's


@pytest.mark.parametrize(
    'files, ends',
    [
        ({'tokenizer_config.json': dict(eos_token=E_OF_S)}, [400]),
        ({'special_tokens_map.json': dict(eos_token=dict(content='</s>'))}, [401]),
        ({'generation_config.json': dict(eos_token_id=[401, 400])}, [401, 400]),
        ({}, [0]),
    ],
)
def test_the_end_of_a_text_is_what_the_folder_names(tmp_path, files, ends):
    name = train_tokenizer(tmp_path / 't')
    content = json.loads((tmp_path / 't' / 'tokenizer.json').read_text())
    for i, token in enumerate((E_OF_S, '</s>'), 400):
        content['added_tokens'].append(content['added_tokens'][0] | dict(id=i, content=token))
    for file, settings in (files | {'tokenizer.json': content}).items():
        (tmp_path / 't' / file).write_text(json.dumps(settings))
    found = load_tokenizer(name)
    assert found.end == ends[0] and list(found.ends) == ends


def test_vocab_and_merges_alone_open_and_travel(tmp_path):
    """As OPT's folder has them."""
    name = train_tokenizer(tmp_path / 't')
    tokenizer = tokenizers.Tokenizer.from_file(f'{name}/tokenizer.json')
    GPT(GPTConfig.named('16x1', vocab_size=400)).save(tmp_path / 'm')
    tokenizer.model.save(str(tmp_path / 'm'))
    succeeds(f'expand.py {tmp_path}/m {tmp_path}/grown --to=stk2')
    assert load_tokenizer(str(tmp_path / 'grown')).encode(TEXT) == tokenizer.encode(TEXT).ids


def test_a_token_beyond_the_embedding_is_named_with_the_way_out(tmp_path):
    size = load_tokenizer(train_tokenizer(tmp_path / 'm', '[PAD]')).vocab_size
    GPT(GPTConfig.named('16x1', vocab_size=size - 1)).save(tmp_path / 'm')
    words = r'\[PAD\].*delete them from "added_tokens"'
    refuses(f'sample.py --model={tmp_path}/m', words)


# ----------------------------------------------------------------------------------------------
# two tokenizers


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    return dict(bytes='bytes', bpe=train_tokenizer(folder / 'bpe'))


def encode(name, text):
    return np.array([int(i) for i in load_tokenizer(name).encode(text)])


@pytest.mark.parametrize('student, teacher', [('bytes', 'bpe'), ('bpe', 'bytes'), ('bpe', 'bpe')])
def test_partners_have_read_the_same_text_and_nothing_more(folders, student, teacher):
    student, teacher = folders[student], folders[teacher]
    ours = encode(student, TEXT)[:240]
    for cut in range(6):  # wherever the sequence begins, within a letter too
        row = ours[cut : cut + 200]
        theirs, place = translate(row, student, teacher)
        assert (place >= 0).any()
        a = b = 0
        for i, partner in zip(row, place):
            a, b = b, b + len(token_bytes(student)[i])
            read = sum(len(token_bytes(teacher)[j]) for j in theirs[: partner + 1])
            assert partner < 0 or a < read <= b


def test_documents_meet_at_their_end(folders):
    end, their_end = 256, load_tokenizer(folders['bpe']).end
    row = np.concatenate([encode('bytes', 'The cat'), [end], encode('bytes', 'sat')])
    theirs, place = translate(row, 'bytes', folders['bpe'])
    assert theirs[place[7]] == their_end and place[10] == len(theirs) - 1


def test_sentencepiece_spaces_and_byte_fallback(tmp_path):
    pieces = ['<unk>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '▁']
    pieces += [*'abcdefghijklmnopqrstuvwxyzA', 'at', 'th', '▁c', '▁cat']
    model = tokenizers.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[('a', 't'), ('t', 'h'), ('▁', 'c'), ('▁c', 'at')],
        unk_token='<unk>',
        byte_fallback=True,
    )
    tokenizer, normal = tokenizers.Tokenizer(model), tokenizers.normalizers
    decoders = tokenizers.decoders
    tokenizer.add_special_tokens(['<unk>', '</s>'])
    tokenizer.normalizer = normal.Sequence([normal.Prepend('▁'), normal.Replace(' ', '▁')])
    parts = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    ids, spans = encode_spans(PROBE, str(tmp_path))
    assert b''.join(token_bytes(str(tmp_path))[i] for i in ids) == b' ' + PROBE
    assert spans.sum() == len(PROBE)
    theirs, place = translate(encode('bytes', 'the cat'), 'bytes', str(tmp_path))
    assert [pieces[i] for i in theirs] == ['▁', 'th', 'e', '▁cat']
    assert place.tolist() == [-1, 1, 2, -1, -1, -1, 3]
