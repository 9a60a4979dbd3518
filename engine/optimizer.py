"""AdamW, the schedule of its learning rate, its state on disk, and its state in half the bytes."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.device import gather, processes
from engine.errors import UserError
from engine.files import commit_file
from engine.parallel import placed_like


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


def stable_steps(steps, knobs):
    """Steps before a WSD decay begins; 0 if there is no stable phase followed by a decay."""
    decay = math.ceil(knobs.decay_fraction * steps)
    return steps - decay if knobs.schedule == 'wsd' and 0 < decay < steps else 0


def make_optimizer(model, knobs):
    """Fused AdamW; weight decay on matrices and embeddings only, every parameter in one group."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        dict(params=matrices, weight_decay=knobs.weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    settings = dict(lr=knobs.learning_rate, betas=(knobs.beta1, knobs.beta2), eps=knobs.eps)
    device = matrices[0].device.type
    if knobs.optimizer_dtype == 'bfloat16':
        compiled = device == 'cuda' and knobs.compile != 'False'
        return CompactAdamW(groups, compiled=compiled, **settings)
    return torch.optim.AdamW(groups, fused=device in ('cuda', 'cpu'), **settings)


# ----------------------------------------------------------------------------------------------
# the state of a finished stage's optimizer on disk


def save_optimizer_state(folder, model, optimizer):
    """Write AdamW's state by parameter names to optimizer.safetensors. Called by every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_optimizer_state_dict(model, optimizer, options=options)
    if processes()[0]:
        return
    tensors, states = {}, found['state']
    for name, state in states.items():
        for moment in ('exp_avg', 'exp_avg_sq'):
            tensors[f'{moment}.{name}'] = state[moment].contiguous()
    step = int(max(state['step'] for state in states.values()))
    path = Path(folder) / 'optimizer.safetensors'
    save_file(tensors, f'{path}.tmp', metadata=dict(step=str(step)))
    commit_file(f'{path}.tmp', path)


def load_optimizer_state(folder):
    """{'step': int, 'exp_avg': {name: tensor}, 'exp_avg_sq': {...}}, float32. UserError."""
    try:
        with safe_open(Path(folder) / 'optimizer.safetensors', 'pt') as file:
            state = dict(step=int(file.metadata()['step']), exp_avg={}, exp_avg_sq={})
            for key in file.keys():
                moment, _, name = key.partition('.')
                tensor = file.get_tensor(key)
                exact = torch.promote_types(tensor.dtype, torch.float32)
                state[moment][name] = tensor.to(exact)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f'{folder} has no readable optimizer.safetensors ({error})') from error
    return state


def set_optimizer_state(model, optimizer, state, dtype=None):
    """
    Give a fresh AdamW `state`, its tensors in `dtype`; None: in the parameters'. Of a sharded model
    only process 0 needs the state, and the others pass None.
    """
    fused, steps = optimizer.defaults.get('fused'), gather(state and float(state['step']))[0]
    for name, parameter in model.named_parameters():
        step = torch.tensor(steps, device=parameter.device if fused else 'cpu')
        optimizer.state[parameter]['step'] = step
        for moment in ('exp_avg', 'exp_avg_sq'):
            whole = state and state[moment][name]
            found = placed_like(parameter, whole, dtype or parameter.dtype)
            optimizer.state[parameter][moment] = found


# ----------------------------------------------------------------------------------------------
# half the bytes


class StepSize(NamedTuple):
    """The numbers of one AdamW step, the same for all parameters of a group."""

    beta1: float
    beta2: float
    rate: float  # learning rate / (1 - beta1^t)
    correction: float  # sqrt(1 - beta2^t)
    eps: float
    keep: float  # 1 - learning rate x weight decay


class CompactAdamW(torch.optim.Optimizer):
    """
    AdamW whose two moments are stored in bfloat16: 12 bytes per parameter for weight, gradient
    and state instead of 16. The arithmetic is float32. A bfloat16 has 8 bits of precision, and
    exp_avg_sq moves by a fraction 1 - beta2 of its distance per step: rounded to the nearest it
    would often not move at all, so it is rounded up or down at random with the right mean. The
    random bits depend on step and parameter only: replicas round alike, and so do resumed runs.
    """

    def __init__(self, groups, lr, betas, eps, compiled=False):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self.update = torch.compile(update, dynamic=True) if compiled else update

    def load_state_dict(self, state_dict):
        """Like torch's, which casts the state to the parameters' dtype; here it is cast back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in ('exp_avg', 'exp_avg_sq'):
                state[key] = state[key].to(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter with a gradient. torch's `closure` is not called."""
        index = 0
        for group in self.param_groups:
            for p in group['params']:
                index += 1
                if p.grad is not None:
                    self.step_parameter(p, group, index)

    def step_parameter(self, p, group, index):
        """One step of the parameter with this number."""
        state = self.state[p]
        if not state:
            state['step'] = torch.zeros(())
            state['exp_avg'] = torch.zeros_like(p, dtype=torch.bfloat16)
            state['exp_avg_sq'] = torch.zeros_like(p, dtype=torch.bfloat16)
        state['step'] += 1
        step = int(state['step'])
        flat = []
        for tensor in (p, p.grad, state['exp_avg'], state['exp_avg_sq']):
            local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor  # a shard
            flat.append(local.detach().view(-1))
        device = flat[0].device
        generator = torch.Generator(device).manual_seed(step * 1_000_003 + index)
        how = dict(dtype=torch.int32, device=device, generator=generator)
        bits = torch.randint(2**16, flat[0].shape, **how)
        (beta1, beta2), rate = group['betas'], group['lr']
        correction = (1 - beta2**step) ** 0.5
        keep = 1 - rate * group['weight_decay']
        size = StepSize(beta1, beta2, rate / (1 - beta1**step), correction, group['eps'], keep)
        self.update(*flat, bits, size)


def update(p, grad, exp_avg, exp_avg_sq, bits, size):
    """One AdamW step of one tensor, in place. bits: random int32 in [0, 2^16)."""
    grad = grad.float()
    first = exp_avg.float().lerp(grad, 1 - size.beta1)
    second = exp_avg_sq.float().lerp(grad.square(), 1 - size.beta2)
    p.mul_(size.keep).sub_(size.rate * first / (second.sqrt() / size.correction + size.eps))
    exp_avg.copy_(round_stochastically(first, bits))
    exp_avg_sq.copy_(round_stochastically(second, bits))


def round_stochastically(x, bits):
    """float32 x -> bfloat16, up or down at random with mean x: the first 16 of its 32 bits."""
    return ((x.view(torch.int32) + bits) & -65536).view(torch.float32).to(torch.bfloat16)
