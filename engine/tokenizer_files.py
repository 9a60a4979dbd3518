"""
The tokenizer of a model folder: half of what a model is to everybody else. It travels with the
weights, is written for models trained on bytes or tiktoken's encodings, so that transformers'
AutoTokenizer opens them, and is compared by content: two vocabularies of one size are not the same.
"""

import json
import re
import shutil
from functools import cache
from pathlib import Path

import tiktoken

from engine.errors import UserError, first_line, import_extra
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
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>')  # of a text, by any name


def bytes_encoding():
    """The 256 bytes and <|endoftext|> = 256 as a tiktoken Encoding."""
    how = dict(mergeable_ranks={bytes([i]): i for i in range(256)})
    how['special_tokens'] = {'<|endoftext|>': 256}
    return tiktoken.Encoding('bytes', pat_str=r'[\s\S]{1,16}', **how)


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
def tokenizer_json(name):
    """
    The content of the tokenizer.json of a folder, or that which gives the ids of an encoding; of a
    folder with vocab.json and merges.txt alone, such as OPT's, that which means the same.
    """
    if not is_encoding(name):
        file = Path(name) / 'tokenizer.json'
        return read_json(file, added_tokens=list) if file.is_file() else from_merges(Path(name))
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


def from_merges(folder):
    """The content of tokenizer.json for vocab.json and merges.txt; UserError if it cannot be."""
    transformers = import_extra('transformers', f'{folder} has no tokenizer.json: made')
    found = transformers.GPT2TokenizerFast.from_pretrained(folder)
    content = json.loads(found.backend_tokenizer.to_str())
    known = read_settings(folder, 'vocab.json', 'added_tokens.json')  # not what the class adds
    kept = [token for token in content['added_tokens'] if token['content'] in known]
    return content | dict(added_tokens=kept)


# ----------------------------------------------------------------------------------------------
# folders


def is_tokenizer(folder):
    """Whether a folder has a tokenizer that load_tokenizer opens."""
    names = {file.name for file in tokenizer_files(folder)}
    return 'tokenizer.json' in names or names >= {'vocab.json', 'merges.txt'}


def has_chat_template(name):
    """Whether a tokenizer is a folder with a chat template."""
    described = read_settings(name, 'tokenizer_config.json').get('chat_template')
    return bool(described) or (Path(name) / 'chat_template.jinja').is_file()


def read_settings(folder, *names):
    """The objects in those of these JSON files that exist, as one; the first of a key counts."""
    files = [Path(folder) / name for name in reversed(names)]
    return {key: v for file in files if file.is_file() for key, v in read_json(file).items()}


def named_token(folder, kind):
    """The text of the eos_token, say, of tokenizer_config.json or special_tokens_map.json; None."""
    found = read_settings(folder, 'tokenizer_config.json', 'special_tokens_map.json').get(kind)
    text = found.get('content') if isinstance(found, dict) else found
    return text if isinstance(text, str) else None


def write_tokenizer(name, folder):
    """
    Put a tokenizer into a model folder: that of an encoding, or the files of another folder.
    Returns what config.json says of it: {'eos_token_id': ..., ...}, and an encoding's name.
    """
    folder = Path(folder)
    if is_encoding(name):
        try:
            write_json(folder / 'tokenizer.json', tokenizer_json(name))
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
    if is_tokenizer(folder) and not (folder / 'tokenizer.json').is_file():  # as others read it
        write_json(folder / 'tokenizer.json', tokenizer_json(name))
    return special_ids(folder)


def tokenizer_files(folder):
    """The files in a folder that belong to its tokenizer, and say how it generates."""
    return [Path(folder) / name for name in FILES if (Path(folder) / name).is_file()]


def vocabulary(name):
    """{token: id} of a tokenizer, with those added later. Raises UserError for a damaged one."""
    content = tokenizer_json(name)
    try:
        vocab = content['model']['vocab']
        if not isinstance(vocab, dict):  # a unigram model lists [token, score]
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        return vocab | {token['content']: int(token['id']) for token in content['added_tokens']}
    except Exception as error:
        raise UserError(f'{name}/tokenizer.json is damaged ({first_line(error)})') from None


def end_ids(folder):
    """
    The ids that end a text or an answer: the eos_token that a folder names, which is what is
    written, then those of generation_config.json; else that of a usual name.
    """
    vocab, named = vocabulary(folder), named_token(folder, 'eos_token')
    more = read_settings(folder, 'generation_config.json').get('eos_token_id')
    ends = [vocab.get(named), *(more if isinstance(more, list) else [more])]
    ends = [i for i in dict.fromkeys(ends) if i in vocab.values()]
    return ends or [vocab[end] for end in ENDS if end in vocab][:1]


def special_ids(folder):
    """{'eos_token_id': one or several} of a folder's tokenizer, as config.json has it."""
    ends = end_ids(folder) if is_tokenizer(folder) else []
    return dict(eos_token_id=ends if len(ends) > 1 else ends[0]) if ends else {}


@cache
def fingerprint(name):
    """A hash of a tokenizer's vocabulary and merges."""
    merges = tokenizer_json(name)['model'].get('merges', [])
    return digest([vocabulary(name), [m if isinstance(m, str) else ' '.join(m) for m in merges]])
