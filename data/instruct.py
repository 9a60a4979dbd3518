"""
Instructions and answers, and preferences between answers: sets for fine-tuning and distillation.

    python data/prepare.py dolly
    python data/prepare.py mine.jsonl --tokenizer=FOLDER   # in the folder's chat template, if any
    python data/prepare.py signatures    # offline: a function's signature -> its documentation
    python data/prepare.py preferences   # offline: a function's documentation before another's

A line of mine.jsonl is {"instruction", "input", "output"}, {"prompt", "completion"}, {"messages"}
or {"prompt", "chosen", "rejected"}. data/NAME/ holds {train,val}.bin, the tokens of the examples
one after the other, and {train,val}.marks, a byte for each: 1 where it is a target, which answers
and what ends them are, and 2 where an example begins. Of a preference there are two examples: the
answer that is preferred, then the other.
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

TARGET, START = 1, 2
LAG = 64  # functions between a documentation and the one that it is preferred to
SUMMARISE = (
    'Given the following article, and the title of the article is {title}, please summarize the '
    'article.'
)
SETS = {  # repository, configuration, splits; templates of instruction and input; answer, choices
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
    """{instruction, input, output} of a row by the columns of SETS; choices are lettered."""
    options, letters, answer = [row[name] for name in choices.split()], 'ABCDEFGH', row[output]
    if len(options) == 1:
        (options,) = options
    if isinstance(options, dict):
        options, letters = options['text'], options['label']
    if options and str(answer) not in letters:
        answer = letters[int(answer) - ('option1' in row)]
    listed = '\n'.join(f'{letter}. {option}' for letter, option in zip(letters, options))
    row = row | dict(options=listed, output={True: 'true', False: 'false'}.get(answer, answer))
    return row | dict(instruction=instruction.format(**row), input=context.format(**row))


def prompt(instruction, context, style='paper'):
    """The lines before an answer: those of Chain-of-Learngene, Appendix C; else the bare words."""
    if style != 'paper':
        return '\n'.join(filter(None, (instruction, context)))
    task = 'Below is an instruction that describes a task'
    wanted = 'Write a response that appropriately completes the request.'
    if not context:
        return f'{task}. {wanted}\n\nInstruction:\n{instruction}\n\nResponse:'
    paired = f'{task}, paired with an input that provides further context. {wanted}'
    return f'{paired}\n\nInstruction:\n{instruction}\n\nInput:\n{context}\n\nResponse:'


# ----------------------------------------------------------------------------------------------
# rows: (where it stands, record, is it for validation; None: by a hash)


def refuse(where, error):
    """Raise UserError for a record that cannot be used."""
    raise UserError(f'{where}: {first_line(error)}')


def leave_out(options, counts, where, error):
    """Count a row that cannot be used; raises UserError under --bad_rows=stop."""
    if options.bad_rows == 'stop':
        refuse(where, error)
    counts.setdefault('bad', dict(rows=0, first=f'{where}: {first_line(error)}'))['rows'] += 1


def file_records(path, bad=refuse):
    """
    Yield (where it stands, record) of a file of JSON lines, or with a list of records. bad: told of
    what is no JSON, as (where, error).
    """
    with open(path, 'rb') as file:
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
    """text, supervised or preferences: what a corpus of such records is."""
    keys = {*record} if isinstance(record, dict) else set()
    if 'chosen' in keys:
        return 'preferences'
    return 'supervised' if keys & {'messages', 'completion', 'output'} else 'text'


def offline_rows(options):
    """A function's signature -> the first line of its documentation; or this before another's."""
    before = [], []  # in training and in validation
    for name, signature, line in signatures():
        is_val = options.holds_out(name)
        before[is_val].append(line)
        if options.corpus == 'signatures':
            yield name, dict(prompt=signature, completion=line), is_val
        elif len(before[is_val]) > LAG:  # mostly of another file
            yield (
                name,
                dict(prompt=signature, chosen=line, rejected=before[is_val][-LAG - 1]),
                is_val,
            )


# ----------------------------------------------------------------------------------------------
# rows -> examples, which are tokens with the marks of targets


def conversations(row, style):
    """[[dict(role, content), ...]] of a record; of a preference the preferred one and the other."""
    answers = [row.get('completion', row.get('output'))]
    if 'chosen' in row:  # UltraFeedback's have messages as well
        answers = [row['chosen'], row['rejected']]
    elif 'messages' in row:
        return [row['messages']]
    asked = row.get('instruction', row.get('prompt'))
    if not isinstance(asked, list):
        asked = [dict(role='user', content=prompt(asked, row.get('input'), style))]
    if not isinstance(answers[0], list):
        answers = [[dict(role='assistant', content=said)] for said in answers]
    return [said if said[0]['role'] != 'assistant' else [*asked, *said] for said in answers]


def encode_turns(messages, tokenizer):
    """(ids, marks) of a conversation: line by line, each answer with the end-of-text behind it."""
    ids, marks = [], []
    for message in messages:
        answer = message['role'] == 'assistant'
        text = message['content'] + '\n' * (not answer)
        ids += [*(tokenizer.encode_rest(text) if ids else tokenizer.encode(text))]
        ids += [tokenizer.end] * answer
        marks += [TARGET * answer] * (len(ids) - len(marks))
    return ids, marks


def example_encoder(options):
    """messages -> (ids, marks), in the tokenizer's chat template or as encode_turns says."""
    if options.prompt == 'auto' and has_chat_template(options.tokenizer):
        from extras.chat import chat_encoder  # it needs transformers

        return chat_encoder(options.tokenizer)
    return partial(encode_turns, tokenizer=load_tokenizer(options.tokenizer))


