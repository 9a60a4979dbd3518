"""
Growth operators, tensor by tensor: every way to make a decoder wider or deeper, exact where it can be exact. expand.py
applies them to models in memory, to folders on disk and to the state of an optimizer.

An axis of the model (residual stream, query heads, key/value heads, MLP neurons, vocabulary) grows by a map `source`: new
unit -> old unit, whole old units first, then again from the first one. What writes an axis is copied and multiplied by a
factor w, what reads it by a factor r; the function is kept if over the copies of each unit  sum w r = 1. A residual stream
is read through a norm, whose gain is multiplied by g = 1 / w. With c copies of a unit, and D / d the growth of the width:

    fpi        w = 1                     r = 1 / c      exact where every unit has as many copies (bert2BERT; paper 001's exp)
    clone      the same, and refused where it is not exact (HyperCloning)
    aki        fpi, but rows of new units come from the layer above (bert2BERT's advanced knowledge initialisation; paper 000)
    lossless   w = sqrt(D / (d c))       r = 1 / c      exact for any D under RMSNorm: the mean square is kept, eps and all
               (under LayerNorm: whole copies times w, then coordinates at the mean, which the norm turns to zero)

Copies of one unit that are read alike get the same gradient and stay copies for ever. `noise` breaks the symmetry: each
reader's column gets noise whose sum over the copies of a unit is zero, which changes no output.
"""
import re
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from configurator import UserError, unknown
from model import GPTConfig

WIDTH, DEPTH = ('fpi', 'aki', 'lossless', 'clone'), ('stack', 'bert2bert', 'interleave', 'identity')
GROWING_WIDTH = ('n_head', 'n_kv_head', 'n_embd', 'n_mlp')
PIECE = 2 ** 20   # elements of a tensor that are grown at once: they fit a CPU's cache, and bound the memory


# ---------------------------------------------------------------------------------------------------------------------
# axes

class Axis(NamedTuple):
    """How one dimension of a tensor grows from `old` units."""
    old: int
    source: torch.Tensor    # (new,) int64: the old unit that each new one copies
    copies: torch.Tensor    # (new,) float64: how many copies of that unit there are
    factor: torch.Tensor    # (new,) float64: what each copy is multiplied by
    covered: int            # units from here on copy none ...
    fill: str = 'zero'      # ... they are zero, one, the mean of the old ones, or small and random
    reads: bool = False     # columns that read duplicated units, which zero-sum noise may tell apart

    def dual(self):
        """The map of gradients: f becomes 1 / (c f), since a unit's gradient is the sum over its c copies of f x theirs."""
        return self._replace(factor=1 / (self.copies * self.factor))

    def scaled(self, factor, **changes):
        """The same map with another factor for each unit."""
        return self._replace(factor=torch.ones_like(self.copies) * factor, **changes)


def round_robin(old, new, covered=None):
    """Whole copies of the old units, then again from the first one, until `new`."""
    source = torch.arange(new) % old
    copies = torch.bincount(source[:covered], minlength=old)[source].double()
    return Axis(old, source, copies, torch.ones_like(copies), covered or new)


def by_head(heads, head_dim):
    """An axis of heads as the axis of their dimensions: heads are copied whole, so RoPE and the softmax scale stay right."""
    source = (heads.source[:, None] * head_dim + torch.arange(head_dim)).flatten()
    copies = heads.copies.repeat_interleave(head_dim)
    return Axis(heads.old * head_dim, source, copies, torch.ones_like(copies), len(source))


def query_heads(small, large, kv):
    """
    The axis of query heads: a new key/value group copies the old group kv.source of it, and its queries take that group's
    queries in turn, going on where an earlier copy of the group stopped. Raises UserError when an old query would be lost.
    """
    per_old, per_new = small.n_head // small.n_kv_head, large.n_head // large.n_kv_head
    earlier = torch.arange(large.n_kv_head) // small.n_kv_head   # copies of the same group before this one
    within = (earlier[:, None] * per_new + torch.arange(per_new)) % per_old
    source = (kv.source[:, None] * per_old + within).flatten()
    counts = torch.bincount(source, minlength=small.n_head)
    if (counts == 0).any():
        raise UserError(f'cannot grow: n_head {small.n_head} -> {large.n_head} with n_kv_head {small.n_kv_head} -> '
                        f'{large.n_kv_head} would lose query heads')
    copies = counts[source].double()
    return Axis(small.n_head, source, copies, torch.ones_like(copies), len(source))


