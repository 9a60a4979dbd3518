"""DPO: the loss is the paper's and TRL's; a family is tuned, preferred and compared."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run_command
from test_model import small, tokens

import train
from data.instruct import LAG, kind_of, offline_rows
from data.prepare import Preparation, prepare
from engine.errors import UserError
from engine.stage import Progress, Result
from extras.dpo import Pairs, dpo, log_probability, log_ratios, reference_of
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
    return Pairs('mine', tmp_path, 'train')


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
    pairs = Pairs('set', tmp_path, 'train')
    found = json.loads(path.read_text()) if name == 'mine.json' else None
    known = {r['chosen']: r for r in found or map(json.loads, path.read_text().splitlines())}
    x, y = pairs.rows([3, 1], 32)
    assert x.shape == (2, 2, 32) and y.shape == (2, 2, 33) and y[:, 0, -1].tolist() == [3, 1]
    for inputs, targets in zip(x, y):
        texts = [bytes(t[:-1][t[:-1] >= 0][:-1].tolist()).decode() for t in targets]
        row = known[texts[0]]
        asked = [bytes(ids[: len(row['prompt'])].tolist()).decode() for ids in inputs]
        assert kind_of(row) == 'preferences' and texts[1] == row['rejected']
        assert asked == 2 * [row['prompt']]


def test_offline_preferences_are_a_functions_own_documentation(monkeypatch):
    found = [(f'file{i // 10}', f'f{i}(x)', f'line {i}') for i in range(3 * LAG)]
    monkeypatch.setattr('data.instruct.signatures', lambda: iter(found))
    rows = [row for _, row, _ in offline_rows(Preparation('preferences', val_fraction=0.2))]
    lines = {signature: line for _, signature, line in found}
    assert rows and all(r['chosen'] == lines[r['prompt']] != r['rejected'] for r in rows)


def test_other_sets_are_refused_and_training_on_preferences_is_explained(pairs, tmp_path):
    with pytest.raises(UserError, match='a set of preferences, not supervised'):
        from data.instruct import Examples

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
    model = model_of(seed=1)
    x, y = map(torch.from_numpy, pairs.rows([4, 0, 2], 32))
    reference = reference_of(model, pairs, np.arange(len(pairs)), 32).double()
    exact = [log_probability(model, x[:, i], y[:, i, :-1]) for i in (0, 1)]
    assert torch.allclose(reference[[4, 0, 2]], torch.stack(exact, 1), atol=1e-5)

    reference = torch.zeros(len(pairs), 2, dtype=torch.float64)
    reference[[4, 0, 2]] = torch.stack(exact, 1).detach()
    loss, _, scalars = dpo(lambda: reference)(model, x, y, AT_START)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12) and scalars['margin'].item() == 0

    other, beta = model_of(seed=2), 0.3  # Rafailov et al., section 4: -beta sigmoid(-margin) ...
    loss, *_ = dpo(lambda: reference, beta)(other, x, y, AT_START)
    gradient = torch.autograd.grad(loss, other.wte.weight)[0]
    gain, data_loss = log_ratios(other, x, y, reference)
    assert data_loss.item() == pytest.approx(other(x[:, 0], y[:, 0, :-1]).loss.item(), rel=1e-6)
    weight = -beta * torch.sigmoid(-beta * (gain[:, 0] - gain[:, 1])).detach() / 3
    by_hand = torch.autograd.grad((weight * (gain[:, 0] - gain[:, 1])).sum(), other.wte.weight)[0]
    assert torch.allclose(gradient, by_hand, rtol=1e-9, atol=1e-14)


# ----------------------------------------------------------------------------------------------
# the method


def test_a_family_is_tuned_and_then_prefers_and_goes_on_where_it_stopped(tmp_path, pairs, capsys):
    folder = tmp_path / 'family'
    for size in ('16x1', '16x2'):
        model = model_of(int(size[-1])).float()
        model.save(folder / size, 'bytes')
    answers = [dict(instruction=f'say {i}', output='abcdefgh'[i % 8 :]) for i in range(40)]
    (tmp_path / 'answers.jsonl').write_text('\n'.join(map(json.dumps, answers)))
    prepare(
        Preparation(
            str(tmp_path / 'answers.jsonl'), str(tmp_path / 'answers'), 'bytes', prompt='plain'
        )
    )
    arguments = [
        '--method=posttrain',
        f'--models={folder}/16x1,{folder}/16x2',
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
    text = capsys.readouterr().out
    assert '16x1 -> 16x2' in text and 'right by implied reward' in text
    tuned, preferring = (Result.of(tmp_path / 'out' / f'16x2-{phase}') for phase in ('sft', 'dpo'))
    pi_ref = preferring.inherited_flops - tuned.flops  # a third of a pass of training
    assert pi_ref == pytest.approx(preferring.flops / 3 / 20, rel=0.1)
    assert tuned.inherited_flops == 0
    lines = (tmp_path / 'out' / '16x2-dpo' / 'metrics.jsonl').read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first['loss'] == pytest.approx(math.log(2), rel=1e-3)
    assert last['loss'] < 0.3 and last['accuracy'] > 0.9  # letters win
    assert (tmp_path / 'out' / '16x2-dpo' / 'reference.safetensors').is_file()
    assert np.isfinite(preferring.val_loss)


def test_a_plan_needs_models_or_sizes(tmp_path, capsys):
    arguments = ['--method=posttrain', '--dry_run=True', f'--data_dir={tmp_path}']
    with pytest.raises(UserError, match='posttrain needs --models'):
        train.main(arguments)
    with pytest.raises(UserError, match='no model nowhere; .* needs --sizes'):
        train.main([*arguments, '--models=nowhere'])
    train.main([*arguments, '--models=nowhere', '--sizes=16x1'])
    assert 'weights of nowhere-sft, objective dpo (beta 0.1' in capsys.readouterr().out
