"""
Growing trained models, and progressive training: a whole model family for the price of its largest member.

Paper: Yano et al., Efficient Construction of Model Family through Progressive Training Using Model Expansion (000).

    python train.py config/progressive_tiny.py         # minutes on a CPU
    python train.py config/progressive_8b.py           # the paper's family
    python expand.py out/family/4b grown/8b --to=8b --width=lossless --depth=identity      # grow a folder, tensor by tensor

Train the smallest model, expand it, train on, expand again. Each size is given the tokens that make the whole family cost
what its largest member costs from scratch (Eq. 4):

    FLOPs(X_i, T_i) = FLOPs(X_i, T_scratch_i) - sum over j < i of FLOPs(X_j, T_j),      FLOPs(X, T) = 6 X T

The growth operators themselves are in operators.py.
"""
import json
import os
import shutil
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoint import load_moments
from configurator import Stage, UserError, check_ranges, configure, run_as_program, unknown, write_atomically
from evaluate import mean_and_spread, table
from hugging_face import config_to_hugging_face, find_tensors, layout, pack, stored_shape, unpack
from let import let, pair_layers
from model import GPT, GPTConfig, load, shape_of
from operators import DEPTH, WIDTH, Growth


@torch.no_grad()
def grow(model, config, width='aki', depth='stack', noise=0.0, seed=0):
    """
    The model grown to the shape `config` by operators of operators.py, widened first and then deepened; dtype, device and
    mode are kept. `noise` tells copies apart without changing the function. Raises UserError with the field in the way.
    """
    growth, state = Growth(model.config, config, width, depth, noise, seed), model.state_dict()
    with torch.device('meta'):
        grown = GPT(config)
    grown.load_state_dict({name: torch.cat(list(growth.pieces(name, state.__getitem__))) for name in grown.state_dict()},
                          assign=True)
    grown.build_rope(next(model.parameters()).device)
    return grown.train(model.training)


def widen(model, config, method='aki', noise=0.0, seed=0):
    """A wider model of the shape `config`, as deep as it was."""
    return grow(model, replace(config, n_layer=model.config.n_layer), method, 'stack', noise, seed)


def deepen(model, n_layer, method='stack'):
    """A deeper model of n_layer layers, as wide as it was."""
    return grow(model, replace(model.config, n_layer=n_layer), 'fpi', method)


@torch.no_grad()
def grow_optimizer(moments, small, large, width='aki', depth='stack'):
    """
    AdamW's state carried through a growth, so that training goes on without warming up again. moments: {'step': steps so
    far, 'exp_avg': {name: tensor}, 'exp_avg_sq': {name: tensor}}; returns the same for the shape `large`. Gradients follow
    the dual of the weights' map, exp_avg_sq its square: exact for whole multiples and under RMSNorm for any width, without
    noise and with as many queries to a key as before; an estimate elsewhere, and where layers are copied.
    """
    growth = Growth(small, large, width, depth)
    with torch.device('meta'):
        names = list(GPT(large).state_dict())
    grown = {key: {name: torch.cat(list(growth.pieces(name, moments[key].__getitem__, moment))) for name in names}
             for moment, key in enumerate(('exp_avg', 'exp_avg_sq'), 1)}
    return dict(step=moments['step'], **grown)


# ---------------------------------------------------------------------------------------------------------------------
# on disk

class Rows:
    """A tensor in an open safetensors file that is read by slices of its rows."""

    def __init__(self, file, name):
        self.slice = file.get_slice(name)
        self.shape = tuple(self.slice.get_shape())

    def __getitem__(self, key):
        return self.slice[key]


