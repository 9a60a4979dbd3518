"""
Instructions with answers, and preferences between answers, for fine-tuning and distillation.

    python data/prepare.py dolly
    python data/prepare.py mine.jsonl --tokenizer=FOLDER   # in the folder's chat template, if any
    python data/prepare.py signatures    # offline: a function's signature -> its documentation
    python data/prepare.py preferences   # offline: prefer a function's documentation to another's

A line of mine.jsonl is {"instruction", "input", "output"}, {"prompt", "completion"}, {"messages"}
or {"prompt", "chosen", "rejected"}. data/NAME/ holds {train,val}.bin, the tokens of all examples,
one example after the other, and {train,val}.marks, a byte for each token: 1 if it is a target, plus
2 if it begins an example. Targets are answers and the tokens that end them. A preference is two
examples: with the preferred answer, then with the other.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from data.corpus import open_corpus
from data.loader import Order, Source, fixed_batches, offsets, some_of
from data.offline import signatures
from data.vocabulary import load_tokenizer
from engine.errors import UserError, first_line
from engine.parallel import processes
from engine.tokenizer_files import has_chat_template

TARGET, START = 1, 2  # bits of a mark
LAG = 64  # the rejected answer is the documentation of the function this many before
SUMMARISE = (
    'Given the following article, and the title of the article is {title}, please summarize the '
    'article.'
)
# name: (repository, configuration and splits; template of the instruction; template of the input;
# column of the answer; columns of the choices). Chat sets need the first alone.
SETS = {
    'dolly': (
        'databricks/databricks-dolly-15k default train',
        '{instruction}',
        '{context}',
        'response',
        '',
    ),
    'boolq': (
        'google/boolq default train validation',
        '{question}? Answer true or false.',
        '{passage}',
        'answer',
        '',
    ),
    'hellaswag': (
        'Rowan/hellaswag default train validation',
        'Which ending follows?\n{options}',
        '{ctx}',
        'label',
        'endings',
    ),
    'winogrande': (
        'allenai/winogrande winogrande_xl train validation',
        'What does _ stand for?\n{options}',
        '{sentence}',
        'answer',
        'option1 option2',
    ),
    'mmlu': (
        'cais/mmlu all dev validation',  # 57 x 5 examples to train on, as in the paper
        '{question}',
        '{options}',
        'answer',
        'choices',
    ),
    'arc_easy': (
        'allenai/ai2_arc ARC-Easy train validation',
        '{question}',
        '{options}',
        'answerKey',
        'choices',
    ),
    'xlsum': ('csebuetnlp/xlsum english train validation', SUMMARISE, '{text}', 'summary', ''),
    'xsum': (
        'EdinburghNLP/xsum default train validation',
        'Given the following article, please summarize the article.',  # it has no titles
        '{document}',
        'summary',
        '',
    ),
    'ultrachat': ('HuggingFaceH4/ultrachat_200k default train_sft test_sft',),
    'ultrafeedback': ('HuggingFaceH4/ultrafeedback_binarized default train_prefs test_prefs',),
}


def filled(row, instruction, context, output, choices):
    """
    A row of a public set with `instruction`, `input` and `output` added, as SETS describes it (the
    other arguments). Choices are lettered; the answer is then the letter of the right one.
    """
    options, letters, answer = [row[name] for name in choices.split()], 'ABCDEFGH', row[output]
    if len(options) == 1:  # the column holds all choices
        (options,) = options
    if isinstance(options, dict):
        options, letters = options['text'], options['label']
    if options and str(answer) not in letters:  # winogrande counts from 1, the others from 0
        answer = letters[int(answer) - ('option1' in row)]
    listed = '\n'.join(f'{letter}. {option}' for letter, option in zip(letters, options))
    row = row | dict(options=listed, output={True: 'true', False: 'false'}.get(answer, answer))
    return row | dict(instruction=instruction.format(**row), input=context.format(**row))


def prompt(instruction, context, style='paper'):
    """
    The text before an answer, from an instruction and an input, `context`. style 'paper': the
    prompt of Chain-of-Learngene, Appendix C; otherwise both as they are, on lines of their own.
    """
    if style != 'paper':
        return '\n'.join(filter(None, (instruction, context)))
    task = 'Below is an instruction that describes a task'
    wanted = 'Write a response that appropriately completes the request.'
    if not context:
        return f'{task}. {wanted}\n\nInstruction:\n{instruction}\n\nResponse:'
    paired = f'{task}, paired with an input that provides further context. {wanted}'
    return f'{paired}\n\nInstruction:\n{instruction}\n\nInput:\n{context}\n\nResponse:'


# ----------------------------------------------------------------------------------------------
# rows: (where, record, is_val). where: its source, for messages; is_val: whether it is for
# validation; None: a hash decides


def refuse(where, error):
    """Raise UserError for a record that cannot be used."""
    raise UserError(f'{where}: {first_line(error)}')


def leave_out(options, counts, where, error):
    """Count a row that cannot be used, keep the first. Raises UserError with --bad_rows=stop."""
    if options.bad_rows == 'stop':
        refuse(where, error)
    counts.setdefault('bad', dict(rows=0, first=f'{where}: {first_line(error)}'))['rows'] += 1


def file_records(path, bad=refuse):
    """
    Yield (where, record) from a file of JSON lines, or from a .json file with a list of records.
    bad: called with (where, error) for what is not JSON; the default raises UserError.
    """
    with open(path, 'rb') as file:
        # a .json file may hold JSON lines, too: a list begins with [, after a BOM or white space
        whole = path.endswith('.json') and b'[' in file.read(64).lstrip(b'\xef\xbb\xbf \n')[:1]
        file.seek(0)
        for number, line in enumerate([file.read()] if whole else file, 1):
            try:
                found = json.loads(line.decode('utf-8-sig'))
            except (ValueError, RecursionError) as error:
                if line.strip():
                    bad(f'{path}, line {number}', error)
                continue
            if not whole:
                yield f'{path}, line {number}', found
                continue
            for i, record in enumerate(found, 1):
                yield f'{path}, record {i}', record


def kind_of(record):
    """The kind of corpus that such records make: 'text', 'supervised' or 'preferences'."""
    keys = {*record} if isinstance(record, dict) else set()
    if 'chosen' in keys:
        return 'preferences'
    return 'supervised' if keys & {'messages', 'completion', 'output'} else 'text'


def offline_rows(options):
    """
    Yield rows that ask for the first line of a function's documentation, given its signature; as
    preferences, with another function's line as the rejected answer. options: a Preparation.
    """
    before = [], []  # the lines so far, in training and in validation
    for name, signature, line in signatures():
        is_val = options.holds_out(name)
        before[is_val].append(line)
        if options.corpus == 'signatures':
            yield name, dict(prompt=signature, completion=line), is_val
        elif len(before[is_val]) > LAG:  # so far back that it is mostly of another file
            yield (
                name,
                dict(prompt=signature, chosen=line, rejected=before[is_val][-LAG - 1]),
                is_val,
            )


# ----------------------------------------------------------------------------------------------
# rows -> examples: tokens and their marks


def conversations(row, style):
    """
    The conversations of a record, each a list of dict(role, content): one; of a preference two, the
    preferred one first. style: as in `prompt`.
    """
    answers = [row.get('completion', row.get('output'))]
    if 'chosen' in row:  # checked first: UltraFeedback's rows have messages as well
        answers = [row['chosen'], row['rejected']]
    elif 'messages' in row:
        return [row['messages']]
    asked = row.get('instruction', row.get('prompt'))
    if not isinstance(asked, list):
        asked = [dict(role='user', content=prompt(asked, row.get('input'), style))]
    if not isinstance(answers[0], list):
        answers = [[dict(role='assistant', content=said)] for said in answers]
    # some sets repeat the prompt in their answers
    return [said if said[0]['role'] != 'assistant' else [*asked, *said] for said in answers]


def encode_turns(messages, tokenizer):
    """
    (ids, marks), two lists, of a conversation without a chat template: a newline ends what is
    asked, an end-of-text token ends an answer.
    """
    ids, marks = [], []
    for message in messages:
        answer = message['role'] == 'assistant'
        text = message['content'] + '\n' * (not answer)
        # a BOS only at the very beginning
        ids += [*(tokenizer.encode_rest(text) if ids else tokenizer.encode(text))]
        ids += [tokenizer.end] * answer
        marks += [TARGET * answer] * (len(ids) - len(marks))
    return ids, marks


def example_encoder(options):
    """
    The function messages -> (ids, marks) for `options`, a Preparation: by the chat template of its
    tokenizer, if that has one and `prompt` is auto, otherwise encode_turns.
    """
    if options.prompt == 'auto' and has_chat_template(options.tokenizer):
        from extras.chat import chat_encoder  # it needs transformers

        return chat_encoder(options.tokenizer)
    return partial(encode_turns, tokenizer=load_tokenizer(options.tokenizer))


def encode_examples(rows, options, bad, encode):
    """
    [(ids, marks, bytes of the answers, is_val), ...] of rows. options: a Preparation; encode: what
    example_encoder(options) returns; bad: called with (where, error) for rows that cannot be used.
    """
    examples = []
    for where, row, is_val in rows:
        found = []
        try:
            for messages in conversations(row, options.prompt):
                answers = [m['content'].strip() for m in messages if m['role'] == 'assistant']
                if not answers or not all(answers):
                    raise ValueError('no answer')
                before = '\n'.join(m['content'] for m in messages[:-1])
                before.encode()  # raises for a lone surrogate
                if is_val is None:  # by the prompt, so that all its answers are in one split
                    asked = row.get('instruction', row.get('prompt')) or before
                    is_val = options.holds_out(f'{asked}{row.get("input") or ""}')
                ids, marks = encode(messages)
                last = len(marks) - marks[::-1].index(TARGET)  # nothing is learned from the rest
                marks[0] |= START
                size = len(''.join(answers).encode())
                found.append((ids[:last], bytes(marks[:last]), size, is_val))
            examples += found  # all of a record or nothing
        except Exception as error:  # whatever a record of another kind raises
            bad(where, error)
    return examples


# ----------------------------------------------------------------------------------------------
# examples -> sequences


class Examples:
    """
    One split of a prepared set, and how its examples become sequences. Raises UserError for a set
    of another kind (as of `kind_of`) and for a damaged one.
    """

    def __init__(self, name, data_dir, split, kind='supervised'):
        corpus, self.folder = open_corpus(name, data_dir), Path(data_dir) / name
        self.tokens, self.tokenizer = getattr(corpus, split), corpus.meta['tokenizer']
        self.ends, found = load_tokenizer(self.tokenizer).ends, corpus.meta.get('kind', 'text')
        if found != kind:
            raise UserError(f'{self.folder} is a set of {found}, not {kind}')
        self.marks = np.fromfile(self.folder / f'{split}.marks', np.uint8)
        if len(self.marks) != len(self.tokens):
            raise UserError(f'{self.folder} is damaged: delete it and prepare it again')
        self.bounds = np.append(np.flatnonzero(self.marks & START), len(self.tokens))
        # of answers alone, as the loss is
        self.bytes_per_token = corpus.meta['splits'][split]['bytes'] / (self.marks & TARGET).sum()

    def __len__(self):
        return len(self.bounds) - 1

    def fit(self, i, longest=2**31, answers=True):
        """
        The tokens of example i, int64, and whether each is a target, bool; at most `longest`. If
        there are more, the prompt loses its middle until the first answer fits, then the example
        loses its end. answers=False: make no room for an answer.
        """
        rows = slice(*self.bounds[i : i + 2])
        ids, asked = self.tokens[rows].astype(np.int64), self.marks[rows] & TARGET > 0
        first = asked.argmax()
        # the length of the first answer; at least one token is left for the prompt
        answer = min(np.append(asked[first:], False).argmin(), longest - 1) * answers
        over = max(0, first + answer - longest)
        middle = slice((first - over) // 2, (first - over) // 2 + over)
        return np.delete(ids, middle)[:longest], np.delete(asked, middle)[:longest]

    def prompt(self, i, longest):
        """The tokens before the first answer of example i, int64, at most `longest` of them."""
        ids, asked = self.fit(i, longest, answers=False)
        return ids[: np.append(asked, True).argmax()]

    def rows(self, indices, block_size):
        """
        Inputs and targets (n, block_size) int64 of the examples `indices`. Inputs are padded with
        end-of-text; targets outside answers are -100.
        """
        x, y = np.full((2, len(indices), block_size), self.ends[0], np.int64)
        y[:] = -100
        for row, i in enumerate(indices):
            ids, asked = self.fit(i, block_size + 1)
            x[row, : len(ids) - 1] = ids[:-1]
            y[row, : len(ids) - 1] = np.where(asked, ids, -100)[1:]
        return x, y


def shuffled(positions, n, seed):
    """Which of n examples come at `positions`, int64: all in every epoch, each in a new order."""
    return offsets(positions, n + 1, Order(1, seed=seed))  # n + 1 tokens have n windows of one


def supervised_source(knobs, name=''):
    """
    The Source of a supervised set: `name`, by default the run's first corpus. knobs: train.Run.
    Raises UserError for another kind of corpus.
    """
    name, size = name or next(iter(knobs.corpora)), knobs.block_size
    train = Examples(name, knobs.data_dir, 'train')
    val = Examples(knobs.val_data or name, knobs.data_dir, 'val')
    longer = (np.diff(train.bounds) > size + 1).sum()
    if longer and not processes()[0]:
        print(f'{longer:,} of {len(train):,} examples are cut to {size} tokens')

    def read(positions):
        return train.rows(shuffled(positions, len(train), knobs.seed), size)

    wanted = some_of(len(val), size, knobs.eval_tokens)
    validation = partial(fixed_batches, partial(val.rows, block_size=size), wanted)
    return Source(read, validation, val.bytes_per_token, train.tokenizer, masked=True)
