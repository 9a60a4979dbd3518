"""
Instructions and answers: supervised sets for fine-tuning and distillation.

    python data/prepare.py dolly
    python data/prepare.py mine.jsonl    # lines of {"instruction", "input", "output"}
    python data/prepare.py signatures    # offline: a function's signature -> its documentation

data/NAME/ holds {train,val}.jsonl, the examples as text; {train,val}.bin, their tokens, prompt and
answer one after the other; {train,val}.spans.npy, int64 (n, 3): where each begins, and the lengths
of its prompt and of its answer with end-of-text. Only answers are predicted: the positions of the
prompt have the target -100.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.corpus import SPLITS, finish_corpus, open_corpus
from data.loader import Source, hash_key, permute, to_device
from data.offline import is_held_out, signatures
from data.vocabulary import load_tokenizer
from engine.errors import UserError, first_line
from engine.hub import WAY_OUT, hub_source, reach_hub
from engine.progress import progress_bar

FIELDS = ('instruction', 'input', 'output')


def choices(options, letters='ABCDEFGH'):
    """Answers to choose from, one per line."""
    return '\n'.join(f'{letter}. {option}' for letter, option in zip(letters, options))


def from_dolly(row):
    """Yield (instruction, input, output) of a row."""
    yield row['instruction'], row['context'], row['response']


def from_boolq(row):
    """Yield (instruction, input, output) of a row."""
    answer = 'true' if row['answer'] else 'false'
    yield f'{row["question"]}? Answer true or false.', row['passage'], answer


def from_hellaswag(row):
    """Yield (instruction, input, output) of a row."""
    question = f'Which ending follows?\n{choices(row["endings"])}'
    yield question, row['ctx'], 'ABCD'[int(row['label'])]


def from_winogrande(row):
    """Yield (instruction, input, output) of a row."""
    question = f'What does _ stand for?\n{choices([row["option1"], row["option2"]])}'
    yield question, row['sentence'], 'AB'[int(row['answer']) - 1]


def from_mmlu(row):
    """Yield (instruction, input, output) of a row."""
    yield row['question'], choices(row['choices']), 'ABCD'[int(row['answer'])]


def from_arc(row):
    """Yield (instruction, input, output) of a row."""
    options = row['choices']
    yield row['question'], choices(options['text'], options['label']), row['answerKey']


def from_xlsum(row):
    """Yield (instruction, input, output) of a row."""
    title = f'the title of the article is {row["title"]}, please summarize the article.'
    yield f'Given the following article, and {title}', row['text'], row['summary']


def from_ultrachat(row):
    """Yield (instruction, input, output): each answer, after all that was said before it."""
    texts = [message['content'] for message in row['messages']]
    for i in range(1, len(texts), 2):
        yield '\n'.join(texts[:i]), '', texts[i]


class HubSet(NamedTuple):
    """A supervised set of the hub."""

    repository: str
    configuration: str | None
    train: str
    validation: str | None  # None: held out from train
    convert: Any  # yields (instruction, input, output) of a row, once or several times


SETS = {
    'dolly': HubSet('databricks/databricks-dolly-15k', None, 'train', None, from_dolly),
    'boolq': HubSet('google/boolq', None, 'train', 'validation', from_boolq),
    'hellaswag': HubSet('Rowan/hellaswag', None, 'train', 'validation', from_hellaswag),
    'winogrande': HubSet(
        'allenai/winogrande', 'winogrande_xl', 'train', 'validation', from_winogrande
    ),
    'mmlu': HubSet('cais/mmlu', 'all', 'auxiliary_train', 'validation', from_mmlu),
    'arc_easy': HubSet('allenai/ai2_arc', 'ARC-Easy', 'train', 'validation', from_arc),
    'xlsum': HubSet('csebuetnlp/xlsum', 'english', 'train', 'validation', from_xlsum),
    'ultrachat': HubSet(
        'HuggingFaceH4/ultrachat_200k', 'default', 'train_sft', 'test_sft', from_ultrachat
    ),
}


def prompt(instruction, context, style='paper'):
    """The text before an answer: that of Chain-of-Learngene, Appendix C; plain: the bare words."""
    if style == 'plain':
        return ''.join(f'{part}\n' for part in (instruction, context) if part)
    task = 'Below is an instruction that describes a task'
    wanted = 'Write a response that appropriately completes the request.'
    if not context:
        return f'{task}. {wanted}\n\nInstruction:\n{instruction}\n\nResponse:\n'
    paired = f'{task}, paired with an input that provides further context. {wanted}'
    return f'{paired}\n\nInstruction:\n{instruction}\n\nInput:\n{context}\n\nResponse:\n'


# ----------------------------------------------------------------------------------------------
# preparing: iterables of (dict(instruction, input, output), is it for validation)


def signature_examples(options):
    """A function's signature -> the first line of its documentation."""
    for name, signature, line in signatures():
        example = dict(instruction=signature, input='', output=line)
        yield example, is_held_out(name, options.val_fraction)


RECORDS = '{"instruction", "input", "output"}, {"prompt", "completion"} or {"messages"} with texts'


