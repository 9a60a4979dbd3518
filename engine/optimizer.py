"""AdamW, the schedule of its learning rate, and its state on disk."""

import math
from pathlib import Path

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
    fused = matrices[0].device.type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups, fused=fused, **settings)


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
                state[moment][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f'{folder} has no readable optimizer.safetensors ({error})') from error
    return state


def set_optimizer_state(model, optimizer, state):
    """
    Give a fresh AdamW `state`. Of a sharded model only process 0 needs the state, and the others
    pass None.
    """
    fused, steps = optimizer.defaults.get('fused'), gather(state and float(state['step']))[0]
    for name, parameter in model.named_parameters():
        step = torch.tensor(steps, device=parameter.device if fused else 'cpu')
        optimizer.state[parameter]['step'] = step
        for moment in ('exp_avg', 'exp_avg_sq'):
            whole = state and state[moment][name]
            optimizer.state[parameter][moment] = placed_like(parameter, whole)
