"""
Diagnostics against what is known: the exact Hessian of a tiny model, variances by hand, the toy
model's exponent.
"""

import json

import numpy as np
import pytest
import torch

import scaling
from engine.errors import UserError
from extras.diagnostics import (
    Toy,
    hessian_vector_product,
    largest_eigenvalue,
    loss_variance,
    plain_cross_entropy,
    toy_exponents,
    training_curves,
)
from model import GPT, GPTConfig


def test_largest_eigenvalue_is_that_of_the_exact_hessian():
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=1, n_embd=4, n_mlp=4, vocab_size=7, block_size=6, init_std=0.3)
    model = GPT(GPTConfig(**shape)).double()
    x = torch.randint(7, (4, 6))
    y, parameters = x.roll(-1, 1), list(model.parameters())

    def flat(parts):
        return torch.cat([part.flatten() for part in parts])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = plain_cross_entropy(model, x, y)
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
        rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient]
    hessian, vector = torch.stack(rows), [torch.randn_like(p) for p in parameters]
    parts = hessian_vector_product(lambda: plain_cross_entropy(model, x, y), parameters, vector)
    torch.testing.assert_close(flat(parts), hessian @ flat(vector), atol=1e-10, rtol=1e-8)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    extreme = eigenvalues[eigenvalues.abs().argmax()].item()
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    assert largest_eigenvalue(model, halves, iterations=300) == pytest.approx(extreme, rel=1e-3)


def test_variance_of_a_curve_is_that_around_its_trend():
    noise = np.random.default_rng(0).normal(0, 0.3, 4000)
    assert loss_variance(np.linspace(9, 1, 4000) + noise) == pytest.approx(0.09, rel=0.1)
    assert loss_variance(np.linspace(9, 1, 50)) == pytest.approx(0, abs=1e-12) and np.isnan(
        loss_variance([1.0, 2.0])
    )


def test_the_toy_models_exponent_falls_with_log_D1():
    D1 = np.logspace(0, 8, 9)
    measured, alpha = toy_exponents(D1, Toy(features=10**5))
    assert (np.diff(measured) < 0).all() and np.allclose(measured, alpha / (1 + alpha), atol=0.02)
    straight = np.polyval(
        np.polyfit(np.log(D1), alpha, 1), np.log(D1)
    )  # "logarithmically": a line in log D1, to first order
    assert np.abs(straight - alpha).max() < 0.1 * np.ptp(alpha)


def test_a_run_in_pieces_is_one_curve(tmp_path):
    for name, parent, continues, steps in (
        ('a', None, False, 3),
        ('b', 'a', True, 2),
        ('c', 'b', False, 2),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'stage.json').write_text(
            json.dumps(dict(parent=parent, continues_optimizer=continues))
        )
        (tmp_path / name / 'metrics.jsonl').write_text(
            '\n'.join(
                json.dumps(dict(step=i, loss=1.0, grad_norm=1.0, param_norm=2.0))
                for i in range(1, steps + 1)
            )
        )
    assert training_curves(tmp_path / 'b')['step'].tolist() == [1, 2, 3, 4, 5] and training_curves(
        tmp_path / 'c'
    )['step'].tolist() == [1, 2]


def test_commands(tmp_path, data_dir, capsys):
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=32)).save(tmp_path / 'model')
    scaling.main(
        [
            'diagnose',
            str(tmp_path / 'model'),
            f'--data_dir={data_dir}',
            '--samples=4',
            '--block_size=16',
            '--iterations=3',
            '--device=cpu',
        ]
    )
    assert 'largest eigenvalue' in capsys.readouterr().out
    scaling.main(['toy', '--features=1000'])
    assert 'measured exponent' in capsys.readouterr().out
    with pytest.raises(UserError, match='usage: scaling.py diagnose'):
        scaling.main(['diagnose'])
