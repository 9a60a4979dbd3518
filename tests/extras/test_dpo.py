"""DPO: its loss and gradients are TRL's; families are tuned, and prefer."""

import math

import numpy as np
import pytest
import torch
from conftest import call, refuses, succeeds, write_lines

from data.instruct import Examples
from data.prepare import Preparation, prepare
from engine.errors import UserError
from engine.log import read_metrics
from engine.stage import Progress, Result
from extras.dpo import dpo, pair_source
from model import GPT, GPTConfig
from train import Run

ROWS = [  # letters are preferred to digits
    dict(
        prompt=f'say {i % 7} of {i}', chosen=chr(65 + i) + 'abcdefgh'[i % 8 :], rejected=f'{i}' * 3
    )
    for i in range(40)
]


@pytest.fixture
def pairs(tmp_path):
    """The Source of a prepared file of preferences, `mine`."""
    path = write_lines(tmp_path / 'mine.jsonl', ROWS)
    prepare(Preparation(path, str(tmp_path / 'mine'), tokenizer='bytes', prompt='plain'))
    return pair_source('mine', Run(data_dir=str(tmp_path), block_size=32, eval_tokens=512))


def model_of(layers, seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig.named(f'16x{layers}', vocab_size=257, block_size=64)).double()


# ----------------------------------------------------------------------------------------------
# data


def test_files_of_preferences_become_pairs_of_answers_to_one_prompt(pairs):
    known = {row['chosen']: row for row in ROWS}
    x, y = pairs.read(np.arange(2))
    assert x.shape == (2, 2, 32) == y.shape
    for inputs, targets in zip(x, y):
        chosen, rejected = (bytes(t[t >= 0][:-1].tolist()).decode() for t in targets)
        row = known[chosen]
        asked = [bytes(ids[: len(row['prompt'])].tolist()).decode() for ids in inputs]
        assert rejected == row['rejected'] and asked == 2 * [row['prompt']]


def test_training_on_preferences_is_explained(pairs, tmp_path):
    with pytest.raises(UserError, match='a set of preferences, not supervised'):
        Examples('mine', tmp_path, 'train')
    line = f'train.py --size=16x1 --data=mine --data_dir={tmp_path} --out_dir={tmp_path}/out'
    refuses(line, 'preferences are for --method=posttrain')


# ----------------------------------------------------------------------------------------------
# the loss


def test_loss_and_gradients_are_those_of_trl(tmp_path):
    trl, transformers = pytest.importorskip('trl'), pytest.importorskip('transformers')
    from datasets import Dataset

    policy, reference = model_of(2, seed=3), model_of(2, seed=4)
    theirs = []
    for name, model in (('policy', policy), ('reference', reference)):
        model.save(tmp_path / name, 'bytes')
        read = transformers.AutoModelForCausalLM.from_pretrained
        theirs.append(read(tmp_path / name, dtype=torch.float64))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'policy')
    tokenizer.pad_token = tokenizer.eos_token
    how = dict(output_dir=str(tmp_path / 'out'), report_to='none', use_cpu=True, bf16=False)
    how |= dict(per_device_train_batch_size=6, beta=0.1, activation_checkpointing=False)
    data = dict(train_dataset=Dataset.from_list(ROWS[:6]), processing_class=tokenizer)
    trainer = trl.DPOTrainer(*theirs, args=trl.DPOConfig(**how), **data)
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(trainer.model, dict(batch))
    found.backward()
    ids, answer = batch['input_ids'], batch['completion_mask'].bool()  # chosen, then rejected
    x, y = ids[:, :-1], torch.where(answer[:, 1:], ids[:, 1:], -100)
    x, y = (torch.stack(tensor.chunk(2), 1) for tensor in (x, y))
    loss, count, _ = dpo(reference, 0.1)(policy, x, y, Progress(0, 10))
    loss.backward()
    assert loss.item() == pytest.approx(found.item(), rel=1e-6) and count == 6
    peers = dict(trainer.model.named_parameters())
    for ours, name in (
        (policy.wte, 'model.embed_tokens'),
        (policy.blocks[1].mlp.down, 'model.layers.1.mlp.down_proj'),
        (policy.blocks[0].attn.v, 'model.layers.0.self_attn.v_proj'),
    ):
        peer = peers[f'{name}.weight'].grad
        assert (ours.weight.grad - peer).abs().max() < 1e-6 * peer.abs().max()


# ----------------------------------------------------------------------------------------------
# the method


def test_a_family_is_tuned_and_then_prefers_and_goes_on_where_it_stopped(tmp_path, pairs):
    names = ('one/16x1', 'one/16x2', 'other/16x2')  # families have members of the same sizes
    for name in names:
        model_of(int(name[-1]), seed=0).float().save(tmp_path / name, 'bytes')
    answers = [dict(instruction=f'say {i}', output='abcdefgh'[i % 8 :]) for i in range(40)]
    path = write_lines(tmp_path / 'answers.jsonl', answers)
    prepare(Preparation(path, str(tmp_path / 'answers'), 'bytes', prompt='plain'))
    line = 'train.py --method=posttrain --data=answers --preferences=mine --block_size=32'
    line += ' --batch_size=8 --sft_epochs=2 --dpo_epochs=20 --dpo_learning_rate=3e-3'
    line += f' --log_interval=1 --data_dir={tmp_path} --out_dir={tmp_path}/out'
    line += f' --models={",".join(str(tmp_path / name) for name in names)}'
    assert call(f'{line} --max_minutes=1e-9').returncode == 75
    succeeds(line)
    tuned, preferring = (Result.of(tmp_path / 'out' / f'one-16x2-{end}') for end in ('sft', 'dpo'))
    assert tuned.inherited_flops == 0 and preferring.inherited_flops == tuned.flops
    # two sequences a pair, and as many through pi_ref, forward alone
    X, T = tuned.params, preferring.tokens
    assert preferring.flops == pytest.approx((6 * 2 + 2 * 2) * X * T)
    first, *_, last = read_metrics(tmp_path / 'out' / 'other-16x2-dpo')
    assert first['loss'] == pytest.approx(math.log(2), rel=1e-3)
    assert last['loss'] < 0.3 and last['accuracy'] > 0.9  # letters win
