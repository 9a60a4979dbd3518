"""
Tokenizer files in model folders. A tokenizer is saved with the weights it belongs to. For models
trained on bytes or with tiktoken's encodings, a tokenizer.json is generated that transformers can
load. Tokenizers are compared by content, since two vocabularies of one size may differ.
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
# common names of the end-of-text token
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>')


def bytes_encoding():
    """A tiktoken Encoding of the 256 bytes, with <|endoftext|> = 256."""
    how = dict(mergeable_ranks={bytes([i]): i for i in range(256)})
    how['special_tokens'] = {'<|endoftext|>': 256}
    # without merges, any split into short pieces gives the same ids
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
# tokenizer.json, the format of the package tokenizers


def byte_letters():
    """{byte: the printable character that represents it in tokenizer.json}, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def halves(token, ranks):
    """
    The two tokens whose merge gives `token`, found by merging its bytes, lowest rank first, until
    two parts are left: tiktoken stores ranks, tokenizer.json needs merges. ranks: {token: rank}.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


@cache
def tokenizer_json(name):
    """
    The content of a folder's tokenizer.json, or of one that gives the same ids as an encoding or as
    a folder with only vocab.json and merges.txt (OPT). Raises UserError.
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
    # {1,3}+ is possessive in tiktoken but a repeated repetition in tokenizers; the greedy {1,3}
    # matches the same text
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
    """
    Convert a folder's vocab.json and merges.txt to the content of tokenizer.json. Raises UserError
    if transformers is not installed.
    """
    transformers = import_extra('transformers', f'{folder} has no tokenizer.json: made')
    found = transformers.GPT2TokenizerFast.from_pretrained(folder)
    content = json.loads(found.backend_tokenizer.to_str())
    # drop the special tokens that GPT2TokenizerFast adds by default
    known = read_settings(folder, 'vocab.json', 'added_tokens.json')
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
    """Merge the JSON objects in those of these files that exist; earlier files take precedence."""
    files = [Path(folder) / name for name in reversed(names)]
    return {key: v for file in files if file.is_file() for key, v in read_json(file).items()}


def named_token(folder, kind):
    """The text of a folder's special token, such as kind='eos_token', or None if it names none."""
    found = read_settings(folder, 'tokenizer_config.json', 'special_tokens_map.json').get(kind)
    text = found.get('content') if isinstance(found, dict) else found
    return text if isinstance(text, str) else None


def write_tokenizer(name, folder):
    """
    Write a tokenizer to a model folder: generated from an encoding, or copied from another folder.
    Returns entries for config.json: eos_token_id, and the name of an encoding. Raises UserError if
    `name` is neither an encoding nor a folder with a tokenizer.
    """
    folder = Path(folder)
    if is_encoding(name):
        try:
            write_json(folder / 'tokenizer.json', tokenizer_json(name))
        except UserError as error:  # saving the model matters more: record the name only
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
    # generate tokenizer.json, too, for programs that need it
    if is_tokenizer(folder) and not (folder / 'tokenizer.json').is_file():
        write_json(folder / 'tokenizer.json', tokenizer_json(name))
    return special_ids(folder)


def tokenizer_files(folder):
    """A folder's tokenizer files, including its chat template and generation_config.json."""
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
    The ids that end a text or an answer. The first is the one that prepared data contains: the
    folder's eos_token; then those of generation_config.json. If there are none, the first of ENDS
    in the vocabulary.
    """
    vocab, named = vocabulary(folder), named_token(folder, 'eos_token')
    more = read_settings(folder, 'generation_config.json').get('eos_token_id')
    ends = [vocab.get(named), *(more if isinstance(more, list) else [more])]
    ends = [i for i in dict.fromkeys(ends) if i in vocab.values()]
    return ends or [vocab[end] for end in ENDS if end in vocab][:1]


def special_ids(folder):
    """{'eos_token_id': an id, or a list of several} of a folder, for config.json; {} if unknown."""
    ends = end_ids(folder) if is_tokenizer(folder) else []
    return dict(eos_token_id=ends if len(ends) > 1 else ends[0]) if ends else {}


@cache
def fingerprint(name):
    """A hash of a tokenizer's vocabulary and merges, to compare it with others."""
    # a merge is 'a b' or ['a', 'b'], depending on the version of tokenizers
    merges = tokenizer_json(name)['model'].get('merges', [])
    return digest([vocabulary(name), [m if isinstance(m, str) else ' '.join(m) for m in merges]])
