"""A model's tokenizer travels with it, opens in transformers, and is compared by its content."""

import json
import shutil

import pytest
import tiktoken
import torch
from conftest import TEXT, succeeds, train_tokenizer

from data.vocabulary import load_tokenizer, same_tokenizer, tokenizer_in
from engine.tokenizer_files import fingerprint, tokenizer_json
from model import GPT, GPTConfig, load

transformers = pytest.importorskip('transformers')

GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
ODD = TEXT + " we'll it's 12345   \n\n\t x\n ¿qué? \u200b\u00a0 🙂‍↔️ \x00 end "


def forget():
    for function in (load_tokenizer, tokenizer_json, fingerprint):
        function.cache_clear()


@pytest.fixture
def make_encoding(monkeypatch):
    """A function: an encoding of tiktoken's, of a pattern and words, that needs no download."""

    def make(name, pattern, *words):
        ranks = {bytes([(i * 7) % 256]): i for i in range(256)}  # not in the order of the bytes
        for word in words:
            ranks.setdefault(word, len(ranks))
        special = {'<|endoftext|>': len(ranks)}
        made = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: made)
        forget()
        return made

    yield make
    forget()


def test_bytes_open_in_transformers(tmp_path):
    GPT(GPTConfig.named('16x1', vocab_size=257)).save(tmp_path, 'bytes')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(ODD).input_ids
    assert ids == list(ODD.encode()) and theirs.decode(ids) == ODD
    assert theirs('<|endoftext|>').input_ids == [256] and theirs.eos_token_id == 256
    assert json.loads((tmp_path / 'config.json').read_text())['eos_token_id'] == 256
    assert tokenizer_in(tmp_path) == 'bytes'


def test_an_encoding_of_tiktoken_opens_in_transformers(tmp_path, make_encoding):
    words = [b' t', b'he', b' the', b'in', b' c', b' ca', b' cat', b'\n\n', '数'.encode()[:2]]
    words += ['数'.encode(), b'12', b'ca', b'll', b"'ll"]
    encoding = make_encoding('r50k_base', GPT2_PATTERN, *words)
    GPT(GPTConfig.named('16x1', vocab_size=encoding.n_vocab)).save(tmp_path, 'r50k_base')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(ODD).input_ids
    assert ids == encoding.encode_ordinary(ODD) and len(ids) < len(ODD.encode())
    assert theirs.decode(ids) == ODD and theirs.eos_token_id == encoding.eot_token
    assert same_tokenizer('r50k_base', str(tmp_path))


def test_numbers_in_groups_of_three_are_cut_as_tiktoken_cuts_them(make_encoding):
    """cl100k_base's possessive {1,3}+ means another thing to the package tokenizers."""
    tokenizers = pytest.importorskip('tokenizers')
    pattern = r'\p{N}{1,3}+|[^\p{N}]'
    made = make_encoding('cl100k_base', pattern, b'12', b'123', b'45', b'34', b'1234')
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json('cl100k_base')))
    for text in ('1234567', '12 345', '45123412'):
        assert theirs.encode(text).ids == made.encode_ordinary(text), text


def test_a_folders_tokenizer_goes_with_the_model_and_no_path_is_stored(tmp_path):
    source = train_tokenizer(tmp_path / 'source')
    (tmp_path / 'source' / 'chat_template.jinja').write_text('{{ messages }}')
    settings = dict(eos_token=dict(content='<|endoftext|>'))
    (tmp_path / 'source' / 'tokenizer_config.json').write_text(json.dumps(settings))
    size = load_tokenizer(source).vocab_size
    GPT(GPTConfig.named('16x1', vocab_size=size)).save(tmp_path / 'model', source)
    shutil.rmtree(source)
    config = (tmp_path / 'model' / 'config.json').read_text()
    assert json.loads(config)['eos_token_id'] == 0 and str(tmp_path) not in config
    assert (tmp_path / 'model' / 'chat_template.jinja').read_text() == '{{ messages }}'
    assert tokenizer_in(tmp_path / 'model') == str(tmp_path / 'model')


def test_two_vocabularies_of_one_size_are_not_the_same(tmp_path):
    one, other = (train_tokenizer(tmp_path / name) for name in 'ab')
    assert same_tokenizer(one, other) and not same_tokenizer('bytes', one)
    path = tmp_path / 'b' / 'tokenizer.json'
    content = json.loads(path.read_text())
    content['model']['merges'].reverse()
    path.write_text(json.dumps(content))
    forget()
    assert not same_tokenizer(one, other)


def test_trained_and_grown_models_are_whole_for_transformers(tmp_path, data_dir):
    """Trained by train.py, grown by expand.py, interpolated by col.py: each opens elsewhere."""
    line = f'train.py --size=16x2 --tokens=512 --block_size=32 --data_dir={data_dir}'
    succeeds(f'{line} --out_dir={tmp_path}/run --save_dtype=bfloat16')
    succeeds(f'expand.py {tmp_path}/run/16x2 {tmp_path}/run/16x4 --to=16x4')
    succeeds(f'col.py {tmp_path}/run {tmp_path}/made --to=16x3')
    for folder in (tmp_path / 'run' / '16x2', tmp_path / 'run' / '16x4', tmp_path / 'made'):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert theirs.dtype == torch.bfloat16
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer('Return the', return_tensors='pt').input_ids
        difference = theirs.float()(ids).logits - load(folder).float()(ids).logits
        assert difference.abs().max() < 1e-4
