"""
The tokenizer of a model folder: half of what a model is to everybody else. It travels with the
weights, is written for models trained on bytes or tiktoken's encodings, so that transformers'
AutoTokenizer opens them, and is compared by content: two vocabularies of one size are not the same.
"""

import re
import shutil
from functools import cache
from pathlib import Path

import tiktoken

from engine.errors import UserError
from engine.files import digest, read_json, write_json
from engine.hub import within

FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.json',
    'merges.txt',
    'tokenizer.model',
    'chat_template.jinja',
    'generation_config.json',
)
IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>')  # end of a text, by any name


def bytes_encoding():
    """The 256 bytes and <|endoftext|> = 256 as a tiktoken Encoding."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {'<|endoftext|>': 256}
    return tiktoken.Encoding(
        'bytes', pat_str=r'[\s\S]{1,16}', mergeable_ranks=ranks, special_tokens=special
    )


def find_encoding(name):
    """
    The tiktoken Encoding of this name; `bytes` is our own. Others are downloaded at their first
    use: UserError where they cannot be.
    """
    if name == 'bytes':
        return bytes_encoding()
    what = f'the vocabulary of {name}, downloaded at its first use, cannot be reached'
    return within(30, lambda: tiktoken.get_encoding(name), what)


def is_encoding(name):
    """Whether a tokenizer's name is an encoding's, and not a folder."""
    return name == 'bytes' or name in tiktoken.list_encoding_names()


# ----------------------------------------------------------------------------------------------
# an encoding as the file that the package tokenizers reads


def byte_letters():
    """The printable character that stands for each byte in tokenizer.json, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def halves(token, ranks):
    """The two tokens that are merged to this one: all its merges but the last, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


@cache
def as_tokenizer_json(name):
    """The content of tokenizer.json that gives the ids of the encoding `name`."""
    encoding, letters = find_encoding(name), byte_letters()
    ranks = encoding._mergeable_ranks

    def spell(token):
        return ''.join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.get)
    merges = [[spell(half) for half in halves(t, ranks)] for t in ordered if len(t) > 1]
    vocab = {spell(token): ranks[token] for token in ordered}
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokens = [dict(id=i, content=text) | added for text, i in encoding._special_tokens.items()]
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type='Split', behavior='Isolated', invert=False)
    # {1,3}+ is possessive for tiktoken and a repeated group for tokenizers; greedy, it is the same
    split['pattern'] = dict(Regex=re.sub(r'(\{\d+,\d+\})\+', r'\1', encoding._pat_str))
    return dict(
        version='1.0',
        truncation=None,
        padding=None,
        added_tokens=tokens,
        normalizer=None,
        pre_tokenizer=dict(type='Sequence', pretokenizers=[split, level]),
        post_processor=None,
        decoder=level,
        model=dict(type='BPE', vocab=vocab, merges=merges),
    )


# ----------------------------------------------------------------------------------------------
# folders


def write_tokenizer(name, folder):
    """
    Put a tokenizer into a model folder: that of an encoding, or the files of another folder.
    Returns what config.json says of it: {'eos_token_id': ..., ...}, and an encoding's name.
    """
    folder = Path(folder)
    if is_encoding(name):
        try:
            write_json(folder / 'tokenizer.json', as_tokenizer_json(name))
        except UserError as error:  # the model is worth more: the name alone is kept
            print(f'{folder} has no tokenizer.json: {error}')
            return dict(nanofamily_tokenizer=name)
        end = '<|endoftext|>'
        settings = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token=end, bos_token=end)
        write_json(folder / 'tokenizer_config.json', settings)
        return special_ids(folder) | dict(nanofamily_tokenizer=name)
    if not tokenizer_files(name):
        raise UserError(f'{name} is no tokenizer: neither an encoding nor a folder that holds one')
    if Path(name).resolve() != folder.resolve():
        for file in tokenizer_files(name):
            shutil.copyfile(file, folder / file.name)
    if (folder / 'tokenizer.json').is_file() or not (Path(name) / 'config.json').is_file():
        return special_ids(folder)
    found = read_json(Path(name) / 'config.json')  # an older tokenizer, of other files
    return {key: found[key] for key in IDS if isinstance(found.get(key), int)}


def tokenizer_files(folder):
    """The files in a folder that belong to its tokenizer, and say how it generates."""
    return [Path(folder) / name for name in FILES if (Path(folder) / name).is_file()]


def read_tokenizer(folder):
    """({token: id} with those added later, [merges as 'a b']) of a tokenizer.json. UserError."""
    path = Path(folder) / 'tokenizer.json'
    content = read_json(path)
    try:
        return vocabulary_and_merges(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error})') from None


def vocabulary_and_merges(content):
    """What `read_tokenizer` returns, of the content of a tokenizer.json."""
    vocab, merges = content['model']['vocab'], content['model'].get('merges', [])
    if not isinstance(vocab, dict):  # a unigram model lists [token, score]
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    vocab = vocab | {token['content']: token['id'] for token in content['added_tokens']}
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError('ids that are no whole numbers')
    return vocab, [m if isinstance(m, str) else ' '.join(m) for m in merges]


def special_ids(folder):
    """{'eos_token_id': ...}, and bos and pad, of the tokens that tokenizer_config.json names."""
    folder, settings = Path(folder), {}
    if not (folder / 'tokenizer.json').is_file():
        return {}
    if (folder / 'tokenizer_config.json').is_file():
        settings = read_json(folder / 'tokenizer_config.json')
    vocab, _ = read_tokenizer(folder)
    ids = {}
    for kind in ('bos', 'eos', 'pad'):
        token = settings.get(f'{kind}_token')
        token = token.get('content') if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            ids[f'{kind}_token_id'] = vocab[token]
    ends = [vocab[end] for end in ENDS if end in vocab]
    return dict(eos_token_id=ends[0]) | ids if ends else ids


@cache
def fingerprint(name):
    """A hash of a tokenizer's vocabulary and merges: an encoding's, or that in a folder."""
    if is_encoding(name):
        return digest(list(vocabulary_and_merges(as_tokenizer_json(name))))
    return digest(list(read_tokenizer(name)))
