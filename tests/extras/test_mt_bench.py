"""MT-Bench: a conversation for each question, in the judge's format."""

import json

import pytest
import torch
from conftest import succeeds, write_lines

from extras import mt_bench
from model import GPT, GPTConfig


@pytest.fixture
def line(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('16x1', vocab_size=257, block_size=256))
    model.save(tmp_path / 'small', 'bytes')
    questions = [
        dict(question_id=81, category='writing', turns=['Write.', 'Again.']),
        dict(question_id=111, category='math', turns=['2 + 2?', 'x' * 300]),
    ]
    path = write_lines(tmp_path / 'q.jsonl', questions)
    return f'-m extras.mt_bench {tmp_path}/small --questions={path} --out={tmp_path}/a.jsonl'


def test_answers_are_what_the_judge_reads(line, tmp_path):
    succeeds(f'{line} --max_new_tokens=8')
    rows = list(map(json.loads, (tmp_path / 'a.jsonl').read_text().splitlines()))
    assert [row['question_id'] for row in rows] == [81, 111]
    for row in rows:
        (choice,) = row['choices']
        assert row['model_id'] == 'small' and row['answer_id']
        assert choice['index'] == 0 and len(choice['turns']) == 2


def test_the_second_turn_sees_the_first_answer(line, monkeypatch):
    seen = []

    def reply(model, tokenizer, ids, new, sampling):
        seen.append((bytes(ids).decode(), sampling.temperature))
        return 'four'

    def encoder(name):
        return lambda messages: '|'.join(m['content'] for m in messages).encode()

    monkeypatch.setattr(mt_bench, 'reply', reply)
    monkeypatch.setattr(mt_bench, 'conversation_encoder', encoder)
    succeeds(line)
    assert seen[:2] == [('Write.', 0.7), ('Write.|four|Again.', 0.7)]
    assert seen[2:] == [('2 + 2?', 0.0), ('2 + 2?|four|' + 'x' * 300, 0.0)]
