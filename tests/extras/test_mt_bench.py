"""MT-Bench: a conversation for each question, in the judge's format."""

import json

import pytest
import torch
from conftest import run_command

from extras import mt_bench
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
        '-m',
        'extras.mt_bench',
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
        assert row['model_id'] == 'small' and row['answer_id']
        (choice,) = row['choices']
        assert choice['index'] == 0 and len(choice['turns']) == 2


def test_the_second_turn_sees_the_first_answer(folder, monkeypatch):
    seen = []

    def reply(model, tokenizer, ids, new, sampling):
        seen.append((bytes(ids).decode(), sampling.temperature))
        return 'four'

    def encoder(name):
        return lambda messages: '|'.join(m['content'] for m in messages).encode()

    monkeypatch.setattr(mt_bench, 'reply', reply)
    monkeypatch.setattr(mt_bench, 'conversation_encoder', encoder)
    out = folder / 'a.jsonl'
    mt_bench.main([str(folder / 'small'), f'--questions={folder}/question.jsonl', f'--out={out}'])
    assert seen[:2] == [('Write.', 0.7), ('Write.|four|Again.', 0.7)]
    assert seen[2:] == [('2 + 2?', 0.0), ('2 + 2?|four|' + 'x' * 300, 0.0)]
    first = json.loads(out.read_text().splitlines()[0])
    assert first['choices'][0]['turns'] == ['four', 'four']


def test_a_missing_file_of_questions_is_one_line():
    process = run_command('-m', 'extras.mt_bench', 'nowhere', '--questions=nowhere.jsonl')
    assert process.returncode == 2 and 'nowhere.jsonl' in process.stderr
