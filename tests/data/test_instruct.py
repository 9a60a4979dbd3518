"""
Instructions and answers: the papers' prompts, chat templates, targets that are answers and nothing
else; what is longer than a sequence; every convention of records.
"""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import refuses, succeeds, train_tokenizer, write_lines

from data.instruct import (
    SETS,
    Examples,
    conversations,
    file_records,
    filled,
    kind_of,
    prompt,
    supervised_source,
)
from data.prepare import Preparation, prepare
from data.vocabulary import load_tokenizer
from engine.errors import UserError
from engine.stage import Result
from model import GPT, GPTConfig
from train import Run


def test_prompts_are_appendix_cs():
    assert prompt('Do.', '').endswith('Instruction:\nDo.\n\nResponse:')
    assert prompt('Do.', 'This.').endswith('Instruction:\nDo.\n\nInput:\nThis.\n\nResponse:')
    assert prompt('f(x)', '', 'plain') == 'f(x)' and prompt('a', 'b', 'plain') == 'a\nb'


OPTIONS = 'A. x\nB. y'


@pytest.mark.parametrize(
    'name, row, expected',
    [
        ('dolly', '{"instruction": "a", "context": "b", "response": "c"}', ('a', 'b', 'c')),
        (
            'boolq',
            '{"question": "is it", "passage": "b", "answer": true}',
            ('is it? Answer true or false.', 'b', 'true'),
        ),
        (
            'hellaswag',
            '{"ctx": "b", "endings": ["x", "y"], "label": "1"}',
            (f'Which ending follows?\n{OPTIONS}', 'b', 'B'),
        ),
        (
            'winogrande',
            '{"sentence": "b", "option1": "x", "option2": "y", "answer": "1"}',
            (f'What does _ stand for?\n{OPTIONS}', 'b', 'A'),
        ),
        ('mmlu', '{"question": "a", "choices": ["x", "y"], "answer": 1}', ('a', OPTIONS, 'B')),
        (
            'arc_easy',
            '{"question": "a", "answerKey": "A",'
            '"choices": {"text": ["x", "y"], "label": ["A", "B"]}}',
            ('a', OPTIONS, 'A'),
        ),
    ],
)
def test_rows_of_public_sets_are_filled_in(name, row, expected):
    found = filled(json.loads(row), *SETS[name][1:])
    assert (found['instruction'], found['input'], found['output']) == expected


def made(folder, rows, **how):
    """The set of rows that are written to a file, on bytes: (train, val) Examples."""
    path = write_lines(folder / 'mine.jsonl', rows)
    how = dict(val_fraction=0.2, tokenizer='bytes') | how
    prepare(Preparation(path, str(folder / 'mine'), **how))
    return [Examples('mine', folder, split) for split in ('train', 'val')]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    rows = [dict(instruction=f'Say {i}', input='x' * (i % 5), output=f'{i}.') for i in range(60)]
    made(folder, rows)
    return folder


def words(ids):
    return bytes(i for i in ids.tolist() if 0 <= i < 256).decode()


def test_only_answers_are_asked_for(prepared):
    seen = []
    for split in ('train', 'val'):
        examples = Examples('mine', prepared, split)
        for x, y in zip(*examples.rows(np.arange(len(examples)), 64)):
            answer = words(y[y != -100])
            n = int(answer[:-1])
            before = prompt(f'Say {n}', 'x' * (n % 5), 'plain') + '\n'
            assert words(x).startswith(before + answer) and y[y != -100][-1] == 256
            assert (y != -100).argmax() == len(before) - 1
            seen.append(n)
    assert sorted(seen) == list(range(60))


def said(*texts):
    turns = zip(('user', 'assistant') * 3, texts)
    return [dict(role=role, content=text) for role, text in turns]


def test_every_answer_of_a_conversation_is_a_target(tmp_path):
    rows = [dict(messages=said('q', f'one {i:2}', 'more', f'two {i:2}')) for i in range(20)]
    examples, _ = made(tmp_path, rows)
    (x,), (y,) = examples.rows([0], 64)
    assert [words(part)[:3] for part in np.split(y[y != -100], [7])] == ['one', 'two']
    assert (y == 256).sum() == 2 and words(x).startswith('q\n')


def test_what_is_asked_at_length_loses_its_middle_and_cuts_are_said(tmp_path, capsys):
    more = 'And so on. ' * 100
    rows = [
        dict(instruction='Summarise.', input=f'Lead {i}. {more}', output='Short.')
        for i in range(10, 30)
    ]
    examples, _ = made(tmp_path, rows, prompt='paper')
    text = words(examples.rows([0], 600)[0][0])
    assert text.startswith('Below is an instruction') and 'Summarise.\n\nInput:\nLead' in text
    assert text.endswith('so on. \n\nResponse:\nShort.')
    assert len(examples.prompt(0, 40)) == 40
    supervised_source(Run(data='mine', data_dir=str(tmp_path), block_size=600))
    assert f'{len(examples)} of {len(examples)} examples are cut to 600' in capsys.readouterr().out


