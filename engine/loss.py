"""
The output head and its losses, without storing all logits: (B T, V) float32 numbers would be the
largest tensor of a training step. `fused_linear_cross_entropy` processes the positions in chunks.
Since the loss is a scalar, the forward pass can already compute the gradients with respect to
hidden states and head; the backward pass only scales them. So each chunk's logits are computed once
and then discarded.

    loss = CE(targets)                                                          without a teacher
    loss = alpha CE(targets) + (1 - alpha) T^2 KL(teacher / T || student / T)   with one
           (reverse: KL(student / T || teacher / T))

where teacher / T is the softmax of the teacher's logits divided by the temperature T.
"""

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from engine.parallel import LOGITS, gather

IGNORED = -100  # the target of positions excluded from the loss


class Distillation(NamedTuple):
    """The teacher's outputs for a batch, and how they enter the loss."""

    hidden: torch.Tensor  # (..., C'), after its final norm
    weight: torch.Tensor  # its head (V', C'); rows beyond the smaller of V and V' are ignored
    alpha: float = 0.5  # weight of the cross entropy; 1 - alpha is that of the KL term
    temperature: float = 1.0  # T
    reverse: bool = False  # KL(student || teacher) instead of KL(teacher || student)


def fused_linear_cross_entropy(hidden, weight, targets, teacher=None):
    """
    (loss, cross entropy, T^2 KL): scalars in nats, averaged over the positions whose target is not
    -100. Only the loss is differentiable, with respect to hidden and weight. hidden: (..., C),
    after the final norm; weight: (V, C); targets: (...) int64; teacher: a Distillation or None.
    Matrix products run in autocast's dtype, everything else in float32 at least.
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    learning = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    flat, targets = hidden.flatten(0, -2), targets.flatten()
    return _FusedLoss.apply(flat, weight, targets, teacher, dtype, learning)


def padded_head(weight, dtype):
    """
    A copy of the (V, C) head in `dtype`, padded with rows of zeros to a multiple of 64, as GPUs are
    slower on matrices of odd sizes. Nothing outside this file sees the padding.
    """
    padded = weight.new_zeros(-(-len(weight) // 64) * 64, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    return padded


def softmax_(logits):
    """Turn logits (n, V) into probabilities in place; returns their logsumexp (n, 1)."""
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    logits.div_(total)
    return total.log() + highest


def less_at(target, p, share):
    """Subtract `share` (n, 1) from p (n, V) at the columns `target` (n, 1); may overwrite p."""
    if torch.compiler.is_compiling():  # unlike a scatter, this is fused with the operations around
        columns = torch.arange(p.shape[-1], device=p.device)
        return p - torch.where(columns == target, share, 0)
    return p.scatter_add_(-1, target, -share)


def forward_divergence(student, teacher):
    """
    (gradient with respect to the student's logits (n, V), KL(teacher || student) (n, 1)), given
    logits (n, V), which are overwritten. With logits s and t, q = softmax(s) and p = softmax(t):

        KL(p || q) = sum p (t - s) + logsumexp(s) - logsumexp(t),    gradient q - p
    """
    gap = teacher - student
    normaliser = softmax_(student) - softmax_(teacher)
    value = torch.linalg.vecdot(teacher, gap)[:, None] + normaliser
    return student.sub_(teacher), value


def reverse_divergence(student, teacher):
    """
    (gradient with respect to the student's logits (n, V), KL(student || teacher) (n, 1)), given
    logits (n, V), which are overwritten. With q and p as in forward_divergence:

        KL(q || p) = sum q log(q / p),    gradient q (log(q / p) - KL)
    """
    gap = student - teacher
    gap += softmax_(teacher) - softmax_(student)
    value = torch.linalg.vecdot(student, gap)[:, None]
    return gap.sub_(value).mul_(student), value


class _FusedLoss(torch.autograd.Function):
    """
    fused_linear_cross_entropy on hidden (n, C) and targets (n,). dtype: of the matrix products;
    learning: whether gradients are needed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, dtype, learning):
        given = teacher or Distillation(None, None, alpha=1.0)
        teacher_hidden, teacher_weight, alpha, temperature, reverse = given
        V, most = len(weight), LOGITS.get(hidden.device.type, LOGITS['cuda'])
        step = max(256, most // V)  # positions whose logits exist at once
        exact = torch.promote_types(dtype, torch.float32)
        shares = (targets != IGNORED).to(exact)
        shares = shares / shares.sum().clamp(min=1)  # each position's weight in the mean
        data_loss = divergence = shares.new_zeros(())
        head = weight if weight.dtype == dtype else padded_head(weight, dtype)
        teacher_head = teacher_weight[:V].to(dtype) if teacher else head
        common = len(teacher_head)  # min(V, V'): one tokenizer, but heads padded differently
        diverge = reverse_divergence if reverse else forward_divergence
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(weight, dtype=exact)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            h, share = hidden[rows].to(dtype), shares[rows][:, None]
            target = targets[rows].clamp(min=0)[:, None]  # -100 becomes any index: its share is 0
            logits = (h @ head.T).to(exact)
            logits[:, V:] = -torch.inf  # the padding
            at_target = logits.gather(-1, target)
            if teacher:
                teacher_logits = teacher_hidden.flatten(0, -2)[rows].to(dtype) @ teacher_head.T
                student_logits = logits[:, :common] / temperature
                apart, value = diverge(student_logits, teacher_logits.to(exact).div_(temperature))
                divergence = divergence + temperature**2 * (value * share).sum()
            # in place from here: this is the largest tensor of the step, and memory is the limit
            highest = logits.amax(-1, keepdim=True)
            p = logits.sub_(highest).exp_()
            total = p.sum(-1, keepdim=True)
            data_loss = data_loss + ((total.log() + highest - at_target) * share).sum()
            if not learning:
                continue
            # gradient of the cross entropy in the logits: the softmax, minus 1 at the target
            slope = less_at(target, p.mul_(alpha * share / total), alpha * share)
            if teacher:
                # T^2 of the loss times 1 / T, as the divergence is that of logits / T
                slope[:, :common] += apart.mul_((1 - alpha) * temperature * share)
            slope = slope.to(dtype)
            d_hidden[rows] = slope @ head
            if exact == dtype:
                d_head.addmm_(slope.T, h)
            else:
                d_head += (slope.T @ h)[:V]  # without the padding
        if learning:
            ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(data_loss, divergence)
        return alpha * data_loss + (1 - alpha) * divergence, data_loss, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, slope, *_):
        d_hidden, d_head = ctx.saved_tensors  # scaled in place: large, and used only here
        return d_hidden.mul_(slope), d_head.mul_(slope), None, None, None, None


# ----------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(model, batches):
    """
    Mean next-token loss in nats over batches of (x, y, number of targets that are not -100), as
    data.loader.validation_batches yields them; over the batches of all processes under
    torch.distributed.
    """
    was_training = model.training
    model.eval()
    losses, counts = [], []  # the losses stay on the device: nothing waits for them before the end
    for x, y, count in batches:
        losses.append(model(x, y).loss)
        counts.append(count)
    model.train(was_training)
    counts = torch.tensor(counts, dtype=torch.float64)
    sums = [(torch.stack(losses).cpu().double() @ counts).item(), counts.sum().item()]
    loss, targets = map(sum, zip(*gather(sums)))
    return loss / targets


def bits_per_byte(loss, bytes_per_token):
    """Nats per token -> bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


def kl_of_logits(logits_p, logits_q):
    """
    KL(P || Q) in nats at each position, (...), given the logits (..., V) of both. If their
    vocabularies are padded differently, the surplus logits are ignored.
    """
    exact = torch.promote_types(logits_p.dtype, torch.float32)
    V = min(logits_p.shape[-1], logits_q.shape[-1])
    log_p, log_q = (each[..., :V].to(exact).log_softmax(-1) for each in (logits_p, logits_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)
