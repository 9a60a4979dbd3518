"""
Text in, text out: the answers of any model, in any vocabulary, as a supervised set that another
model learns from (the bridge of Chain-of-Learngene, section 3.2, and sequence-level distillation),
and how good answers are.
"""

import json
import re
import statistics
import time
from pathlib import Path

import torch

from data.instruct import FIELDS, file_records, prompt, write_supervised
from data.prepare import Preparation
from data.vocabulary import load_tokenizer, tokenizer_of_model
from engine.errors import UserError
from engine.files import read_json
from engine.parallel import choose_device, processes
from engine.progress import progress_bar
from extras.minillm import Answering, answer
from model import load


def text_generator(name, device='cpu', max_new_tokens=256):
    """prompts -> answers (lists of texts), greedy, of a model, a folder or hub name."""
    tokenizer = load_tokenizer(tokenizer_of_model(name))
    return answers_of(load(name).to(device).eval(), tokenizer, max_new_tokens)


def answers_of(model, tokenizer, max_new_tokens):
    """prompts -> answers of an open model, with its tokenizer."""

    def answers(prompts):
        ids = [[int(i) for i in tokenizer.encode(text)] or [tokenizer.end] for text in prompts]
        found = greedy_answers(model, ids, max_new_tokens, tokenizer.end)
        return [tokenizer.text(row).strip() for row in found]

    return answers


def greedy_answers(model, ids, max_new_tokens, end):
    """A GPT's greedy answers to prompts, both lists of ids, in half of its context at most."""
    device = model.wte.weight.device
    most = min(max_new_tokens, model.config.block_size // 2)
    room = max(1, model.config.block_size - most)
    prompts = [torch.tensor(row[-room:], device=device) for row in ids]
    found = answer(model, prompts, Answering(most, end, temperature=0))
    return [row[mask].tolist() for row, mask in zip(found.ids, found.mask)]


def write_answers(generate, examples, path, style='paper', batch_size=16):
    """
    Let `generate` (prompts -> answers) answer examples, [dict(instruction, input)], and append
    them to the .jsonl file `path` batch by batch: an interrupted run continues. Returns the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    if path.is_file():
        lines = path.read_text(encoding='utf-8').split('\n')[:-1]  # the last may be cut short
    path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    starts = range(len(lines), len(examples), batch_size)
    with open(path, 'a', encoding='utf-8') as file:
        for i in progress_bar(starts, desc=f'answers for {path.parent.name}'):
            chunk = examples[i : i + batch_size]
            prompts = [prompt(e['instruction'], e['input'], style) for e in chunk]
            for example, output in zip(chunk, generate(prompts)):
                line = json.dumps(dict(example, output=output), ensure_ascii=False)
                file.write(f'{line}\n')
            file.flush()
    return path


def read_examples(path):
    """The examples of a .jsonl file, a list of dicts. Raises UserError for a damaged one."""
    try:
        lines = Path(path).read_text(encoding='utf-8').split('\n')
        examples = [json.loads(line) for line in lines if line]
        assert all(isinstance(example[key], str) for example in examples for key in FIELDS)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__})') from None
    return examples


def pseudo_answers(ancestor, name, run, out, limit=0):
    """
    A supervised set in the folder `out` (made once) with the prompts of the prepared set `name`
    and the ancestor's answers to them (Eq. 2), in the tokenizer of `name`. limit: answers at most,
    0: all. Returns `out`.
    """
    what = f'{limit or "all"} answers of {ancestor} to {name}'
    meta_file = Path(out) / 'meta.json'
    while processes()[0] and not meta_file.is_file():
        time.sleep(1)  # one process writes, the others wait for it
    if meta_file.is_file():
        found = read_json(meta_file).get('corpus')
        if found != what:
            again = f'remove it and {out}.answers, or choose another --out_dir'
            raise UserError(f'{out} holds {found}, not {what}: {again}')
        return out
    source = Path(run.data_dir) / name
    meta = read_json(source / 'meta.json', options=dict, tokenizer=str)
    style = meta['options']['prompt']
    length = min(256, run.block_size // 2)
    generate = text_generator(ancestor, choose_device(run.device), length)
    examples = []
    for split, most in (('train', limit), ('val', max(1, limit // 8))):
        wanted = read_examples(source / f'{split}.jsonl')
        if limit:
            wanted = wanted[:most]
        path = write_answers(generate, wanted, Path(f'{out}.answers') / f'{split}.jsonl', style)
        examples += [(e, split == 'val') for e in read_examples(path) if e['output']]
    options = Preparation(what, str(out), tokenizer=meta['tokenizer'], prompt=style)
    return write_supervised(examples, options, Path(out))


def scored_prompts(path):
    """
    [(prompt, references)] of a .jsonl or .json file of records with `instruction` and maybe
    `input`, or a whole `prompt`; and `output`, a text or a list of texts that are all right. Raises
    UserError.
    """
    if not Path(path).is_file():
        raise UserError(f'no file {path}')
    found = []
    for number, row in file_records(path):
        try:
            references = row['output'] if isinstance(row['output'], list) else [row['output']]
            asked = [row['instruction'], row.get('input') or ''] if 'instruction' in row else None
            asked = asked or [row['prompt']]
            assert references and all(isinstance(text, str) for text in (*asked, *references))
        except (TypeError, KeyError, AttributeError, AssertionError):
            fields = 'instruction (and input) or prompt, and output, as texts'
            raise UserError(f'{path}, record {number}: not {fields}') from None
        found.append((prompt(*asked) if len(asked) == 2 else asked[0], references))
    if not found:
        raise UserError(f'{path} holds no records')
    return found


def mean_rouge(generate, asked, batch_size=16):
    """
    The mean Rouge-L of the answers of `generate` (prompts -> answers) to scored_prompts; of several
    references the closest counts.
    """
    found = []
    for i in progress_bar(range(0, len(asked), batch_size), desc='answers'):
        prompts, references = zip(*asked[i : i + batch_size])
        for said, right in zip(generate(list(prompts)), references):
            found.append(max(rouge_l(said, text) for text in right))
    return statistics.mean(found)


def rouge_l(text, reference):
    """Rouge-L (Eq. 8, beta = 1): the F-measure of the longest common subsequence of words."""
    a, b = (re.findall(r'[a-z0-9]+', t.lower()) for t in (text, reference))
    before = [0] * (len(b) + 1)
    for word in a:
        now = [0]
        for j, other in enumerate(b):
            now.append(before[j] + 1 if word == other else max(before[j + 1], now[j]))
        before = now
    common = before[-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def answer_scores(model, examples, which, max_new_tokens=48):
    """(mean Rouge-L, share of exact answers) of greedy answers to `which`, indices of Examples."""
    tokenizer = load_tokenizer(examples.tokenizer)
    length = min(max_new_tokens, model.config.block_size // 2)
    room = model.config.block_size - length
    prompts = [examples.prompt(i, room).tolist() for i in which]
    said = []
    for start in progress_bar(range(0, len(prompts), 32), desc='answers'):
        rows = greedy_answers(model, prompts[start : start + 32], length, examples.end)
        said += [tokenizer.text(row) for row in rows]
    answers = read_examples(examples.folder / 'val.jsonl')
    right = [answers[i]['output'] for i in which]
    exact = [a.strip() == b.strip() for a, b in zip(said, right)]
    return statistics.mean(map(rouge_l, said, right)), statistics.mean(exact)
