"""
Shapes between the models of a chain: which two a size lies between, and what it looks like there.
"""

import contextlib
import re
from dataclasses import fields, replace

from engine.errors import UserError
from engine.report import format_count
from model import SIZE_FIELDS, GPTConfig, all_params


def check_between(small, large, config):
    """Raise UserError unless `config` lies between two shapes that differ in size alone."""
    for f in fields(GPTConfig):
        low, high, wanted = (getattr(shape, f.name) for shape in (small, large, config))
        if f.name in SIZE_FIELDS:
            if not low <= wanted <= high:
                raise UserError(f'{f.name} = {wanted} is outside the chain: {low} to {high}')
        elif f.name not in ('init_std', 'block_size') and not low == wanted == high:
            found = f'{f.name} is {low!r} and {high!r}, wanted is {wanted!r}'
            raise UserError(f'a chain of mixed architectures: {found}')
    if config.n_head // config.n_kv_head > large.n_head // large.n_kv_head:
        wanted = f'{config.n_head} heads on {config.n_kv_head} key heads'
        found = f'{large.n_head} on {large.n_kv_head}'
        raise UserError(f'{wanted} cannot be cut out of {found}')


def fits(small, large):
    """Whether one shape is nowhere larger than another."""
    return all(getattr(small, f) <= getattr(large, f) for f in SIZE_FIELDS)


def neighbours(shapes, config):
    """
    The names of the next smaller and larger of {name: GPTConfig} around a shape; where all are
    larger, twice that of the smallest, of which it is a part. UserError.
    """

    def weight(name):
        shape = shapes[name]
        return shape.n_layer * shape.n_embd * (shape.n_head * shape.head_dim + shape.n_mlp)

    smaller = [name for name, shape in shapes.items() if fits(shape, config)]
    larger = [name for name, shape in shapes.items() if fits(config, shape)]
    if len(larger) == len(shapes) and not smaller:
        smaller = [min(larger, key=weight)]
    if not smaller or not larger:
        wanted = f'{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}'
        known = [f'{n} ({s.n_layer}, {s.n_head}, {s.n_embd})' for n, s in shapes.items()]
        raise UserError(f'{wanted} lie outside the chain: {", ".join(known)}')
    return max(smaller, key=weight), min(larger, key=weight)


def shape_between(shapes, to):
    """
    The GPTConfig of a named size, or of WIDTHxLAYERS among {name: GPTConfig}: heads, groups and MLP
    lie as far between the neighbours' as the width. Raises UserError where they are not whole.
    """
    match, ordered = re.fullmatch(r'(\d+)x(\d+)', to), sorted(shapes.values(), key=all_params)
    small_ones = ordered[0].head_dim == 16 and ordered[0].n_kv_head == ordered[0].n_head
    if not match or small_ones:
        named = GPTConfig.named(to)
        return replace(ordered[0], **{f: getattr(named, f) for f in SIZE_FIELDS})
    width, layers = int(match[1]), int(match[2])
    for small, large in zip(ordered, ordered[1:]):
        if not (small.n_embd <= width <= large.n_embd and small.n_layer <= layers <= large.n_layer):
            continue
        sizes = dict(n_embd=width, n_layer=layers)
        way, span = width - small.n_embd, large.n_embd - small.n_embd or 1
        for field in ('n_head', 'n_kv_head', 'n_mlp'):
            low, high = getattr(small, field), getattr(large, field)
            more, rest = divmod(way * (high - low), span)
            if rest:
                raise UserError(f'{to}: {field}, from {low} to {high}, is no whole number there')
            sizes[field] = low + more
        return replace(small, **sizes)
    known = ', '.join(f'{shape.n_embd}x{shape.n_layer}' for shape in ordered)
    raise UserError(f'{to} lies outside the chain: {known}')


def shape_of_size(shapes, params):
    """
    The GPTConfig among {name: GPTConfig} of about so many parameters, embeddings and head included:
    of all within 1%, else of the closest, the one as far between its neighbours in width as in
    depth: for the paper's five numbers the paper's five shapes. Raises UserError outside the chain.
    """
    ordered = sorted(shapes.values(), key=all_params)
    pairs = [p for p in zip(ordered, ordered[1:]) if all_params(p[0]) <= params <= all_params(p[1])]
    if not pairs:
        ends = f'{format_count(all_params(ordered[0]))} to {format_count(all_params(ordered[-1]))}'
        raise UserError(f'{format_count(params)} parameters lie outside the chain: {ends}')
    small, large = pairs[0]
    wider, deeper, found = large.n_embd - small.n_embd, large.n_layer - small.n_layer, []
    step = 64 if small.n_embd % 64 == large.n_embd % 64 == 0 else 1  # what hardware likes
    for width in range(small.n_embd, large.n_embd + 1, step):
        with contextlib.suppress(UserError):  # of widths without whole heads
            low, high = (shape_between(shapes, f'{width}x{s.n_layer}') for s in pairs[0])
            layer = (all_params(high) - all_params(low)) / max(1, deeper)
            more = (params - all_params(low)) / layer if layer else 0
            found.append(replace(low, n_layer=low.n_layer + round(min(max(0, more), deeper))))

    def miss(shape):
        return abs(all_params(shape) - params) / params

    def leaning(shape):
        if not (wider and deeper):
            return miss(shape)
        ways = (shape.n_embd - small.n_embd) / wider, (shape.n_layer - small.n_layer) / deeper
        return abs(ways[0] - ways[1])

    return min([s for s in found if miss(s) < 0.01] or [min(found, key=miss)], key=leaning)


def between(shapes, wanted):
    """(the names of a shape's neighbours, the smaller one's GPTConfig at that size). UserError."""
    small, large = neighbours(shapes, wanted)
    config = replace(shapes[small], **{f: getattr(wanted, f) for f in SIZE_FIELDS})
    least = shapes[small] if fits(shapes[small], config) else config
    check_between(least, shapes[large], config)
    return small, large, config
