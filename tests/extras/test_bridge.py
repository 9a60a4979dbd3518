"""
Bridges: answers across two vocabularies, from any model, going on after an interruption; and
Rouge-L.
"""

import json

import pytest
import torch
from conftest import run_command

import extras.bridge as bridge
import train
from data.instruct import Examples, prompt
from data.prepare import Preparation, prepare
from engine.errors import UserError
from engine.stage import Result
from extras.bridge import rouge_l, scored_prompts, text_generator, write_answers
from model import GPT, GPTConfig


def test_rouge_l_is_the_share_of_the_longest_common_subsequence():
    for text, reference, common, words in (
        ('the cat sat on the mat', 'The cat lay on a mat.', 4, 12),
        ('a b c', 'c b a', 1, 6),
        ('Return 12 items, now!', 'return items 12 now', 3, 8),
        ('', 'x', 0, 1),
    ):
        assert rouge_l(text, ['another', reference]) == pytest.approx(2 * common / words)


def test_a_bridge_between_two_vocabularies(data_dir, tmp_path):
    pytest.importorskip('tokenizers')
    from conftest import train_tokenizer

    train_tokenizer('byte-level', tmp_path / 'ancestor', 300)
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, block_size=64)).save(
        tmp_path / 'ancestor'
    )
    run = train.Run(data_dir=str(data_dir), block_size=64, device='cpu')
    folder = bridge.pseudo_answers(
        str(tmp_path / 'ancestor'), 'signatures', run, tmp_path / 'bridge-data', limit=24
    )
    examples, meta = (
        Examples('bridge-data', tmp_path, 'train'),
        json.loads((folder / 'meta.json').read_text()),
    )
    assert meta['tokenizer'] == 'bytes' and 0 < len(examples) <= 24
    said = text_generator(str(tmp_path / 'ancestor'), max_new_tokens=32)
    ids, asked = examples.fit(0)
    question, answer = (bytes(part.tolist()).decode() for part in (ids[~asked], ids[asked][:-1]))
    assert said([question]) == [answer]
    assert (
        bridge.pseudo_answers(str(tmp_path / 'ancestor'), 'signatures', run, folder, limit=24)
        == folder
    )  # made once
    with pytest.raises(
        UserError, match='holds 24 answers of .*ancestor to signatures, not all answers of another'
    ):
        bridge.pseudo_answers('another', 'signatures', run, folder)


def test_a_bridges_ancestor_is_tuned_in_its_own_vocabulary_and_paid_for(data_dir, tmp_path):
    """It answers as it was tuned, another vocabulary learns that, and the ledger has the cost."""
    pytest.importorskip('tokenizers')
    from conftest import train_tokenizer

    big, data = tmp_path / 'big', tmp_path / 'data'
    train_tokenizer('byte-level', big, 300)
    shape = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=300, block_size=64)
    GPT(GPTConfig(**shape)).save(big)
    data.mkdir()
    (data / 'pydocs').symlink_to(data_dir / 'pydocs')
    rows = [json.dumps(dict(instruction=f'Count to {i}.', output=f'{i}')) for i in range(40)]
    (tmp_path / 'tasks.jsonl').write_text('\n'.join(rows))
    tasks = str(tmp_path / 'tasks.jsonl')
    how = dict(tokenizer=str(big), val_fraction=0.2)
    prepare(Preparation(tasks, str(data / 'tasks_big'), **how))
    prepare(Preparation(tasks, str(data / 'tasks'), **how | dict(tokenizer='bytes')))
    words = ['--ancestor_size=16x2', '--chain=16x1', '--descendants=', '--baselines=']
    words += [f'--bridge={big}', '--bridge_data=tasks_big', '--sft_data=tasks']
    words += ['--bridge_answers=16', '--sft_epochs=1', '--ancestor_tokens=640', '--tokens=640']
    words += ['--block_size=64', '--batch_size=4', '--eval_tokens=512', '--answers=4']
    out = [f'--data_dir={data}', f'--out_dir={tmp_path / "run"}', '--device=cpu']
    train.main(['--method=col', *words, *out])
    results = {p.parent.name: Result.of(p.parent) for p in tmp_path.glob('run/*/result.json')}
    tuned, made = results['bridge-ancestor'], results['bridge']
    assert tuned.tokens > 0 and made.tokens > 0
    meta = json.loads((tmp_path / 'run' / 'bridge-data-1337' / 'meta.json').read_text())
    assert meta['corpus'].endswith('bridge-ancestor to tasks') and meta['tokenizer'] == 'bytes'
    answers = 2 * tuned.params * 16 * 64
    spent = results['ancestor'].flops + tuned.flops + answers
    assert made.inherited_flops == pytest.approx(spent)


