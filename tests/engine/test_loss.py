"""
The head's loss in chunks: the plain computation's values and gradients, at any chunk size, with
and without a teacher.
"""

import pytest
import torch
import torch.nn.functional as F

import engine.loss as head
from engine.loss import Distillation, fused_linear_cross_entropy, padded_head


def drawn(seed=0, n=(3, 7), width=8, vocab=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((*n, width), (vocab, width))
    )
    targets = torch.randint(vocab, n, generator=generator)
    targets[0, :3] = -100
    teacher = (
        torch.randn(*n, 5, generator=generator, dtype=dtype),
        torch.randn(vocab + 3, 5, generator=generator, dtype=dtype),
    )
    return hidden, weight, targets, teacher


def plain_linear_cross_entropy(hidden, weight, targets, teacher=None):
    """What the fused loss computes, with full logits."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight).flatten(0, -2).to(exact)
    targets = targets.flatten()
    data_loss = F.cross_entropy(logits, targets)
    if teacher is None:
        return data_loss, data_loss.detach(), torch.zeros_like(data_loss)
    theirs = F.linear(teacher.hidden, teacher.weight).detach().flatten(0, -2).to(exact)
    pair = theirs[:, : len(weight)] / teacher.temperature, logits / teacher.temperature
    divergence = head.kl_of_logits(*(reversed(pair) if teacher.reverse else pair))
    divergence = teacher.temperature**2 * divergence[targets != head.IGNORED].mean()
    loss = teacher.alpha * data_loss + (1 - teacher.alpha) * divergence
    return loss, data_loss.detach(), divergence.detach()


@pytest.mark.parametrize('most', [0, 11 * 300, 10**6])  # logits at once: 3, 2 chunks, 1
@pytest.mark.parametrize(
    'taught, alpha, temperature, reverse',
    [
        (False, 0.5, 1.0, False),
        (True, 0.5, 1.0, False),
        (True, 0.3, 2.5, False),
        (True, 0.0, 1.0, True),
        (True, 0.3, 2.5, True),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_computation(
    monkeypatch, most, taught, alpha, temperature, reverse
):
    monkeypatch.setitem(head.LOGITS, 'cpu', most)
    hidden, weight, targets, teacher = drawn(n=(3, 200))
    results = []
    how = Distillation(*teacher, alpha, temperature, reverse) if taught else None
    for function in (fused_linear_cross_entropy, plain_linear_cross_entropy):
        hidden.grad = weight.grad = None
        values = function(hidden, weight, targets, how)
        (3 * values[0]).backward()
        results.append([*(v.detach().double() for v in values), hidden.grad, weight.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_without_gradients_only_the_values_are_made():
    hidden, weight, targets, _ = drawn()
    with torch.no_grad():
        loss, data, _ = fused_linear_cross_entropy(hidden, weight, targets)
    assert (
        not loss.requires_grad
        and loss == data == fused_linear_cross_entropy(hidden, weight, targets)[1]
    )


def test_bfloat16_keeps_the_loss_in_float32():
    hidden, weight, targets, teacher = drawn(n=(16, 64), width=32, vocab=300, dtype=torch.float32)
    exact = fused_linear_cross_entropy(hidden, weight, targets)[0]
    with torch.autocast('cpu', torch.bfloat16):
        rounded = fused_linear_cross_entropy(hidden, weight, targets)[0]
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(
        exact.item(), rel=2e-3
    )
    rounded.backward()
    assert weight.grad.dtype == torch.float32


def test_it_compiles_without_graph_breaks():
    hidden, weight, targets, _ = drawn(dtype=torch.float32)
    compiled = torch.compile(
        lambda h, w: fused_linear_cross_entropy(2 * h, w, targets)[0], fullgraph=True
    )
    compiled(hidden, weight).backward()
    ours, hidden.grad = hidden.grad, None
    fused_linear_cross_entropy(2 * hidden, weight, targets)[0].backward()
    torch.testing.assert_close(ours, hidden.grad)


@pytest.mark.parametrize('taught', [False, True])
def test_a_vocabulary_of_an_odd_size_is_padded_where_nobody_sees_it(monkeypatch, taught):
    hidden, weight, targets, teacher = drawn(n=(4, 16), width=16, vocab=61, dtype=torch.float32)
    padded = padded_head(weight.detach(), torch.bfloat16)
    assert padded.shape == (64, 16) and not padded[61:].any()
    results = []
    how = Distillation(*teacher) if taught else None
    for pad in (padded_head, lambda weight, dtype: weight.to(dtype)):
        monkeypatch.setattr(head, 'padded_head', pad)
        hidden.grad = weight.grad = None
        with torch.autocast('cpu', torch.bfloat16):
            values = fused_linear_cross_entropy(hidden, weight, targets, how)
        values[0].backward()
        results.append([*(v.detach() for v in values), hidden.grad, weight.grad])
    for ours, plain in zip(*results, strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-2)
