"""
Growing trained models, and progressive training: a model family for the price of its largest
member.

Paper: Yano et al., Efficient Construction of Model Family through Progressive Training Using
Model Expansion.

    python train.py config/progressive_tiny.py         # minutes on a CPU
    python train.py config/progressive_8b.py           # the paper's family
    python expand.py out/family/4b grown/8b --to=8b --width=lossless --depth=identity
    python expand.py llama-8b grown/upscaled --layers=1-24,9-32    # any slices of its layers

Train the smallest model, expand it, train on, expand again. Each size trains on its from-scratch
budget minus what the smaller sizes cost, so that the family costs what its largest member would
cost alone (Eq. 4):

    FLOPs(X_i, T_i) = FLOPs(X_i, T_scratch_i) - sum_{j<i} FLOPs(X_j, T_j),   FLOPs(X, T) = 6 X T

Growing in width, by example: give an MLP two copies of each neuron. Both compute what the original
computed. Halve the weights with which the next layer reads them, and the sums it receives are
unchanged: the MLP is twice as wide, and the model computes the same function. With c copies, divide
by c.

The residual stream takes one more step: every layer writes to it and reads it through a norm. Scale
each of the c copies of a unit by a factor w that leaves the norm's statistics unchanged (`lossless`
below). Divide the norm's gain by w, and its output is read like any other copies.

Copies that are read with equal weights receive equal gradients and stay equal forever. Noise on the
weights that read them breaks the symmetry; it sums to zero over the copies of a unit, so no output
changes.

Growing in depth repeats layers, or adds layers whose outputs are zero at first.
"""

import math
import re
import statistics
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from configurator import Count, NonNegative, Positive, configure
from data.vocabulary import tokenizer_to_carry
from engine.errors import UserError, run_as_program, unknown
from engine.files import new_folder
from engine.log import progress_bar
from engine.loss import kl_of_logits
from engine.report import (
    by_label,
    compare_variants,
    curve_panels,
    difference,
    family_cost,
    mean_curve,
    steps_to_loss,
    training_curve,
)
from engine.stage import Origin, Result, Stage
from model import GPT, SIZE_FIELDS, GPTConfig, load

WIDTH_FIELDS = ('n_head', 'n_kv_head', 'n_embd', 'n_mlp')  # fields that grow in width

# ----------------------------------------------------------------------------------------------
# growing in width, one tensor at a time


class Axis(NamedTuple):
    """How one dimension of a tensor grows, from d units to D."""

    source: torch.Tensor  # (D,) int64: index of the old unit that each new unit copies; -1: none
    factor: torch.Tensor  # (D,) float64: scale of each new unit
    fill: float = 0.0  # a unit without a source is the mean of the old units times this and factor


def copies(source):
    """For each new unit, how many new units copy the same old one: (D,) int64 -> (D,) float64."""
    _, unit, count = source.unique(return_inverse=True, return_counts=True)
    return count[unit].double()


def unscaled(source, fill=0.0):
    """An Axis that copies units without scaling them."""
    return Axis(source, torch.ones(len(source), dtype=torch.float64), fill)


def copy_units(tensor, axis, dim):
    """A new tensor grown along dimension `dim` by an Axis; with axis None, the tensor itself."""
    if axis is None:
        return tensor
    source = axis.source.to(tensor.device)
    new = tensor.index_select(dim, source.clamp(min=0))  # -1 copies unit 0, and is filled below
    shape = [-1] + [1] * (tensor.ndim - 1 - dim)  # broadcasts along dim
    if source.min() < 0:
        fill = axis.fill * tensor.mean(dim, keepdim=True)
        new = torch.where((source < 0).view(shape), fill, new)
    return new.mul_(axis.factor.to(new).view(shape))


def copied(old, rows, columns, above=None):
    """
    Grow a tensor (rows,) or (rows, columns) by copying along both axes, an Axis or None each.
    `above`, which only rows_from_above needs, is ignored.
    """
    return copy_units(copy_units(old, rows, 0), columns, 1)


def rows_from_above(old, rows, columns, above=None):
    """
    As `copied`, but the rows of new units come from `above`, the same tensor in the old model's
    next layer (AKI, bert2BERT). above None: norms, the top layer, tensors outside the layers.
    """
    own = copied(old, rows, columns)
    if above is None or rows is None:
        return own
    return torch.cat([own[: len(old)], copied(above, rows, columns)[len(old) :]])