def grow_folder(source, target, shape, width='aki', depth='stack', noise=0.0, seed=0):
    """
    Grow the model in the folder `source` into the new folder `target`, a few megabytes at a time: neither model is ever in
    memory (what transformers packs, q, k and v of GPT-2 and GPT-NeoX, is held whole, one tensor at a time). shape: GPTConfig
    of the model -> GPTConfig of the larger one. The result is built beside `target` and moved there when it is whole. Raises
    UserError for what is missing, damaged or in the way.
    """
    source, target, unfinished = Path(source), Path(target), Path(f'{target}.partial')
    if target.exists():
        raise UserError(f'{target} is there already: choose another folder, or remove it')
    with ExitStack() as stack:
        small = shape_of(source)
        try:
            files = [stack.enter_context(safe_open(path, 'pt')) for path in sorted(source.glob('model*.safetensors'))]
        except (OSError, SafetensorError) as error:
            raise UserError(f'{source} cannot be read: {error}') from error
        holder = {name: file for file in files for name in file.keys()}
        large = shape(small)
        growth = Growth(small, large, width, depth, noise, seed)
        with torch.device('meta'):
            old_shapes, new_shapes = ({n: tuple(t.shape) for n, t in GPT(c).state_dict().items()} for c in (small, large))
        try:
            stored, found = layout(small, old_shapes), find_tensors(small, holder, old_shapes)
        except UserError as error:
            raise UserError(f'{source}: {error}') from None
        where = {name: theirs for theirs, (ours, _) in stored.items() for name in ours}

        def fetch(name):
            ours, packed = stored[where[name]]
            theirs = found[where[name]]
            if not packed and len(ours) == 1:
                return Rows(holder[theirs], theirs)
            tensor = holder[theirs].get_tensor(theirs)
            return unpack(tensor, packed, small, [old_shapes[n][0] for n in ours])[ours.index(name)]

        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        dtype = fetch('wte.weight')[:1].dtype
        write_safetensors(unfinished / 'model.safetensors', growth, layout(large, new_shapes), new_shapes, dtype, fetch)
    hf_config = config_to_hugging_face(large, str(dtype).removeprefix('torch.'))
    write_atomically(unfinished / 'config.json', json.dumps(hf_config, indent=1) + '\n')
    os.replace(unfinished, target)


def write_safetensors(path, growth, stored, shapes, dtype, fetch):
    """
    Write grown tensors to one safetensors file as they are made, which the library's own writer, wanting all of them at
    once, cannot: 8 bytes with the header's length, the header (name -> dtype, shape, offsets in JSON), the data.
    """
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    names = {torch.float64: 'F64', torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}
    for theirs, (ours, packed) in stored.items():
        if ours:
            shape = stored_shape(ours, packed, shapes)
        else:   # a bias of zeros, as long as its weight has outputs
            shape = tuple(header[theirs.replace('.bias', '.weight')]['shape'][-1:])
        size = dtype.itemsize * torch.Size(shape).numel()
        header[theirs] = dict(dtype=names[dtype], shape=shape, data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)   # the data are aligned
    with open(path, 'wb') as file, tqdm(desc=f'growing {path.parent}', total=offset, unit='B', unit_scale=True) as bar:
        file.write(len(text).to_bytes(8, 'little') + text)
        for theirs, (ours, packed) in stored.items():
            pieces = (piece for name in ours for piece in growth.pieces(name, fetch))
            if packed:
                pieces = [pack([torch.cat(list(growth.pieces(name, fetch))) for name in ours], packed, growth.large)]
            elif not ours:
                pieces = [torch.zeros(header[theirs]['shape'], dtype=dtype)]
            for piece in pieces:
                bar.update(file.write(piece.to(dtype).contiguous().view(torch.uint8).numpy()))


# ---------------------------------------------------------------------------------------------------------------------
# shapes and budgets

SECOND_STAGES = {   # paper 001: a size written relative to the one before it
    'exp': lambda c: _wider(c, round(2 ** 0.5 * c.n_head)),   # width x sqrt 2, in whole heads
    'stk2': lambda c: replace(c, n_layer=2 * c.n_layer), 'stk4': lambda c: replace(c, n_layer=4 * c.n_layer),
}


