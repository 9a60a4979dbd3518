"""
A model's answers to the questions of MT-Bench (Zheng et al.; Progressive training, Appendix E), in
the format that FastChat's judge reads.

    python -m extras.mt_bench out/posttrain_8b/progressive_8b-8b-dpo --questions=question.jsonl

question.jsonl comes with FastChat: a line for each question, with question_id, category and turns.
A question's turns are one conversation, in which the model sees its own first answer. Judging them,
by a commercial model, is left to FastChat.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import Count, configure
from data.instruct import file_records
from data.vocabulary import load_tokenizer, tokenizer_of_model
from engine.errors import run_as_program
from engine.files import write_atomically
from engine.log import progress_bar
from engine.parallel import choose_device
from model import load
from sample import Sampling, conversation_encoder, reply

# sampling temperatures by category, as the benchmark prescribes; 0.7 for any other
TEMPERATURES = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


@dataclass
class Answering:
    """Write a model's answers to MT-Bench: mt_bench.py FOLDER --questions=FILE."""

    model: str = ''  # model folder, or a name on the hub
    questions: str = 'question.jsonl'  # FastChat's
    out: str = ''  # file of the answers; empty: NAME.jsonl
    max_new_tokens: Count = 1024  # of an answer
    device: str = 'auto'  # cuda, mps or cpu


def main(argv):
    """Command line: FOLDER, then knobs."""
    options, _, _ = configure(
        argv, Answering, program='python -m extras.mt_bench', words=('model',)
    )
    questions = list(file_records(options.questions))
    model = load(options.model, choose_device(options.device)).eval()
    tokenizer = load_tokenizer(tokenizer_of_model(options.model))
    encode, lines = conversation_encoder(options.model), []
    name = Path(options.model).name
    torch.manual_seed(0)
    for _, question in progress_bar(questions, desc='questions'):
        temperature = TEMPERATURES.get(question.get('category'), 0.7)
        sampling, messages = Sampling(temperature, stop=tokenizer.ends), []
        for turn in question['turns']:
            messages.append(dict(role='user', content=turn))
            said = reply(model, tokenizer, encode(messages), options.max_new_tokens, sampling)
            messages.append(dict(role='assistant', content=said))
        number, said = question['question_id'], [m['content'] for m in messages[1::2]]
        record = dict(question_id=number, answer_id=f'{name}-{number}', model_id=name)
        record['choices'] = [dict(index=0, turns=said)]
        lines.append(json.dumps(record, ensure_ascii=False))
    out = options.out or f'{name}.jsonl'
    write_atomically(out, '\n'.join(lines) + '\n')
    print(f'{out}: the answers to {len(lines)} questions')


if __name__ == '__main__':
    run_as_program(main)