def test_answers_go_on_where_they_were_interrupted(tmp_path):
    prompts, asked = [f'q{i}' for i in range(10)], []

    def generate(some):
        asked.extend(some)
        if len(asked) > 6:
            raise KeyboardInterrupt
        return ['a'] * len(some)

    path = tmp_path / 'x' / 'a.jsonl'
    with pytest.raises(KeyboardInterrupt):
        write_answers(generate, prompts, path, batch_size=4)
    with open(path, 'a') as file:
        file.write('"cut sho')
    found = write_answers(lambda some: [f'b of {p}' for p in some], prompts, path, batch_size=4)
    assert found == ['a'] * 4 + [f'b of q{i}' for i in range(4, 10)]


def test_answers_are_scored_by_the_closest_of_their_references(tmp_path):
    """Of several references the one counts that is most like what the model says."""
    torch.manual_seed(0)
    config = GPTConfig.named('32x2', vocab_size=257, block_size=64)
    GPT(config).save(tmp_path / 'm', 'bytes')
    asked = ['Name a letter.', 'Name another one.', 'And one more.']
    said = text_generator(str(tmp_path / 'm'), max_new_tokens=32)(
        [prompt(a, '') + '\n' for a in asked]
    )
    right = [dict(instruction=a, output=['xyzzy', s + ' word']) for a, s in zip(asked, said)]
    wrong = [dict(instruction=a, input='', output='xyzzy') for a in asked]
    for name, rows in (('right', right), ('wrong', wrong)):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    files = [str(tmp_path / f'{name}.jsonl') for name in ('right', 'wrong')]
    how = [f'--answers={",".join(files)}', '--answer_tokens=32']
    process = run_command('extras/bridge.py', tmp_path / 'm', *how)
    assert process.returncode == 0, process.stderr
    scores = [float(line.split('|')[2]) for line in process.stdout.splitlines()[2:]]
    expected = [rouge_l(s, row['output']) for s, row in zip(said, right)]
    assert scores[0] == pytest.approx(100 * sum(expected) / 3, abs=1e-4) and scores[0] > 20
    assert scores[1] == 0 and scores[2] == pytest.approx(scores[0] / 2, abs=1e-4)


def test_a_prompt_is_taken_as_it_is_and_an_instruction_as_models_are_tuned(tmp_path):
    rows = [
        dict(prompt='Say a.', output='a'),
        dict(instruction='Say', input='b', output=['b', 'c']),
    ]
    (tmp_path / 'q.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = scored_prompts(str(tmp_path / 'q.jsonl'))
    assert found == [('Say a.', ['a']), (prompt('Say', 'b') + '\n', ['b', 'c'])]


@pytest.mark.parametrize(
    'text, word',
    [
        ('', 'holds no records'),
        ('{"instruction": "a"}', 'line 1: not instruction'),
        ('{"prompt": 1, "output": "b"}', 'line 1'),
        ('{"instruction": "a", "output": []}', 'line 1'),
        ('[1]', 'line 1'),
        ('{', 'line 1: JSONDecodeError'),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, text, word):
    (tmp_path / 'q.jsonl').write_text(text)
    with pytest.raises(UserError, match=word):
        scored_prompts(str(tmp_path / 'q.jsonl'))
