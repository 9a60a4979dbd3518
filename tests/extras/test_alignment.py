"""What a teacher would teach: gradients and curvature against direct computations."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from test_model import small

from engine.errors import UserError
from extras import alignment
from let import alignment_loss
from model import GPT, GPTConfig


def test_a_gradient_agrees_with_itself():
    """A teacher whose states are moved along the slope of the loss pulls where the data pull."""
    model, teacher = small(n_layer=1, n_embd=16, n_head=2), small(n_layer=1, n_embd=16, n_head=2)
    x = torch.randint(61, (4, 10), generator=torch.Generator().manual_seed(3))
    batches = [(x, x.roll(-1, 1)), (x.flip(0), x.flip(0).roll(-1, 1))]
    moves = {}
    for ids, y in batches:
        hidden = model(ids, hidden_at=1).hidden
        logits = model.lm_head(model.norm(hidden)).flatten(0, 1)
        slope = torch.autograd.grad(F.cross_entropy(logits, y.flatten()), hidden)[0]
        moves[int(ids[0, 0])] = hidden.detach(), 1e-3 * slope
    for sign in (1, -1):
        teacher.residual_stream = lambda ids, _: (
            torch.sub(*moves[int(ids[0, 0])], alpha=sign),
            None,
        )
        record = alignment.measure(model, teacher, batches, (1, 1))
        assert sign * record['agreement'] > 0.3 and record['similarity'] > 0.99


def test_the_curvature_of_a_deep_linear_network_is_bounded_by_its_blocks():
    """
    Appendix I, exactly: the Hessian of L_proj at layer k has no entries beyond the layers before k
    (Eq. 11); its norm is that of its k x k blocks, and at most k times the largest (Eqs. 16, 17).
    The bound grows with k. The curvature itself need not.
    """
    L, d, n = 4, 3, 50
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(L, d, d, generator=draw, dtype=torch.float64)
    weights[2:] *= 3  # layers that make the representation longer, which a cosine does not see
    x, teacher = torch.randn(2, n, d, generator=draw, dtype=torch.float64)

    def l_proj(weights, k):
        h = x
        for W in weights[:k]:
            h = h @ W.T  # Eq. 8
        return alignment_loss(h, teacher)

    norms = []
    for k in range(1, L + 1):
        H = torch.autograd.functional.hessian(partial(l_proj, k=k), weights).view(
            L, d * d, L, d * d
        )
        assert not H[k:].any() and not H[:, :, k:].any()
        blocks = H.square().sum((1, 3)).sqrt()
        norms.append(H.norm().item())
        assert norms[-1] == pytest.approx(blocks[:k, :k].norm().item())
        assert norms[-1] <= k * blocks.max() + 1e-12
        layers = weights.clone().requires_grad_()
        found = alignment.curvature(lambda: l_proj(layers, k), [layers], probes=2000)
        assert found == pytest.approx(norms[-1], rel=0.1)
    assert norms != sorted(norms)


def test_command_line(data_dir, tmp_path):
    shape = dict(vocab_size=257, block_size=32)
    GPT(GPTConfig.named('16x2', **shape)).save(tmp_path / 'teacher', 'bytes')
    GPT(GPTConfig.named('32x3', **shape)).save(tmp_path / 'target', 'bytes')
    argv = [str(tmp_path / 'teacher'), f'--data_dir={data_dir}', '--samples=16', '--block_size=32']
    program = '-m', 'extras.alignment'
    fresh = run_command(*program, *argv, '--target=32x6', '--probes=2')
    assert fresh.returncode == 0, fresh.stderr
    header, _, *rows = [line for line in fresh.stdout.splitlines() if line.startswith('|')]
    assert 'curvature' in header and 'of a constant' in header
    assert [int(row.split('|')[1]) for row in rows] == [3, 6]  # early and middle are one here
    trained = run_command(*program, *argv, f'--target={tmp_path / "target"}', '--pairings=L2F2')
    assert trained.returncode == 0 and 'curvature' not in trained.stdout
    for more, word in (
        (['--pairings=L1F9', '--target=32x6'], 'the target has 6 layers'),
        (['--target=nowhere'], "no size 'nowhere'"),
        (['--samples=0'], 'samples must be'),
        (['--data=nothing'], 'nothing'),
    ):
        with pytest.raises(UserError, match=word):
            alignment.main([*argv, *more])
    with pytest.raises(UserError):
        alignment.main([])
