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

Growing in width, by example: copy a neuron u of an MLP, so that there are two of it. Both compute
what u computed. Halve the weights by which the next layer reads them, and their sum is what it was:
the model is twice as wide there and computes the same function. With c copies, divide by c.

The residual stream is more: it is written by every layer, and read through norms. Let each of the c
copies of a unit be written with a factor w that leaves the norms' statistics unchanged (`lossless`
below). A norm's gain divides by w, and what it puts out is read like any other copies.

Copies that are read alike get the same gradient and stay copies for ever. Noise on the weights that
read them tells them apart; it sums to zero over the copies of a unit and changes no output.

Growing in depth repeats layers, or adds layers that compute nothing yet.
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

WIDTH_FIELDS = ('n_head', 'n_kv_head', 'n_embd', 'n_mlp')

# ----------------------------------------------------------------------------------------------
# growing in width: a tensor at a time


class Axis(NamedTuple):
    """How one dimension of a tensor grows, from d units to D."""

    source: torch.Tensor  # (D,) int64: the old unit that each new one copies; -1: none
    factor: torch.Tensor  # (D,) float64: what each is multiplied by
    fill: float = 0.0  # units without a source are this times the mean of the old units


def copies(source):
    """How many copies of its unit there are, for each new unit: (D,) float64."""
    _, unit, count = source.unique(return_inverse=True, return_counts=True)
    return count[unit].double()


def unscaled(source, fill=0.0):
    """The Axis with all factors 1."""
    return Axis(source, torch.ones(len(source), dtype=torch.float64), fill)


def copy_units(tensor, axis, dim):
    """Copy the units of one dimension, each times its factor. axis None: the tensor as it is."""
    if axis is None:
        return tensor
    source = axis.source.to(tensor.device)
    new = tensor.index_select(dim, source.clamp(min=0))
    shape = [-1] + [1] * (tensor.ndim - 1 - dim)
    if source.min() < 0:
        fill = axis.fill * tensor.mean(dim, keepdim=True)
        new = torch.where((source < 0).view(shape), fill, new)
    return new.mul_(axis.factor.to(new).view(shape))


def copied(old, rows, columns, above=None):
    """The new tensor, with both dimensions copied along their axes."""
    return copy_units(copy_units(old, rows, 0), columns, 1)


def rows_from_above(old, rows, columns, above=None):
    """The same, but the rows of new units are those of the layer above, where there is one."""
    own = copied(old, rows, columns)
    if above is None or rows is None:
        return own
    return torch.cat([own[: len(old)], copied(above, rows, columns)[len(old) :]])


def round_robin(d, D, norm):
    """The residual stream with its units copied in turn: 0, 1, ..., d - 1, 0, 1, ..."""
    return unscaled(torch.arange(D) % d)


def equal_norm(d, D, norm):
    """
    The residual stream, scaled so that its norms are unchanged. RMSNorm divides by the root mean
    square. Written with w = sqrt(D / (d c)), the c copies of x have c (w x)^2 = (D / d) x^2
    together, so the mean over D units is what it was over d. LayerNorm subtracts the mean first:
    it gets k = floor(D / d) copies of each unit, w = sqrt(D / (k d)), and the units that are left
    stand at the mean, which the norm turns to zero.
    """
    source, whole = torch.arange(D) % d, D // d * d
    if norm == 'rms':
        return Axis(source, (D / (d * copies(source))).sqrt())
    source[whole:] = -1
    return Axis(source, torch.full((D,), (D / whole) ** 0.5, dtype=torch.float64), 1.0)


class Width(NamedTuple):
    """A width operator: two small functions."""

    residual: Callable  # (d, D, norm: rms or layer) -> the residual stream's Axis
    tensor: Callable  # (old, rows: Axis or None, columns, the layer above's or None) -> new tensor
    integer_only: bool = False  # refuses what is not a whole multiple


# Function-preserving initialisation (bert2BERT): exact where every unit has equally many copies;
# elsewhere the norms weigh units by their copies. The paper draws at random which units are copied
# once more; here they come in turn.
fpi = Width(round_robin, copied)
# Advanced knowledge initialisation (bert2BERT; progressive training's operator): not exact.
aki = Width(round_robin, rows_from_above)
# Exact for any width, tied or not, under both norms.
lossless = Width(equal_norm, copied)
# HyperCloning: fpi where it is exact.
clone = Width(round_robin, copied, integer_only=True)

WIDTH = {'fpi': fpi, 'aki': aki, 'lossless': lossless, 'clone': clone}


