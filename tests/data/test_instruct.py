"""
Instructions and answers: the papers' prompts, chat templates, targets that are answers and nothing
else; what is longer than a sequence; every convention of records.
"""

import json
import shutil

import numpy as np
import pytest
import torch

import train
from data.instruct import (
    Examples,
    conversations,
    file_records,
    kind_of,
    prompt,
    shuffled,
    supervised_source,
)
from data.loader import Share
from data.prepare import Preparation, prepare
from engine.errors import UserError
from engine.stage import Result
from model import GPT, load


def test_prompts_are_appendix_cs():
    assert prompt('Do.', '').endswith('Instruction:\nDo.\n\nResponse:')
    assert prompt('Do.', 'This.').endswith('Instruction:\nDo.\n\nInput:\nThis.\n\nResponse:')
    assert prompt('f(x)', '', 'plain') == 'f(x)' and prompt('a', 'b', 'plain') == 'a\nb'


def made(folder, rows, **how):
    """The set of rows that are written to a file, on bytes: (train, val) Examples."""
    folder.mkdir(exist_ok=True)
    (folder / 'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    how = dict(val_fraction=0.2, tokenizer='bytes') | how
    prepare(Preparation(str(folder / 'mine.jsonl'), str(folder / 'mine'), **how))
    return [Examples('mine', folder, split) for split in ('train', 'val')]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    made(
        folder,
        [
            dict(instruction=f'Say {i}', input='x' * (i % 5), output=f'It is {i}.')
            for i in range(60)
        ],
    )
    return folder


def words(ids):
    return bytes(i for i in ids.tolist() if 0 <= i < 256).decode()


def test_only_answers_are_asked_for(prepared):
    seen = []
    for split in ('train', 'val'):
        examples = Examples('mine', prepared, split)
        x, y = examples.rows(np.arange(len(examples)), 64)
        for inputs, targets in zip(x, y):
            answer = words(targets[targets != -100])
            n = int(answer.removeprefix('It is ').removesuffix('.'))
            before = prompt(f'Say {n}', 'x' * (n % 5), 'plain') + '\n'
            assert words(inputs).startswith(before + answer)
            assert (targets != -100).argmax() == len(before) - 1
            assert targets[targets != -100][-1] == 256
            seen.append(n)
    assert sorted(seen) == list(range(60))


def test_every_answer_of_a_conversation_is_a_target(tmp_path):
    talk = [('user', 'q'), ('assistant', 'one'), ('user', 'more'), ('assistant', 'two')]
    rows = [
        dict(messages=[dict(role=role, content=f'{text} {i:2}') for role, text in talk])
        for i in range(20)
    ]
    examples, _ = made(tmp_path, rows)
    (x,), (y,) = examples.rows([0], 64)
    assert [words(part)[:3] for part in np.split(y[y != -100], [7])] == ['one', 'two']
    assert (y == 256).sum() == 2 and words(x).startswith('q ')
    (short,), (wanted,) = examples.rows([0], 12)  # loses its end, not what its first answer needs
    assert words(short) == words(x)[: len(words(short))] and 256 in wanted


def test_what_is_asked_at_length_loses_its_middle_and_cuts_are_said(tmp_path, capsys):
    rows = [
        dict(instruction='Summarise.', input=f'Lead {i}. ' + 'And so on. ' * 100, output='Short.')
        for i in range(10, 30)
    ]
    examples, _ = made(tmp_path, rows, prompt='paper')
    for ids in examples.rows(range(len(examples)), 600)[0]:
        assert words(ids).startswith('Below is an instruction') and ids[-1] < 256
        assert 'Summarise.\n\nInput:\nLead' in words(ids)
        assert words(ids).endswith('so on. \n\nResponse:\nShort.')
    assert len(examples.prompt(0, 40)) == 40
    supervised_source(train.Run(data='mine', data_dir=str(tmp_path), block_size=600))
    assert f'{len(examples)} of {len(examples)} examples are cut to 600' in capsys.readouterr().out


def test_prompts_do_not_teach(prepared):
    """The gradient is that of the answers' cross entropy alone."""
    torch.manual_seed(0)
    model = GPT(train.Run(data_dir='nowhere').model_config('16x1', block_size=64))
    x, y = map(torch.from_numpy, Examples('mine', prepared, 'train').rows([3, 4], 64))
    logits = model(x).logits.log_softmax(-1)
    asked = y != -100
    assert model(x, y).loss.item() == pytest.approx(
        -logits[asked].gather(-1, y[asked][:, None]).mean().item(), rel=1e-5
    )


def test_every_epoch_has_every_example_once():
    first, second = shuffled(np.arange(10), 10, 1), shuffled(np.arange(10, 20), 10, 1)
    assert sorted(first) == sorted(second) == list(range(10)) and list(first) != list(second)


def test_fine_tuning_is_a_run_like_any_other(prepared, tmp_path):
    common = [f'--data_dir={prepared}', '--data=mine', '--block_size=48', '--batch_size=4']
    common += ['--device=cpu', '--learning_rate=0.01']
    train.main([*common, '--size=16x1', '--tokens=4000', f'--out_dir={tmp_path / "a"}'])
    more = [f'--init_from={tmp_path / "a" / "16x1"}', '--tokens=2000', f'--out_dir={tmp_path}/b']
    train.main([*common, *more])
    first, second = (tmp_path / name for name in ('a/16x1', 'b/16x1-continued'))
    assert Result.of(second).val_loss < Result.of(first).val_loss < 4
    assert load(second).config.vocab_size == 257
    shutil.copytree(prepared / 'mine', prepared / 'other')
    two = ['--data=mine,other', '--size=16x1', '--tokens=100', f'--out_dir={tmp_path / "c"}']
    with pytest.raises(UserError, match='cannot be mixed'):
        train.main([*common, *two])


def test_text_and_instructions_are_told_apart(prepared, data_dir):
    assert kind_of(dict(text='a')) == kind_of([1]) == 'text'
    with pytest.raises(UserError, match='is a set of text, not supervised'):
        Examples('pydocs', data_dir, 'train')
    source = supervised_source(train.Run(data='mine', data_dir=str(prepared), block_size=32))
    assert sum(count for *_, count in source.validation(4, Share())) == sum(
        count for rank in (0, 1) for *_, count in source.validation(4, Share('cpu', rank, 2))
    )


def said(*texts):
    return [dict(role=role, content=text) for role, text in zip(('user', 'assistant'), texts)]


@pytest.mark.parametrize(
    'record, expected',
    [
        (dict(prompt='2 + 2 =', completion='4'), said('2 + 2 =', '4')),
        (dict(messages=said('Hello', 'Hi')), said('Hello', 'Hi')),
        (dict(instruction='a', input=None, output='b'), said('a', 'b')),
        (dict(prompt=said('a'), completion=said('a', 'b')[1:]), said('a', 'b')),
        (dict(prompt='a', chosen=said('a', 'b'), rejected=said('a', 'c')), said('a', 'b')),
    ],
)
@pytest.mark.parametrize('suffix', ['jsonl', 'json'])
def test_records_of_other_conventions(tmp_path, record, expected, suffix):
    path, records = tmp_path / f'own.{suffix}', [record] * 3
    lines = '\n'.join(map(json.dumps, records))
    path.write_text(lines if suffix == 'jsonl' else json.dumps(records, indent=1))
    for _, row in file_records(str(path)):
        assert kind_of(row) != 'text' and conversations(row, 'auto')[0] == expected


def test_what_follows_the_last_answer_is_left_out(tmp_path):
    answer = [*said('', 'a')[1:], *said('thanks')]
    rows = [dict(prompt=said(f'q {i}'), completion=answer) for i in range(20)]
    ids, asked = made(tmp_path, rows)[0].fit(0)
    assert ids[-1] == 256 and words(ids[asked]) == 'a'
