"""
Growing a trained model, and progressive training: a whole model family for the price of its largest member.

Paper: Yano et al., Efficient Construction of Model Family through Progressive Training Using Model Expansion (000).

    python train.py config/progressive_tiny.py         # minutes on a CPU
    python train.py config/progressive_8b.py           # the paper's family

Train the smallest model, expand it, train on, expand again. Each size is given the tokens that make the whole family cost
what its largest member costs from scratch (Eq. 4):

    FLOPs(X_i, T_i) = FLOPs(X_i, T_scratch_i) - sum over j < i of FLOPs(X_j, T_j),      FLOPs(X, T) = 6 X T

Growing in width duplicates units. An axis of the model (residual stream, query heads, key/value heads, MLP neurons) grows
by a map `source`: new unit -> old unit. Rows of a weight (its outputs) are copied by the map of their axis; columns (its
inputs) are copied and divided by the number of copies, so that the copies together say what the one unit said.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from configurator import Stage, UserError, unknown
from model import GPT, load


# ---------------------------------------------------------------------------------------------------------------------
# width

class Axis(NamedTuple):
    """How one axis grows. source (new,) int64: old unit of each new one; copies (new,): how often that old unit occurs."""
    source: torch.Tensor
    copies: torch.Tensor
    old: int


def axis(old, new):
    """Round-robin duplication: the old units first, then again from the first one until there are `new`."""
    source = torch.arange(new) % old
    return Axis(source, torch.bincount(source, minlength=old)[source], old)


def head_axis(heads, head_dim):
    """The axis of all heads' dimensions: whole heads are duplicated, so RoPE and the softmax scale keep their meaning."""
    def spread(units):
        return (units[:, None] * head_dim + torch.arange(head_dim)).flatten()
    return Axis(spread(heads.source), heads.copies.repeat_interleave(head_dim), heads.old * head_dim)


def query_axis(small, large, kv):
    """
    The query heads' axis. New key/value group G copies the old group kv.source[G]; its queries take that group's queries
    in turn, going on where an earlier copy of the group stopped. Raises UserError when an old query would be lost.
    """
    per_old, per_new = small.n_head // small.n_kv_head, large.n_head // large.n_kv_head
    groups = torch.arange(large.n_kv_head)
    earlier = groups // small.n_kv_head   # copies of the same old group before this one
    within = (earlier[:, None] * per_new + torch.arange(per_new)) % per_old
    source = (kv.source[:, None] * per_old + within).flatten()
    counts = torch.bincount(source, minlength=small.n_head)
    if (counts == 0).any():
        raise UserError(f'cannot grow: n_head {small.n_head} -> {large.n_head} with n_kv_head {small.n_kv_head} -> '
                        f'{large.n_kv_head} would lose query heads')
    return Axis(source, counts[source], small.n_head)


# which axis the rows (outputs) and columns (inputs) of each tensor are; None: an axis that does not grow
ROLES = {
    'wte.weight': (None, 'embd'), 'wpe.weight': (None, 'embd'), 'lm_head.weight': (None, 'read'), 'norm': ('embd',),
    'norm1': ('embd',), 'norm2': ('embd',), 'attn.q_norm': (None,), 'attn.k_norm': (None,),
    'attn.q': ('query', 'read'), 'attn.k': ('kv', 'read'), 'attn.v': ('kv', 'read'), 'attn.o': ('embd', 'query'),
    'mlp.up': ('mlp', 'read'), 'mlp.gate': ('mlp', 'read'), 'mlp.down': ('embd', 'mlp'),
}


def roles(name):
    """(layer or None, roles of the tensor's dimensions) for a name such as 'blocks.3.attn.q.weight'."""
    parts = name.split('.')
    layer = int(parts[1]) if parts[0] == 'blocks' else None
    key = name if layer is None and name in ROLES else '.'.join(parts[2:-1] if layer is not None else parts[:-1])
    return layer, ROLES[key][:1] if parts[-1] == 'bias' else ROLES[key]


def axes_between(small, large):
    """{role: Axis} that grow the shape `small` into `large`."""
    kv = axis(small.n_kv_head, large.n_kv_head)
    return {'embd': axis(small.n_embd, large.n_embd), 'mlp': axis(small.n_mlp, large.n_mlp),
            'kv': head_axis(kv, small.head_dim), 'query': head_axis(query_axis(small, large, kv), small.head_dim)}


