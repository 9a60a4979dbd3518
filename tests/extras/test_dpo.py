"""DPO: the loss and its gradient are the paper's; families are tuned, and prefer."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_command
from test_model import small, tokens

import train
from data.instruct import LAG, Examples, kind_of, offline_rows
from data.loader import Share
from data.prepare import Preparation, prepare
from engine.errors import UserError
from engine.stage import Progress, Result
from extras.dpo import dpo, log_probability, pair_source
from model import GPT, GPTConfig

AT_START = Progress(0, 10)


def write_pairs(folder, n=40, name='mine.jsonl'):
    """A file of preferences: letters are preferred to digits."""
    rows = [
        dict(
            prompt=f'say {i % 7} of {i}',
            chosen='abcdefgh'[i % 8 :] + chr(65 + i) + 'xy',
            rejected=str(i) * 3,
        )
        for i in range(n)
    ]
    path = folder / name
    text = json.dumps(rows) if path.suffix == '.json' else '\n'.join(map(json.dumps, rows))
    path.write_text(text)
    return path


@pytest.fixture
def pairs(tmp_path):
    path = write_pairs(tmp_path)
    prepare(Preparation(str(path), str(tmp_path / 'mine'), tokenizer='bytes', prompt='plain'))
    return pair_source('mine', knobs_of(tmp_path))


def knobs_of(data_dir):
    return SimpleNamespace(data_dir=data_dir, block_size=32, seed=0, eval_tokens=512)


def model_of(layers=1, seed=0, block_size=32):
    torch.manual_seed(seed)
    return GPT(GPTConfig.named(f'16x{layers}', vocab_size=257, block_size=block_size)).double()


# ----------------------------------------------------------------------------------------------
# data


@pytest.mark.parametrize('name', ['mine.jsonl', 'mine.json'])
def test_files_of_preferences_become_pairs_of_answers_to_one_prompt(tmp_path, name):
    path = write_pairs(tmp_path, name=name)
    process = run_command(
        'data/prepare.py', path, f'--out={tmp_path}/set', '--tokenizer=bytes', '--prompt=plain'
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(path.read_text()) if name == 'mine.json' else None
    known = {r['chosen']: r for r in found or map(json.loads, path.read_text().splitlines())}
    source = pair_source('set', knobs_of(tmp_path))
    x, y = source.read(np.arange(2))
    assert x.shape == (2, 2, 32) == y.shape
    for inputs, targets in zip(x, y):
        texts = [bytes(t[t >= 0][:-1].tolist()).decode() for t in targets]
        row = known[texts[0]]
        asked = [bytes(ids[: len(row['prompt'])].tolist()).decode() for ids in inputs]
        assert kind_of(row) == 'preferences' and texts[1] == row['rejected']
        assert asked == 2 * [row['prompt']]
    ((vx, vy, count), *_) = source.validation(4, Share('cpu'))
    assert vx.shape[1] == 32 and (vy >= 0).sum() == count


def test_offline_preferences_are_a_functions_own_documentation(monkeypatch):
    found = [(f'file{i // 10}', f'f{i}(x)', f'line {i}') for i in range(3 * LAG)]
    monkeypatch.setattr('data.instruct.signatures', lambda: iter(found))
    rows = [row for _, row, _ in offline_rows(Preparation('preferences', val_fraction=0.2))]
    lines = {signature: line for _, signature, line in found}
    assert rows and all(r['chosen'] == lines[r['prompt']] != r['rejected'] for r in rows)


def test_other_sets_are_refused_and_training_on_preferences_is_explained(pairs, tmp_path):
    with pytest.raises(UserError, match='a set of preferences, not supervised'):
        Examples('mine', tmp_path, 'train')
    arguments = ['--size=16x1', '--data=mine', f'--data_dir={tmp_path}', '--tokens=64']
    with pytest.raises(UserError, match='preferences are for --method=posttrain'):
        train.main([*arguments, f'--out_dir={tmp_path / "out"}', '--device=cpu'])


# ----------------------------------------------------------------------------------------------
# the loss


def test_a_models_log_probability_of_an_answer_is_the_sum_over_its_tokens():
    model, ids = small().double(), tokens(3, 9)
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[:, :3], y[1, 6:] = -100, -100  # prompts, and what fills up
    logs = model(x).logits.log_softmax(-1)
    expected = [sum(logs[i, t, y[i, t]] for t in range(8) if y[i, t] >= 0) for i in range(3)]
    assert torch.allclose(log_probability(model, x, y), torch.stack(expected), rtol=1e-12)


def test_the_loss_begins_at_log_2_and_its_gradient_is_the_papers(pairs):
    model, (x, y) = model_of(seed=1), map(torch.from_numpy, pairs.read(np.arange(3)))
    loss, count, scalars = dpo(model)(model, x, y, AT_START)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert count == 3

    other, beta = model_of(seed=2), 0.3  # Rafailov et al., section 4: -beta sigmoid(-margin) ...
    loss, _, scalars = dpo(model, beta)(other, x, y, AT_START)
    gradient = torch.autograd.grad(loss, other.wte.weight)[0]
    preferred = other(x[:, 0], y[:, 0]).loss.item()
    assert scalars['data_loss'].item() == pytest.approx(preferred, rel=1e-6)
    chosen, rejected = (
        log_probability(other, x[:, i], y[:, i]) - log_probability(model, x[:, i], y[:, i]).detach()
        for i in (0, 1)
    )
    weight = -beta * torch.sigmoid(-beta * (chosen - rejected)).detach() / 3
    by_hand = torch.autograd.grad((weight * (chosen - rejected)).sum(), other.wte.weight)[0]
    assert torch.allclose(gradient, by_hand, rtol=1e-9, atol=1e-14)


# ----------------------------------------------------------------------------------------------
# the method


def test_a_family_is_tuned_and_then_prefers_and_goes_on_where_it_stopped(tmp_path, pairs, capsys):
    names = ('one/16x1', 'one/16x2', 'other/16x2')  # families have members of the same sizes
    for name in names:
        model_of(int(name[-1])).float().save(tmp_path / name, 'bytes')
    answers = [dict(instruction=f'say {i}', output='abcdefgh'[i % 8 :]) for i in range(40)]
    (tmp_path / 'answers.jsonl').write_text('\n'.join(map(json.dumps, answers)))
    prepare(
        Preparation(
            str(tmp_path / 'answers.jsonl'), str(tmp_path / 'answers'), 'bytes', prompt='plain'
        )
    )
    arguments = [
        '--method=posttrain',
        '--models=' + ','.join(str(tmp_path / name) for name in names),
        '--data=answers',
        '--preferences=mine',
        f'--data_dir={tmp_path}',
        f'--out_dir={tmp_path}/out',
        '--block_size=32',
        '--batch_size=8',
        '--sft_epochs=2',
        '--dpo_epochs=20',
        '--dpo_learning_rate=3e-3',
        '--log_interval=1',
        '--device=cpu',
    ]
    with pytest.raises(SystemExit):
        train.main([*arguments, '--max_minutes=1e-9'])
    train.main(arguments)
    assert 'finished before' not in capsys.readouterr().out.split('one-16x1-dpo')[1]
    stages = {f'{name.replace("/", "-")}-{phase}' for name in names for phase in ('sft', 'dpo')}
    assert {path.parent.name for path in (tmp_path / 'out').glob('*/result.json')} == stages
    tuned, preferring = (Result.of(tmp_path / 'out' / f'one-16x2-{end}') for end in ('sft', 'dpo'))
    assert tuned.inherited_flops == 0 and preferring.inherited_flops == tuned.flops
    # two sequences a pair, and as many through pi_ref, forward alone
    X, T = tuned.params, preferring.tokens
    assert preferring.flops == pytest.approx((6 * 2 + 2 * 2) * X * T)
    lines = (tmp_path / 'out' / 'other-16x2-dpo' / 'metrics.jsonl').read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first['loss'] == pytest.approx(math.log(2), rel=1e-3)
    assert last['loss'] < 0.3 and last['accuracy'] > 0.9  # letters win
    assert np.isfinite(preferring.val_loss)


def test_a_plan_needs_models_or_their_sizes(tmp_path, capsys):
    arguments = ['--method=posttrain', '--dry_run=True', f'--data_dir={tmp_path}']
    for more in ([], ['--models=a/16x1,a/16x1']):
        with pytest.raises(UserError, match='needs different --models'):
            train.main([*arguments, *more])
    with pytest.raises(UserError, match='nowhere'):
        train.main([*arguments, '--models=nowhere'])
    train.main([*arguments, '--models=no/16x1'])
    assert 'weights of no-16x1-sft, objective dpo (beta 0.1' in capsys.readouterr().out
