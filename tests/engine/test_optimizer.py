"""AdamW: its state survives the disk; where a stable phase ends."""

import pytest
import torch

from engine.checkpoint import load_state, save_state
from engine.errors import UserError
from engine.optimizer import (
    load_optimizer_state,
    make_optimizer,
    save_optimizer_state,
    set_optimizer_state,
    stable_steps,
)
from model import GPT, GPTConfig
from train import Run


def trained(knobs, steps=30):
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('16x2', vocab_size=61, block_size=16))
    optimizer, losses = make_optimizer(model, knobs), []
    for _ in range(steps):
        x = torch.randint(61, (4, 17)) % 7
        loss = model(x[:, :-1], x[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, optimizer, losses


def test_its_state_survives_the_disk(tmp_path):
    knobs = Run(learning_rate=0.01)
    model, optimizer, _ = trained(knobs)
    save_state(tmp_path, model, optimizer, dict(step=30))
    save_optimizer_state(tmp_path, model, optimizer)
    again = GPT(model.config)
    fresh = make_optimizer(again, knobs)
    progress = load_state(tmp_path, again, fresh)
    other = make_optimizer(GPT(model.config), knobs)
    set_optimizer_state(again, other, load_optimizer_state(tmp_path))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key in ('exp_avg', 'exp_avg_sq', 'step'):
            assert torch.equal(optimizer.state[p][key], fresh.state[q][key])
            assert torch.equal(optimizer.state[p][key], other.state[q][key])
    assert progress == dict(step=30)
    with pytest.raises(UserError, match='optimizer.safetensors'):
        load_optimizer_state(tmp_path / 'nowhere')


def test_where_a_stable_phase_ends():
    assert (
        stable_steps(100, Run(schedule='wsd', decay_fraction=0.2)) == 80
        and stable_steps(7, Run(schedule='wsd', decay_fraction=0.1)) == 6
    )
    assert (
        stable_steps(100, Run(schedule='wsd', decay_fraction=1.0))
        == 0
        == stable_steps(100, Run(schedule='cosine'))
    )