def add_noise(weight, source, noise, generator):
    """
    Tell copies apart, in place: columns (D,) that read the c > 1 copies of a unit get normal noise
    that sums to zero over the copies, `noise` times the root mean square of its row.
    """
    _, unit, count = source.unique(return_inverse=True, return_counts=True)
    copied = torch.nonzero(count[unit] > 1).flatten()
    size = noise * weight.square().mean(1, keepdim=True).sqrt()
    drawn = torch.randn(len(weight), len(copied), generator=generator, dtype=torch.float64)
    drawn = size * drawn.to(weight)
    unit, count = unit[copied].to(weight.device), count.to(weight)
    sums = weight.new_zeros(len(weight), len(count)).index_add_(1, unit, drawn)
    weight[:, copied] += drawn - sums[:, unit] / count[unit]


# What the rows and the columns of a weight are; None does not grow. A bias has its weight's rows.
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
    The old query head that each new one copies, int64. Group G copies group G mod n_kv_head; its
    queries are that group's in turn, and a further copy of a group goes on where the one before it
    stopped. 4 queries in 2 groups to 6 in 3: 0 1, 2 3, 0 1. 4 in 1 group to 6 in 2: 0 1 2, 3 0 1.
    Raises UserError where an old query would be lost.
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
    """{what rows or columns are: their Axis}, for two shapes and the residual stream's Axis."""

    def dimensions(heads):  # whole heads are copied: RoPE and the softmax's scale stay right
        return (heads[:, None] * small.head_dim + torch.arange(small.head_dim)).flatten()

    kv = dimensions(torch.arange(large.n_kv_head) % small.n_kv_head)
    query, mlp = dimensions(query_heads(small, large)), torch.arange(large.n_mlp) % small.n_mlp
    vocab = torch.arange(large.vocab_size)
    vocab[small.vocab_size :] = -1
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
        'gain': Axis(source, 1 / w, 1.0),  # the norm of w x is that of x, times w
        'shift': unscaled(source),
        # A tied head reads with the embeddings, that is with w in place of 1 / c. It sums
        # w (gain' w x + shift') over c copies: gain / (c w^2) and shift / (c w) give the old sum.
        'tied gain': Axis(source, 1 / (c * w * w), 1.0),
        'tied shift': Axis(source, 1 / (c * w)),
    }


# ----------------------------------------------------------------------------------------------
# growing in depth: lists of the layer that each new one copies


def stack(old, new):
    """The whole stack again and again: layer l copies l mod L."""
    return [layer % old for layer in range(new)]


def bert2bert(old, new):
    """Whole stacks, then the remainder from the top layers (bert2BERT)."""
    rest = new % old
    return stack(old, new - rest) + list(range(old - rest, old))


