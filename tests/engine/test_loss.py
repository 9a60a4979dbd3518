"""
The head's loss in chunks: the plain computation's values and gradients, at any chunk size, with
and without a teacher.
"""

import pytest
import torch
import torch.nn.functional as F

import engine.loss as head
from engine.loss import Distillation, fused_linear_cross_entropy, padded_head


def drawn(n, width=8, vocab=11, dtype=torch.float64):
    """Hidden states, a head, targets, and a teacher of another width and a longer head."""
    torch.manual_seed(0)
    hidden, weight, theirs, head = (
        torch.randn(*shape, dtype=dtype)
        for shape in ((*n, width), (vocab, width), (*n, 5), (vocab + 3, 5))
    )
    targets = torch.randint(vocab, n)
    targets[0, :3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, (theirs, head)


def plain_linear_cross_entropy(hidden, weight, targets, teacher=None):
    """What the fused loss computes, with full logits."""
    logits, targets = F.linear(hidden, weight).flatten(0, -2), targets.flatten()
    data_loss = F.cross_entropy(logits, targets)
    if teacher is None:
        return data_loss, data_loss.detach(), torch.zeros_like(data_loss)
    theirs = F.linear(teacher.hidden, teacher.weight).flatten(0, -2)[:, : len(weight)]
    q, p = ((x / teacher.temperature).log_softmax(-1) for x in (logits, theirs))
    p, q = (q, p) if teacher.reverse else (p, q)
    divergence = (p.exp() * (p - q)).sum(-1)[targets != -100].mean() * teacher.temperature**2
    loss = teacher.alpha * data_loss + (1 - teacher.alpha) * divergence
    return loss, data_loss.detach(), divergence.detach()


@pytest.mark.parametrize('most', [0, 11 * 300, 10**6])  # logits at once: 3, 2 chunks, 1
@pytest.mark.parametrize(
    'how', [None, (0.5, 1.0, False), (0.3, 2.5, False), (0.0, 1.0, True), (0.3, 2.5, True)]
)
def test_values_and_gradients_are_those_of_the_plain_computation(monkeypatch, most, how):
    monkeypatch.setitem(head.LOGITS, 'cpu', most)
    hidden, weight, targets, teacher = drawn(n=(3, 200))
    results, how = [], Distillation(*teacher, *how) if how else None
    for function in (fused_linear_cross_entropy, plain_linear_cross_entropy):
        values = function(hidden, weight, targets, how)
        gradients = torch.autograd.grad(3 * values[0], (hidden, weight))
        results.append([*(v.detach().double() for v in values), *gradients])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_bfloat16_keeps_the_loss_in_float32():
    hidden, weight, targets, _ = drawn(n=(16, 64), width=32, vocab=300, dtype=torch.float32)
    exact = fused_linear_cross_entropy(hidden, weight, targets)[0].item()
    with torch.autocast('cpu', torch.bfloat16):
        rounded = fused_linear_cross_entropy(hidden, weight, targets)[0]
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact, rel=2e-3)
    rounded.backward()
    assert weight.grad.dtype == torch.float32


def test_a_head_of_an_odd_size_is_padded_where_nobody_sees_it():
    hidden, weight, targets, _ = drawn(n=(4, 16), width=16, vocab=5, dtype=torch.float32)
    padded = padded_head(weight.detach(), torch.bfloat16)
    assert padded.shape == (64, 16) and not padded[5:].any()
    with torch.autocast('cpu', torch.bfloat16):
        loss, *_ = fused_linear_cross_entropy(hidden, weight, targets)
    expected, *_ = plain_linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)


def test_compiled_it_has_the_same_gradient():
    hidden, weight, targets, _ = drawn(n=(3, 7), dtype=torch.float32)
    function = lambda h, w: fused_linear_cross_entropy(2 * h, w, targets)[0]  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    both = [torch.autograd.grad(f(hidden, weight), hidden)[0] for f in (compiled, function)]
    torch.testing.assert_close(*both)
