"""
Growing trained models, and progressive training: a model family for the price of its largest
member.

Paper: Yano et al., Efficient Construction of Model Family through Progressive Training Using
Model Expansion.

    python train.py config/progressive_tiny.py         # minutes on a CPU
    python train.py config/progressive_8b.py           # the paper's family
    python expand.py out/family/4b grown/8b --to=8b --width=lossless --depth=identity

Train the smallest model, expand it, train on, expand again. Each size gets the tokens that make
the whole family cost what its largest member costs from scratch (Eq. 4):

    FLOPs(X_i, T_i) = FLOPs(X_i, T_scratch_i) - sum_{j<i} FLOPs(X_j, T_j),   FLOPs(X, T) = 6 X T

Growing in width. An axis of the model (residual stream, heads, MLP neurons) grows by copying its
units. What writes a unit's c copies is multiplied by w, what reads them by r; the function is
kept if over the copies of each unit  sum w r = 1. The residual stream is read through norms,
whose gains are multiplied by 1 / w. Copies of a unit that are read alike get the same gradient
and stay copies for ever; `noise` that sums to zero over them tells them apart and changes no
output. Growing in depth repeats layers, or adds layers that compute nothing yet.
"""

import math
import re
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from configurator import (
    Count,
    Natural,
    NonNegative,
    Positive,
    SaveDtype,
    configure,
)
from data.vocabulary import tokenizer_to_carry
from engine.errors import UserError, run_as_program, unknown
from engine.files import new_folder
from engine.loss import kl_of_logits
from engine.progress import progress_bar
from engine.report import (
    Line,
    Panel,
    by_label,
    compare_variants,
    family_cost,
    mean_curve,
    steps_to_loss,
    training_curve,
)
from engine.stage import Origin, Result, Stage
from model import GPT, SIZE_FIELDS, GPTConfig, load

WIDTH_FIELDS = ('n_head', 'n_kv_head', 'n_embd', 'n_mlp')

# ----------------------------------------------------------------------------------------------
# how a tensor grows: units of its axes are copied, each with a factor


class Axis(NamedTuple):
    """How one dimension of a tensor grows from `old` units."""

    old: int
    source: torch.Tensor  # (new,) int64: the old unit that each new one copies
    copies: torch.Tensor  # (new,) float64: how many copies of that unit there are
    factor: torch.Tensor  # (new,) float64: what each copy is multiplied by
    covered: int  # units from here on copy none ...
    fill: str = 'zero'  # ... they are zero, one, the mean of the old ones, or random
    reads: bool = False  # columns that read copied units, which zero-sum noise may tell apart

    def scaled(self, factor, **changes):
        """The same map with another factor for each unit."""
        return self._replace(factor=torch.ones_like(self.copies) * factor, **changes)


def copy_of(old, source, covered=None):
    """The Axis of new units that copy the old ones in `source`, all factors 1."""
    copies = torch.bincount(source[:covered], minlength=old)[source].double()
    return Axis(old, source, copies, torch.ones_like(copies), covered or len(source))


def round_robin(old, new, covered=None):
    """Whole copies of the old units, then again from the first one, until `new`."""
    return copy_of(old, torch.arange(new) % old, covered)


def by_head(heads, head_dim):
    """An axis of heads as the axis of their dimensions: RoPE and softmax scale stay right."""
    source = (heads.source[:, None] * head_dim + torch.arange(head_dim)).flatten()
    return copy_of(heads.old * head_dim, source)


def grow_tensor(old, donor, axes, noise, generator):
    """
    The new tensor, of the old one's dtype. donor: the tensor that rows of new units are copied
    from, None: the old one; axes: an Axis or None for each dimension; noise: zero-sum, relative to
    the rows, on columns that read copied units.
    """
    new = old.to(torch.promote_types(old.dtype, torch.float32))  # rounded once, at the end
    for dim, axis in enumerate(axes):
        if axis:
            new = copy_along(new, axis, dim, None if dim else donor)
            if axis.fill == 'random':  # columns that read what is always zero
                drawn = torch.randn(len(new), len(axis.source) - axis.covered, generator=generator)
                new[:, axis.covered :] = 0.02 * drawn.to(new)
            if axis.reads and noise:
                add_noise(new, axis, noise, generator)
    return new.to(old.dtype)


