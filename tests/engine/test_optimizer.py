"""
AdamW with moments in half the bytes: the same path within what bfloat16 can tell apart, and no
moment that is stuck.
"""

import pytest
import torch

from engine.checkpoint import Saver, load_state
from engine.optimizer import (
    CompactAdamW,
    load_optimizer_state,
    make_optimizer,
    round_stochastically,
    save_optimizer_state,
    set_optimizer_state,
    stable_steps,
)
from model import GPT, GPTConfig
from train import Run


def test_rounding_at_random_is_right_in_the_mean():
    torch.manual_seed(0)
    x = torch.randn(1000)
    draws = torch.stack(
        [
            round_stochastically(x, torch.randint(2**16, x.shape, dtype=torch.int32)).float()
            for _ in range(2000)
        ]
    )
    step = x.abs() * 2**-7  # two neighbours in bfloat16 are at most so far apart
    assert ((draws - x).abs() <= step).all() and ((draws.mean(0) - x).abs() < 0.1 * step).all()
    assert all(len(column.unique()) <= 2 for column in draws.T[:50])


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


def test_it_trains_as_adamw_does_in_half_the_bytes():
    (_, exact, losses), (_, compact, ours) = (
        trained(Run(learning_rate=0.01)),
        trained(Run(learning_rate=0.01, optimizer_dtype='bfloat16')),
    )
    assert ours == pytest.approx(losses, abs=0.05) and ours[-1] < ours[0] - 1

    def size(optimizer):
        return sum(
            t.numel() * t.element_size()
            for state in optimizer.state.values()
            for key, t in state.items()
            if key != 'step'
        )

    assert (
        2 * size(compact) == size(exact)
        and trained(Run(learning_rate=0.01, optimizer_dtype='bfloat16'))[2] == ours
    )


def test_a_small_change_of_the_second_moment_is_not_lost():
    """
    With beta2 = 0.999 and gradients a third of what they were it has far to go, in steps too
    small for bfloat16 to see.
    """
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = CompactAdamW(
        [dict(params=[p], weight_decay=0.0)], lr=0.0, betas=(0.9, 0.999), eps=1e-8
    )
    p.grad = torch.ones(1000)
    for _ in range(2000):
        optimizer.step()
    p.grad = torch.full((1000,), 1 / 3)
    for _ in range(1000):
        optimizer.step()
    expected = (1 - 0.999**2000) * 0.999**1000 + (1 - 0.999**1000) / 9
    assert optimizer.state[p]['exp_avg_sq'].float().mean().item() == pytest.approx(
        expected, rel=0.02
    )
    nearest = torch.ones((), dtype=torch.bfloat16)
    assert (
        nearest.float().lerp(torch.tensor(1 / 9), 0.001).bfloat16() == nearest
    )  # rounded to the nearest it would stay for ever


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_its_state_survives_the_disk(tmp_path, dtype):
    knobs = Run(learning_rate=0.01, optimizer_dtype=dtype)
    model, optimizer, _ = trained(knobs)
    Saver(tmp_path).save(model, optimizer, dict(step=30))
    save_optimizer_state(tmp_path, model, optimizer)
    again = GPT(model.config)
    fresh = make_optimizer(again, knobs)
    progress = load_state(tmp_path, again, fresh)
    other = make_optimizer(GPT(model.config), knobs)
    set_optimizer_state(again, other, load_optimizer_state(tmp_path), getattr(torch, dtype))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key in ('exp_avg', 'exp_avg_sq', 'step'):
            assert torch.equal(optimizer.state[p][key], fresh.state[q][key]) and torch.equal(
                optimizer.state[p][key], other.state[q][key]
            )
            assert (
                optimizer.state[p][key].dtype
                == fresh.state[q][key].dtype
                == other.state[q][key].dtype
            )
    assert progress == dict(step=30)


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
