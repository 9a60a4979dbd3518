"""What a teacher would teach: gradients and curvature against direct computations."""

import re

import pytest
import torch
from conftest import run_command
from test_model import small

from engine.errors import UserError
from extras import alignment
from extras.alignment import MICRO_BATCH
from let import pair_layers
from model import GPT, GPTConfig


def drawn_batches(model, n, width=12, length=10):
    """n batches of random ids, their targets, and a teacher's hidden states."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        x = torch.randint(model.config.vocab_size, (MICRO_BATCH, length), generator=generator)
        theirs = torch.randn(MICRO_BATCH, length, width, generator=generator, dtype=torch.float64)
        found.append((x, x.roll(-1, 1), theirs))
    return found


def test_a_gradient_agrees_with_itself():
    """A teacher whose states are moved along the slope of the loss pulls where the data pull."""
    model = small(n_layer=1, n_embd=16, n_head=2)
    x, y, _ = drawn_batches(model, 1)[0]
    hidden = model(x, hidden_at=1).hidden
    slope = torch.autograd.grad(
        torch.nn.functional.cross_entropy(
            model.lm_head(model.norm(hidden)).flatten(0, 1), y.flatten()
        ),
        hidden,
    )[0]
    for sign in (1, -1):
        towards = (hidden - sign * 1e-3 * slope).detach()
        batches = [(x, y, towards)] * 2
        data = torch.autograd.grad(model(x, y).loss, list(model.parameters()))
        record = alignment.measure(model, batches, 1, data, alignment.Options())
        assert sign * record['agreement'] > 0.3


def test_command_line(data_dir, tmp_path):
    shape = dict(vocab_size=257, block_size=32)
    GPT(GPTConfig.named('16x2', **shape)).save(tmp_path / 'teacher', 'bytes')
    GPT(GPTConfig.named('32x3', **shape)).save(tmp_path / 'target', 'bytes')
    argv = [tmp_path / 'teacher', f'--data_dir={data_dir}', '--samples=16', '--block_size=32']
    program = 'extras/alignment.py'
    fresh = run_command(program, *map(str, argv), '--size=32x6', '--probes=2')
    assert fresh.returncode == 0, fresh.stderr
    header, _, *rows = [line for line in fresh.stdout.splitlines() if line.startswith('|')]
    assert 'curvature' in header and [int(row.split('|')[1]) for row in rows] == [3, 6]
    assert re.search(r'the best constant vector: 0\.\d\d', fresh.stdout)
    trained = run_command(program, *map(str, argv), f'--target={tmp_path / "target"}')
    assert trained.returncode == 0 and 'curvature' not in trained.stdout
    for more, word in (
        (['--layers=9', '--size=32x6'], 'there is no layer 9'),
        (['--samples=0'], 'samples must be'),
        (['--data=nothing'], 'nothing'),
    ):
        with pytest.raises(UserError, match=word):
            alignment.main([*map(str, argv), *more])
    with pytest.raises(UserError, match='missing argument'):
        alignment.main([])
    assert [pair_layers(pair, 1, 6)[0] for pair in ('L2E', 'L2M', 'L2L')] == [3, 3, 6]
