"""
Instructions and answers: the papers' prompts, masked in the loss; every set's rows in words;
files that are none.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import train
from data.instruct import (
    Examples,
    file_examples,
    is_supervised,
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
    assert prompt('Do.', '').endswith(
        'Instruction:\nDo.\n\nResponse:\n'
    ) and 'Input:' not in prompt('Do.', '')
    assert (
        prompt('Do.', 'This.').endswith('Instruction:\nDo.\n\nInput:\nThis.\n\nResponse:\n')
        and prompt('f(x)', '', 'plain') == 'f(x)\n'
    )


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    rows = [
        dict(instruction=f'Say {i}', input='x' * (i % 5), output=f'It is {i}.') for i in range(60)
    ]
    (folder / 'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    prepare(
        Preparation(
            corpus=str(folder / 'mine.jsonl'),
            out=str(folder / 'mine'),
            tokenizer='bytes',
            prompt='plain',
            val_fraction=0.2,
        )
    )
    return folder


def test_only_answers_are_asked_for(prepared):
    for split in ('train', 'val'):
        examples, texts = (
            Examples('mine', prepared, split),
            [
                json.loads(line)
                for line in (prepared / 'mine' / f'{split}.jsonl').read_text().splitlines()
            ],
        )
        x, y = examples.rows(np.arange(len(examples)), 64)
        for inputs, targets, example in zip(x, y, texts, strict=True):
            asked = targets != -100
            assert (
                bytes(targets[asked][:-1].tolist()).decode() == example['output']
                and targets[asked][-1] == 256
            )
            before = prompt(example['instruction'], example['input'], 'plain')
            assert (
                bytes(inputs[: len(before)].tolist()).decode() == before
                and asked.argmax() == len(before) - 1
            )
    assert len(Examples('mine', prepared, 'train')) + len(Examples('mine', prepared, 'val')) == 60


def test_a_long_article_loses_its_end_and_keeps_the_instruction(tmp_path):
    rows = []
    for i in range(10, 20):
        article, talk = f'The lead {i}. ' + 'And so on. ' * 100, f'{i}. ' + 'A talk. ' * 100
        rows.append(dict(instruction='Summarise.', input=article, output='Short.'))
        rows.append(dict(instruction=talk + 'What now?', input='', output='Now.'))
    (tmp_path / 'long.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    out = str(tmp_path / 'long')
    prepare(Preparation(str(tmp_path / 'long.jsonl'), out, tokenizer='bytes', val_fraction=0.5))
    shown = set()
    for split in ('train', 'val'):
        examples = Examples('long', tmp_path, split)
        for ids in examples.rows(range(len(examples)), 300)[0]:
            text = bytes(i for i in ids.tolist() if i < 256).decode()
            assert text.endswith(('Response:\nShort.', 'Response:\nNow.'))
            assert len(ids) == 300 and ids[-1] < 256
            if text.endswith('Short.'):
                assert re.search('Summarise.\n\nInput:\nThe lead \\d\\d. And so on.', text)
            else:
                assert 'A talk. What now?\n\nResponse' in text and 'Instruction' not in text
            shown.add(text[-6:])
    assert len(shown) == 2


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


def test_fine_tuning_is_a_run_like_any_other(prepared, tmp_path, capsys):
    common = [
        f'--data_dir={prepared}',
        '--data=mine',
        '--block_size=48',
        '--batch_size=4',
        '--device=cpu',
        '--learning_rate=0.01',
    ]
    train.main([*common, '--size=16x1', '--tokens=4000', f'--out_dir={tmp_path / "a"}'])
    train.main(
        [
            *common,
            f'--init_from={tmp_path / "a" / "16x1"}',
            '--tokens=2000',
            f'--out_dir={tmp_path / "b"}',
        ]
    )
    assert (
        Result.of(tmp_path / 'b' / '16x1-continued').val_loss
        < Result.of(tmp_path / 'a' / '16x1').val_loss
        < 4
    )
    assert load(tmp_path / 'b' / '16x1-continued').config.vocab_size == 257
    shutil.copytree(prepared / 'mine', prepared / 'other')
    two = ['--data=mine,other', '--size=16x1', '--tokens=100', f'--out_dir={tmp_path / "c"}']
    with pytest.raises(UserError, match='cannot be mixed'):
        train.main([*common, *two])


@pytest.mark.parametrize(
    'text, word',
    [
        ('', 'no examples|gave no'),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', 'record 2: not'),
        ('{"instruction": "a", "output": 3}', 'record 1: not'),
    ],
)
def test_files_that_are_no_examples(tmp_path, text, word):
    (tmp_path / 'bad.jsonl').write_text(text)
    with pytest.raises(UserError, match=word):
        prepare(
            Preparation(
                corpus=str(tmp_path / 'bad.jsonl'), out=str(tmp_path / 'bad'), tokenizer='bytes'
            )
        )
    assert not (tmp_path / 'bad').exists()


def test_text_and_instructions_are_told_apart(prepared, data_dir, tmp_path):
    (tmp_path / 'text.jsonl').write_text('{"text": "a"}\n')
    assert (
        is_supervised('dolly')
        and is_supervised(str(prepared / 'mine.jsonl'))
        and not is_supervised(str(tmp_path / 'text.jsonl'))
        and not is_supervised('pydocs')
    )
    with pytest.raises(UserError, match='is text, not instructions'):
        Examples('pydocs', data_dir, 'train')
    source = supervised_source(train.Run(data='mine', data_dir=str(prepared), block_size=32))
    assert sum(count for *_, count in source.validation(4, Share())) == sum(
        count for rank in (0, 1) for *_, count in source.validation(4, Share('cpu', rank, 2))
    )


@pytest.mark.parametrize(
    'record, expected',
    [
        (dict(prompt='2 + 2 =', completion='4'), ('2 + 2 =', '4')),
        (
            dict(
                messages=[
                    dict(role='system', content='Be brief.'),
                    dict(role='user', content='Hello'),
                    dict(role='assistant', content='Hi'),
                ]
            ),
            ('Be brief.\nHello', 'Hi'),
        ),
        (dict(instruction='a', output='b'), ('a', 'b')),
    ],
)
@pytest.mark.parametrize('suffix', ['jsonl', 'json'])
def test_records_of_other_conventions(tmp_path, record, expected, suffix):
    records = [record] * 20
    text = (
        '\n'.join(map(json.dumps, records)) if suffix == 'jsonl' else json.dumps(records, indent=1)
    )
    path = tmp_path / f'own.{suffix}'
    path.write_text(text)
    assert is_supervised(str(path))
    found = list(file_examples(Preparation(str(path), val_fraction=0.2)))
    assert len(found) == 20
    example = found[0][0]
    assert (example['instruction'], example['output'], example['input']) == (*expected, '')


def test_a_conversation_without_an_answer_is_refused(tmp_path):
    path = tmp_path / 'own.jsonl'
    path.write_text(json.dumps(dict(messages=[dict(role='user', content='Hello')])))
    with pytest.raises(UserError, match='record 1: not'):
        list(file_examples(Preparation(str(path))))