def residual_axis(small, large, width):
    """The residual stream: Axis of its writers, with the factor w of the operator (see the head of this file)."""
    d, D = small.n_embd, large.n_embd
    if width != 'lossless':
        return round_robin(d, D)
    if small.norm == 'rms':
        axis = round_robin(d, D)
        return axis.scaled((D / (d * axis.copies)).sqrt())
    whole = D // d * d   # LayerNorm subtracts the mean, so what is not a whole copy must stand at the mean
    return round_robin(d, D, covered=whole).scaled((D / whole) ** 0.5, fill='mean')


def axes_between(small, large, width):
    """{role: Axis} that grow the shape `small` into `large` by the operator `width`. UserError: what it cannot do."""
    check_growth(small, large)
    for field in GROWING_WIDTH if width == 'clone' else ():
        if getattr(large, field) % getattr(small, field):
            raise UserError(f'clone needs whole multiples: {field} {getattr(small, field)} -> {getattr(large, field)}; '
                            'lossless does not')
    residual = residual_axis(small, large, width)
    kv_heads = round_robin(small.n_kv_head, large.n_kv_head)
    query, kv = by_head(query_heads(small, large, kv_heads), small.head_dim), by_head(kv_heads, small.head_dim)
    mlp = round_robin(small.n_mlp, large.n_mlp)
    vocab = round_robin(small.vocab_size, large.vocab_size, covered=small.vocab_size)._replace(fill='mean')
    w, c = residual.factor, residual.copies
    return {
        'vocab': vocab.scaled(1), 'query': query, 'kv': kv, 'mlp': mlp,                         # rows of linear layers
        'from query': query.scaled(1 / query.copies, reads=True), 'from mlp': mlp.scaled(1 / mlp.copies, reads=True),
        'write': residual, 'read': residual.scaled(1 / c, fill='random', reads=True),           # the residual stream ...
        'gain': residual.scaled(1 / w, fill='one'), 'shift': residual.scaled(1, fill='zero'),   # ... and its norms
        # a tied head reads embeddings that were copied as writers, times w and not divided, so the last norm divides
        'tied gain': residual.scaled(1 / (c * w * w), fill='one'), 'tied shift': residual.scaled(1 / (c * w), fill='zero'),
    }


# roles of each tensor's dimensions (rows, columns); None does not grow. A bias has the role of its weight's rows.
ROLES = {
    'wte': ('vocab', 'write'), 'wpe': (None, 'write'), 'lm_head': ('vocab', 'read'), 'norm1': ('gain',), 'norm2': ('gain',),
    'attn.q': ('query', 'read'), 'attn.k': ('kv', 'read'), 'attn.v': ('kv', 'read'), 'attn.o': ('write', 'from query'),
    'attn.q_norm': (None,), 'attn.k_norm': (None,),
    'mlp.up': ('mlp', 'read'), 'mlp.gate': ('mlp', 'read'), 'mlp.down': ('write', 'from mlp'),
}


def check_growth(small, large):
    """Raise UserError, naming the field and both values, unless `large` can be grown from `small`."""
    for field, before in vars(small).items():
        after = getattr(large, field)
        if field in (*GROWING_WIDTH, 'n_layer', 'vocab_size') or field == 'block_size' and small.pos == 'rope':
            if after < before:
                raise UserError(f'cannot grow: {field} {before} -> {after} is smaller')
        elif field != 'init_std' and before != after:
            raise UserError(f'cannot grow: {field} {before} -> {after} differs, and growth keeps it')


