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
from conftest import refuses, succeeds, write_lines

from engine.stage import Origin, Result
from extras.diagnostics import (
    largest_eigenvalue,
    toy_exponents,
    training_curves,
)
from model import GPT, GPTConfig


def test_largest_eigenvalue_is_that_of_the_exact_hessian():
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=1, n_embd=4, n_mlp=4, vocab_size=7, block_size=6, init_std=0.3)
    model = GPT(GPTConfig(**shape)).double()
    x = torch.randint(7, (4, 6))
    y, flat = x.roll(-1, 1), torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    sizes = [p.numel() for p in model.parameters()]

    def loss(flat):
        parts = zip(model.named_parameters(), flat.split(sizes))
        values = {name: part.view_as(p) for (name, p), part in parts}
        logits = torch.func.functional_call(model, values, (x,)).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat)
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


def write_stage(folder, origin, losses):
    """A stage's folder with its origin and its curve."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'stage.json').write_text(json.dumps(dict(origin=asdict(origin))))
    lines = [dict(loss=loss, grad_norm=1.0, param_norm=2.0) for loss in losses]
    write_lines(folder / 'metrics.jsonl', [line | dict(step=i) for i, line in enumerate(lines, 1)])


def test_a_run_in_pieces_is_one_curve(tmp_path):
    write_stage(tmp_path / 'a', Origin('random'), [1.0] * 3)
    write_stage(tmp_path / 'b', Origin('last state', ('a',)), [1.0] * 2)
    write_stage(tmp_path / 'c', Origin('weights', ('b',)), [1.0] * 2)
    assert training_curves(tmp_path / 'b').index.tolist() == [1, 2, 3, 4, 5]
    assert training_curves(tmp_path / 'c').index.tolist() == [1, 2]


def test_commands(tmp_path, data_dir):
    for name in ('48x2-131k', '48x2-131k-cpt-66k'):
        folder = tmp_path / 'run' / name
        GPT(GPTConfig.named('16x1', vocab_size=257, block_size=32)).save(folder)
        Result(name, str(folder), labels=dict(method='cpt', D1=1e5, D2=6e4)).write()
        write_stage(folder, Origin(), [5 + i % 2 for i in range(9)])
    folders = ' '.join(map(str, sorted((tmp_path / 'run').iterdir())))
    out = succeeds(f'scaling.py diagnose {folders} --data_dir={data_dir} --samples=4')
    assert 'largest eigenvalue' in out and '0.5714' in out  # the variance: differences of 1 and -1
    assert 'measured exponent' in succeeds(f'scaling.py toy --out={tmp_path}')
    refuses('scaling.py diagnose', 'usage: scaling.py diagnose')