def test_fine_tuning_is_a_run_like_any_other(prepared, data_dir, tmp_path):
    line = f'train.py --data_dir={prepared} --block_size=48 --batch_size=4 --learning_rate=0.01'
    succeeds(f'{line} --data=mine --size=16x1 --tokens=4000 --out_dir={tmp_path}/a')
    more = f'--data=mine --init_from={tmp_path}/a/16x1 --tokens=2000 --out_dir={tmp_path}/b'
    succeeds(f'{line} {more}')
    first, second = (Result.of(tmp_path / name) for name in ('a/16x1', 'b/16x1-continued'))
    assert second.val_loss < first.val_loss < 4
    shutil.copytree(prepared / 'mine', prepared / 'other', dirs_exist_ok=True)
    refuses(f'{line} --data=mine,other --size=16x1 --out_dir={tmp_path}/c', 'cannot be mixed')
    with pytest.raises(UserError, match='is a set of text, not supervised'):
        Examples('pydocs', data_dir, 'train')


@pytest.mark.parametrize(
    'record, expected',
    [
        (dict(prompt='2 + 2 =', completion='4'), said('2 + 2 =', '4')),
        (dict(prompt=said('a'), completion=said('a', 'b')[1:]), said('a', 'b')),
        (dict(prompt='a', chosen=said('a', 'b'), rejected=said('a', 'c')), said('a', 'b')),
    ],
)
def test_records_of_other_conventions(tmp_path, record, expected):
    assert kind_of(dict(text='a')) == kind_of([1]) == 'text'
    (tmp_path / 'a.json').write_text(json.dumps([record] * 3, indent=1))
    for _, row in file_records(str(tmp_path / 'a.json')):
        assert kind_of(row) != 'text' and conversations(row, 'auto')[0] == expected


# ----------------------------------------------------------------------------------------------
# chat templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def chat(tmp_path):
    """(a model's folder with a chat template, the path of 41 conversations)."""
    pytest.importorskip('tokenizers')
    pytest.importorskip('transformers')
    name = train_tokenizer(tmp_path / 'm', '<|im_start|>', '<|im_end|>')
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (tmp_path / 'm' / 'tokenizer_config.json').write_text(settings)
    (tmp_path / 'm' / 'chat_template.jinja').write_text(CHATML)
    shape = dict(vocab_size=load_tokenizer(name).vocab_size, block_size=256)
    GPT(GPTConfig.named('16x1', **shape)).save(tmp_path / 'm', name)
    brief = dict(role='system', content='Be brief.')
    talks = [said(f'q {i}', f'a {i}', 'more', 'b') for i in range(40)]
    talks.append(said('what is <|im_end|>?', 'an end'))
    rows = [dict(messages=[brief, *talk]) for talk in talks]
    return name, write_lines(tmp_path / 'talk.jsonl', rows)


def test_a_chat_is_trained_in_the_format_in_which_it_is_used(tmp_path, chat):
    import transformers

    name, path = chat
    out = succeeds(f'data/prepare.py {path} --tokenizer={name} --out={tmp_path}/talk')
    assert '1 rows cannot be used and are left out; the first: ' in out
    assert 'line 41: UserError: a message holds the control token <|im_end|>' in out
    theirs = transformers.AutoTokenizer.from_pretrained(name)
    ids, asked = Examples('talk', tmp_path, 'train').fit(0)
    begins = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq '
    assert theirs.decode(ids).startswith(begins)
    answers = theirs.decode(ids[asked]).split('<|im_end|>')
    assert [answer[:1] for answer in answers] == ['a', 'b', '']
    line = f'train.py --init_from={name} --data_dir={tmp_path} --data=talk --tokens=512'
    out = succeeds(f'{line} --block_size=24 --batch_size=2 --out_dir={tmp_path}/run')
    assert 'examples are cut to 24 tokens' in out
    made = tmp_path / 'run' / 'm-continued'
    end = json.loads((made / 'generation_config.json').read_text())['eos_token_id']
    assert theirs.convert_ids_to_tokens(end) == '<|im_end|>'
    assert end in load_tokenizer(str(made)).ends and (made / 'chat_template.jinja').is_file()


def test_a_template_without_transformers_is_one_line(tmp_path, chat, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    words = 'need the package transformers: pip install'
    refuses(f'data/prepare.py {chat[1]} --tokenizer={chat[0]} --out={tmp_path}/talk', words)
