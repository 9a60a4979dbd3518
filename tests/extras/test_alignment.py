"""What a teacher would teach: curvature against the known, and the command."""

import pytest
import torch
from conftest import refuses, succeeds

from extras import alignment
from model import GPT, GPTConfig


def test_the_curvature_of_a_quadratic_form_is_the_norm_of_its_matrix():
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    A, x = A + A.T, torch.ones(6).double().requires_grad_()
    found = alignment.curvature(lambda: x @ A @ x / 2, [x], probes=2000)
    assert found == pytest.approx(A.norm().item(), rel=0.1)


def test_command_line(data_dir, tmp_path):
    for name in ('16x2', '32x3'):
        shape = dict(vocab_size=257, block_size=32)
        GPT(GPTConfig.named(name, **shape)).save(tmp_path / name, 'bytes')
    line = f'-m extras.alignment {tmp_path}/16x2 --data_dir={data_dir} --samples=16'
    line += ' --block_size=32'
    fresh = succeeds(f'{line} --target=32x6 --probes=2')
    header, _, *rows = [line for line in fresh.splitlines() if line.startswith('|')]
    assert 'curvature' in header and 'of a constant' in header
    assert [int(row.split('|')[1]) for row in rows] == [3, 6]  # early and middle are one here
    assert 'curvature' not in succeeds(f'{line} --target={tmp_path}/32x3 --pairings=L2F2')
    refuses(f'{line} --pairings=L1F9 --target=32x6', 'the target has 6 layers')
    refuses(f'{line} --target=nowhere', "no size 'nowhere'")