@torch.no_grad()
def widen(model, config, method='aki'):
    """
    A wider model of shape `config`, whose number of layers must be the model's. dtype and device are kept.

    method 'fpi' (bert2BERT, function-preserving initialisation): every new unit duplicates an old one. Exactly the old
    function where all of an axis' units are duplicated equally often; RMSNorm sees a re-weighted mean otherwise.
    method 'aki' (bert2BERT, advanced knowledge initialisation; what paper 000 uses): new rows come from the layer above,
    grown by the same maps, in every linear layer; the top layer, embeddings, norms and head as in fpi. Starts worse than
    fpi and ends better, because the new units are no copies.
    """
    if method not in WIDTH:
        raise unknown('width growth', method, WIDTH)
    check_growth(model.config, config)
    axes, state = axes_between(model.config, config), model.state_dict()

    def columns(tensor, role):
        """Grow the inputs: copy and divide; the embedding's columns are outputs to the residual stream, so only copied."""
        along = axes['embd' if role == 'read' else role]
        grown = tensor.index_select(-1, along.source.to(tensor.device))
        return grown if role == 'embd' else grown / along.copies.to(tensor)

    def grow_tensor(name):
        layer, dims = roles(name)
        tensor = state[name] if len(dims) == 1 or dims[1] is None else columns(state[name], dims[1])
        if dims[0] is None:
            return tensor.clone()
        along = axes[dims[0]]
        grown = tensor.index_select(0, along.source.to(tensor.device))
        above = name.replace(f'blocks.{layer}.', f'blocks.{(layer or 0) + 1}.')
        if config.tied and layer is None:   # a tied head reads the duplicated embedding undivided, so the final norm divides
            grown = grown / along.copies.to(tensor)
        if method == 'aki' and layer is not None and above in state and 'norm' not in name:
            donor = state[above] if len(dims) == 1 else columns(state[above], dims[1])
            grown[along.old:] = donor.index_select(0, along.source[along.old:].to(tensor.device))
        return grown

    return _model_with(config, {name: grow_tensor(name) for name in state}, model)


# ---------------------------------------------------------------------------------------------------------------------
# depth

def layer_map(old, new, method='stack'):
    """
    For each of `new` layers the old layer that it copies, a list. stack: the whole stack again and again (M o M).
    bert2bert: whole stacks, then the remainder from the top layers (what paper 000 uses).
    """
    if method not in DEPTH:
        raise unknown('depth growth', method, DEPTH)
    if method == 'stack':
        return [layer % old for layer in range(new)]
    whole = new // old * old
    return [layer % old for layer in range(whole)] + list(range(old - (new - whole), old))


@torch.no_grad()
def deepen(model, n_layer, method='stack'):
    """A model of n_layer layers, each a copy of the one that `layer_map` names. Raises UserError if that is fewer."""
    if n_layer < model.config.n_layer:
        raise UserError(f'cannot grow: n_layer {model.config.n_layer} -> {n_layer} is smaller')
    state = model.state_dict()
    grown = {name: tensor.clone() for name, tensor in state.items() if not name.startswith('blocks.')}
    for layer, source in enumerate(layer_map(model.config.n_layer, n_layer, method)):
        prefix = f'blocks.{source}.'
        grown |= {f'blocks.{layer}.{name.removeprefix(prefix)}': tensor.clone()
                  for name, tensor in state.items() if name.startswith(prefix)}
    return _model_with(_with(model.config, n_layer=n_layer), grown, model)


def grow(model, config, width='aki', depth='stack'):
    """The model grown to `config`, in width and then in depth (bert2BERT's order). UserError: the field in the way."""
    check_growth(model.config, config)
    return deepen(widen(model, _with(config, n_layer=model.config.n_layer), width), config.n_layer, depth)


WIDTH, DEPTH = ('fpi', 'aki'), ('stack', 'bert2bert')
GROWING = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_mlp')


def check_growth(small, large):
    """Raise UserError, naming the field and both values, unless `large` can be grown from `small`."""
    for field in vars(small):
        before, after = getattr(small, field), getattr(large, field)
        if field in GROWING and after < before:
            raise UserError(f'cannot grow: {field} {before} -> {after} is smaller')
        if field not in GROWING and field != 'init_std' and before != after:
            raise UserError(f'cannot grow: {field} {before} -> {after} differs, and growth keeps it')


def _with(config, **changes):
    return type(config)(**{**vars(config), **changes})


def _model_with(config, state, like):
    """A model of shape `config` made of these tensors, strictly, on the device and in the mode of `like`."""
    with torch.device('meta'):
        grown = GPT(config)
    grown.load_state_dict(state, assign=True)
    grown.build_rope(next(like.parameters()).device)
    return grown.train(like.training)


# ---------------------------------------------------------------------------------------------------------------------
# the method

