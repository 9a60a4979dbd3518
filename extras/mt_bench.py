"""
A model's answers to the questions of MT-Bench (Zheng et al.; Progressive training, Appendix E), in
the format that FastChat's judge reads.

    python extras/mt_bench.py out/posttrain_8b/8b-dpo --questions=question.jsonl

question.jsonl comes with FastChat: a line for each question, with question_id, category and turns.
A question's turns are one conversation, in which the model sees its own first answer. The judge
itself, a model behind an interface that costs money, is FastChat's business.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch

from configurator import Count, Natural, configure
from data.instruct import file_records
from data.vocabulary import load_tokenizer, tokenizer_of_model
from engine.errors import UserError, run_as_program
from engine.files import write_atomically
from engine.parallel import choose_device
from engine.progress import progress_bar
from model import load
from sample import Sampling, conversation_encoder, reply

# by the kind of question, as the benchmark prescribes; 0.7 for any other
TEMPERATURES = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


@dataclass
class Answering:
    """Write a model's answers to MT-Bench: mt_bench.py FOLDER --questions=FILE."""

    model: str = ''  # model folder, or a name on the hub
    questions: str = ''  # FastChat's question.jsonl
    out: str = ''  # file of the answers; empty: out/mt_bench/NAME.jsonl
    name: str = ''  # of the model in them; empty: its folder's
    max_new_tokens: Count = 1024  # of an answer, as far as the context goes
    seed: Natural = 0  # of sampling
    device: str = 'auto'  # cuda, mps or cpu


def read_questions(path):
    """The questions of a file, dicts. Raises UserError, with its number, for a bad one."""
    found = []
    for where, question in file_records(path):
        try:
            turns = question['turns']
            assert isinstance(question['question_id'], int | str) and turns
            assert isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
        except (TypeError, KeyError, AssertionError):
            raise UserError(f'{where}: no question_id and turns') from None
        found.append(question)
    return found


def answers(model, name, questions, max_new_tokens):
    """
    Yield the answer record of every question. name: the model's folder. A conversation that does
    not fit the context loses its beginning.
    """
    tokenizer, encode = load_tokenizer(tokenizer_of_model(name)), conversation_encoder(name)
    new = min(max_new_tokens, model.config.block_size // 2)
    for question in progress_bar(questions, desc='questions'):
        temperature = TEMPERATURES.get(str(question.get('category')), 0.7)
        sampling = Sampling(temperature, stop=tokenizer.ends)
        messages, said = [], []
        for turn in question['turns']:
            messages.append(dict(role='user', content=turn))
            ids = encode(messages)[-(model.config.block_size - new) :]
            said.append(reply(model, tokenizer, ids, new, sampling))
            messages.append(dict(role='assistant', content=said[-1]))
        yield dict(question_id=question['question_id'], choices=[dict(index=0, turns=said)])


def main(argv):
    """Command line: FOLDER, then knobs."""
    words = ('model',)
    options, _, _ = configure(argv, Answering, program='extras/mt_bench.py FOLDER', words=words)
    if not (options.model and options.questions):
        raise UserError('missing arguments; usage: mt_bench.py FOLDER --questions=question.jsonl')
    if not Path(options.questions).is_file():
        raise UserError(f'no file {options.questions}')
    questions = read_questions(options.questions)
    model = load(options.model, choose_device(options.device)).eval()
    name = options.name or Path(options.model).name
    torch.manual_seed(options.seed)
    lines = []
    for record in answers(model, options.model, questions, options.max_new_tokens):
        record |= dict(answer_id=f'{name}-{record["question_id"]}', model_id=name)
        lines.append(json.dumps(record | dict(tstamp=time.time()), ensure_ascii=False))
    out = Path(options.out or Path('out', 'mt_bench', f'{name}.jsonl'))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, '\n'.join(lines) + '\n')
    print(f'{out}: the answers to {len(lines)} questions')


if __name__ == '__main__':
    run_as_program(main)
