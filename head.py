"""
The head and the losses on it, without the logits: (B T, V) float32 numbers are the largest tensor of a training step, and
nothing needs them all at once. `head_loss` goes through the positions in chunks, and since the loss is a scalar, the gradients
of hidden states and head are made in the same pass: each chunk's logits are computed once and forgotten.

    loss = CE(targets)                                                             without a teacher
    loss = alpha CE(targets) + (1 - alpha) T^2 KL(teacher / T || student / T)      with one; reverse: KL(student || teacher)

`plain_head_loss` computes the same with full logits: for reading, and for the tests to compare with.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def chunk_positions(vocab_size, device):
    """Positions whose logits are there at once: 16 MB of them on a CPU, near its caches; 512 MB on a GPU."""
    return max(256, 2 ** (22 if device.type == 'cpu' else 27) // vocab_size)


def plain_head_loss(hidden, weight, targets, teacher=None, alpha=0.5, temperature=1.0, reverse=False):
    """head_loss with full logits."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits, targets = F.linear(hidden, weight).flatten(0, -2).to(exact), targets.flatten()
    data = F.cross_entropy(logits, targets)
    if teacher is None:
        return data, data.detach(), torch.zeros_like(data)
    wanted = F.linear(*teacher).detach().flatten(0, -2).to(exact)[:, :len(weight)]
    wanted, found = (wanted / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    if reverse:
        wanted, found = found, wanted
    divergence = temperature ** 2 * (wanted.exp() * (wanted - found)).sum(-1)[targets != -100].mean()
    return alpha * data + (1 - alpha) * divergence, data.detach(), divergence.detach()


def head_loss(hidden, weight, targets, teacher=None, alpha=0.5, temperature=1.0, reverse=False):
    """
    (loss, cross entropy, divergence), scalars in nats, means over the positions whose target is not -100; the loss alone
    has a gradient. hidden (..., C), normalised already; weight (V, C); targets (...) int64. teacher: (its hidden states
    (..., C'), its head (V', C')); of a V' larger than V the rest is padding. Matrix products are in autocast's dtype,
    everything else at least in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    theirs = (teacher[0].detach().flatten(0, -2), teacher[1].detach()) if teacher else (None, None)
    learning = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _HeadLoss.apply(hidden.flatten(0, -2), weight, targets.flatten(), *theirs, alpha, temperature, reverse, dtype,
                           learning)


def aligned(weight, dtype):
    """
    The (V, C) head in `dtype`; where that takes a copy anyway, with rows of zeros up to a multiple of 64: GPUs multiply matrices
    of odd sizes slower (GPT-2's 50257 tokens become 50304). Here alone: no model, no file and no loss knows of the padding.
    """
    if weight.dtype == dtype and (dtype.itemsize > 2 or len(weight) % 64 == 0):
        return weight
    padded = weight.new_zeros(-(-len(weight) // 64) * 64, weight.shape[1], dtype=dtype)
    padded[:len(weight)] = weight
    return padded


def softmax_(logits):
    """Turn logits (n, V) into probabilities where they are; returns their logsumexp (n, 1)."""
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    logits.div_(total)
    return total.log() + highest


def forward_divergence(found, wanted):
    """(slope at each logit, KL(wanted || found) (n, 1)) of logits (n, V), which are used up."""
    gap, normaliser = wanted - found, softmax_(found) - softmax_(wanted)
    return found.sub_(wanted), torch.linalg.vecdot(wanted, gap)[:, None] + normaliser


def reverse_divergence(found, wanted):
    """(slope at each logit, KL(found || wanted) (n, 1)) of logits (n, V), which are used up."""
    gap = found - wanted
    gap += softmax_(wanted) - softmax_(found)
    value = torch.linalg.vecdot(found, gap)[:, None]
    return gap.sub_(value).mul_(found), value


class _HeadLoss(torch.autograd.Function):
    """hidden (n, C), weight (V, C), targets (n,), the teacher's hidden (n, C') and head (V', C') or None, and how."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, their_hidden, their_weight, alpha, temperature, reverse, dtype, learning):
        taught, step = their_hidden is not None, chunk_positions(len(weight), hidden.device)
        exact, alpha = torch.promote_types(dtype, torch.float32), alpha if taught else 1.0
        asked = (targets != -100).to(exact)
        shares, data, divergence = asked / asked.sum().clamp(min=1), asked.new_zeros(()), asked.new_zeros(())
        head, their_head = aligned(weight, dtype), their_weight[:len(weight)].to(dtype) if taught else None
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            h, target, share = hidden[rows].to(dtype), targets[rows].clamp(min=0)[:, None], shares[rows][:, None]
            logits = (h @ head.T).to(exact)
            if len(head) > len(weight):
                logits[:, len(weight):] = -torch.inf
            at_target = logits.gather(-1, target)
            if taught:
                wanted = (their_hidden[rows].to(dtype) @ their_head.T).to(exact).div_(temperature)
                found = logits[:, :len(weight)] / temperature
                apart, value = reverse_divergence(found, wanted) if reverse else forward_divergence(found, wanted)
                divergence = divergence + temperature ** 2 * (value * share).sum()
            # from here on in place: what follows goes over the largest tensor of the step, and memory is what it waits for
            highest = logits.amax(-1, keepdim=True)
            p = logits.sub_(highest).exp_()
            total = p.sum(-1, keepdim=True)
            data = data + ((total.log() + highest - at_target) * share).sum()
            if not learning:
                continue
            # the slope of the cross entropy at each logit: its probability, less 1 at the target
            slope = p.mul_(alpha * share / total).scatter_add_(-1, target, -alpha * share)
            if taught:
                slope[:, :len(weight)] += apart.mul_((1 - alpha) * temperature * share)
            slope = slope.to(dtype)
            d_hidden[rows] = slope @ head
            if exact == dtype:
                d_head.addmm_(slope.T, h)
            else:
                d_head += (slope.T @ h)[:len(weight)]
        loss = alpha * data + (1 - alpha) * divergence
        if learning:
            ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(data, divergence)
        return loss, data, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, slope, *_):
        d_hidden, d_head = ctx.saved_tensors   # scaled in place: they are large, and this is their one use
        return d_hidden.mul_(slope), d_head.mul_(slope), *(None,) * 8