def layer_map(old, new, depth='stack'):
    """
    Where each of `new` layers comes from: a list of (old layer, whether its outputs are zero).
    stack: the whole stack again and again (M o M). bert2bert: whole stacks, then the remainder from the top layers.
    interleave: each layer beside its copies. identity: new layers are spread evenly, each a copy of the one below it whose
    attn.o and mlp.down are zero, so that it adds nothing at first (LLaMA-Pro); the function is kept bit for bit.
    """
    if depth not in DEPTH:
        raise unknown('depth growth', depth, DEPTH)
    if depth == 'stack':
        return [(layer % old, False) for layer in range(new)]
    if depth == 'bert2bert':
        rest = new % old
        return [(layer % old, False) for layer in range(new - rest)] + [(layer, False) for layer in range(old - rest, old)]
    if depth == 'interleave':
        return [((2 * layer + 1) * old // (2 * new), False) for layer in range(new)]
    extra = [(layer + 1) * (new - old) // old - layer * (new - old) // old for layer in range(old)]
    return [(layer, copy > 0) for layer in range(old) for copy in range(1 + extra[layer])]


# ---------------------------------------------------------------------------------------------------------------------
# growing tensors

@dataclass
class Growth:
    """A growth between two shapes: says what each tensor of the larger model is, a piece of rows at a time."""
    small: GPTConfig
    large: GPTConfig
    width: str = 'aki'
    depth: str = 'stack'
    noise: float = 0.0   # root mean square of the zero-sum noise, relative to its row's; 0: none
    seed: int = 0
    piece: int = PIECE   # elements grown at once; the noise depends on it

    def __post_init__(self):
        if self.width not in WIDTH:
            raise unknown('width growth', self.width, WIDTH)
        self.axes = axes_between(self.small, self.large, self.width)
        self.layers = layer_map(self.small.n_layer, self.large.n_layer, self.depth)

    def roles(self, name):
        """The Axis, or None, of each dimension of a tensor."""
        stem, kind = re.sub(r'^blocks\.\d+\.', '', name).rsplit('.', 1)
        if stem in ('norm', 'norm1', 'norm2'):
            tied = 'tied ' if stem == 'norm' and self.small.tied else ''
            return [self.axes[tied + ('gain' if kind == 'weight' else 'shift')]]
        axes = [role and self.axes[role] for role in ROLES[stem]]
        return axes[:1] if kind == 'bias' else axes

    def origin(self, name):
        """(the old tensor that `name` copies, the one in the layer above it or None, is it in a layer that adds nothing?)."""
        match = re.match(r'blocks\.(\d+)\.(.+)', name)
        if not match:
            return name, None, False
        layer, adds_nothing = self.layers[int(match[1])]
        has_donor = self.width == 'aki' and layer + 1 < self.small.n_layer and 'norm' not in name
        return f'blocks.{layer}.{match[2]}', f'blocks.{layer + 1}.{match[2]}' if has_donor else None, adds_nothing

    def rescaled(self, name):
        """The factor of a tensor whose layer's number changes, where attention logits are divided by that number."""
        match = re.match(r'blocks\.(\d+)\.attn\.(q|q_norm)\.', name)
        if not (match and self.small.attn_scale_by_layer) or (match[2] == 'q' and self.small.qk_norm):
            return 1.0
        layer = int(match[1])
        return (layer + 1) / (self.layers[layer][0] + 1)

    def pieces(self, name, fetch, moment=0):
        """
        Yield the new tensor `name` in pieces of rows, of the old one's dtype. fetch: old name -> what gives rows by slicing
        and has a shape. moment: 0 for weights; 1 and 2 for AdamW's exp_avg and exp_avg_sq, which follow the gradient.
        The pieces, and so the noise, are the same wherever and in whatever order tensors are grown.
        """
        old_name, donor_name, adds_nothing = self.origin(name)
        old, donor, axes = fetch(old_name), fetch(donor_name) if donor_name else None, self.roles(name)
        if moment:   # units without an origin: no momentum, but a mean second moment, or their first steps would be leaps
            axes = [axis and axis.dual()._replace(fill='zero' if moment == 1 else 'mean') for axis in axes]
        is_zero = adds_nothing and ((moment == 0 and re.search(r'\.(attn\.o|mlp\.down)\.', name)) or moment == 1)
        rescale = self.rescaled(name) ** (1, -1, -2)[moment]
        n_rows = len(axes[0].source) if axes[0] else old.shape[0]
        columns = len(axes[1].source) if len(axes) == 2 and axes[1] else 1
        has_mean = axes[0] and axes[0].fill == 'mean' and axes[0].covered < n_rows
        mean = old[:].mean(0, keepdim=True) if has_mean else None
        for start in range(0, n_rows, step := max(1, self.piece // columns)):
            stop = min(n_rows, start + step)
            rows = gather_rows(old, donor, mean, axes[0], start, stop)
            generator = torch.Generator().manual_seed(zlib.crc32(f'{self.seed} {name} {start}'.encode()))
            piece = grow_piece(rows, axes, start, stop, max(1, moment), 0.0 if moment else self.noise, generator)
            if is_zero:
                piece.zero_()
            if rescale != 1:
                piece.mul_(rescale)
            yield piece


def gather_rows(old, donor, mean, axis, start, stop):
    """The old rows that rows `start` to `stop` of a new tensor copy; new units take theirs from `donor` if there is one."""
    if axis is None:
        return old[start:stop].clone()
    own = axis.old if donor is not None else axis.covered
    parts = [take(old, axis.source[start:min(stop, own)])] if start < own else []
    if stop > own and donor is not None:
        parts.append(take(donor, axis.source[max(start, own):stop]))
    elif stop > own:   # units that copy none: the mean of all, or a place to be filled
        like = old[:1] if mean is None else mean
        parts.append(like.expand(stop - max(start, own), *like.shape[1:]))
    return torch.cat(parts)


def take(tensor, index):
    """tensor[index] by rows, read as slices of rows that follow one another: so a tensor on disk is read in large pieces."""
    breaks = (torch.nonzero(index.diff() != 1).flatten() + 1).tolist()
    return torch.cat([tensor[int(index[a]):int(index[b - 1]) + 1] for a, b in zip([0, *breaks], [*breaks, len(index)])])


def grow_piece(rows, axes, start, stop, power, noise, generator):
    """The piece `start` to `stop` of a new tensor, from the old rows it copies: columns grown, factors ** power applied."""
    dtype, rows = rows.dtype, rows.to(torch.promote_types(rows.dtype, torch.float32))   # round to bfloat16 once, at the end
    if axis := axes[0]:
        if axis.covered < stop and axis.fill != 'mean':
            rows[max(0, axis.covered - start):] = float(axis.fill == 'one')
        factor = axis.factor[start:stop].clone()
        if axis.fill == 'one':
            factor[max(0, axis.covered - start):] = 1
        scale(rows, factor ** power, 0)
    if len(axes) == 2 and axes[1]:
        rows = grow_columns(rows, axes[1], power, generator)
        if axes[1].reads and noise:
            add_noise(rows, axes[1], noise, generator)
    return rows.to(dtype)


def grow_columns(rows, axis, power, generator):
    """Copy the columns of `rows` by the axis, times its factors ** power; those that copy none are filled."""
    whole, rest = divmod(axis.covered, axis.old)
    if torch.equal(axis.source, torch.arange(len(axis.source)) % axis.old):   # in slices: several times faster than by index
        free = rows.new_zeros(len(rows), len(axis.source) - axis.covered)
        grown = torch.cat([rows] * whole + [rows[:, :rest], free], 1)
    else:
        grown = rows.index_select(1, axis.source.to(rows.device))
    if axis.covered < grown.shape[1] and axis.fill == 'mean':
        grown[:, axis.covered:] = rows.mean(1, keepdim=True)
    scale(grown, axis.factor ** power, 1)
    if axis.covered < grown.shape[1] and axis.fill == 'random':   # they read what is always zero
        grown[:, axis.covered:] = 0.02 * torch.randn(len(rows), grown.shape[1] - axis.covered, generator=generator).to(rows)
    return grown


def scale(tensor, factor, dim):
    """Multiply by a factor for each index of `dim`, in place; no work where all are 1."""
    if not (factor == 1).all():
        tensor.mul_(factor.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.ndim)]))


def add_noise(rows, axis, noise, generator):
    """
    Tell copies apart, in place: columns that read the c > 1 copies of a unit get normal noise whose sum over the copies is
    zero, `noise` times the root mean square of its row (LEMON, HyperCloning; here for any numbers of copies).
    """
    copied = torch.nonzero(axis.copies[:axis.covered] > 1).flatten()
    if len(copied):
        amplitude = noise * rows.square().mean(1, keepdim=True).sqrt()
        drawn = amplitude * torch.randn(len(rows), len(copied), generator=generator, dtype=torch.float64).to(rows)
        units, copies = axis.source[copied].to(rows.device), axis.copies[copied].to(rows)
        sums = rows.new_zeros(len(rows), axis.old).index_add_(1, units, drawn)
        rows[:, copied] += drawn - sums[:, units] / copies
