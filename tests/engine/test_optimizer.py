"""AdamW: its state survives the disk; a step's gradient is the mean over its targets."""

import torch

from engine.optimizer import make_optimizer
from engine.state import load_state, save_state
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
    again = GPT(model.config)
    fresh = make_optimizer(again, knobs)
    progress = load_state(tmp_path, again, fresh)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key in ('exp_avg', 'exp_avg_sq', 'step'):
            assert torch.equal(optimizer.state[p][key], fresh.state[q][key])
    assert progress == dict(step=30)
