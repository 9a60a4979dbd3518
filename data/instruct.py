"""
Instructions and answers: supervised sets for fine-tuning and distillation (paper 004), prepared by data/prepare.py:

    python data/prepare.py dolly
    python data/prepare.py mine.jsonl              # lines of {"instruction": ..., "input": ..., "output": ...}
    python data/prepare.py signatures              # no network: what a function's signature says -> the first line of its docs

data/NAME/ then holds {train,val}.jsonl, the examples as text; {train,val}.bin, their tokens, prompt and answer one after the
other; {train,val}.spans.npy, int64 (n, 3): where each begins, and the lengths of its prompt and of its answer with end-of-text.
Only answers are predicted: what a prompt says has the target -100.
"""
import ast
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checksums import checksum
from configurator import UserError, unknown, write_atomically
from data.loader import Source, _key, open_corpus, permute, to_device
from data.prepare import load_tokenizer, source_files, token_dtype
from hugging_face import WAY_OUT, reach_hub


def _choices(options, letters='ABCDEFGH'):
    return '\n'.join(f'{letter}. {option}' for letter, option in zip(letters, options))


# name: (repository, configuration, training split, validation split or None, row -> (instruction, input, output) or None)
SETS = {
    'dolly': ('databricks/databricks-dolly-15k', None, 'train', None,
              lambda r: (r['instruction'], r['context'], r['response'])),
    'boolq': ('google/boolq', None, 'train', 'validation',
              lambda r: (f'{r["question"]}? Answer true or false.', r['passage'], 'true' if r['answer'] else 'false')),
    'hellaswag': ('Rowan/hellaswag', None, 'train', 'validation',
                  lambda r: (f'Which ending follows?\n{_choices(r["endings"])}', r['ctx'], 'ABCD'[int(r['label'])])),
    'winogrande': ('allenai/winogrande', 'winogrande_xl', 'train', 'validation',
                   lambda r: (f'What does _ stand for?\n{_choices([r["option1"], r["option2"]])}', r['sentence'],
                              'AB'[int(r['answer']) - 1])),
    'mmlu': ('cais/mmlu', 'all', 'auxiliary_train', 'validation',
             lambda r: (r['question'], _choices(r['choices']), 'ABCD'[int(r['answer'])])),
    'arc_easy': ('allenai/ai2_arc', 'ARC-Easy', 'train', 'validation',
                 lambda r: (r['question'], _choices(r['choices']['text'], r['choices']['label']), r['answerKey'])),
    'xlsum': ('csebuetnlp/xlsum', 'english', 'train', 'validation',
              lambda r: (f'Given the following article, and the title of the article is {r["title"]}, please summarize the '
                         'article.', r['text'], r['summary'])),
    'ultrachat': ('HuggingFaceH4/ultrachat_200k', 'default', 'train_sft', 'test_sft',
                  lambda r: (r['messages'][0]['content'], '', r['messages'][1]['content'])),
}


def prompt(instruction, input, style='paper'):
    """The text before an answer: the prompts of paper 004, Appendix C; style plain: the bare words, for models of few bytes."""
    if style == 'plain':
        return ''.join(f'{part}\n' for part in (instruction, input) if part)
    if not input:
        return ('Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
                f'Instruction:\n{instruction}\n\nResponse:\n')
    return ('Below is an instruction that describes a task, paired with an input that provides further context. Write a '
            f'response that appropriately completes the request.\n\nInstruction:\n{instruction}\n\nInput:\n{input}\n\nResponse:\n')


# ---------------------------------------------------------------------------------------------------------------------
# where examples come from: iterables of (dict(instruction, input, output), is it for validation)

def held_out(text, fraction):
    """Whether an example belongs to the validation split: by a hash of its text."""
    return zlib.crc32(text.encode()) < fraction * 2 ** 32


def signature_examples(options):
    """A function's signature -> the first line of its documentation, from the packages that pydocs is made of."""
    seen = set()
    for name, path in tqdm(source_files(options.packages), desc='reading signatures', unit='file', leave=False):
        try:
            tree = ast.parse(path.read_text(encoding='utf-8'))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
            if text:
                line = text.strip().split('\n')[0].strip()
                signature = f'{node.name}({ast.unparse(node.args)})'
                if 15 <= len(line) <= 80 and len(signature) <= 80 and line not in seen:
                    seen.add(line)
                    yield dict(instruction=signature, input='', output=line), held_out(name, options.val_fraction)