def example_of(row):
    """
    dict(instruction, input, output) of a record: of a conversation all before the last answer is
    the instruction. Raises what a record of another kind raises.
    """
    if 'messages' in row:
        *before, last = row['messages']
        assert last['role'] == 'assistant'
        instruction = '\n'.join(message['content'] for message in before)
        return dict(instruction=instruction, input='', output=last['content'])
    if 'completion' in row:
        return dict(instruction=row['prompt'], input='', output=row['completion'])
    return {field: row.get(field, '') for field in FIELDS}


def file_records(path):
    """
    Yield (number from 1, record) of a .jsonl file, or of a .json file with a list. Raises UserError
    for what is no JSON.
    """
    number = 0
    try:
        with open(path, encoding='utf-8') as file:
            if path.endswith('.json'):
                records = json.load(file)
                if not isinstance(records, list):
                    raise UserError(f'{path} holds no list of records')
            else:
                records = map(json.loads, filter(str.strip, file))
            for number, record in enumerate(records, 1):
                yield number, record
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}, record {number + 1}: {first_line(error)}') from None


def file_examples(options):
    """The records of a file. Raises UserError, with its number, for a bad one."""
    for number, record in file_records(options.corpus):
        try:
            example = example_of(record)
            assert all(isinstance(text, str) for text in example.values())
            assert example['instruction'] and example['output']
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError):
            raise UserError(f'{options.corpus}, record {number}: not {RECORDS}') from None
        yield example, is_held_out(example['instruction'] + example['input'], options.val_fraction)


def hub_rows(name, repository, configuration, train, validation):
    """
    Yield (row, is it for validation) of the splits `train` and `validation` of a set of the hub;
    without a validation split, (row, None). Raises UserError if it cannot be reached.
    """
    reach_hub(f'the data set {name}')
    import datasets

    for split in filter(None, (train, validation)):
        try:
            rows = datasets.load_dataset(**hub_source(repository, configuration, split))
        except Exception as error:  # its own, or those of whichever HTTP client it uses
            reason = type(error).__name__
            where = f'{name} ({repository})'
            raise UserError(f'{where} cannot be reached ({reason}). {WAY_OUT}') from error
        for row in progress_bar(rows, desc=name):
            yield row, split == validation if validation else None


def hub_examples(options):
    """The rows of a set of the hub. Raises UserError if it cannot be reached."""
    found = SETS[options.corpus]
    for row, is_val in hub_rows(options.corpus, *found[:4]):
        for answer in found.convert(row):
            example = dict(zip(FIELDS, answer))
            held_out = is_held_out(example['instruction'], options.val_fraction)
            yield example, held_out if is_val is None else is_val


def is_supervised(corpus):
    """Whether a name given to data/prepare.py is one of instructions and answers."""
    if corpus == 'signatures' or corpus in SETS:
        return True
    first = first_record(corpus)
    kinds = (('"instruction"', '"output"'), ('"prompt"', '"completion"'), ('"messages"',))
    return first is not None and (
        any(all(field in first for field in fields) for fields in kinds) or not first
    )


def first_record(path):
    """The text of the first record of a .jsonl or .json file; None for anything else."""
    path = Path(path)
    if path.suffix not in ('.jsonl', '.json') or not path.is_file():
        return None
    with open(path, encoding='utf-8', errors='replace') as file:
        first = file.read(2**16).strip()
    return first.split('\n')[0] if path.suffix == '.jsonl' else first


def prepare_supervised(options, out):
    """Write the supervised set that `options` (a Preparation) describe into the folder `out`."""
    read = hub_examples if options.corpus in SETS else file_examples
    if options.corpus == 'signatures':
        read = signature_examples
    return write_supervised(read(options), options, out)


def write_supervised(examples, options, out, kind='supervised'):
    """Write (example, is it for validation) pairs as a prepared set, completely or not at all."""
    unfinished = Path(f'{out}.partial')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer = load_tokenizer(options.tokenizer)
    counts = {split: dict(tokens=0, bytes=0, documents=0) for split in SPLITS}
    spans = {split: [] for split in SPLITS}
    asks = len(tokenizer.encode(prompt('', '\0', options.prompt).partition('\0')[2]))
    with contextlib.ExitStack() as stack:
        tokens, texts = {}, {}
        for split in SPLITS:
            tokens[split] = stack.enter_context(open(unfinished / f'{split}.bin', 'wb'))
            how = dict(encoding='utf-8', errors='replace')  # of lone surrogates, as the tokens
            texts[split] = stack.enter_context(open(unfinished / f'{split}.jsonl', 'w', **how))
        for example, is_val in examples:
            split = SPLITS[is_val]
            text = prompt(example['instruction'], example['input'], options.prompt)
            before = np.asarray(tokenizer.encode(text))
            answer = np.append(np.asarray(tokenizer.encode(example['output'])), tokenizer.end)
            behind = asks if example['input'] else -1
            spans[split].append((counts[split]['tokens'], len(before), len(answer), behind))
            ids = np.concatenate([before, answer]).astype(tokenizer.dtype)
            tokens[split].write(ids.tobytes())
            texts[split].write(json.dumps(example, ensure_ascii=False) + '\n')
            counts[split]['tokens'] += len(ids)
            counts[split]['bytes'] += len(example['output'].encode('utf-8', 'replace'))
            counts[split]['documents'] += 1
    for split in SPLITS:
        np.save(unfinished / f'{split}.spans.npy', np.array(spans[split], np.int64))
    return finish_corpus(unfinished, out, counts, options, kind)


