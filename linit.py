"""
LInit: a model of any size between two checkpoints of a chain, by interpolating their weights (paper 004, section 3.4).

    theta  =  alpha expand(smaller)  +  (1 - alpha) subset(larger)
"""
import re
from dataclasses import fields, replace

import torch

from configurator import UserError
from expand import grow
from model import GPT, GPTConfig
from operators import Growth

SHAPE = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_mlp')   # what differs between the sizes of a chain


def default_alpha(small_params, large_params, params):
    """
    The weight of the smaller checkpoint: relative distance in parameters, within 0 and 1. (Of several readings of "based on the
    relative distance" the one that gives the paper's 0.9 at 138M by nominal and by exact counts.)
    >>> round(default_alpha(117, 345, 138), 1)
    0.9
    """
    return min(1.0, max(0.0, (large_params - params) / (large_params - small_params))) if large_params != small_params else 1.0


def rows_of(config, large, name):
    """Which rows of the larger model's tensor `name` a subset keeps: the first ones; of heads the first queries of each group."""
    stem = re.sub(r'^blocks\.\d+\.', '', name).rsplit('.', 1)[0]
    if stem == 'attn.q':
        per_large, per = large.n_head // large.n_kv_head, config.n_head // config.n_kv_head
        heads = torch.tensor([group * per_large + query for group in range(config.n_kv_head) for query in range(per)])
        return (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()
    sizes = {'attn.k': config.n_kv_head * config.head_dim, 'attn.v': config.n_kv_head * config.head_dim, 'mlp.up': config.n_mlp,
             'mlp.gate': config.n_mlp, 'wte': None, 'lm_head': None, 'wpe': config.block_size, 'attn.q_norm': None,
             'attn.k_norm': None}
    return slice(sizes[stem] if stem in sizes else config.n_embd)


def subset_tensor(config, large, name, tensor):
    """The part of the larger model's tensor `name` that a model of shape `config` keeps, a view or a copy."""
    rows = tensor[rows_of(config, large, name)]
    if tensor.ndim == 1:
        return rows
    if '.attn.o.' in name:
        return rows[:, rows_of(config, large, name.replace('.attn.o.', '.attn.q.'))]
    return rows[:, :config.n_mlp if '.mlp.down.' in name else config.n_embd]


def subset(model, config):
    """A model of shape `config` cut out of a larger one: its first layers, heads and dimensions."""
    check_shapes(config, model.config, config)
    state = model.state_dict()
    return _assemble(config, lambda name, _: subset_tensor(config, model.config, name, state[name]).clone(), model)


def _assemble(config, tensor_of, like):
    with torch.device('meta'):
        made = GPT(config)
    made.load_state_dict({name: tensor_of(name, empty.shape) for name, empty in made.state_dict().items()}, assign=True)
    made.build_rope(like.wte.weight.device)
    return made


def check_shapes(small, large, config):
    """Raise UserError unless `config` lies between two shapes that differ in size alone."""
    for field in fields(GPTConfig):
        a, b, c = (getattr(shape, field.name) for shape in (small, large, config))
        if field.name in SHAPE:
            if not a <= c <= b:
                raise UserError(f'{field.name} = {c} is outside the chain: its neighbours have {a} and {b}')
        elif field.name not in ('init_std', 'block_size') and not a == b == c:
            raise UserError(f'a chain of mixed architectures: {field.name} is {a!r} and {b!r}, wanted is {c!r}')
    if config.n_head // config.n_kv_head > large.n_head // large.n_kv_head:
        raise UserError(f'{config.n_head} heads on {config.n_kv_head} key heads cannot be cut out of {large.n_head} on '
                        f'{large.n_kv_head}')


@torch.no_grad()
def linit(small, large, config, alpha=None, depth='bert2bert'):
    """
    A model of shape `config` between two neighbours of a chain: alpha expand(small) + (1 - alpha) subset(large), tensor by tensor.
    alpha None: by relative distance in all parameters, tied ones once. expand: units copied (fpi), the last layers replicated
    (depth: bert2bert appends them, 0..11 10 11; interleave and the others as in operators.py). Raises UserError for a shape that
    is not between the two, or architectures that differ. Mixing helps where the larger one has taught the smaller; two models
    that do not know each other are better not mixed.
    """
    if small.wpe is not None:
        config = replace(config, block_size=min(config.block_size, small.config.block_size))
    check_shapes(small.config, large.config, config)
    if alpha is None:
        alpha = default_alpha(*(m.num_params(embedding=True, head=True) for m in (small, large)),
                              config.num_params(embedding=True, head=True))
    if alpha == 0:
        return subset(large, config)
    if alpha == 1:
        return grow(small, config, 'fpi', depth)
    growth = Growth(small.config, config, 'fpi', depth, piece=2 ** 18)   # small enough for the allocator to keep
    ours, theirs = small.state_dict(), large.state_dict()

    def mixed(name, shape):   # piece by piece, as they are grown: each is mixed while it is in the cache, and written once
        cut, row = subset_tensor(config, large.config, name, theirs[name]), 0
        made = small.wte.weight.new_empty(shape)
        for piece in growth.pieces(name, ours.__getitem__):
            rows = slice(row, row := row + len(piece))
            torch.lerp(cut[rows], piece, alpha, out=made[rows])
        return made
    return _assemble(config, mixed, small)


def neighbours(shapes, config):
    """The names of the next smaller and next larger checkpoint, {name: GPTConfig}, between which a shape lies. UserError."""
    def fits(small, large):
        return all(getattr(small, f) <= getattr(large, f) for f in SHAPE)
    smaller = [name for name, shape in shapes.items() if fits(shape, config)]
    larger = [name for name, shape in shapes.items() if fits(config, shape)]
    if not smaller or not larger:
        sizes = ', '.join(f'{name} ({s.n_layer} layers, {s.n_head} heads, width {s.n_embd})' for name, s in shapes.items())
        raise UserError(f'{config.n_layer} layers, {config.n_head} heads, width {config.n_embd} lie outside the chain: {sizes}')
    weights = {name: s.n_layer * s.n_embd * (s.n_head * s.head_dim + s.n_mlp) for name, s in shapes.items()}
    return max(smaller, key=weights.get), min(larger, key=weights.get)
