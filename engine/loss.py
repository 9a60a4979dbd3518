"""
The head and its losses without the logits: (B T, V) float32 numbers would be the largest tensor
of a training step, and nothing needs them all at once. `fused_linear_cross_entropy` goes through
the positions in chunks; since the loss is a scalar, it makes the gradients of hidden states and
head in the same pass, and each chunk's logits are computed once and forgotten.

    loss = CE(targets)                                                          without a teacher
    loss = alpha CE(targets) + (1 - alpha) T^2 KL(teacher / T || student / T)   with one
           (reverse: KL(student || teacher))
"""

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from engine.parallel import LOGITS, gather

IGNORED = -100  # the target of positions excluded from the loss


class Distillation(NamedTuple):
    """A teacher's part in the loss."""

    hidden: torch.Tensor  # (..., C'), after its final norm
    weight: torch.Tensor  # its head (V', C'); rows beyond the smaller of V and V' are ignored
    alpha: float = 0.5  # weight of the data; 1 - alpha is the teacher's
    temperature: float = 1.0  # T
    reverse: bool = False  # KL(student || teacher) instead of KL(teacher || student)


def fused_linear_cross_entropy(hidden, weight, targets, teacher=None):
    """
    (loss, cross entropy, divergence), scalars in nats, means over the positions whose target is
    not -100; only the loss has a gradient. hidden (..., C), after the final norm; weight (V, C);
    targets (...) int64; teacher: a Distillation or None. Matrix products run in autocast's dtype,
    everything else at least in float32.
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    learning = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    flat, targets = hidden.flatten(0, -2), targets.flatten()
    return _FusedLoss.apply(flat, weight, targets, teacher, dtype, learning)


def padded_head(weight, dtype):
    """
    A copy of the (V, C) head in `dtype`, with rows of zeros up to a multiple of 64: GPUs multiply
    matrices of odd sizes slower. No model, file or loss knows of this padding.
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
    """p (n, V), overwritten, less `share` (n, 1) at the columns `target` (n, 1)."""
    if torch.compiler.is_compiling():  # which fuses a comparison with the passes around it
        columns = torch.arange(p.shape[-1], device=p.device)
        return p - torch.where(columns == target, share, 0)
    return p.scatter_add_(-1, target, -share)


def forward_divergence(student, teacher):
    """(slope in each logit, KL(teacher || student) (n, 1)) of logits (n, V), overwritten."""
    gap = teacher - student
    normaliser = softmax_(student) - softmax_(teacher)
    value = torch.linalg.vecdot(teacher, gap)[:, None] + normaliser
    return student.sub_(teacher), value


def reverse_divergence(student, teacher):
    """(slope in each logit, KL(student || teacher) (n, 1)) of logits (n, V), overwritten."""
    gap = student - teacher
    gap += softmax_(teacher) - softmax_(student)
    value = torch.linalg.vecdot(student, gap)[:, None]
    return gap.sub_(value).mul_(student), value


class _FusedLoss(torch.autograd.Function):
    """hidden (n, C), weight (V, C), targets (n,), a Distillation or None; dtype of products."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, dtype, learning):
        given = teacher or Distillation(None, None, alpha=1.0)
        teacher_hidden, teacher_weight, alpha, temperature, reverse = given
        V, most = len(weight), LOGITS.get(hidden.device.type, LOGITS['cuda'])
        step = max(256, most // V)  # positions whose logits exist at once
        exact = torch.promote_types(dtype, torch.float32)
        shares = (targets != IGNORED).to(exact)
        shares = shares / shares.sum().clamp(min=1)  # of each position in the mean
        data_loss = divergence = shares.new_zeros(())
        head = weight if weight.dtype == dtype else padded_head(weight, dtype)
        teacher_head = teacher_weight[:V].to(dtype) if teacher else head
        common = len(teacher_head)  # one tokenizer, heads padded differently
        diverge = reverse_divergence if reverse else forward_divergence
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(weight, dtype=exact)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            h, share = hidden[rows].to(dtype), shares[rows][:, None]
            target = targets[rows].clamp(min=0)[:, None]
            logits = (h @ head.T).to(exact)
            logits[:, V:] = -torch.inf  # the padding
            at_target = logits.gather(-1, target)
            if teacher:
                theirs = teacher_hidden.flatten(0, -2)[rows].to(dtype) @ teacher_head.T
                ours = logits[:, :common] / temperature
                apart, value = diverge(ours, theirs.to(exact).div_(temperature))
                divergence = divergence + temperature**2 * (value * share).sum()
            # in place from here: this is the largest tensor of the step, and memory is the limit
            highest = logits.amax(-1, keepdim=True)
            p = logits.sub_(highest).exp_()
            total = p.sum(-1, keepdim=True)
            data_loss = data_loss + ((total.log() + highest - at_target) * share).sum()
            if not learning:
                continue
            # the slope of the cross entropy in each logit: its probability, less 1 at the target
            slope = less_at(target, p.mul_(alpha * share / total), alpha * share)
            if teacher:
                slope[:, :common] += apart.mul_((1 - alpha) * temperature * share)
            slope = slope.to(dtype)
            d_hidden[rows] = slope @ head
            if exact == dtype:
                d_head.addmm_(slope.T, h)
            else:
                d_head += (slope.T @ h)[:V]
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
# measuring without learning


@torch.no_grad()
def evaluate(model, batches):
    """
    Mean next-token loss in nats over `batches` of (x, y, number of real targets), as
    data.loader.validation_batches yields them; over all processes under torch.distributed.
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
    D(P || Q) in nats at each position: logits (..., V) of both -> (...). Of vocabularies that are
    padded differently, the tokens of the smaller are compared.
    """
    exact = torch.promote_types(logits_p.dtype, torch.float32)
    V = min(logits_p.shape[-1], logits_q.shape[-1])
    log_p, log_q = (each[..., :V].to(exact).log_softmax(-1) for each in (logits_p, logits_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)