def copy_along(tensor, axis, dim, donor=None):
    """Copy the units of one dimension, each times its factor; those that copy none are filled."""
    source = axis.source.to(tensor.device)
    new = tensor.index_select(dim, source)
    if donor is not None:
        new[axis.old :] = donor[source[axis.old :]].to(new)
    factor = axis.factor.to(new)
    if axis.covered < len(source):
        free = new.movedim(dim, 0)[axis.covered :]
        if axis.fill == 'mean':
            free.copy_(tensor.mean(dim))
        elif axis.fill == 'one':
            free.fill_(1)
            factor[axis.covered :] = 1
        else:
            free.zero_()
    return new.mul_(factor.view(-1, *[1] * (tensor.ndim - 1 - dim)))


def add_noise(rows, axis, noise, generator):
    """
    Tell copies apart, in place: columns that read the c > 1 copies of a unit get normal noise
    whose sum over the copies is zero, `noise` times the root mean square of its row.
    """
    copied = torch.nonzero(axis.copies[: axis.covered] > 1).flatten()
    amplitude = noise * rows.square().mean(1, keepdim=True).sqrt()
    drawn = torch.randn(len(rows), len(copied), generator=generator, dtype=torch.float64)
    drawn = amplitude * drawn.to(rows)
    units = axis.source[copied].to(rows.device)
    copies = axis.copies[copied].to(rows)
    sums = rows.new_zeros(len(rows), axis.old).index_add_(1, units, drawn)
    rows[:, copied] += drawn - sums[:, units] / copies


# ----------------------------------------------------------------------------------------------
# growing in width: how the residual stream is copied


class Widening(NamedTuple):
    """A width operator for two shapes: the residual stream's Axis, with the factors w."""

    residual: Axis
    from_above: bool = False  # new rows are copied from the layer above


def fpi(small, large):
    """
    Function-preserving initialisation (bert2BERT): w = 1, r = 1 / c. Exact where every unit has
    the same number of copies; elsewhere the norms weigh units by their copies.
    """
    return Widening(round_robin(small.n_embd, large.n_embd))


def clone(small, large):
    """HyperCloning: fpi for whole multiples, where it is exact; UserError for anything else."""
    for field in WIDTH_FIELDS:
        before, after = getattr(small, field), getattr(large, field)
        if after % before:
            raise UserError(f'clone needs whole multiples, not {field} {before} -> {after}')
    return fpi(small, large)


def aki(small, large):
    """
    Advanced knowledge initialisation (bert2BERT; progressive training's operator): fpi, but the
    rows of new units come from the layer above. Not exact.
    """
    return fpi(small, large)._replace(from_above=True)


def lossless(small, large):
    """
    Exact for any D > d. RMSNorm sees the mean square: with w = sqrt(D / (d c)) it is the same over
    D units as over d, eps and all. LayerNorm also subtracts the mean: whole copies are multiplied
    by w = sqrt(D / (k d)), k = floor(D / d), and the rest stands at the mean, which the norm turns
    to zero.
    """
    d, D = small.n_embd, large.n_embd
    if small.norm == 'rms':
        axis = round_robin(d, D)
        return Widening(axis.scaled((D / (d * axis.copies)).sqrt()))
    whole = D // d * d
    return Widening(round_robin(d, D, covered=whole).scaled((D / whole) ** 0.5, fill='mean'))


WIDTH = {'fpi': fpi, 'aki': aki, 'lossless': lossless, 'clone': clone}


# ----------------------------------------------------------------------------------------------
# growing in depth: where each new layer comes from


class Layer(NamedTuple):
    """A new layer: the old one it copies, and whether its outputs are zero at first."""

    source: int
    adds_nothing: bool = False


def stack(old, new):
    """The whole stack again and again: layer l copies l mod L."""
    return [Layer(layer % old) for layer in range(new)]


def bert2bert(old, new):
    """Whole stacks, then the remainder from the top layers (bert2BERT)."""
    rest = new % old
    return stack(old, new - rest) + [Layer(layer) for layer in range(old - rest, old)]