def _wider(config, n_head):
    """The shape with n_head heads, and all other widths in proportion."""
    n_kv_head = n_head if config.n_kv_head == config.n_head else config.n_kv_head
    n_embd = config.n_embd * n_head // config.n_head
    return replace(config, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_mlp=config.n_mlp * n_embd // config.n_embd)


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
    sizes: tuple[str, ...] = ('32x2', '48x2', '64x2', '64x4')  # ascending; exp, stk2, stk4: relative to the one before
    params: tuple[float, ...] = ()          # X of each size in FLOPs = 6 X T; empty: counted, layers and head
    scratch_tokens: tuple[float, ...] = ()  # tokens each size would train on from scratch; empty: tokens_per_param x X
    tokens_per_param: float = 20.0          # 20: Chinchilla
    tokens: tuple[float, ...] = ()          # tokens of each size as they are; empty: what Eq. 4 leaves of scratch_tokens
    learning_rates: tuple[float, ...] = ()  # maximum learning rate of each size; empty: learning_rate for all
    batch_sizes: tuple[int, ...] = ()       # sequences a step for each size; empty: batch_size for all
    width: str = 'aki'                      # aki, fpi, lossless, clone; or random: as many tokens, nothing inherited
    depth: str = 'stack'                    # stack, bert2bert, interleave or identity
    noise: float = 0.0                      # zero-sum noise that tells copies apart, relative to the weights; 0: none
    optimizer: str = 'fresh'                # AdamW's state after a growth: fresh, or grown with the model (and no warmup)
    taught: float = 0.0                     # strength (lambda0) at which the size before teaches a grown one (LET, for 15% of it)
    compare: str = ''                       # independent: also train each size from scratch on its own token budget
    independent_learning_rates: tuple[float, ...] = ()  # maximum learning rates of those; empty: the same as the family's

    def stages(self, run):
        """One stage a size, each grown from the one before; then, to compare, each size from scratch."""
        configs = self.configs(run)
        params = self.params or [config.num_params(head=True) for config in configs]
        self.check(configs, params)
        scratch = self.scratch_tokens or self.tokens or [self.tokens_per_param * x for x in params]
        tokens = self.tokens or allocate_tokens(params, scratch)
        baseline = [sum(6 * x * t for x, t in zip(params[:i + 1], scratch)) for i in range(len(params))]
        if self.width == 'random' or self.tokens and not self.scratch_tokens:   # nothing is saved, or nothing to compare with
            baseline = [0.0] * len(params)

        smaller = None
        for i, config in enumerate(configs):
            stage = Stage(self.name(i), config, tokens[i], params[i], baseline_flops=baseline[i], knobs=self.knobs_of(i))
            if smaller and self.width != 'random':
                grow_stage(stage, smaller, configs[i - 1], self.width, self.depth, self.noise, self.optimizer)
            if smaller and self.taught:
                theirs, ours = pair_layers('L2E', configs[i - 1].n_layer, config.n_layer)
                stage.objective = let(smaller.folder, ours, theirs, self.taught, stop=0.15)
                stage.start += f', taught by {smaller.name}: layer {theirs} to {ours}, {self.taught:g} until 0.15'
            smaller = yield stage

        if self.compare == 'independent':
            for i, config in enumerate(configs):
                knobs = self.knobs_of(i)
                if self.independent_learning_rates:
                    knobs['learning_rate'] = self.independent_learning_rates[i]
                if i or knobs != self.knobs_of(i):   # else the smallest size is one model in both families
                    yield Stage(f'independent-{self.name(i)}', config, scratch[i], params[i], baseline_flops=baseline[i],
                                knobs=knobs)

    def configs(self, run):
        """The shape of each size."""
        configs = []
        for size in self.sizes:
            relative = SECOND_STAGES.get(size) if configs else None
            configs.append(relative(configs[-1]) if relative else run.model_config(size))
        return configs

    def name(self, i):
        """The name of size i: its own, with those before it where it is relative to them."""
        own = self.sizes[i]
        return f'{self.name(i - 1)}-{own}' if i and own in SECOND_STAGES else own

    def knobs_of(self, i):
        """The general knobs that size i sets for itself."""
        knobs = dict(keep_optimizer=True) if self.optimizer == 'grown' else {}
        if self.learning_rates:
            knobs['learning_rate'] = self.learning_rates[i]
        if self.batch_sizes:
            knobs['batch_size'] = self.batch_sizes[i]
        return knobs

    def check(self, configs, params):
        """Raise UserError for knobs that do not fit together, before anything is trained."""
        check_ranges(self, noise=(0, None), taught=(0, None), batch_sizes=(1, None), **{knob: (1e-12, None) for knob in (
            'params', 'scratch_tokens', 'tokens_per_param', 'tokens', 'learning_rates', 'independent_learning_rates')})
        for name in ('params', 'scratch_tokens', 'tokens', 'learning_rates', 'batch_sizes', 'independent_learning_rates'):
            if len(getattr(self, name)) not in (0, len(self.sizes)):
                raise UserError(f'{name} has {len(getattr(self, name))} values for {len(self.sizes)} sizes')
        if not self.sizes or list(params) != sorted(params) or len({self.name(i) for i in range(len(params))}) < len(params):
            raise UserError(f'sizes={",".join(self.sizes)} must be different and in ascending order')
        for knob, legal in dict(width=(*WIDTH, 'random'), depth=DEPTH, optimizer=('fresh', 'grown'),
                                compare=('', 'independent')).items():
            if getattr(self, knob) not in legal:
                raise unknown(knob, getattr(self, knob), legal)
        for small, large in zip(configs, configs[1:]):
            if self.width != 'random':
                Growth(small, large, self.width, self.depth)


def grow_stage(stage, smaller, small_config, width, depth, noise, optimizer):
    """Let a stage start from the model of the Result `smaller`, grown; with optimizer='grown' its AdamW state too."""
    wider = any(getattr(small_config, f) != getattr(stage.config, f) for f in ('n_embd', 'n_head', 'n_kv_head', 'n_mlp'))
    deeper = small_config.n_layer < stage.config.n_layer
    how = [width] * wider + [depth] * deeper + [f'noise {noise:g}'] * (noise > 0) + ['its optimizer'] * (optimizer == 'grown')
    stage.parent, stage.start = smaller, ' + '.join([smaller.name, *how])
    stage.model = lambda: grow(load(smaller.folder), stage.config, width, depth, noise)
    if optimizer == 'grown':
        stage.moments = lambda: grow_optimizer(load_moments(smaller.folder), small_config, stage.config, width, depth)
        stage.knobs |= dict(warmup=0.0)


@dataclass
class GrowthComparison:
    """Growth operators side by side: one base model, then the same second stage from every operator and from nothing."""
    base: str = '48x2'                # size of the base
    target: str = '64x4'              # size that it is grown to; exp, stk2 and stk4 are relative to the base
    base_tokens: float = 1e6          # D1, tokens of the first stage
    tokens: float = 5e5               # D2, tokens of each second stage
    arms: tuple[str, ...] = ('random', 'aki+stack', 'lossless+identity')  # WIDTH+DEPTH[+noise][+grown], or random
    noise: float = 0.1                # zero-sum noise of the arms that say so
    seeds: int = 3                    # runs of everything, each with its own initialisation and data order

    def stages(self, run):
        """For every seed the base, then every arm."""
        check_ranges(self, base_tokens=(1, None), tokens=(1, None), noise=(0, None), seeds=(1, None))
        base = run.model_config(self.base)
        target = SECOND_STAGES[self.target](base) if self.target in SECOND_STAGES else run.model_config(self.target)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise UserError(f'arms={",".join(self.arms)} must be some, and different ones')
        for arm in self.arms:   # complain before anything is trained
            parts = arm.split('+')
            if arm != 'random' and (len(parts) < 2 or set(parts[2:]) - {'noise', 'grown'}):
                raise UserError(f'{arm!r} in arms is neither random nor WIDTH+DEPTH, with +noise or +grown after it')
            if arm != 'random':
                Growth(base, target, *parts[:2])
        for seed in range(self.seeds):
            knobs = dict(seed=run.seed + seed)
            smaller = yield Stage(f'base-{seed}', base, self.base_tokens, base.num_params(head=True),
                                  knobs=dict(knobs, keep_optimizer=any('grown' in arm for arm in self.arms)))
            for arm in self.arms:
                stage = Stage(f'{arm}-{seed}', target, self.tokens, target.num_params(head=True), knobs=dict(knobs),
                              data_after=smaller)
                if arm != 'random':
                    width, depth, *more = arm.split('+')
                    grow_stage(stage, smaller, base, width, depth, self.noise if 'noise' in more else 0.0,
                               'grown' if 'grown' in more else 'fresh')
                yield stage

    def summary(self, results):
        """The ranking: mean validation loss over the seeds, and the difference from random initialisation, seed by seed."""
        losses = {arm: [r.val_loss for r in results if r.name.rsplit('-', 1)[0] == arm] for arm in self.arms}
        rows = [['second stage from', 'val loss', 'standard deviation', 'against random', 'standard deviation']]
        for arm, values in sorted(losses.items(), key=lambda item: statistics.mean(item[1])):
            gains = [a - b for a, b in zip(values, losses.get('random', []))]
            rows.append([arm, *mean_and_spread(values), *mean_and_spread(gains)])
        return table(rows)


# ---------------------------------------------------------------------------------------------------------------------
# the command line: growing a folder

@dataclass
class FolderGrowth:
    """Grow a model folder on disk: expand.py SOURCE TARGET --to=SIZE."""
    source: str = ''        # folder of the model
    target: str = ''        # folder to be made
    to: str = ''            # named size, WIDTHxLAYERS, or exp, stk2, stk4 relative to the source
    width: str = 'aki'      # aki, fpi, lossless or clone
    depth: str = 'stack'    # stack, bert2bert, interleave or identity
    noise: float = 0.0      # zero-sum noise that tells copies apart, relative to the weights; 0: none
    seed: int = 0           # of the noise


def main(argv):
    """Command line: SOURCE TARGET, then knobs."""
    named = [f'--{knob}={arg}' for knob, arg in zip(('source', 'target'), argv) if not arg.startswith('-')]
    options, _, _ = configure(named + argv[len(named):], FolderGrowth, program='expand.py')
    if not (options.source and options.target and options.to):
        raise UserError('say what to grow into what: expand.py SOURCE TARGET --to=SIZE')

    def shape(small):
        if options.to in SECOND_STAGES:
            return SECOND_STAGES[options.to](small)
        large = GPTConfig.named(options.to)
        fields = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_mlp', 'head_dim')
        return replace(small, **{field: getattr(large, field) for field in fields})
    grow_folder(options.source, options.target, shape, options.width, options.depth, options.noise, options.seed)


if __name__ == '__main__':
    run_as_program(main)