# ----------------------------------------------------------------------------------------------
# reading


KINDS = dict(text='text', supervised='instructions with answers', preferences='preferences')


class Examples:
    """One split of a prepared supervised set, and how examples are laid into sequences."""

    def __init__(self, name, data_dir, split, kind='supervised'):
        corpus, folder = open_corpus(name, data_dir), Path(data_dir) / name
        self.folder, self.tokens = folder, getattr(corpus, split)
        if corpus.meta.get('kind', 'text') != kind:
            found = KINDS.get(str(corpus.meta.get('kind', 'text')), 'of an unknown kind')
            raise UserError(f'{folder} is {found}, not {KINDS[kind]}')
        self.sizes = corpus.meta['splits'][split]
        self.end = corpus.meta.get('end_of_text')
        self.tokenizer = corpus.meta['tokenizer']
        try:
            assert 0 <= self.end < corpus.meta['vocab_size']
            table = np.load(folder / f'{split}.spans.npy')
            assert table.shape[1] in (3, 4) and table.dtype == np.int64  # older sets have 3
            self.spans, self.behind = table[:, :3], table[:, 3:].sum(1) - (table.shape[1] == 3)
            assert self.spans[:, 1:].sum() == len(self.tokens) and self.behind.min() >= -1
            assert self.spans.min() >= 0 and self.spans.sum(1).max() <= len(self.tokens)
        except Exception as error:  # numpy's reader can fail in many ways
            raise UserError(
                f'{folder} is damaged ({split}.spans.npy or meta.json): delete it and prepare it '
                'again'
            ) from error

    def __len__(self):
        return len(self.spans)

    @property
    def bytes_per_token(self):
        """Bytes of the answers per token of them."""
        return self.sizes['bytes'] / int(self.spans[:, 2].sum())

    def prompt(self, i, longest):
        """
        What stands before the answer of example i, in at most `longest` tokens, int64: an input,
        such as an article, loses its end; where there is none, the prompt loses its beginning.
        """
        start, before, _ = self.spans[i]
        found = self.tokens[start : start + before].astype(np.int64)
        kept, behind = min(before, longest), self.behind[i]  # tokens behind the input
        if not 0 <= behind < kept < before:
            return found[before - kept :]
        return np.concatenate([found[: kept - behind], found[before - behind :]])

    def rows(self, indices, block_size):
        """
        Inputs and targets (n, block_size) int64 of examples, filled up with end-of-text. A longer
        example has a shorter prompt, and then loses the end of its answer.
        """
        x, y = np.full((2, len(indices), block_size), self.end, np.int64)
        y[:] = -100
        for row, i in enumerate(indices):
            start, before, after = self.spans[i]
            asked = self.prompt(i, block_size + 1 - min(after, block_size))
            answer = self.tokens[start + before : start + before + min(after, block_size)]
            ids = np.concatenate([asked, answer])
            x[row, : len(ids) - 1] = ids[:-1]
            first = max(len(asked), 1)  # the first position that can be predicted
            y[row, first - 1 : len(ids) - 1] = ids[first:]
        return x, y


def shuffled(positions, n, seed):
    """Which of n examples come at `positions`: every epoch all of them, in a new order."""
    epochs, places = np.divmod(np.asarray(positions, np.int64), n)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = permute(places[epochs == epoch], n, hash_key(seed, epoch))
    return indices


def answer_batches(rows, n, knobs):
    """
    The `validation` of a Source: batches of n examples, or of as many as knobs.eval_tokens are.
    rows: (numbers of examples, block_size) -> inputs and targets.
    """
    size = knobs.block_size
    wanted = np.arange(n)
    if knobs.eval_tokens:
        wanted = wanted[: max(1, knobs.eval_tokens // size)]

    def validation(batch_size, share):
        mine = wanted[share.rank :: share.world_size]
        for i in range(0, -(-len(wanted) // share.world_size), batch_size):
            chunk = mine[i : i + batch_size]
            x, y = rows(np.resize(chunk, batch_size), size)
            y[len(chunk) :] = -100  # as many batches on every process
            yield *to_device((x, y), share.device), int((y != -100).sum())

    return validation


def supervised_source(knobs, name=''):
    """The Source of a supervised set: the run's first corpus, or `name`. knobs: train.Run."""
    name = name or next(iter(knobs.corpora))
    train = Examples(name, knobs.data_dir, 'train')
    val = Examples(knobs.val_data or name, knobs.data_dir, 'val')

    def read(positions):
        return train.rows(shuffled(positions, len(train), knobs.seed), knobs.block_size)

    validation = answer_batches(val.rows, len(val), knobs)
    return Source(read, validation, val.bytes_per_token, train.tokenizer, masked=True)
