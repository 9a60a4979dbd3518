"""AdamW, the learning rate's schedule, and AdamW with its moments in half the bytes."""
import math

import torch
from torch.distributed.tensor import DTensor


def learning_rate(step, steps, knobs):
    """Learning rate of `step` (0 .. steps - 1): linear warmup, then the schedule, down to min_lr_fraction of the maximum."""
    warmup = knobs.warmup * steps if knobs.warmup < 1 else knobs.warmup
    if step < warmup:
        return knobs.learning_rate * min(1.0, (step + 1) / warmup)
    height = 1.0
    if knobs.schedule == 'cosine':
        height = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    elif knobs.schedule == 'wsd':
        height = min(1.0, (steps - step) / max(1, knobs.decay_fraction * steps))
    return knobs.learning_rate * (knobs.min_lr_fraction + (1 - knobs.min_lr_fraction) * height)


def stable_steps(steps, knobs):
    """Steps of a stage before its decay begins; 0 where there is no stable phase with a decay behind it."""
    decay = math.ceil(knobs.decay_fraction * steps)
    return steps - decay if knobs.schedule == 'wsd' and 0 < decay < steps else 0


def make_optimizer(model, knobs):
    """AdamW in one fused kernel; weight decay on matrices and embeddings only. Every parameter is in exactly one group."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    assert len(matrices) + len(vectors) == len(list(model.parameters()))
    groups = [dict(params=matrices, weight_decay=knobs.weight_decay), dict(params=vectors, weight_decay=0.0)]
    settings = dict(lr=knobs.learning_rate, betas=(knobs.beta1, knobs.beta2), eps=knobs.eps)
    device = matrices[0].device.type
    if knobs.optimizer_dtype == 'bfloat16':
        return CompactAdamW(groups, compiled=device == 'cuda' and knobs.compile != 'False', **settings)
    return torch.optim.AdamW(groups, fused=device in ('cuda', 'cpu'), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# half the bytes

class CompactAdamW(torch.optim.Optimizer):
    """
    AdamW whose moments are stored in bfloat16: 4 bytes a parameter in place of 8, so that 12 in place of 16 are held for weight,
    gradient and moments. The arithmetic is float32. bfloat16 has 8 bits, and exp_avg_sq moves by 1 - beta2 of its distance in a
    step: rounded to the nearest, it would often not move at all, so it is rounded up or down at random with the right mean.
    The random bits depend on step and parameter alone: all replicas round alike, and a resumed run as the whole one.
    """

    def __init__(self, groups, lr, betas, eps, compiled=False):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self.update = torch.compile(update, dynamic=True) if compiled else update   # one kernel for all shapes and rates

    def load_state_dict(self, state_dict):
        """As every optimizer, which gives the moments the dtype of the parameters; here they go back to theirs."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({key: state[key].to(torch.bfloat16) for key in ('exp_avg', 'exp_avg_sq')})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient. `closure` is for torch's interface and is not called."""
        index = 0
        for group in self.param_groups:
            for p in group['params']:
                index += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p, dtype=torch.bfloat16),
                                 exp_avg_sq=torch.zeros_like(p, dtype=torch.bfloat16))
                state['step'] += 1
                step = int(state['step'])
                local = [(t.to_local() if isinstance(t, DTensor) else t).detach().view(-1)
                         for t in (p, p.grad, state['exp_avg'], state['exp_avg_sq'])]
                generator = torch.Generator(local[0].device).manual_seed(step * 1_000_003 + index)
                bits = torch.randint(2 ** 16, local[0].shape, dtype=torch.int32, device=local[0].device, generator=generator)
                (beta1, beta2), rate = group['betas'], group['lr']
                self.update(*local, bits, beta1, beta2, rate / (1 - beta1 ** step), (1 - beta2 ** step) ** 0.5, group['eps'],
                            1 - rate * group['weight_decay'])


def update(p, grad, exp_avg, exp_avg_sq, bits, beta1, beta2, rate, correction, eps, keep):
    """
    One AdamW step of one tensor in place. bits: random int32 in [0, 2^16); rate: learning rate / (1 - beta1^t); correction:
    sqrt(1 - beta2^t); keep: 1 - learning rate x weight decay.
    """
    grad = grad.float()
    first = exp_avg.float().lerp(grad, 1 - beta1)
    second = exp_avg_sq.float().lerp(grad.square(), 1 - beta2)
    p.mul_(keep).sub_(rate * first / (second.sqrt() / correction + eps))
    exp_avg.copy_(round_at_random(first, bits))
    exp_avg_sq.copy_(round_at_random(second, bits))


def round_at_random(x, bits):
    """float32 x -> bfloat16, up or down, right in the mean: a bfloat16 is a float32 without its last 16 bits."""
    return ((x.view(torch.int32) + bits) & -65536).view(torch.float32).to(torch.bfloat16)