def round_robin(d, D, norm):
    """The residual stream's Axis that copies units in turn, unscaled: 0, 1, ..., d - 1, 0, ..."""
    return unscaled(torch.arange(D) % d)


def equal_norm(d, D, norm):
    """
    The residual stream's Axis with copies scaled so that norms see unchanged statistics. RMSNorm
    divides by the root mean square. With w = sqrt(D / (d c)), the c copies of x contribute
    c (w x)^2 = (D / d) x^2 to the sum of squares, so the mean over D units equals the old mean over
    d. LayerNorm subtracts the mean first, so every unit gets the same number of copies,
    k = floor(D / d), with w = sqrt(D / (k d)); the remaining units are set to the mean, which
    LayerNorm turns into zero.
    """
    source, whole = torch.arange(D) % d, D // d * d
    if norm == 'rms':
        return Axis(source, (D / (d * copies(source))).sqrt())
    source[whole:] = -1
    return Axis(source, torch.full((D,), (D / whole) ** 0.5, dtype=torch.float64), 1.0)


class Width(NamedTuple):
    """
    A width operator: how the residual stream is copied, and how a tensor grows. Tensors come in
    float32 or wider; gains and biases are (rows,), with columns None. Where the columns of a weight
    read copies, their factor is 1 / copies(source). train.py seeds torch before it grows a model.
    """

    residual: Callable  # (d, D, norm: rms or layer) -> the residual stream's Axis
    tensor: Callable  # (old, rows: Axis or None, columns, the layer above's or None) -> new tensor
    integer_only: bool = False  # every field in WIDTH_FIELDS must grow by a whole factor


# Function-preserving initialisation (bert2BERT): exact if every unit has the same number of copies;
# otherwise norms weight each unit by its number of copies. bert2BERT draws the extra copies at
# random; here units are copied in turn.
fpi = Width(round_robin, copied)
# Advanced knowledge initialisation (bert2BERT): not exact. Yano et al. use it (footnote 4).
aki = Width(round_robin, rows_from_above)
# Exact for any width, with a tied or untied head, under RMSNorm and LayerNorm.
lossless = Width(equal_norm, copied)
# HyperCloning: fpi, restricted to whole multiples, for which it is exact.
clone = Width(round_robin, copied, integer_only=True)

WIDTH = {'fpi': fpi, 'aki': aki, 'lossless': lossless, 'clone': clone}


def add_noise(weight, source, noise, generator):
    """
    Break the symmetry of copies, in place: the columns of `weight` (rows, D) that read the c > 1
    copies of a unit get normal noise of standard deviation `noise` times the row's root mean
    square, less its mean over the c copies, so that it sums to zero. source: (D,), of the Axis.
    """
    _, unit, count = source.unique(return_inverse=True, return_counts=True)
    copied = torch.nonzero(count[unit] > 1).flatten()
    size = noise * weight.square().mean(1, keepdim=True).sqrt()
    # drawn on the CPU in float64, so the noise does not depend on the weight's device or dtype
    drawn = torch.randn(len(weight), len(copied), generator=generator, dtype=torch.float64)
    drawn = size * drawn.to(weight)
    unit, count = unit[copied].to(weight.device), count.to(weight)
    sums = weight.new_zeros(len(weight), len(count)).index_add_(1, unit, drawn)
    weight[:, copied] += drawn - sums[:, unit] / count[unit]  # less the mean over the copies


# The roles of a weight's rows and columns, which choose their Axis in `axes_between`: `write` is
# the residual stream as layers write it, `read` the same after a norm, `from query` and `from mlp`
# read what `query` and `mlp` make; None does not grow. A bias has its rows' role, a norm's `shift`.
ROLES = {
    'wte': ('vocab', 'write'),
    'wpe': (None, 'write'),
    'lm_head': ('vocab', 'read'),
    'norm': ('gain',),
    'norm1': ('gain',),
    'norm2': ('gain',),
    'attn.q': ('query', 'read'),
    'attn.k': ('kv', 'read'),
    'attn.v': ('kv', 'read'),
    'attn.o': ('write', 'from query'),
    'attn.q_norm': (None,),
    'attn.k_norm': (None,),
    'mlp.up': ('mlp', 'read'),
    'mlp.gate': ('mlp', 'read'),
    'mlp.down': ('write', 'from mlp'),
}