def interleave(old, new):
    """Each layer beside its copies: layer l copies floor((l + 1/2) L / L')."""
    return [(2 * layer + 1) * old // (2 * new) for layer in range(new)]


def identity(old, new):
    """
    Copies spread evenly, each above its layer: layer l copies ceil((l + 1) L / L') - 1 (LLaMA-Pro).
    `grow` makes zero what a copy writes, attn.o and mlp.down: it adds nothing at first, and the
    function is kept bit for bit.
    """
    return [((layer + 1) * old - 1) // new for layer in range(new)]


DEPTH = {'stack': stack, 'bert2bert': bert2bert, 'interleave': interleave, 'identity': identity}


def repeated(layers):
    """The places in a list of source layers that copy one which is there already."""
    return [place for place, layer in enumerate(layers) if layer in layers[:place]]


# ----------------------------------------------------------------------------------------------
# growing a model


def check_growth(small, large, width, depth):
    """Raise UserError, with the field and both values, unless `large` can be grown from `small`."""
    if width not in WIDTH:
        raise unknown('width operator', width, WIDTH)
    if not isinstance(depth, str):  # a list may leave layers out
        small = replace(small, n_layer=1)
    elif depth not in DEPTH:
        raise unknown('depth operator', depth, DEPTH)
    growing = [*SIZE_FIELDS, 'vocab_size']
    if small.pos == 'rope':
        growing.append('block_size')
    for field, before in vars(small).items():
        after = getattr(large, field)
        if field in growing and after < before:
            raise UserError(f'cannot grow: {field} {before} -> {after} is smaller')
        if field not in (*growing, 'init_std') and after != before:
            raise UserError(f'cannot grow: {field} {before} -> {after} differs')
        if WIDTH[width].integer_only and field in WIDTH_FIELDS and after % before:
            raise UserError(f'{width} needs whole multiples, not {field} {before} -> {after}')
    query_heads(small, large)


def roles_of(stem, kind, tied):
    """What the rows and the columns of a tensor are."""
    rows, columns = (*ROLES[stem], None)[:2]
    if kind == 'bias':
        rows, columns = rows.replace('gain', 'shift'), None
    return f'tied {rows}' if tied and stem == 'norm' else rows, columns


@torch.no_grad()
def grow(model, config, width='lossless', depth='identity', noise=0.0, seed=0):
    """
    The model grown to the shape `config`; dtype, device and mode are kept. width: a name in WIDTH;
    depth: a name in DEPTH, or a list of source layers; noise: zero-sum, relative to the rows, on
    all that reads copies; seed: of the noise. Raises UserError naming the field in the way.
    """
    small, old, grown = model.config, model.state_dict(), {}
    check_growth(small, config, width, depth)
    operator = WIDTH[width]
    axes = axes_between(small, config, operator.residual(small.n_embd, config.n_embd, small.norm))
    layers = DEPTH[depth](small.n_layer, config.n_layer) if isinstance(depth, str) else depth
    zero_output = repeated(layers) if depth == 'identity' else ()

    def exact(name):  # in float32 at least: rounded once, at the end
        return old[name].to(torch.promote_types(old[name].dtype, torch.float32))

    for name in GPT.on_meta(config).state_dict():
        layer, stem, kind = re.fullmatch(r'(?:blocks\.(\d+)\.)?(.+)\.(\w+)', name).groups()
        source, above = name, None
        if layer:
            layer = int(layer)
            source = f'blocks.{layers[layer]}.{stem}.{kind}'
            above = f'blocks.{layers[layer] + 1}.{stem}.{kind}'
        donor = exact(above) if above in old and 'norm' not in stem else None
        rows, columns = roles_of(stem, kind, small.tied)
        new = operator.tensor(exact(source), axes[rows], axes[columns], donor)
        if noise and columns not in (None, 'write'):
            generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name} 0'.encode()))
            add_noise(new, axes[columns].source, noise, generator)
        if layer in zero_output and stem in ('attn.o', 'mlp.down'):
            new = torch.zeros_like(new)
        if small.attn_scale_by_layer and stem == ('attn.q_norm' if small.qk_norm else 'attn.q'):
            new = new * ((layer + 1) / (layers[layer] + 1))  # logits are q k / number of the layer
        grown[name] = new.to(old[source].dtype, copy=True)  # layers share no memory
    return GPT.from_state(config, grown).train(model.training)


def widen(model, config, method='lossless'):
    """A wider model of the shape `config`, as deep as it was."""
    return grow(model, replace(config, n_layer=model.config.n_layer), method, 'stack')


def deepen(model, n_layer, method='identity'):
    """A deeper model of n_layer layers, as wide as it was."""
    return grow(model, replace(model.config, n_layer=n_layer), 'fpi', method)


# ----------------------------------------------------------------------------------------------
# shapes and budgets


def exp(config):
    """Width x sqrt 2, in whole heads (scaling laws of model reuse)."""
    n_head = round(2**0.5 * config.n_head)
    n_kv_head = n_head if config.n_kv_head == config.n_head else config.n_kv_head
    n_embd = config.n_embd * n_head // config.n_head
    n_mlp = config.n_mlp * n_embd // config.n_embd
    return replace(config, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_mlp=n_mlp)


def stk2(config):
    """Twice the layers."""
    return replace(config, n_layer=2 * config.n_layer)


def stk4(config):
    """Four times the layers."""
    return stk2(stk2(config))


RELATIVE_SIZES = {'exp': exp, 'stk2': stk2, 'stk4': stk4}  # relative to the size before


def grown_shape(small, to):
    """
    The shape `to` of a model that grows from `small`: exp, stk2, stk4, a named size, or
    WIDTHxLAYERS, whose heads, groups and MLP keep small's proportions. Raises UserError.
    """
    if to in RELATIVE_SIZES:
        return RELATIVE_SIZES[to](small)
    match = re.fullmatch(r'(\d+)x(\d+)', to)
    if match and (small.head_dim != 16 or small.n_kv_head < small.n_head):  # not named like that
        width, layers = map(int, match.groups())
        shape = dict(n_embd=width, n_layer=layers, head_dim=int(small.head_dim))
        for field in ('n_head', 'n_kv_head', 'n_mlp'):
            shape[field] = round(getattr(small, field) * width / small.n_embd)
        return replace(small, **shape)
    large = GPTConfig.named(to)
    return replace(small, **{f: getattr(large, f) for f in (*SIZE_FIELDS, 'head_dim')})


def allocate_tokens(params, scratch_tokens):
    """
    Training tokens of each size under progressive training (Eq. 4): its from-scratch compute minus
    what the smaller sizes cost. params X, ascending.
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
    scratch_tokens: tuple[Positive, ...] = ()  # of each size from scratch; empty: per parameter
    tokens_per_param: Positive = 20.0  # 20: Chinchilla
    shares: tuple[Positive, ...] = ()  # tokens of each size / its tokens from scratch; empty: Eq. 4
    budget: NonNegative = 0.0  # share of the compute from scratch; the largest gets what it leaves
    learning_rates: tuple[Positive, ...] = ()  # maximum of each member; empty: as of sizes alone
    batch_sizes: tuple[Count, ...] = ()  # sequences per step of each size; empty: batch_size
    width: str = 'aki'  # fpi, aki, lossless or clone; random: as many tokens, nothing inherited
    depth: Literal[*DEPTH] = 'stack'
    noise: NonNegative = 0.0  # zero-sum noise that tells copies apart; 0: none
    last_schedule: Literal['cosine', 'wsd'] = 'cosine'  # of the largest, which ends a trunk
    compare: Literal['', 'independent'] = ''  # also train each size from scratch

    def stages(self, run):
        """
        One stage per size, each grown from the one before, its optimizer fresh; then, to compare,
        from scratch. Under --schedule=wsd a family grows along a trunk.
        """
        sizes = self.from_scratch(run)
        grows_from = finished = None
        for stage, tokens in zip(sizes, self.allocation(sizes)):
            stage.tokens = tokens
            if self.width == 'random':
                stage.labels.pop('baseline_flops')  # nothing is saved
            elif grows_from:
                how = dict(width=self.width, depth=self.depth, noise=self.noise)
                grow_stage(stage, grows_from, **how)
                stage.also = (finished,)  # of a trunk: its branch is part of the family, too
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
        """A stage for each size, from scratch. Raises UserError for knobs that do not fit."""
        for name in ('scratch_tokens', 'learning_rates', 'batch_sizes', 'shares'):
            found, wanted = len(getattr(self, name)), len(self.sizes)
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
            cost += 6 * X * tokens
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
        """Training tokens of each size: by Eq. 4, or as shares of those from scratch."""
        X, scratch = [size.params for size in sizes], [size.tokens for size in sizes]
        if not (self.shares or self.budget):
            return allocate_tokens(X, scratch)
        shares = self.shares or [1] * (len(sizes) - 1)
        tokens = [share * t for share, t in zip(shares, scratch)]
        if self.budget:
            left = self.budget * sizes[-1].labels['baseline_flops'] / 6
            left -= sum(x * t for x, t in zip(X, tokens))
            if left <= 0:
                raise UserError(f'budget={self.budget:g} leaves nothing for the largest size')
            tokens.append(left / X[-1])
        return tokens

    def independents(self, run):
        """Every size from scratch; beside a trunk under both schedules, for `summary` to choose."""
        trunk = run.schedule == 'wsd'
        for schedule in ('wsd', 'cosine') if trunk else (run.schedule,):
            for i, stage in enumerate(self.from_scratch(run)):
                stage.knobs.pop('learning_rate', None)  # from scratch: the run's
                if i or self.shares or self.learning_rates:  # else the smallest is one in both
                    stage.name = f'independent-{stage.name}'
                    if trunk:
                        stage.name += f'-{schedule}'
                    stage.knobs['schedule'] = stage.labels['independent'] = schedule
                    yield stage

    def summary(self, results):
        """Each member against its size alone, under the better schedule, paired by seed."""
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
    """The mean validation loss."""
    return statistics.mean(result.val_loss for result in results)


def saved_at_equal_loss(member, alone):
    """
    The share of compute saved when a member's training loss falls below, and stays below, the
    final one of the same size trained alone (Figure 2). The smaller sizes count on both sides;
    losses are means over a twentieth of a stage. None where the member ends worse.
    """
    if member.val_loss > alone.val_loss or not member.baseline_flops:
        return None
    loss = training_curve(alone, points=20)[1][-1]
    reached = steps_to_loss(list(zip(*training_curve(member, points=20))), loss)
    return None if reached is None else 1 - reached / family_cost(alone)


def grow_stage(stage, smaller, **how):
    """Let a stage start from the model of the Result `smaller`, grown. how: as of `grow`."""
    stage.parent, stage.origin = smaller, Origin('growth', (smaller.name,), how)
    stage.model = lambda: grow(load(smaller.folder), stage.config, **how)
    return stage


def continue_from(stage, before, with_optimizer):
    """
    A stage that continues the Result `before`: its last state, which a stage at a constant rate
    keeps, with the optimizer; or its weights alone, with a new warmup.
    """
    origin, model = Origin('weights', (before.name,)), partial(load, before.folder)
    stage = replace(stage, parent=before, origin=origin, model=model)
    if with_optimizer:
        origin.kind, stage.model = 'last state', None
        stage.knobs = stage.knobs | dict(warmup=0.0)
    return stage


def trunk_and_branch(stage, decay_fraction):
    """
    A stage under WSD, in two: its stable phase, a piece of the family's trunk, and its decay, the
    branch that becomes the member. `yield` hands a stage to train.py and is sent back its Result.
    Returns both: the next size grows from the first, before its learning rate decays.
    """
    trunk = replace(stage, name=f'{stage.name}-trunk', tokens=(1 - decay_fraction) * stage.tokens)
    trunk.knobs = stage.knobs | dict(schedule='constant')
    trunk.labels = dict(size=stage.labels['size'], trunk=True)
    before = yield trunk
    branch = replace(stage, tokens=decay_fraction * stage.tokens, also=())
    branch = continue_from(branch, before, with_optimizer=True)
    branch.knobs |= dict(decay_fraction=1.0)
    member = yield branch
    return before, member


# ----------------------------------------------------------------------------------------------
# growth operators side by side


@dataclass
class GrowthComparison:
    """Growth operators side by side: the same second stage from every operator and from nothing."""

    base: str = '48x2'  # size of the base
    base_model: str = ''  # folder or hub name of a trained base of that size; empty: train one
    target: str = '64x4'  # size it is grown to; exp, stk2 and stk4 are relative to the base
    base_tokens: Positive = 1e6  # D1, tokens of the first stage
    tokens: Positive = 5e5  # D2, tokens of each second stage
    widths: tuple[str, ...] = ('aki', 'lossless')  # operators in width ...
    depths: tuple[str, ...] = ('stack', 'identity')  # ... each with these in depth
    noise: NonNegative = 0.0  # zero-sum noise that tells copies apart; 0: none
    against: str = 'random'  # variant that the others are compared with: aki+stack

    def stages(self, run):
        """The base, then the target from nothing and from every pair of operators."""
        given = '' if run.toy else self.base_model  # a toy trains a small one instead
        if given and (not run.dry_run or Path(given).is_dir()):
            base = run.given_config(given)
            target = grown_shape(base, self.target)
        else:  # a plan asks no hub
            target = grown_shape(GPTConfig.named(self.base), self.target)
            sizes = {field: getattr(target, field) for field in (*SIZE_FIELDS, 'head_dim')}
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
            stage.knobs['eval_interval'] = run.eval_interval or math.ceil(steps / 8)
            stage.tokenizer, stage.labels = given, dict(variant=name)
            if depth:
                grow_stage(stage, smaller, width=width, depth=depth, noise=self.noise)
            yield stage

    def summary(self, results):
        """The ranking, with the difference from one variant, seed by seed, and the curves."""
        records, groups = compare_variants(results, self.against), by_label(results, 'variant')
        for record in records:
            _, record['at step 0'] = mean_curve(groups[record['variant']])[0]
        ranked = sorted(records, key=lambda record: record['val loss'])
        groups.pop('random')  # so far above the operators that it would hide what tells them apart
        return [ranked, ('growth.png', curve_panels(groups))]


# ----------------------------------------------------------------------------------------------
# how alike the members of a family are


@torch.no_grad()
def compare(model_p, model_q, examples, batch_size=4):
    """
    (D(P || Q) in nats, share of positions at which both prefer the same token) of two models over
    examples (n, T), int64: the mean over positions within an example, then over examples
    (Appendix F).
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
    target: str = ''  # folder to be made
    to: str = ''  # named size, WIDTHxLAYERS, or exp, stk2, stk4 relative to the source
    layers: tuple[str, ...] = ()  # of the source, one after the other, in place of --depth
    width: str = 'lossless'  # fpi, aki, lossless or clone
    depth: Literal[*DEPTH] = 'identity'
    noise: NonNegative = 0.1  # zero-sum noise that tells copies apart; 0: none


def slices(texts, n_layer):
    """The source layers of '1-24', '9-32', counted from 1. Raises UserError."""
    try:
        spans = [tuple(map(int, text.split('-'))) for text in texts]
        assert all(1 <= first <= last <= n_layer for first, last in spans)
    except (ValueError, AssertionError):
        where = f'--layers={",".join(texts)}'
        raise UserError(f'{where}: FIRST-LAST,FIRST-LAST of {n_layer} layers') from None
    return [layer for first, last in spans for layer in range(first - 1, last)]


def main(argv):
    """Command line: SOURCE TARGET, then knobs."""
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
