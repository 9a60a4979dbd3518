"""
Diagnostics against what is known: the exact Hessian of a tiny model, variances by hand, the toy
model's exponent.
"""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import scaling
from engine.errors import UserError
from engine.stage import Origin, Result
from extras.diagnostics import (
    curvature_panel,
    hessian_vector_product,
    largest_eigenvalue,
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
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
        rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient]
    hessian = torch.stack(rows)
    vector = torch.randn_like(hessian[0])
    loss = lambda: plain_cross_entropy(model, x, y)  # noqa: E731
    product = hessian_vector_product(loss, parameters, vector)
    torch.testing.assert_close(product, hessian @ vector, atol=1e-10, rtol=1e-8)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    extreme = eigenvalues[eigenvalues.abs().argmax()].item()
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    assert largest_eigenvalue(model, halves, iterations=300) == pytest.approx(extreme, rel=1e-3)


def test_the_toy_models_exponent_falls_with_log_D1():
    """Small exponents, for which the theory of section 5.3 holds to first order."""
    D1 = np.logspace(0, 8, 5)
    measured, alpha = toy_exponents(D1)
    assert (np.diff(measured) < 0).all() and np.allclose(measured, alpha / (1 + alpha), rtol=2e-3)
    theta = 0.5 * 0.05 / math.log(1e3) ** 2
    assert np.allclose(alpha[0] - theta * np.log(D1), alpha, rtol=0.02)
    assert np.allclose(measured, alpha, rtol=0.1)


def test_curvature_of_bases_is_over_their_own_tokens():
    """Figure 15: a base, from scratch, has no D1; seeds are averaged."""
    rows = [('scratch', 0.0, 1e5, 3.0), ('scratch', 0.0, 2e5, 1.0), ('stk2', 1e5, 5e4, 7.0)]
    rows.append(('stk2', 1e5, 5e4, 9.0))
    names = ('method', 'D1', 'D2', 'largest eigenvalue')
    base, stacked = curvature_panel([dict(zip(names, row)) for row in rows], 'pycode').lines
    assert list(base.x) == [1e5, 2e5] and list(base.y[:2]) == [3.0, 1.0]
    assert stacked.label == 'stk2' and stacked.y.iloc[0] == 8.0


def test_a_run_in_pieces_is_one_curve(tmp_path):
    for name, parent, kind, steps in (
        ('a', '', 'random', 3),
        ('b', 'a', 'last state', 2),
        ('c', 'b', 'weights', 2),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'stage.json').write_text(
            json.dumps(dict(origin=asdict(Origin(kind, (parent,)))))
        )
        (tmp_path / name / 'metrics.jsonl').write_text(
            '\n'.join(
                json.dumps(dict(step=i, loss=1.0, grad_norm=1.0, param_norm=2.0))
                for i in range(1, steps + 1)
            )
        )
    assert training_curves(tmp_path / 'b').index.tolist() == [1, 2, 3, 4, 5] and training_curves(
        tmp_path / 'c'
    ).index.tolist() == [1, 2]


def test_commands(tmp_path, data_dir, capsys):
    for name in ('48x2-131k', '48x2-131k-cpt-66k'):
        folder = tmp_path / 'run' / name
        GPT(GPTConfig.named('16x1', vocab_size=257, block_size=32)).save(folder)
        Result(name, str(folder), labels=dict(method='cpt', D1=1e5, D2=6e4)).write()
        lines = [dict(step=i, loss=5 + i % 2, grad_norm=1.0, param_norm=2.0) for i in range(9)]
        (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
        (folder / 'stage.json').write_text(json.dumps(dict(origin=asdict(Origin()))))
    folders = [str(path) for path in sorted((tmp_path / 'run').iterdir())]
    knobs = [f'--data_dir={data_dir}', '--samples=4']
    scaling.main(['diagnose', *folders, *knobs])
    out = capsys.readouterr().out
    assert 'largest eigenvalue' in out and '0.5714' in out  # the variance: differences of 1 and -1
    assert (tmp_path / 'run' / 'norms.png').stat().st_size > 10_000
    scaling.main(['toy', f'--out={tmp_path}'])
    assert 'measured exponent' in capsys.readouterr().out
    with pytest.raises(UserError, match='usage: scaling.py diagnose'):
        scaling.main(['diagnose'])
