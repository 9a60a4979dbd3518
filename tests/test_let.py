"""Learning from a teacher: losses against direct computations."""
import pytest
import torch

from let import distil, kd_loss, reverse_kl
from test_model import small, tokens


def test_kd_loss_is_the_softened_divergence_and_teaches_the_student_only():
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for temperature in (1.0, 2.5):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        expected = temperature ** 2 * (p * (p / q).log()).sum(-1).mean()
        assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    kd_loss(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 6)
    assert kd_loss(student, student).item() == pytest.approx(0, abs=1e-6)


def test_reverse_kl():
    student, teacher = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    p, q = student.softmax(-1), teacher.softmax(-1)
    assert reverse_kl(student, teacher).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)


def test_distillation_weighs_data_and_teacher(tmp_path):
    teacher, student, x = small().float(), small(n_layer=1).float(), tokens()
    teacher.save(tmp_path)
    loss, scalars = distil(tmp_path, alpha=0.6, temperature=2.0)(student, x, x.roll(-1, 1), 0.0)
    expected = kd_loss(student(x).logits, teacher(x).logits, 2.0)
    assert scalars['data_loss'].item() == pytest.approx(student(x, x.roll(-1, 1)).loss.item(), rel=1e-5)
    assert scalars['distillation_loss'].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == pytest.approx(0.6 * scalars['data_loss'].item() + 0.4 * expected.item(), rel=1e-4)