def encode_examples(rows, options, bad, encode):
    """
    [(ids, marks, bytes of the answers, is it for validation), ...] of rows. encode: as
    example_encoder gives it for `options`, a Preparation; bad: told of rows that cannot be used.
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
                before.encode()  # not so a lone surrogate
                if is_val is None:
                    asked = row.get('instruction', row.get('prompt')) or before
                    is_val = options.holds_out(f'{asked}{row.get("input") or ""}')
                ids, marks = encode(messages)
                last = len(marks) - marks[::-1].index(TARGET)
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
    """One split of a prepared set of answers, and how examples are laid into sequences."""

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
        self.bytes_per_token = corpus.meta['splits'][split]['bytes'] / (self.marks & TARGET).sum()

    def __len__(self):
        return len(self.bounds) - 1

    def fit(self, i, longest=2**31, answers=True):
        """
        Tokens int64 and which are targets, bool, of example i, at most `longest`: what stands
        before its first answer loses its middle, as far as that answer needs it, then the whole
        its end. answers=False: no answer needs anything.
        """
        rows = slice(*self.bounds[i : i + 2])
        ids, asked = self.tokens[rows].astype(np.int64), self.marks[rows] & TARGET > 0
        first = asked.argmax()
        answer = min(np.append(asked[first:], False).argmin(), longest - 1) * answers
        over = max(0, first + answer - longest)
        middle = slice((first - over) // 2, (first - over) // 2 + over)
        return np.delete(ids, middle)[:longest], np.delete(asked, middle)[:longest]

    def prompt(self, i, longest):
        """What stands before the first answer of example i, int64, in at most `longest` tokens."""
        ids, asked = self.fit(i, longest, answers=False)
        return ids[: np.append(asked, True).argmax()]

    def rows(self, indices, block_size):
        """Inputs and targets (n, block_size) int64 of examples, filled up with end-of-text."""
        x, y = np.full((2, len(indices), block_size), self.ends[0], np.int64)
        y[:] = -100
        for row, i in enumerate(indices):
            ids, asked = self.fit(i, block_size + 1)
            x[row, : len(ids) - 1] = ids[:-1]
            y[row, : len(ids) - 1] = np.where(asked, ids, -100)[1:]
        return x, y


def shuffled(positions, n, seed):
    """Which of n examples come at `positions`: every epoch all of them, in a new order."""
    return offsets(positions, n + 1, Order(1, seed=seed))


def supervised_source(knobs, name=''):
    """The Source of a supervised set: the run's first corpus, or `name`. knobs: train.Run."""
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