def file_examples(options):
    """The lines of a .jsonl file. Raises UserError, with the line's number, for one that is no example."""
    try:
        lines = Path(options.corpus).read_text(encoding='utf-8').split('\n')   # not splitlines: a text may hold what it splits at
    except UnicodeDecodeError as error:
        raise UserError(f'{options.corpus} is not UTF-8 text ({error.reason} at byte {error.start})') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = dict(instruction=row['instruction'], input=row.get('input', ''), output=row['output'])
            assert all(isinstance(text, str) for text in example.values()) and example['instruction'] and example['output']
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
            raise UserError(f'{options.corpus}, line {number}: not {{"instruction": ..., "input": ..., "output": ...}} '
                            'with texts') from None
        yield example, held_out(example['instruction'] + example['input'], options.val_fraction)


def hub_examples(options):
    """The rows of a set of the hub, in the words of SETS."""
    reach_hub(f'the data set {options.corpus}')
    import datasets
    repository, configuration, train, validation, words = SETS[options.corpus]
    for split in filter(None, (train, validation)):
        try:
            rows = datasets.load_dataset(repository, configuration, split=split)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f'the data set {options.corpus} ({repository}) cannot be reached ({type(error).__name__}). '
                            f'{WAY_OUT}') from error
        for row in tqdm(rows, desc=options.corpus, leave=False):
            example = dict(zip(('instruction', 'input', 'output'), words(row)))
            held = split == validation if validation else held_out(example['instruction'], options.val_fraction)
            yield example, held


def is_supervised(corpus):
    """Whether a name given to data/prepare.py is one of instructions and answers."""
    if corpus == 'signatures' or corpus in SETS:
        return True
    path = Path(corpus)
    if path.suffix != '.jsonl' or not path.is_file():
        return False
    with open(path, encoding='utf-8', errors='replace') as file:
        first = file.readline()
    return '"output"' in first and '"instruction"' in first or not first.strip()


def prepare_supervised(options, out):
    """Write the supervised set that `options` (data.prepare.Preparation) describe into the folder `out`."""
    if options.prompt not in ('paper', 'plain'):
        raise unknown('prompt', options.prompt, ('paper', 'plain'))
    make = signature_examples if options.corpus == 'signatures' else hub_examples if options.corpus in SETS else file_examples
    return write_supervised(make(options), options, out)


def write_supervised(examples, options, out):
    """Write examples, an iterable of (example, is it for validation), as a prepared set; whole or not at all."""
    encode, _, vocab_size, end = load_tokenizer(options.tokenizer)
    unfinished = Path(f'{out}.partial')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    spans, counts = dict(train=[], val=[]), {s: dict(tokens=0, bytes=0, documents=0) for s in ('train', 'val')}
    files = {split: (open(unfinished / f'{split}.bin', 'wb'), open(unfinished / f'{split}.jsonl', 'w', encoding='utf-8'))
             for split in spans}
    for example, is_val in examples:
        split = 'val' if is_val else 'train'
        before = np.asarray(encode(prompt(example['instruction'], example['input'], options.prompt)))
        answer = np.append(np.asarray(encode(example['output'])), end)
        spans[split].append((counts[split]['tokens'], len(before), len(answer)))
        files[split][0].write(np.concatenate([before, answer]).astype(token_dtype(vocab_size)).tobytes())
        files[split][1].write(json.dumps(example, ensure_ascii=False) + '\n')
        for key, more in dict(tokens=len(before) + len(answer), bytes=len(example['output'].encode()), documents=1).items():
            counts[split][key] += more
    for pair in files.values():
        for file in pair:
            file.close()
    for split in spans:
        if not spans[split]:
            raise UserError(f'{options.corpus} gave no examples to {"train on" if split == "train" else "validate with"}: '
                            f'--val_fraction={options.val_fraction} of them are held out')
        np.save(unfinished / f'{split}.spans.npy', np.array(spans[split], np.int64))
    meta = dict(corpus=options.corpus, kind='supervised', tokenizer=options.tokenizer, vocab_size=vocab_size, end_of_text=end,
                dtype=np.dtype(token_dtype(vocab_size)).name, options=vars(options),
                splits={s: counts[s] | dict(sha256=checksum(unfinished / f'{s}.bin')) for s in spans},
                checksums={f'{s}.spans.npy': checksum(unfinished / f'{s}.spans.npy') for s in spans})
    write_atomically(unfinished / 'meta.json', json.dumps(meta, indent=1) + '\n')
    os.replace(unfinished, out)
    print(f'{out}: {len(spans["train"]):,} examples to train on, {len(spans["val"]):,} to validate with ({options.tokenizer})')
    return out