def allocate_tokens(params, scratch_tokens):
    """
    Training tokens of each size under progressive training, paper 000's Eq. 4: what is left of the size's from-scratch
    compute when all that was spent on smaller sizes is taken off. params X and scratch_tokens in ascending order of size.
    >>> allocate_tokens([1, 2, 4, 8], [40e9, 80e9, 160e9, 320e9])
    [40000000000.0, 60000000000.0, 120000000000.0, 240000000000.0]
    """
    tokens = []
    for size, scratch in zip(params, scratch_tokens, strict=True):
        left = size * scratch - sum(x * t for x, t in zip(params, tokens))   # in FLOPs / 6
        if left <= 0:
            raise UserError(f'nothing is left for the model of {size:g} parameters: the smaller ones cost as much already')
        tokens.append(left / size)
    return tokens


@dataclass
class Progressive:
    """Progressive training (Yano et al., paper 000): train the smallest size, expand, train on, up to the largest."""
    sizes: tuple[str, ...] = ('32x2', '48x2', '64x2', '64x4')  # the family, in ascending order
    params: tuple[float, ...] = ()          # X of each size in FLOPs = 6 X T; empty: counted, layers and head
    scratch_tokens: tuple[float, ...] = ()  # tokens each size would train on from scratch; empty: tokens_per_param x X
    tokens_per_param: float = 20.0          # 20: Chinchilla
    learning_rates: tuple[float, ...] = ()  # maximum learning rate of each size; empty: learning_rate for all
    batch_sizes: tuple[int, ...] = ()       # sequences a step for each size; empty: batch_size for all
    width: str = 'aki'                      # width growth: aki or fpi
    depth: str = 'stack'                    # depth growth: stack or bert2bert
    compare: str = ''                       # independent: also train each size from scratch on its own token budget
    independent_learning_rates: tuple[float, ...] = ()  # maximum learning rates of those; empty: the same as the family's

    def stages(self, run):
        """One stage a size, each grown from the one before; then, to compare, each size from scratch."""
        configs = [run.model_config(size) for size in self.sizes]
        params = self.params or [config.num_params(head=True) for config in configs]
        self.check(params)
        for small, large in zip(configs, configs[1:]):
            check_growth(small, large)
        scratch = self.scratch_tokens or [self.tokens_per_param * x for x in params]
        tokens = allocate_tokens(params, scratch)
        baseline = [sum(6 * x * t for x, t in zip(params[:i + 1], scratch)) for i in range(len(params))]

        smaller = None
        for i, (size, config) in enumerate(zip(self.sizes, configs)):
            smaller = yield Stage(
                size, config, tokens[i], params[i], baseline_flops=baseline[i], knobs=self.knobs_of(i), parent=smaller,
                start=self.describe_growth(smaller.name, configs[i - 1], config) if smaller else 'random initialisation',
                model=(lambda: grow(load(smaller.folder), config, self.width, self.depth)) if smaller else None)

        if self.compare == 'independent':
            for i, (size, config) in enumerate(zip(self.sizes, configs)):
                knobs = self.knobs_of(i)
                if self.independent_learning_rates:
                    knobs['learning_rate'] = self.independent_learning_rates[i]
                if i or knobs != self.knobs_of(i):   # else the smallest size is one model in both families
                    yield Stage(f'independent-{size}', config, scratch[i], params[i], baseline_flops=baseline[i], knobs=knobs)

    def describe_growth(self, name, small, large):
        """In words, where a grown model's weights come from."""
        wider = any(getattr(small, f) != getattr(large, f) for f in GROWING if f != 'n_layer')
        return ' + '.join([name] + [self.width] * wider + [self.depth] * (small.n_layer < large.n_layer))

    def knobs_of(self, i):
        """The general knobs that size i sets for itself."""
        knobs = {}
        if self.learning_rates:
            knobs['learning_rate'] = self.learning_rates[i]
        if self.batch_sizes:
            knobs['batch_size'] = self.batch_sizes[i]
        return knobs

    def check(self, params):
        """Raise UserError for knobs that do not fit together, before anything is trained."""
        for name in ('params', 'scratch_tokens', 'learning_rates', 'batch_sizes', 'independent_learning_rates'):
            if getattr(self, name) and len(getattr(self, name)) != len(self.sizes):
                raise UserError(f'{name} has {len(getattr(self, name))} values for {len(self.sizes)} sizes')
        if list(params) != sorted(params) or len(set(self.sizes)) < len(self.sizes) or not self.sizes:
            raise UserError(f'sizes={",".join(self.sizes)} must be different and in ascending order')
        if self.compare not in ('', 'independent'):
            raise UserError(f"compare is '' or independent, not {self.compare!r}")
        layer_map(1, 1, self.depth)
        if self.width not in WIDTH:
            raise unknown('width growth', self.width, WIDTH)
