"""
Learning from a teacher: objectives that add a trained model to the loss, for the stages of any method.

Logit distillation (Hinton et al.), as the papers use it for a baseline:

    loss = alpha CE(student, next token) + (1 - alpha) T^2 KL(teacher / T || student / T)
"""
import torch
import torch.nn.functional as F

from model import load


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """
    T^2 KL(teacher || student) of the distributions softened by the temperature T, in nats, the mean over positions. Logits
    (..., V) of both; float32 inside. The gradient goes to the student alone.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return temperature ** 2 * (teacher.exp() * (teacher - student)).sum(-1).mean()


def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) in nats, the mean over positions (paper 004, Eq. 1): keep to what the teacher finds likely."""
    student, teacher = student_logits.float().log_softmax(-1), teacher_logits.detach().float().log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


def distil(folder, alpha=0.6, temperature=1.0):
    """
    The objective of logit distillation from the model in `folder`, which is loaded when the first batch comes. alpha is the
    weight of the data, 1 - alpha that of the teacher (paper 003, Appendix D: 0.6 at temperature 1).
    """
    teacher = []

    def objective(model, x, y, progress):
        if not teacher:
            teacher.append(load(folder, x.device).eval())
        with torch.no_grad():
            wanted = teacher[0](x).logits
        logits = model(x).logits
        data = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        distillation = kd_loss(logits, wanted, temperature)
        return alpha * data + (1 - alpha) * distillation, dict(data_loss=data, distillation_loss=distillation)
    return objective
