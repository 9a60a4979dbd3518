"""AdamW and the schedule of its learning rate."""

import math
import re

import torch
import torch.distributed as dist

from engine.errors import UserError


def learning_rate(step, steps, knobs):
    """Learning rate of `step` (0 .. steps - 1): linear warmup, then the schedule."""
    warmup = knobs.warmup * steps if knobs.warmup < 1 else knobs.warmup
    if step < warmup:
        return knobs.learning_rate * min(1.0, (step + 1) / warmup)
    height = 1.0
    if knobs.schedule == 'cosine':
        height = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    elif knobs.schedule == 'wsd':
        height = min(1.0, (steps - step) / max(1, knobs.decay_fraction * steps))
    low = knobs.min_lr_fraction
    return knobs.learning_rate * (low + (1 - low) * height)


def make_optimizer(model, knobs):
    """
    Fused AdamW with weight decay on matrices and embeddings only. Parameters whose names match
    knobs.freeze, a regular expression, get requires_grad=False. Raises UserError if it is invalid
    or matches all.
    """
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(not (knobs.freeze and re.search(knobs.freeze, name)))
    except re.error as error:
        raise UserError(f'freeze={knobs.freeze}: {error}') from None
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f'freeze={knobs.freeze} leaves nothing to train')
    groups = [
        dict(params=[p for p in trained if p.ndim >= 2], weight_decay=knobs.weight_decay),
        dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0),
    ]
    betas = knobs.beta1, knobs.beta2
    return torch.optim.AdamW(groups, lr=knobs.learning_rate, betas=betas, fused=True)


def mean_over_terms(model, terms, full):
    """
    Rescale gradients to the mean over all targets of a step, on all processes. terms: the number of
    unmasked targets on this process, a 0-d tensor; full: what it would be if none were masked.

    So far, each process has summed its losses and divided by `full`, and DDP or FSDP has averaged
    over the processes: sum / (world_size full). The mean is sum / (terms of all processes).
    """
    terms, world_size = terms.float(), 1
    if dist.is_initialized():
        dist.all_reduce(terms)
        world_size = dist.get_world_size()
    share = world_size * full / terms.clamp(min=1)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(share)