# ---------------------------------------------------------------------------------------------------------------------
# reading them

class Examples:
    """One split of a prepared supervised set: tokens, spans (n, 3), and how examples are laid into sequences."""

    def __init__(self, name, data_dir, split):
        corpus, folder = open_corpus(name, data_dir), Path(data_dir) / name
        if corpus.meta.get('kind') != 'supervised':
            raise UserError(f'{folder} is text, not instructions with answers')
        self.tokens, self.end, self.folder = getattr(corpus, split), corpus.meta.get('end_of_text'), folder
        if type(self.end) is not int or not 0 <= self.end < corpus.meta['vocab_size']:
            raise UserError(f'{folder}/meta.json is damaged: delete {folder} and prepare it again')
        self.tokenizer = corpus.meta['tokenizer']
        try:
            self.spans = np.load(folder / f'{split}.spans.npy')
            assert self.spans.shape[1:] == (3,) and self.spans[:, 1:].sum() == len(self.tokens) and self.spans.dtype == np.int64
            assert self.spans.min() >= 0 and self.spans.sum(1).max() <= len(self.tokens)
        except Exception as error:   # numpy's reader has many ways to stumble
            raise UserError(f'{folder}/{split}.spans.npy is damaged: delete {folder} and prepare it again') from error

    def __len__(self):
        return len(self.spans)

    def prompt(self, i, longest):
        """The tokens of example i before its answer, the last `longest` of them, int64."""
        start, before, _ = self.spans[i]
        return self.tokens[start:start + before][-longest:].astype(np.int64)

    def rows(self, indices, block_size):
        """
        Inputs and targets (n, block_size) int64 of examples, filled up with end-of-text. A longer one loses the beginning of its
        prompt, and what of its answer does not fit without any.
        """
        x, y = np.full((2, len(indices), block_size), self.end, np.int64)
        y[:] = -100
        for row, (start, before, after) in enumerate(self.spans[indices]):
            after = min(after, block_size)
            keep = min(before, block_size + 1 - after)
            ids = self.tokens[start + before - keep:start + before + after].astype(np.int64)
            x[row, :len(ids) - 1], y[row, keep - 1 if keep else 0:len(ids) - 1] = ids[:-1], ids[max(keep, 1):]
        return x, y


def shuffled(positions, n, seed):
    """Which of n examples stand at `positions`: every epoch all of them, in a new order."""
    epochs, places = np.divmod(np.asarray(positions, np.int64), n)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = permute(places[epochs == epoch], n, _key(seed, epoch))
    return indices


def supervised_source(knobs, name=''):
    """The Source of a supervised set: the run's first corpus, or `name`. knobs: train.Run."""
    name = name or next(iter(knobs.corpora))
    train, corpus = Examples(name, knobs.data_dir, 'train'), open_corpus(name, knobs.data_dir)
    val = Examples(knobs.val_data or name, knobs.data_dir, 'val')
    wanted = np.arange(len(val))[:max(1, knobs.eval_tokens // knobs.block_size) if knobs.eval_tokens else None]

    def validation(batch_size, device, rank, world_size):
        mine = wanted[rank::world_size]
        for i in range(0, -(-len(wanted) // world_size), batch_size):   # as many batches on every process
            chunk = mine[i:i + batch_size]
            x, y = val.rows(np.resize(chunk, batch_size), knobs.block_size)
            y[len(chunk):] = -100
            yield *to_device((x, y), device), int((y != -100).sum())
    counts = corpus.meta['splits']['val']
    answers = int(val.spans[:, 2].sum())
    return Source(lambda positions: train.rows(shuffled(positions, len(train), knobs.seed), knobs.block_size), validation,
                  counts['bytes'] / answers, corpus.meta['tokenizer'])
