"""MT-Bench: a conversation for each question, in the judge's format."""

import json

import pytest
import torch
from conftest import run_command

from engine.errors import UserError
from extras.mt_bench import answers, read_questions
from model import GPT, GPTConfig

QUESTIONS = [
    dict(question_id=81, category='writing', turns=['Write.', 'Again.']),
    dict(question_id=111, category='math', turns=['2 + 2?', 'x' * 300]),
]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('16x1', vocab_size=257, block_size=256))
    model.save(tmp_path / 'small', 'bytes')
    (tmp_path / 'question.jsonl').write_text('\n'.join(map(json.dumps, QUESTIONS)))
    return tmp_path


def test_answers_are_what_the_judge_reads(folder):
    process = run_command(
        'extras/mt_bench.py',
        folder / 'small',
        f'--questions={folder}/question.jsonl',
        f'--out={folder}/answers.jsonl',
        '--max_new_tokens=8',
        '--device=cpu',
    )
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in open(folder / 'answers.jsonl', encoding='utf-8')]
    assert [row['question_id'] for row in rows] == [81, 111]
    for row in rows:
        assert row['model_id'] == 'small' and row['tstamp'] > 0 and row['answer_id']
        (choice,) = row['choices']
        assert choice['index'] == 0 and len(choice['turns']) == 2


def test_the_second_turn_sees_the_first_answer(folder, monkeypatch):
    seen = []

    def reply(model, tokenizer, ids, new, sampling):
        seen.append((bytes(ids).decode(), sampling.temperature))
        return 'four'

    monkeypatch.setattr('extras.mt_bench.reply', reply)
    monkeypatch.setattr(
        'extras.mt_bench.conversation_encoder',
        lambda name: lambda messages: '|'.join(m['content'] for m in messages).encode(),
    )
    model = GPT(GPTConfig.named('16x1', vocab_size=257, block_size=256))
    found = list(answers(model, str(folder / 'small'), QUESTIONS, 100))
    assert seen[:2] == [('Write.', 0.7), ('Write.|four|Again.', 0.7)]
    assert seen[3] == ('x' * 156, 0.0)  # the end of what does not fit
    assert found[0]['choices'][0]['turns'] == ['four', 'four']


def test_what_is_no_question_is_named(tmp_path):
    (tmp_path / 'q.jsonl').write_text('{"question_id": 1, "turns": ["a"]}\n{"turns": ["b"]}')
    with pytest.raises(UserError, match='q.jsonl, line 2: no question_id and turns'):
        read_questions(str(tmp_path / 'q.jsonl'))
    process = run_command('extras/mt_bench.py', 'nowhere', '--questions=nowhere.jsonl')
    assert process.returncode == 2 and 'no file nowhere.jsonl' in process.stderr