def interleave(old, new):
    """Each layer beside its copies: layer l copies floor((l + 1/2) L / L')."""
    return [Layer((2 * layer + 1) * old // (2 * new)) for layer in range(new)]


def identity(old, new):
    """
    New layers spread evenly, each a copy of the one below it whose attn.o and mlp.down are zero
    (LLaMA-Pro): they add nothing at first, and the function is kept bit for bit.
    """
    layers = []
    for layer in range(old):
        extra = (layer + 1) * (new - old) // old - layer * (new - old) // old
        layers += [Layer(layer)] + [Layer(layer, adds_nothing=True)] * extra
    return layers


DEPTH = {'stack': stack, 'bert2bert': bert2bert, 'interleave': interleave, 'identity': identity}


# ----------------------------------------------------------------------------------------------
# from operators to tensors


@dataclass
class Operators:
    """How a model grows."""

    width: str = 'lossless'
    depth: str = 'identity'
    noise: float = 0.0  # zero-sum noise on readers of copies, relative to their rows; 0: none
    seed: int = 0  # of the noise


def query_heads(small, large, kv):
    """
    The axis of query heads. A new key/value group copies the old group kv.source of it, and its
    queries take that group's queries in turn, continuing where an earlier copy of the group
    stopped. Raises UserError if an old query would be lost.
    """
    per_old = small.n_head // small.n_kv_head
    per_new = large.n_head // large.n_kv_head
    earlier = torch.arange(large.n_kv_head) // small.n_kv_head  # copies of this group before it
    within = (earlier[:, None] * per_new + torch.arange(per_new)) % per_old
    source = (kv.source[:, None] * per_old + within).flatten()
    if len(source.unique()) < small.n_head:
        raise UserError(
            f'cannot grow: n_head {small.n_head} -> {large.n_head} with n_kv_head '
            f'{small.n_kv_head} -> {large.n_kv_head} would lose query heads'
        )
    return copy_of(small.n_head, source)


def axes_between(small, large, residual):
    """{role of a tensor's dimension: Axis} for two shapes; residual: a width operator's Axis."""
    kv_heads = round_robin(small.n_kv_head, large.n_kv_head)
    query = by_head(query_heads(small, large, kv_heads), small.head_dim)
    mlp = round_robin(small.n_mlp, large.n_mlp)
    vocab = round_robin(small.vocab_size, large.vocab_size, covered=small.vocab_size)
    w, c = residual.factor, residual.copies
    axes = {
        # rows of linear layers, and the columns that read them
        'vocab': vocab._replace(fill='mean').scaled(1),
        'query': query,
        'kv': by_head(kv_heads, small.head_dim),
        'mlp': mlp,
        'from query': query.scaled(1 / query.copies, reads=True),
        'from mlp': mlp.scaled(1 / mlp.copies, reads=True),
        # the residual stream: its writers, its readers behind a norm, and the norms
        'write': residual,
        'read': residual.scaled(1 / c, fill='random', reads=True),
        'gain': residual.scaled(1 / w, fill='one'),
        'shift': residual.scaled(1, fill='zero'),
        # a tied head reads embeddings that were copied as writers, so the last norm divides
        'tied gain': residual.scaled(1 / (c * w * w), fill='one'),
        'tied shift': residual.scaled(1 / (c * w), fill='zero'),
    }
    return axes


# the roles of each weight's rows and columns; None does not grow. A bias has its weight's rows.
ROLES = {
    'wte': ('vocab', 'write'),
    'wpe': (None, 'write'),
    'lm_head': ('vocab', 'read'),
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


def check_growth(small, large):
    """Raise UserError, with the field and both values, unless `large` can be grown from `small`."""
    growing = [*SIZE_FIELDS, 'vocab_size']
    if small.pos == 'rope':
        growing.append('block_size')
    for field, before in vars(small).items():
        after = getattr(large, field)
        if field in growing and after < before:
            raise UserError(f'cannot grow: {field} {before} -> {after} is smaller')
        if field not in (*growing, 'init_std') and after != before:
            raise UserError(f'cannot grow: {field} {before} -> {after} differs')


class Growth:
    """A growth between two shapes: what each tensor of the larger model is."""

    def __init__(self, small, large, operators):
        """Raises UserError where the shapes or the operators do not allow it."""
        for what, name, known in (
            ('width operator', operators.width, WIDTH),
            ('depth operator', operators.depth, DEPTH),
        ):
            if name not in known:
                raise unknown(what, name, known)
        check_growth(small, large)
        self.small, self.large, self.operators = small, large, operators
        widening = WIDTH[operators.width](small, large)
        self.from_above = widening.from_above
        self.axes = axes_between(small, large, widening.residual)
        self.layers = DEPTH[operators.depth](small.n_layer, large.n_layer)

    def roles(self, name):
        """The Axis, or None, of each dimension of a tensor."""
        stem, kind = re.sub(r'^blocks\.\d+\.', '', name).rsplit('.', 1)
        if stem in ('norm', 'norm1', 'norm2'):
            role = 'gain' if kind == 'weight' else 'shift'
            if stem == 'norm' and self.small.tied:
                role = f'tied {role}'
            return [self.axes[role]]
        axes = [role and self.axes[role] for role in ROLES[stem]]
        return axes[:1] if kind == 'bias' else axes

    def tensor(self, name, old):
        """The new tensor `name`; old: {name: tensor} of the smaller model."""
        match = re.match(r'blocks\.(\d+)\.(.+)', name)
        layer = self.layers[int(match[1])] if match else None
        donor = None
        if self.from_above and match and 'norm' not in name:
            donor = old.get(self.name_in(layer, match, 1, name))  # the last layer has none above
        key = f'{self.operators.seed} {name} 0'
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        tensor = old[self.name_in(layer, match, 0, name)]
        new = grow_tensor(tensor, donor, self.roles(name), self.operators.noise, generator)
        if layer and layer.adds_nothing and re.search(r'\.(attn\.o|mlp\.down)\.', name):
            return torch.zeros_like(new)
        return new * self.rescaled(match)

    def name_in(self, layer, match, above, name):
        """The old tensor that `name` copies, or with above=1 the same of the layer above it."""
        return f'blocks.{layer.source + above}.{match[2]}' if match else name

    def rescaled(self, match):
        """
        The factor of queries whose layer's number changes, if attention logits are divided by it;
        match: layer number and rest of a tensor's name.
        """
        scaled_tensor = 'attn.q_norm.' if self.small.qk_norm else 'attn.q.'
        if not (match and self.small.attn_scale_by_layer and match[2].startswith(scaled_tensor)):
            return 1.0
        layer = int(match[1])
        return (layer + 1) / (self.layers[layer].source + 1)


# ----------------------------------------------------------------------------------------------
# growing models, optimizer states and folders


@torch.no_grad()
def grow(model, config, width='lossless', depth='identity', noise=0.0, seed=0):
    """
    The model grown to the shape `config`; dtype, device and mode are kept. width: fpi, aki,
    lossless or clone; depth: stack, bert2bert, interleave or identity. Raises UserError naming
    the field in the way.
    """
    growth = Growth(model.config, config, Operators(width, depth, noise, seed))
    old = model.state_dict()
    grown = {name: growth.tensor(name, old) for name in GPT.on_meta(config).state_dict()}
    return GPT.from_state(config, grown).train(model.training)


def widen(model, config, method='lossless', noise=0.0, seed=0):
    """A wider model of the shape `config`, as deep as it was."""
    config = replace(config, n_layer=model.config.n_layer)
    return grow(model, config, method, 'stack', noise, seed)


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
    return replace(config, n_layer=4 * config.n_layer)


RELATIVE_SIZES = {'exp': exp, 'stk2': stk2, 'stk4': stk4}  # relative to the size before


def grown_shape(small, to):
    """
    The shape `to` of a model that grows from `small`: exp, stk2, stk4, a named size, or
    WIDTHxLAYERS, whose heads, groups and MLP keep small's proportions. Raises UserError.
    """
    if to in RELATIVE_SIZES:
        return RELATIVE_SIZES[to](small)
    ours = f'{small.n_embd}x{small.n_layer}'
    match = re.fullmatch(r'(\d+)x(\d+)', to)
    if match and (small.head_dim != 16 or small.n_kv_head < small.n_head):  # not named like that
        width, layers = int(match[1]), int(match[2])
        shape = dict(n_embd=width, n_layer=layers, head_dim=int(small.head_dim))
        for field in ('n_head', 'n_kv_head', 'n_mlp'):
            shape[field], rest = divmod(getattr(small, field) * width, small.n_embd)
            if rest:
                raise UserError(f'{to}: {field} of {ours} does not scale to a whole number')
        return replace(small, **shape)
    large = GPTConfig.named(to)
    return replace(small, **{f: getattr(large, f) for f in (*SIZE_FIELDS, 'head_dim')})


def allocate_tokens(params, scratch_tokens):
    """
    Training tokens of each size under progressive training (Eq. 4): what remains of the size's
    from-scratch compute after all smaller sizes are paid for. params X, ascending.
    >>> allocate_tokens([1, 2, 4, 8], [40e9, 80e9, 160e9, 320e9])
    [40000000000.0, 60000000000.0, 120000000000.0, 240000000000.0]
    """
    tokens, spent = [], 0.0  # spent: X T of the smaller sizes, in FLOPs / 6
    for X, T_scratch in zip(params, scratch_tokens, strict=True):
        left = X * T_scratch - spent
        if left <= 0:
            raise UserError(f'nothing is left for {X:g} parameters: the smaller sizes cost as much')
        tokens.append(left / X)
        spent += X * tokens[-1]
    return tokens


# ----------------------------------------------------------------------------------------------
# progressive training


@dataclass
class Progressive:
    """Progressive training (Yano et al.): train the smallest size, expand, train on, and so on."""

    sizes: tuple[str, ...] = ('32x2', '48x2', '64x2', '64x4')  # ascending; also exp, stk2, stk4
    params: tuple[Positive, ...] = ()  # X of each size in FLOPs = 6 X T; empty: layers and head
    scratch_tokens: tuple[Positive, ...] = ()  # of each size from scratch; empty: per parameter
    tokens_per_param: Positive = 20.0  # 20: Chinchilla
    tokens: tuple[Positive, ...] = ()  # of each size as they are; empty: what Eq. 4 gives
    shares: tuple[Positive, ...] = ()  # ... as shares of the tokens from scratch, instead
    learning_rates: tuple[Positive, ...] = ()  # maximum of each size; empty: learning_rate
    batch_sizes: tuple[Count, ...] = ()  # sequences per step of each size; empty: batch_size
    width: Literal[*WIDTH, 'random'] = 'aki'  # random: as many tokens, nothing inherited
    depth: Literal[*DEPTH] = 'stack'
    noise: NonNegative = 0.0  # zero-sum noise that tells copies apart; 0: none
    last_schedule: Literal['', 'cosine', 'wsd'] = ''  # of the largest, from which nothing grows
    compare: Literal['', 'independent'] = ''  # also train each size from scratch
    independent_learning_rates: tuple[Positive, ...] = ()  # of those; empty: the family's

    def stages(self, run):
        """One stage per size, each grown from the one before; then, to compare, from scratch."""
        configs = self.configs(run)
        X = self.params or [config.num_params(head=True) for config in configs]
        self.check(configs, X)
        scratch = self.scratch_tokens or self.tokens or [self.tokens_per_param * x for x in X]
        tokens = self.tokens or [share * t for share, t in zip(self.shares, scratch)]
        tokens = tokens or allocate_tokens(X, scratch)
        baseline = [sum(6 * x * t for x, t in zip(X[: i + 1], scratch)) for i in range(len(X))]
        if self.width == 'random' or self.tokens and not self.scratch_tokens:
            baseline = [0.0] * len(X)  # nothing is saved, or there is nothing to compare with

        unique = dict(unique=run.unique_tokens) if run.unique_tokens else {}
        smaller = member = None  # what the next size grows from, and the finished model
        for i, config in enumerate(configs):
            name = self.name(i)
            stage = Stage(name, config, tokens[i], X[i], knobs=self.knobs_of(i))
            stage.labels = dict(size=name, baseline_flops=baseline[i]) | unique
            if smaller and self.width != 'random':
                operators = Operators(self.width, self.depth, self.noise)
                grow_stage(stage, smaller, configs[i - 1], operators)
                if member is not smaller:  # of a trunk: the family has its branches, too
                    stage.also = (member,)
            if run.schedule == 'wsd' and i + 1 < len(configs):
                smaller, member = yield from trunk_and_branch(stage, run)
                continue
            if self.last_schedule and i + 1 == len(configs):
                stage.knobs['schedule'] = self.last_schedule
            smaller = member = yield stage

        if self.compare == 'independent':
            for i, stage in enumerate(self.independents(configs, X, scratch, unique)):
                same = stage.knobs == self.knobs_of(i) and tokens[i] == scratch[i]
                if i or not same:  # else the smallest is one model in both
                    stage.labels['baseline_flops'] = baseline[i]
                    yield stage

    def independents(self, configs, params, scratch_tokens, labels=None):
        """A stage per size, from scratch; labels: more that all of them have."""
        for i, config in enumerate(configs):
            stage = Stage(f'independent-{self.name(i)}', config, scratch_tokens[i], params[i])
            stage.knobs = self.knobs_of(i)
            if self.independent_learning_rates:
                stage.knobs['learning_rate'] = self.independent_learning_rates[i]
            stage.labels = dict(size=self.name(i), independent=True) | (labels or {})
            yield stage

    def summary(self, results):
        """With independent models, FLOPs until a member has the training loss of its like."""
        alone = {r.labels['size']: r for r in results if r.labels.get('independent')}
        records = []
        for r in results:
            peer = alone.get(r.labels['size'])
            if peer and peer.baseline_flops and not set(r.labels) & {'independent', 'trunk'}:
                records.append(equal_loss(r, peer))
        return [records, ('data.png', [data_panel(results)])]

    def configs(self, run):
        """The shape of each size."""
        configs = []
        for size in self.sizes:
            if configs and size in RELATIVE_SIZES:
                configs.append(RELATIVE_SIZES[size](configs[-1]))
            else:
                configs.append(run.model_config(size))
        return configs

    def name(self, i):
        """The name of size i: its own, after those before it if it is relative to them."""
        own = self.sizes[i]
        return f'{self.name(i - 1)}-{own}' if i and own in RELATIVE_SIZES else own

    def knobs_of(self, i):
        """The general knobs that size i sets for itself."""
        knobs = {}
        if self.learning_rates:
            knobs['learning_rate'] = self.learning_rates[i]
        if self.batch_sizes:
            knobs['batch_size'] = self.batch_sizes[i]
        return knobs

    def check(self, configs, params):
        """Raise UserError for knobs that do not fit together, before anything is trained."""
        lists = ('params', 'scratch_tokens', 'tokens', 'shares', 'learning_rates', 'batch_sizes')
        for name in (*lists, 'independent_learning_rates'):
            found = len(getattr(self, name))
            if found not in (0, len(self.sizes)):
                raise UserError(f'{name} has {found} values for {len(self.sizes)} sizes')
        names = {self.name(i) for i in range(len(self.sizes))}
        if not names or len(names) < len(params) or list(params) != sorted(params):
            raise UserError(f'sizes={",".join(self.sizes)} must be different and ascending')
        if self.width != 'random':
            for small, large in zip(configs, configs[1:]):
                Growth(small, large, Operators(self.width, self.depth))


def grow_stage(stage, smaller, small_config, operators):
    """Let a stage start from the model of the Result `smaller`, grown."""
    large = stage.config
    settings = {}
    if any(getattr(small_config, f) != getattr(large, f) for f in WIDTH_FIELDS):
        settings['width'] = operators.width
    if small_config.n_layer < large.n_layer:
        settings['depth'] = operators.depth
    if operators.noise:
        settings['noise'] = operators.noise
    stage.parent = smaller
    stage.origin = Origin('growth', (smaller.name,), settings)
    how = dict(width=operators.width, depth=operators.depth, noise=operators.noise)
    stage.model = lambda: grow(load(smaller.folder), large, **how, seed=operators.seed)


def data_panel(results):
    """
    Which part of the data each model has read, itself or before it grew or branched off (Figure 3).
    Beyond the tokens of --unique_tokens, if it is set, the data are read again.
    """
    panel = Panel('position in the order of the data (tokens)', '')
    panel.rows = tuple(r.name for r in results)
    parts = ('read before', 'C7'), ('read for the first time', 'C0'), ('read again', 'C1')
    for i, r in enumerate(results):
        start, unique = r.position - r.tokens, r.labels.get('unique') or math.inf
        first = min(start, unique), min(r.position, unique)
        spans = [(0, first[0]), first, *read_again(max(start, unique), r.position, unique)]
        labels = [*parts, parts[-1]]
        for (begin, end), (label, color) in zip(spans, labels):
            if begin < end:
                label = '' if label in [line.label for line in panel.lines] else label
                panel.lines.append(Line([begin, end], [-i, -i], label, '-', color, width=8))
    return panel


def read_again(start, end, unique):
    """The parts of `unique` tokens that positions from `start` on, in later epochs, come to."""
    if start >= end:
        return []
    begin = start % unique
    if end - start >= unique:
        return [(0, unique)]
    if begin + end - start <= unique:
        return [(begin, begin + end - start)]
    return [(0, begin + end - start - unique), (begin, unique)]


def equal_loss(member, alone):
    """
    A record: FLOPs of the whole family until a member has the last training loss of the model
    that was trained alone, against what that one and the smaller ones cost (Figure 2). The loss
    is the mean over a twentieth of a stage.
    """
    loss = training_curve(alone, points=20)[1][-1]
    reached = steps_to_loss(list(zip(*training_curve(member, points=20))), loss)
    record = {'member': member.name, 'training loss alone': loss, 'FLOPs alone': family_cost(alone)}
    record['FLOPs to it'] = reached
    return record | {'saved': None if reached is None else 1 - reached / family_cost(alone)}


def continue_from(stage, before, with_optimizer):
    """
    Let a stage continue the Result `before`: its last state, which a stage at a constant rate
    keeps, with the optimizer; or its weights alone, with a new warmup.
    """
    stage.parent, stage.origin = before, Origin('weights', (before.name,))
    if with_optimizer:
        stage.origin.kind, stage.knobs = 'last state', dict(warmup=0.0)
    else:
        stage.model = partial(load, before.folder)
    return stage


def trunk_and_branch(stage, run):
    """
    A stage under WSD, in two: its stable phase, a piece of the family's trunk, and its decay, the
    branch that becomes the member. Returns the Results of both: the next size grows from the
    first, which a learning rate near zero has not settled yet.
    """
    knobs = replace(run, **stage.knobs)
    knobs.block_size = min(run.block_size, stage.config.block_size)
    step = knobs.batch_size * knobs.block_size  # in tokens
    steps = max(2, math.ceil(stage.tokens / step - 1e-9))
    stable = min(steps - 1, max(1, steps - math.ceil(knobs.decay_fraction * steps)))
    trunk = replace(stage, name=f'{stage.name}-trunk', tokens=stable * step)
    trunk.knobs = stage.knobs | dict(schedule='constant')
    trunk.labels = stage.labels | dict(trunk=True, baseline_flops=0.0)
    before = yield trunk
    branch = Stage(stage.name, stage.config, (steps - stable) * step, stage.params)
    branch = continue_from(branch, before, with_optimizer=True)
    branch.knobs = stage.knobs | branch.knobs | dict(decay_fraction=1.0)
    branch.labels = stage.labels
    member = yield branch
    return before, member


@dataclass
class GrowthComparison:
    """Growth operators side by side: the same second stage from every operator and from nothing."""

    base: str = '48x2'  # size of the base
    base_model: str = ''  # folder or hub name of a trained base of that size; empty: train one
    target: str = '64x4'  # size it is grown to; exp, stk2 and stk4 are relative to the base
    base_tokens: Positive = 1e6  # D1, tokens of the first stage
    tokens: Positive = 5e5  # D2, tokens of each second stage
    variants: tuple[str, ...] = ('random', 'aki+stack', 'lossless+identity')  # +noise
    noise: NonNegative = 0.1  # zero-sum noise of the variants with +noise

    def stages(self, run):
        """The base, then every variant."""
        base, target = self.shapes(run)
        given = bool(self.base_model) and not run.toy  # a toy trains a small one instead
        grown = {variant: self.parse(variant) for variant in self.variants}
        for operators in filter(None, grown.values()):
            Growth(base, target, operators)  # complain before anything is trained
        if not grown or len(grown) < len(self.variants):
            raise UserError(f'variants={",".join(self.variants)} must be different ones')
        X, X_base = target.num_params(head=True), base.num_params(head=True)
        if given:
            smaller = Result(Path(self.base_model).name, self.base_model)
        else:
            smaller = yield Stage('base', base, self.base_tokens, X_base)
        for variant, operators in grown.items():
            stage = Stage(variant, target, self.tokens, X, begin=smaller.position)
            stage.tokenizer = self.base_model if given else ''
            stage.labels = dict(variant=variant)
            if operators:
                grow_stage(stage, smaller, base, operators)
            yield stage

    def shapes(self, run):
        """The shapes of the base and of the target, as they are trained."""
        here = not run.dry_run or Path(self.base_model).is_dir()  # else a plan takes it from `base`
        if self.base_model and not run.toy and here:
            base = run.given_config(self.base_model)
            return base, grown_shape(base, self.target)
        target = grown_shape(GPTConfig.named(self.base), self.target)
        sizes = {field: getattr(target, field) for field in (*SIZE_FIELDS, 'head_dim')}
        return run.model_config(self.base), run.model_config(self.base, **sizes)

    def parse(self, variant):
        """'aki+stack+noise' -> its Operators; random -> None. Raises UserError."""
        if variant == 'random':
            return None
        width, _, rest = variant.partition('+')
        depth, *more = rest.split('+')
        if not depth or more not in ([], ['noise']):
            wanted = 'random or WIDTH+DEPTH, with +noise after it'
            raise UserError(f'{variant!r} in variants must be {wanted}')
        return Operators(width, depth, self.noise if more else 0.0)

    def summary(self, results):
        """The ranking, with the difference from the first variant, seed by seed, and the curves."""
        first, groups = self.variants[0], by_label(results, 'variant')
        curves = {variant: mean_curve(runs) for variant, runs in groups.items()}
        panel = Panel('tokens of the second stage', 'validation loss')
        records = compare_variants(results, first)
        for record in records:
            curve, tokens = curves[record['variant']], groups[record['variant']][0].tokens
            if len(curve) > 2:
                record['at step 0'] = curve[0][1]
            x, y = zip(*curve)
            panel.lines.append(Line([share * tokens for share in x], list(y), record['variant']))
        blocks = [sorted(records, key=lambda record: record['val loss'])]
        return [*blocks, ('growth.png', [panel])] if len(panel.lines[0].x) > 2 else blocks


# ----------------------------------------------------------------------------------------------
# how alike the members of a family are


@torch.no_grad()
def compare(model_p, model_q, examples, batch_size=4):
    """
    (D(P || Q), D(Q || P), share of positions at which both prefer the same token) of two models
    over examples (n, T), int64: the mean over positions within an example, then over examples
    (progressive training, Appendix F).
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for x in progress_bar(examples.split(batch_size), desc='comparing'):
        p, q = model_p(x).logits, model_q(x).logits
        same = p.argmax(-1) == q.argmax(-1)
        found = torch.stack([kl_of_logits(p, q), kl_of_logits(q, p), same.float()])
        sums += found.double().mean(-1).sum(-1).cpu()
    return tuple((sums / len(examples)).tolist())


# ----------------------------------------------------------------------------------------------
# the command line: growing a folder


@dataclass
class FolderGrowth:
    """Grow a model folder on disk: expand.py SOURCE TARGET --to=SIZE."""

    source: str = ''  # folder of the model, or its name on the hub
    target: str = ''  # folder to be made
    to: str = ''  # named size, WIDTHxLAYERS, or exp, stk2, stk4 relative to the source
    width: Literal[*WIDTH] = 'lossless'  # operator in width
    depth: Literal[*DEPTH] = 'identity'  # operator in depth
    noise: NonNegative = 0.1  # zero-sum noise that tells copies apart; 0: none
    seed: Natural = 0  # of the noise
    save_dtype: SaveDtype = 'auto'  # of the new weights; auto: the old ones'


def main(argv):
    """Command line: SOURCE TARGET, then knobs."""
    words = ('source', 'target')
    options, _, _ = configure(argv, FolderGrowth, program='expand.py SOURCE TARGET', words=words)
    if not (options.source and options.target and options.to):
        raise UserError('missing arguments; usage: expand.py SOURCE TARGET --to=SIZE')
    how = dict(width=options.width, depth=options.depth, noise=options.noise, seed=options.seed)
    with new_folder(options.target) as unfinished:
        model = load(options.source)
        grown = grow(model, grown_shape(model.config, options.to), **how)
        tokenizer = tokenizer_to_carry(options.source)
        grown.save(unfinished, tokenizer, dtype=getattr(torch, options.save_dtype, None))
    sizes = f'{model.config.num_params():,} to {grown.config.num_params():,} parameters (N)'
    print(f'{options.target}: grown from {sizes} by {options.width} and {options.depth}')


if __name__ == '__main__':
    run_as_program(main)