def query_heads(small, large):
    """
    The old query head that each new one copies: (large.n_head,) int64. New group G copies old group
    G mod n_kv_head and cycles through its heads; a second copy of a group continues where the first
    stopped. 4 heads in 2 groups to 6 in 3: 0 1, 2 3, 0 1. 4 in 1 group to 6 in 2: 0 1 2, 3 0 1.
    Raises UserError if an old query head would be lost.
    """
    before, after = small.n_head // small.n_kv_head, large.n_head // large.n_kv_head
    group = torch.arange(large.n_kv_head)[:, None]
    within = (group // small.n_kv_head * after + torch.arange(after)) % before
    heads = (group % small.n_kv_head * before + within).flatten()
    if len(heads.unique()) < small.n_head:
        raise UserError(
            f'cannot grow: n_head {small.n_head} -> {large.n_head} with n_kv_head '
            f'{small.n_kv_head} -> {large.n_kv_head} would lose query heads'
        )
    return heads


def axes_between(small, large, residual):
    """{role of rows or columns: Axis} for growth between two shapes. residual: stream's Axis."""

    def dimensions(heads):  # copies whole heads: RoPE and the softmax's scale stay valid
        return (heads[:, None] * small.head_dim + torch.arange(small.head_dim)).flatten()

    kv = dimensions(torch.arange(large.n_kv_head) % small.n_kv_head)
    query, mlp = dimensions(query_heads(small, large)), torch.arange(large.n_mlp) % small.n_mlp
    vocab = torch.arange(large.vocab_size)
    vocab[small.vocab_size :] = -1  # new tokens start at the mean of the old ones
    source, w, _ = residual
    c = copies(source)
    return {
        None: None,
        'vocab': unscaled(vocab, 1.0),
        'query': unscaled(query),
        'kv': unscaled(kv),
        'mlp': unscaled(mlp),
        'from query': Axis(query, 1 / copies(query)),
        'from mlp': Axis(mlp, 1 / copies(mlp)),
        'write': residual,
        'read': Axis(source, 1 / c),
        'gain': Axis(source, 1 / w, 1.0),  # undoes w: the copies of x, normalised, are w norm(x)
        'shift': unscaled(source),
        # A tied head reads with the embeddings, scaled by w, where an untied one has 1 / c. Summed
        # over c copies that is c w (gain' w x + shift') times the old weight, so
        # gain' = gain / (c w^2) and shift' = shift / (c w) restore the logits.
        'tied gain': Axis(source, 1 / (c * w * w), 1.0),
        'tied shift': Axis(source, 1 / (c * w)),
    }


# ----------------------------------------------------------------------------------------------
# growing in depth: lists of the old layer, from 0, that each new layer copies (L old, L' new)


def stack(old, new):
    """Repeat the whole stack: layer l copies l mod L."""
    return [layer % old for layer in range(new)]


def bert2bert(old, new):
    """Repeat the whole stack; its top layers make up the remainder (bert2BERT)."""
    rest = new % old
    return stack(old, new - rest) + list(range(old - rest, old))


def interleave(old, new):
    """Put every layer next to its copies: layer l copies floor((l + 1/2) L / L')."""
    return [(2 * layer + 1) * old // (2 * new) for layer in range(new)]


def identity(old, new):
    """
    Spread the copies evenly, each directly above its original: layer l copies
    ceil((l + 1) L / L') - 1 (LLaMA-Pro). In the copies `grow` zeroes attn.o and mlp.down, which
    write to the residual stream: they add nothing at first, and the function is preserved bit for
    bit.
    """
    return [((layer + 1) * old - 1) // new for layer in range(new)]


DEPTH = {'stack': stack, 'bert2bert': bert2bert, 'interleave': interleave, 'identity': identity}


def repeated(layers):
    """The positions in a list of source layers whose source occurs earlier in the list."""
    return [place for place, layer in enumerate(layers) if layer in layers[:place]]


# ----------------------------------------------------------------------------------------------
# growing a model


def check_growth(small, large, width, depth):
    """
    Raise UserError, naming the field and both values, unless the GPTConfig `large` can be grown
    from `small`. width: a name in WIDTH; depth: a name in DEPTH, or a list of source layers.
    """
    if width not in WIDTH:
        raise unknown('width operator', width, WIDTH)
    if not isinstance(depth, str):  # a list may leave layers out: any n_layer will do
        small = replace(small, n_layer=1)
    elif depth not in DEPTH:
        raise unknown('depth operator', depth, DEPTH)
    growing = [*SIZE_FIELDS, 'vocab_size']
    if small.pos == 'rope':  # learned positions would need new rows of wpe
        growing.append('block_size')
    for field, before in vars(small).items():
        after = getattr(large, field)
        if field in growing and after < before:
            raise UserError(f'cannot grow: {field} {before} -> {after} is smaller')
        # init_std does not matter to a model that is trained already
        if field not in (*growing, 'init_std') and after != before:
            raise UserError(f'cannot grow: {field} {before} -> {after} differs')
        if WIDTH[width].integer_only and field in WIDTH_FIELDS and after % before:
            raise UserError(f'{width} needs whole multiples, not {field} {before} -> {after}')
    query_heads(small, large)  # raises if a query head would be lost


def roles_of(stem, kind, tied):
    """
    (role of the rows, role of the columns) of a tensor: 'attn.q', 'weight' -> 'query', 'read'.
    tied: whether the head is the token embedding, which changes the final norm's role.
    """
    rows, columns = (*ROLES[stem], None)[:2]  # norms have no columns
    if kind == 'bias':
        rows, columns = rows.replace('gain', 'shift'), None
    return f'tied {rows}' if tied and stem == 'norm' else rows, columns


@torch.no_grad()
def grow(model, config, width='lossless', depth='identity', noise=0.0, seed=0):
    """
    A new GPT of shape `config`, grown from `model`, with its dtype, device and training mode.
    width: a name in WIDTH; depth: a name in DEPTH, or a list of source layers, from 0; noise:
    standard deviation of the zero-sum noise on weights that read copies, relative to each row's
    root mean square; seed: of the noise. Raises UserError, naming the field that does not fit.
    """
    small, old, grown = model.config, model.state_dict(), {}
    check_growth(small, config, width, depth)
    operator = WIDTH[width]
    axes = axes_between(small, config, operator.residual(small.n_embd, config.n_embd, small.norm))
    layers = DEPTH[depth](small.n_layer, config.n_layer) if isinstance(depth, str) else depth
    zero_output = repeated(layers) if depth == 'identity' else ()

    def exact(name):  # compute in float32 or wider, so that only the result is rounded
        return old[name].to(torch.promote_types(old[name].dtype, torch.float32))

    for name in GPT.on_meta(config).state_dict():
        # blocks.3.attn.q.weight -> '3', 'attn.q', 'weight'
        layer, stem, kind = re.fullmatch(r'(?:blocks\.(\d+)\.)?(.+)\.(\w+)', name).groups()
        source, above = name, None
        if layer:
            layer = int(layer)
            source = f'blocks.{layers[layer]}.{stem}.{kind}'
            above = f'blocks.{layers[layer] + 1}.{stem}.{kind}'
        # AKI takes rows of linear layers from the layer above, but keeps the layer's own norms
        donor = exact(above) if above in old and 'norm' not in stem else None
        rows, columns = roles_of(stem, kind, small.tied)
        new = operator.tensor(exact(source), axes[rows], axes[columns], donor)
        if noise and columns not in (None, 'write'):  # `write`: embeddings, which do not read
            # seeded by name: independent of the other tensors (hash() differs between processes)
            generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name} 0'.encode()))
            add_noise(new, axes[columns].source, noise, generator)
        if layer in zero_output and stem in ('attn.o', 'mlp.down'):
            new = torch.zeros_like(new)
        # logits are q k / layer number: scale q to keep those of the source layer (with qk_norm
        # through the gain of q_norm, which would normalise a factor on q away)
        if small.attn_scale_by_layer and stem == ('attn.q_norm' if small.qk_norm else 'attn.q'):
            new = new * ((layer + 1) / (layers[layer] + 1))
        grown[name] = new.to(old[source].dtype, copy=True)  # repeated layers must not share memory
    return GPT.from_state(config, grown).train(model.training)


def widen(model, config, method='lossless'):
    """
    Grow a model in width alone, to the widths of `config`, whose n_layer is ignored. method: a name
    in WIDTH. Raises UserError as `grow` does.
    """
    return grow(model, replace(config, n_layer=model.config.n_layer), method, 'stack')


def deepen(model, n_layer, method='identity'):
    """
    Grow a model in depth alone, to n_layer layers. method: a name in DEPTH. Raises UserError as
    `grow` does.
    """
    return grow(model, replace(model.config, n_layer=n_layer), 'fpi', method)


# ----------------------------------------------------------------------------------------------
# shapes and budgets


def exp(config):
    """The shape sqrt(2) times as wide, rounded to whole heads (scaling laws of model reuse)."""
    n_head = round(2**0.5 * config.n_head)
    n_kv_head = n_head if config.n_kv_head == config.n_head else config.n_kv_head
    n_embd = config.n_embd * n_head // config.n_head
    n_mlp = config.n_mlp * n_embd // config.n_embd
    return replace(config, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_mlp=n_mlp)


def stk2(config):
    """The shape with twice the layers."""
    return replace(config, n_layer=2 * config.n_layer)


def stk4(config):
    """The shape with four times the layers."""
    return stk2(stk2(config))


RELATIVE_SIZES = {'exp': exp, 'stk2': stk2, 'stk4': stk4}  # functions of the previous GPTConfig


def grown_shape(small, to):
    """
    The GPTConfig that `to` means for a model grown from `small`: exp, stk2 or stk4; a named size;
    or WIDTHxLAYERS, whose heads, groups and MLP keep small's proportions, rounded. Raises UserError
    for an unknown name and for numbers that do not fit together.
    """
    if to in RELATIVE_SIZES:
        return RELATIVE_SIZES[to](small)
    match = re.fullmatch(r'(\d+)x(\d+)', to)
    # GPTConfig.named would give WIDTHxLAYERS heads of 16 without groups
    if match and (small.head_dim != 16 or small.n_kv_head < small.n_head):
        width, layers = map(int, match.groups())
        # int(): replace() would compute a Derived head_dim again
        shape = dict(n_embd=width, n_layer=layers, head_dim=int(small.head_dim))
        for field in ('n_head', 'n_kv_head', 'n_mlp'):
            shape[field] = round(getattr(small, field) * width / small.n_embd)
        return replace(small, **shape)
    large = GPTConfig.named(to)
    return replace(small, **{f: getattr(large, f) for f in (*SIZE_FIELDS, 'head_dim')})


def allocate_tokens(params, scratch_tokens):
    """
    Training tokens of each size under progressive training (Eq. 4): its from-scratch compute minus
    the compute of all smaller sizes. params: X of each size, ascending; scratch_tokens: T_scratch
    of each. Raises UserError if nothing is left for a size.
    >>> allocate_tokens([1, 2, 4, 8], [40e9, 80e9, 160e9, 320e9])
    [40000000000.0, 60000000000.0, 120000000000.0, 240000000000.0]
    """
    tokens, spent = [], 0.0  # spent: X T of the smaller sizes, in FLOPs / 6
    for X, T_scratch in zip(params, scratch_tokens, strict=True):
        left = X * T_scratch - spent
        if left <= 0:
            raise UserError(f'nothing is left for {X:g} parameters: the smaller sizes cost as much')
        tokens.append(left / X)
        spent += left
    return tokens


# ----------------------------------------------------------------------------------------------
# progressive training


@dataclass
class Progressive:
    """Progressive training (Yano et al.): train the smallest size, expand, train on, and so on."""

    sizes: tuple[str, ...] = ('32x2', '48x2', '64x2', '64x4')  # ascending; also exp, stk2, stk4
    scratch_tokens: tuple[Positive, ...] = ()  # of each size from scratch; empty: tokens_per_param
    tokens_per_param: Positive = 20.0  # tokens from scratch, per parameter; Chinchilla: 20
    shares: tuple[Positive, ...] = ()  # tokens of each size / its tokens from scratch; empty: Eq. 4
    budget: NonNegative = 0.0  # family's compute / all from scratch; largest gets the rest; 0: off
    learning_rates: tuple[Positive, ...] = ()  # maximum of each member; empty: learning_rate
    batch_sizes: tuple[Count, ...] = ()  # sequences per step of each size; empty: batch_size
    width: str = 'aki'  # fpi, aki, lossless, clone; or random, a control: nothing is inherited
    depth: Literal[*DEPTH] = 'stack'  # operator in depth
    noise: NonNegative = 0.0  # zero-sum noise to make copies differ, relative to weights; 0: none
    last_schedule: Literal['cosine', 'wsd'] = 'cosine'  # of the largest size, if schedule is wsd
    compare: Literal['', 'independent'] = ''  # also train each size from scratch

    def stages(self, run):
        """
        Yield one stage per size, each grown from the one before and trained with a fresh optimizer;
        then, with `compare`, every size from scratch. `yield` hands a stage to train.py and is sent
        back its Result. With --schedule=wsd the family grows along a trunk (trunk_and_branch).
        """
        sizes = self.from_scratch(run)
        grows_from = finished = None
        for stage, tokens in zip(sizes, self.allocation(sizes)):
            stage.tokens = tokens
            if self.width == 'random':
                stage.labels.pop('baseline_flops')  # from scratch itself: no saving to report
            elif grows_from:
                how = dict(width=self.width, depth=self.depth, noise=self.noise)
                grow_stage(stage, grows_from, **how)
                stage.also = (finished,)  # along a trunk the branch's compute counts, too
            if run.schedule != 'wsd':
                grows_from = finished = yield stage
            elif stage is not sizes[-1]:
                grows_from, finished = yield from trunk_and_branch(stage, run.decay_fraction)
            else:
                stage.knobs['schedule'] = self.last_schedule
                yield stage
        if self.compare:
            yield from self.independents(run)

    def from_scratch(self, run):
        """
        The from-scratch Stage of each size, a list. Raises UserError if a list of knobs has the
        wrong length, or a size cannot be grown from the one before.
        """
        for name in ('scratch_tokens', 'learning_rates', 'batch_sizes', 'shares'):
            found, wanted = len(getattr(self, name)), len(self.sizes)
            # with a budget the largest size has no share: it gets what is left
            if found not in (0, wanted - (name == 'shares' and self.budget > 0)):
                raise UserError(f'{name} has {found} values for {wanted} sizes')
        if not self.sizes:
            raise UserError('sizes is empty')
        sizes, cost = [], 0.0
        for i, name in enumerate(self.sizes):
            if sizes and name in RELATIVE_SIZES:
                config = RELATIVE_SIZES[name](sizes[-1].config)
                name = f'{sizes[-1].name}-{name}'
            else:
                config = run.model_config(name)
            X = config.num_params(head=True)
            tokens = self.scratch_tokens[i] if self.scratch_tokens else self.tokens_per_param * X
            cost += 6 * X * tokens  # FLOPs of this and all smaller sizes from scratch
            stage = Stage(name, config, tokens, X, labels=dict(size=name, baseline_flops=cost))
            if self.learning_rates:
                stage.knobs['learning_rate'] = self.learning_rates[i]
            if self.batch_sizes:
                stage.knobs['batch_size'] = self.batch_sizes[i]
            if sizes and self.width != 'random':
                check_growth(sizes[-1].config, config, self.width, self.depth)
            sizes.append(stage)
        return sizes

    def allocation(self, sizes):
        """
        Training tokens of each size: by Eq. 4, or `shares` of its from-scratch tokens; with a
        `budget`, the largest gets what is left. Raises UserError if that is nothing.
        """
        X, scratch = [size.params for size in sizes], [size.tokens for size in sizes]
        if not (self.shares or self.budget):
            return allocate_tokens(X, scratch)
        # a budget without shares: the smaller sizes train as long as from scratch
        shares = self.shares or [1] * (len(sizes) - 1)
        tokens = [share * t for share, t in zip(shares, scratch)]
        if self.budget:
            left = self.budget * sizes[-1].labels['baseline_flops'] / 6  # X T is FLOPs / 6
            left -= sum(x * t for x, t in zip(X, tokens))
            if left <= 0:
                raise UserError(f'budget={self.budget:g} leaves nothing for the largest size')
            tokens.append(left / X[-1])
        return tokens

    def independents(self, run):
        """
        Yield every size trained from scratch; beside a trunk, once under each of two schedules, of
        which `summary` takes the better one.
        """
        trunk = run.schedule == 'wsd'
        for schedule in ('wsd', 'cosine') if trunk else (run.schedule,):
            for i, stage in enumerate(self.from_scratch(run)):
                stage.knobs.pop('learning_rate', None)  # from scratch uses the run's
                # without these knobs the family's smallest member was itself trained this way
                if i or self.shares or self.learning_rates:
                    stage.name = f'independent-{stage.name}'
                    if trunk:
                        stage.name += f'-{schedule}'
                    stage.knobs['schedule'] = stage.labels['independent'] = schedule
                    yield stage

    def summary(self, results):
        """Records of each member against the same size alone (better schedule), paired by seed."""
        records = []
        for size, runs in by_label(results, 'size').items():
            members = [r for r in runs if not {'independent', 'trunk'} & {*r.labels}]
            alone = min(by_label(runs, 'independent').values(), key=mean_loss, default=())
            if alone:
                record = {'member': size, 'val loss': mean_loss(members)}
                record |= {'alone': mean_loss(alone), 'schedule': alone[0].labels['independent']}
                record |= difference(members, alone, 'alone')
                saved = list(map(saved_at_equal_loss, members, alone))
                record['saved at equal loss'] = None if None in saved else statistics.mean(saved)
                records.append(record)
        return [records]


def mean_loss(results):
    """The mean validation loss of Results, in nats per token."""
    return statistics.mean(result.val_loss for result in results)


def saved_at_equal_loss(member, alone):
    """
    The share of compute saved once a member's training loss falls below, for good, the final
    training loss of the same size trained alone (Figure 2). Both costs include the smaller sizes;
    losses are averaged over twentieths of a stage. None if the member ends worse or has no
    baseline.
    """
    if member.val_loss > alone.val_loss or not member.baseline_flops:
        return None
    loss = training_curve(alone, points=20)[1][-1]
    reached = steps_to_loss(list(zip(*training_curve(member, points=20))), loss)
    return None if reached is None else 1 - reached / family_cost(alone)


def grow_stage(stage, smaller, **how):
    """
    Make a stage start from the model of the Result `smaller`, grown to the stage's shape. how:
    keyword arguments of `grow`. Returns the stage.
    """
    stage.parent, stage.origin = smaller, Origin('growth', (smaller.name,), how)
    stage.model = lambda: grow(load(smaller.folder), stage.config, **how)
    return stage


def continue_from(stage, before, with_optimizer):
    """
    A copy of a stage that continues the Result `before`: with_optimizer, from its last training
    state, which a stage with schedule=constant keeps, and without a warmup; else from its weights
    alone, with a fresh optimizer and the usual warmup.
    """
    origin, model = Origin('weights', (before.name,)), partial(load, before.folder)
    stage = replace(stage, parent=before, origin=origin, model=model)
    if with_optimizer:
        origin.kind, stage.model = 'last state', None  # None: train.py loads the parent's state
        stage.knobs = stage.knobs | dict(warmup=0.0)  # a new dict: replace() shared the old one
    return stage


def trunk_and_branch(stage, decay_fraction):
    """
    Split a stage under WSD (warmup, stable, decay) in two: the stable phase is part of the family's
    trunk, the decay is the branch that becomes the member. `yield` hands a stage to train.py and is
    sent back its Result. Returns both Results: the next size grows from the trunk, whose learning
    rate has not decayed.
    """
    trunk = replace(stage, name=f'{stage.name}-trunk', tokens=(1 - decay_fraction) * stage.tokens)
    trunk.knobs = stage.knobs | dict(schedule='constant')
    trunk.labels = dict(size=stage.labels['size'], trunk=True)
    before = yield trunk
    branch = replace(stage, tokens=decay_fraction * stage.tokens, also=())
    branch = continue_from(branch, before, with_optimizer=True)
    branch.knobs |= dict(decay_fraction=1.0)  # the branch is all decay
    member = yield branch
    return before, member


# ----------------------------------------------------------------------------------------------
# growth operators side by side


@dataclass
class GrowthComparison:
    """Compare growth operators: the same second stage after each, and from random weights."""

    base: str = '48x2'  # size of the base model
    base_model: str = ''  # folder or hub name of a trained base of that size; empty: train one
    target: str = '64x4'  # size it is grown to; exp, stk2 and stk4 are relative to the base
    base_tokens: Positive = 1e6  # D1, tokens of the first stage
    tokens: Positive = 5e5  # D2, tokens of each second stage
    widths: tuple[str, ...] = ('aki', 'lossless')  # operators in width, each combined ...
    depths: tuple[str, ...] = ('stack', 'identity')  # ... with each of these operators in depth
    noise: NonNegative = 0.0  # zero-sum noise to make copies differ, relative to weights; 0: none
    against: str = 'random'  # variant the others are compared with: random, or such as aki+stack

    def stages(self, run):
        """
        Yield the base, unless given; then the target from random weights and after every pair of
        operators.
        """
        given = '' if run.toy else self.base_model  # a toy run trains a small base instead
        if given and (not run.dry_run or Path(given).is_dir()):
            base = run.given_config(given)
            target = grown_shape(base, self.target)
        else:  # the base is trained here, or this is a dry run, which downloads nothing
            target = grown_shape(GPTConfig.named(self.base), self.target)
            sizes = {field: getattr(target, field) for field in (*SIZE_FIELDS, 'head_dim')}
            # again, with the run's vocabulary and block_size, and shrunk for a toy run
            base, target = run.model_config(self.base), run.model_config(self.base, **sizes)
        operators = list(product(self.widths, self.depths))
        for width, depth in operators:
            check_growth(base, target, width, depth)
        smaller = Result(Path(given).name, given)
        if not given:
            smaller = yield Stage('base', base, self.base_tokens, base.num_params(head=True))
        steps = self.tokens / (run.batch_size * run.block_size)
        for width, depth in [('random', ''), *operators]:
            name, X = f'{width}+{depth}'.strip('+'), target.num_params(head=True)
            stage = Stage(name, target, self.tokens, X, begin=smaller.position)
            # eight evaluations for the curve, unless the run sets the interval
            stage.knobs['eval_interval'] = run.eval_interval or math.ceil(steps / 8)
            stage.tokenizer, stage.labels = given, dict(variant=name)
            if depth:
                grow_stage(stage, smaller, width=width, depth=depth, noise=self.noise)
            yield stage

    def summary(self, results):
        """Records ranked by loss, with differences from `against` paired by seed; the curves."""
        records, groups = compare_variants(results, self.against), by_label(results, 'variant')
        for record in records:
            _, record['at step 0'] = mean_curve(groups[record['variant']])[0]
        ranked = sorted(records, key=lambda record: record['val loss'])
        groups.pop('random')  # so far above the operators that it would hide what tells them apart
        return [ranked, ('growth.png', curve_panels(groups))]


# ----------------------------------------------------------------------------------------------
# how similar the members of a family are


@torch.no_grad()
def compare(model_p, model_q, examples, batch_size=4):
    """
    (D(P || Q) in nats per token, share of positions where both models rank the same token first),
    averaged over the positions of each example, then over examples (Appendix F). examples: (n, T)
    int64.
    """
    found = []
    for x in progress_bar(examples.split(batch_size), desc='comparing'):
        p, q = model_p(x).logits, model_q(x).logits
        same = p.argmax(-1) == q.argmax(-1)
        found.append(torch.stack([kl_of_logits(p, q), same]).double().mean(-1).cpu())
    return tuple(torch.cat(found, 1).mean(1).tolist())


# ----------------------------------------------------------------------------------------------
# the command line: growing a folder


@dataclass
class FolderGrowth:
    """Grow a model folder on disk: expand.py SOURCE TARGET --to=SIZE or --layers=1-24,9-32."""

    source: str = ''  # folder of the model, or its name on the hub
    target: str = ''  # folder to create
    to: str = ''  # named size, WIDTHxLAYERS, or exp, stk2, stk4 relative to the source
    layers: tuple[str, ...] = ()  # slices of the source's layers, in this order; replaces --depth
    width: str = 'lossless'  # fpi, aki, lossless or clone
    depth: Literal[*DEPTH] = 'identity'  # operator in depth
    noise: NonNegative = 0.1  # zero-sum noise to make copies differ, relative to weights; 0: none


def slices(texts, n_layer):
    """The source layers, from 0, of slices '1-24', '9-32', counted from 1. Raises UserError."""
    try:
        spans = [tuple(map(int, text.split('-'))) for text in texts]
        assert all(1 <= first <= last <= n_layer for first, last in spans)
    except (ValueError, AssertionError):
        where = f'--layers={",".join(texts)}'
        raise UserError(f'{where}: expected FIRST-LAST,FIRST-LAST within 1-{n_layer}') from None
    return [layer for first, last in spans for layer in range(first - 1, last)]


def main(argv):
    """Command line: grow the model SOURCE and save it as TARGET."""
    usage = dict(program='expand.py SOURCE TARGET', words=('source', 'target'))
    options, _, _ = configure(argv, FolderGrowth, **usage)
    if not (options.source and options.target and (options.to or options.layers)):
        raise UserError('missing arguments; usage: expand.py SOURCE TARGET --to=SIZE')
    with new_folder(options.target) as unfinished:
        model = load(options.source)
        config, depth = model.config, options.depth
        if options.to:
            config = grown_shape(config, options.to)
        if options.layers:
            depth = slices(options.layers, model.config.n_layer)
            config = replace(config, n_layer=len(depth))
        grown = grow(model, config, options.width, depth, options.noise)
        grown.save(unfinished, tokenizer_to_carry(options.source))
    print(f'{options.target}: {model.config.num_params():,} to {config.num_params():,} parameters')
    layers = depth if options.layers else DEPTH[depth](model.config.n_layer, config.n_layer)
    if added := repeated(layers):
        places = '|'.join(map(str, added))
        print(f"its new layers alone are trained by  --freeze='^(?!blocks\\.({places})\\.)'")


if __name__ == '__main__':
    run_as_program(main)
