"""
Text in, text out: the answers of any model, in any vocabulary, as a supervised set that another
model learns from (the bridge of Chain-of-Learngene, section 3.2, and sequence-level distillation),
and how good answers are:

    python extras/bridge.py out/col_gpt2/138m-linit-on-dolly --answers=self-inst.jsonl,vicuna.jsonl
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from configurator import Count, configure
from data.instruct import START, TARGET, Examples, file_records, prompt
from data.prepare import Preparation, fresh_counts, write_corpus
from data.vocabulary import load_tokenizer, tokenizer_of_model
from engine.errors import UserError, run_as_program
from engine.files import read_json
from engine.log import progress_bar
from engine.parallel import choose_device, processes
from engine.report import table
from extras.minillm import Answering, answer
from model import load


def text_generator(name, device='cpu', max_new_tokens=256):
    """prompts -> answers (lists of texts), greedy, of a model, a folder or hub name."""
    tokenizer, model = load_tokenizer(tokenizer_of_model(name)), load(name, device).eval()

    def answers(prompts):
        ids = [[int(i) for i in tokenizer.encode(text)] or [tokenizer.end] for text in prompts]
        found = greedy_answers(model, ids, max_new_tokens, tokenizer.ends)
        return [tokenizer.text(row, asked).strip() for row, asked in zip(found, ids)]

    return answers


def greedy_answers(model, ids, max_new_tokens, ends):
    """A GPT's greedy answers to prompts, both lists of ids, in half of its context at most."""
    device = model.wte.weight.device
    most = min(max_new_tokens, model.config.block_size // 2)
    room = max(1, model.config.block_size - most)
    prompts = [torch.tensor(row[-room:], device=device) for row in ids]
    found = answer(model, prompts, Answering(most, ends, temperature=0))
    return [row[mask].tolist() for row, mask in zip(found.ids, found.mask)]


def write_answers(generate, prompts, path, batch_size=16):
    """
    The answers of `generate` (prompts -> answers) to a list of prompts, kept batch by batch in the
    .jsonl file `path`: an interrupted run continues. Raises UserError for a damaged file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    if path.is_file():
        lines = path.read_text(encoding='utf-8').split('\n')[:-1]  # the last may be cut short
    path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    with open(path, 'a', encoding='utf-8') as file:
        starts = range(len(lines), len(prompts), batch_size)
        for i in progress_bar(starts, desc=f'answers for {path.parent.name}'):
            for answer in generate(prompts[i : i + batch_size]):
                file.write(json.dumps(answer, ensure_ascii=False) + '\n')
            file.flush()
    return [answer for _, answer in file_records(str(path))]


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
    generate = text_generator(ancestor, choose_device(run.device), min(256, run.block_size // 2))
    batches = []
    for split, most in (('train', limit), ('val', max(1, limit // 8))):
        examples = Examples(name, run.data_dir, split)
        tokenizer = load_tokenizer(examples.tokenizer)
        wanted = range(min(len(examples), most) if limit else len(examples))
        asked = [examples.prompt(i, 2**31).tolist() for i in wanted]
        path = Path(f'{out}.answers') / f'{split}.jsonl'
        answers = write_answers(generate, [tokenizer.decode(ids) for ids in asked], path)
        for ids, text in zip(asked, answers):
            said = [*tokenizer.encode_rest(text), int(examples.tokens[-1])]  # ends as theirs
            marks = np.array([0] * len(ids) + [TARGET] * len(said), np.uint8)
            marks[0] |= START
            size, is_val = len(text.encode()), split == 'val'
            batches += [([([*ids, *said], marks.tobytes(), size, is_val)], None)] * bool(text)
    options = Preparation(what, str(out), tokenizer=examples.tokenizer)
    state = dict(counts=fresh_counts(), read=None)
    return write_corpus(batches, 'supervised', options, Path(out), state)


def scored_prompts(path, style='paper'):
    """
    [(prompt, references)] of a .jsonl or .json file of records with `instruction` and maybe
    `input`, or a whole `prompt`; and `output`, a text or a list of texts that are all right. Raises
    UserError.
    """
    if not Path(path).is_file():
        raise UserError(f'no file {path}')
    found = []
    for where, row in file_records(path):
        try:
            references = row['output'] if isinstance(row['output'], list) else [row['output']]
            asked = [row['instruction'], row.get('input') or ''] if 'instruction' in row else None
            asked = asked or [row['prompt']]
            assert references and all(isinstance(text, str) for text in (*asked, *references))
        except (TypeError, KeyError, AttributeError, AssertionError):
            fields = 'instruction (and input) or prompt, and output, as texts'
            raise UserError(f'{where}: not {fields}') from None
        found.append((f'{prompt(*asked, style)}\n' if len(asked) == 2 else asked[0], references))
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
        found += map(rouge_l, generate(list(prompts)), references)
    return statistics.mean(found)


def rouge_l(text, references):
    """
    Rouge-L (Eq. 8, beta = 1): the F-measure of the longest common subsequence of words of a text
    and the closest of some references.
    """
    from rouge_score.rouge_scorer import RougeScorer  # a second, which not every command needs

    return RougeScorer(['rougeL']).score_multi(references, text)['rougeL'].fmeasure


def answer_scores(model, examples, which, max_new_tokens=48):
    """(mean Rouge-L, share of exact answers) of greedy answers to `which`, indices of Examples."""
    tokenizer = load_tokenizer(examples.tokenizer)
    length = min(max_new_tokens, model.config.block_size // 2)
    room = model.config.block_size - length
    prompts = [examples.prompt(i, room).tolist() for i in which]
    said = []
    for start in progress_bar(range(0, len(prompts), 32), desc='answers'):
        rows = greedy_answers(model, prompts[start : start + 32], length, examples.ends)
        said += map(tokenizer.text, rows, prompts[start : start + 32])
    right = [[tokenizer.text(ids[asked].tolist())] for ids, asked in map(examples.fit, which)]
    exact = [a.strip() == b.strip() for a, (b,) in zip(said, right)]
    return statistics.mean(map(rouge_l, said, right)), statistics.mean(exact)


@dataclass
class Scoring:
    """Rouge-L of a model's greedy answers: extras/bridge.py FOLDER --answers=FILE,FILE."""

    model: str = ''  # model folder, or a name on the hub
    answers: tuple[str, ...] = ()  # .jsonl files of instructions and right answers
    answer_tokens: Count = 256  # of an answer, at most
    prompt: Literal['paper', 'plain'] = 'paper'  # of instructions: as data/prepare.py --prompt


def main(argv):
    """Command line: FOLDER, then knobs. Prints 100 x Rouge-L of each file, and the mean."""
    options, _, _ = configure(argv, Scoring, program='extras/bridge.py FOLDER', words=('model',))
    generate = text_generator(options.model, choose_device('auto'), options.answer_tokens)
    scores = {}
    for path in options.answers:
        scores[path] = 100 * mean_rouge(generate, scored_prompts(path, options.prompt))
    scores['average'] = statistics.mean(scores.values())
    print(table([{'file': path, 'Rouge-L': score} for path, score in scores.items()]))


if __name__ == '__main__':
    run_as_program(main)
