"""
Inheritune: deep layers of a trained model turn lazy; inherit the early ones, train on, and grow
until the child matches its parent.

Paper: Sanyal et al., Inheritune: Training Smaller Yet More Attentive Language Models.

    python inheritune.py out/progressive_tiny/64x4             # how attentive is each layer
    python inheritune.py out/progressive_tiny/64x4 child --n=2 # a model of the first two
    python train.py config/inheritune_tiny.py                  # the method and its baselines

Algorithm 1: train a child of the first n = k/2 layers of a reference of k layers for as many steps
as the reference had; while its validation loss is above the reference's, let it inherit two more
layers and train again. What a lazy layer is: extras/attention.py.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    configure,
)
from data.vocabulary import tokenizer_to_carry
from engine.errors import UserError, run_as_program, unknown
from engine.files import new_folder, read_json, write_json
from engine.hub import model_folder
from engine.log import has_metrics
from engine.loss import evaluate
from engine.parallel import find_hardware, gather, processes
from engine.report import Line, Panel, by_label, compare_variants, mean_curve
from engine.stage import Origin, Result, Stage
from engine.weights import weight_files
from extras.attention import (
    Attention,
    attention_command,
    observe_attention,
    observed_panels,
    run_samples,
)
from let import distil, teacher_flops
from model import GPT, load, read_config

# ----------------------------------------------------------------------------------------------
# inheriting

PARTS = ('attention', 'mlp', 'norms')


def part_of(name):
    """The part of a layer that a tensor belongs to."""
    if '.attn.' in name:
        return 'attention'
    return 'mlp' if '.mlp.' in name else 'norms'


def inherit(reference, n_layer, parts=PARTS, layers=None, rescale=False):
    """
    A model of n_layer layers of the reference, the first ones unless `layers` lists others, with
    its embeddings, final norm and head. parts: what is inherited of each layer; the rest starts
    at random (Table 3). rescale: where attention logits are divided by the layer's number, keep
    the logits of layers whose number changes; else all are copied as they are, as the paper does.
    Raises UserError for layers that do not exist, or an unknown part.
    """
    layers = list(range(n_layer)) if layers is None else layers
    k = reference.config.n_layer
    if n_layer < 1 or max(layers) >= k:
        wanted = f'layer {max(layers) + 1}' if n_layer <= k else f'{n_layer} layers'
        raise UserError(f'{wanted} cannot be inherited from a reference of {k}')
    for part in parts:
        if part not in PARTS:
            raise unknown('part of a layer', part, PARTS)
    child = GPT(replace(reference.config, n_layer=n_layer)).to(reference.wte.weight)
    rescale = rescale and reference.config.attn_scale_by_layer
    queries = 'attn.q_norm.' if reference.config.qk_norm else 'attn.q.'
    old, new = reference.state_dict(), child.state_dict()
    for name in new:
        if not name.startswith('blocks.'):
            new[name] = old[name].clone()
        elif part_of(name) in parts:
            _, layer, rest = name.split('.', 2)
            source = layers[int(layer)]
            new[name] = old[f'blocks.{source}.{rest}'].clone()
            if rescale and rest.startswith(queries):
                new[name] *= (int(layer) + 1) / (source + 1)
    child.load_state_dict(new)
    return child


def inherit_next(reference, smaller, n_layer, parts=PARTS):
    """The trained `smaller` model with the reference's next layers, n_layer in all (line 4)."""
    child = inherit(reference, n_layer, parts)
    child.load_state_dict(child.state_dict() | smaller.state_dict())
    return child


def half_width_config(config):
    """The shape of all layers at half the width. Raises UserError where that is not defined."""
    n_head = config.n_head // 2
    if n_head < 1 or config.n_kv_head != config.n_head:
        heads = f'{config.n_head} heads and {config.n_kv_head} key heads'
        raise UserError(f'half the width of {heads} is not defined')
    n_embd = config.n_embd * n_head // config.n_head
    changes = dict(n_head=n_head, n_kv_head=n_head, n_embd=n_embd, n_mlp=config.n_mlp // 2)
    return replace(config, **changes)


def half_width(reference):
    """The first half of heads, MLP units and hidden dimensions of every layer (Table 2)."""
    child = GPT(half_width_config(reference.config)).to(reference.wte.weight)
    old, new = reference.state_dict(), child.state_dict()
    for name, tensor in new.items():
        new[name] = old[name][tuple(slice(n) for n in tensor.shape)]
    child.load_state_dict(new)
    return child


def alternate_layers(k, n):
    """DistilBERT's choice: every other one of k layers, then those before the last two."""
    every_other = list(range(0, k, 2))[:n]
    missing = n - len(every_other)
    return every_other + [max(0, layer) for layer in range(k - 2 - missing, k - 2)]


def stacked_layers(half, n):
    """The first `half` layers again and again, n in all, copied as they are (section 4)."""
    return [layer % half for layer in range(n)]


# ----------------------------------------------------------------------------------------------
# what a child is compared with: each yields its stages


@dataclass
class Comparison:
    """A reference, and children of its first n layers beside other models of n layers."""

    method: Any  # Inheritune
    run: Any  # the general knobs
    config: Any  # the reference's
    reference: Result | None = None
    n: int = 0

    def stage(self, name, n_layer=None, **fields):
        """A Stage of n_layer layers (default: the child's), trained as long as it."""
        method, shape = self.method, replace(self.config, n_layer=n_layer or self.n)
        tokens = method.child_tokens or method.tokens
        fields['labels'] = dict(variant=name)
        stage = Stage(name, shape, tokens, shape.num_params(head=True), **fields)
        if self.reference:
            stage.tokenizer = self.reference.folder
        if method.observe_attention and not self.run.dry_run:
            stage.observe = observe_attention(run_samples(self.run, self.config, 8))
        return stage

    def copy(self, model, layers):
        """A model of these layers of another."""
        return inherit(model, len(layers), layers=layers, rescale=self.method.rescale)

    def inherited(self, name, build, origin, **fields):
        """A Stage that starts from build(the reference)."""
        folder = self.reference.folder
        origin.models = (self.reference.name,)
        fields |= dict(parent=self.reference, origin=origin)
        fields['model'] = lambda: build(load(folder))
        return self.stage(name, **fields)

    def distilled(self, stage):
        """Let the reference teach a stage by its logits."""
        stage.tokens = self.method.distillation_tokens or stage.tokens
        settings = dict(alpha=self.method.alpha, temperature=self.method.temperature)
        stage.objective = distil(self.reference.folder, **settings)
        X = self.config.num_params(head=True)
        stage.teaching = dict(objective='distillation', teacher=self.reference.name, **settings)
        stage.teaching['teacher_params'], stage.more_flops = X, teacher_flops(X)
        return stage

    def trained_reference(self):
        """The Stage that trains the reference."""
        stage = self.stage('reference', self.config.n_layer)
        stage.tokens = self.method.tokens
        return stage

    def child(self, smaller=None):
        """The Stage of a child of n layers: from the reference, or grown from a `smaller` child."""
        n, parts = self.n, self.method.parts
        if smaller and self.method.regrow == 'continue':
            folders = self.reference.folder, smaller.folder
            origin = Origin('growth', (smaller.name,), dict(layers_of=self.reference.name))
            model = lambda: inherit_next(*map(load, folders), n, parts)
            return self.stage(f'{n}-layers', parent=smaller, origin=origin, model=model)
        origin = Origin('first layers', settings=dict(layers=n, parts=' '.join(parts)))
        return self.inherited(f'{n}-layers', lambda r: inherit(r, n, parts), origin)


def random_init(c):
    """The same shape from random initialisation."""
    yield c.stage(f'random-{c.n}')


def random_2x(c):
    """The same for twice as many steps."""
    stage = c.stage(f'random-2x-{c.n}')
    stage.tokens *= 2
    yield stage


def last_layers(c):
    """The last layers of the reference instead of the first (Figure 1c)."""
    k, n = c.config.n_layer, c.n
    origin = Origin('last layers', settings=dict(layers=n))
    build = lambda r: c.copy(r, list(range(k - n, k)))
    yield c.inherited(f'last-layers-{n}', build, origin)


def stacking(c):
    """A model of half the layers from random initialisation, stacked once."""
    n, half = c.n, max(1, c.n // 2)
    small = yield c.stage(f'stacking-{half}', half)
    origin = Origin('growth', (small.name,), dict(depth='stack'))
    model = lambda: c.copy(load(small.folder), stacked_layers(half, n))
    yield c.stage(f'stacking-{n}', parent=small, origin=origin, model=model)


def hybrid_stacking(c):
    """The first layers of the reference, stacked."""
    n, half = c.n, max(1, c.n // 2)
    origin = Origin('growth', settings=dict(first_layers=half, depth='stack'))
    build = lambda r: c.copy(r, stacked_layers(half, n))
    yield c.inherited(f'hybrid-stacking-{n}', build, origin)


def half_width_child(c):
    """All layers at half the width."""
    stage = c.inherited('half-width', half_width, Origin('half width'))
    stage.config = half_width_config(c.config)
    stage.params = stage.config.num_params(head=True)
    yield stage


def distillation(c):
    """From random initialisation, taught by the reference."""
    stage = c.stage(f'distillation-{c.n}', begin=c.reference.position, also=(c.reference,))
    yield c.distilled(stage)


def distilbert(c):
    """From alternate layers, taught by the reference."""
    n, layers = c.n, alternate_layers(c.config.n_layer, c.n)
    origin = Origin('alternate layers', settings=dict(layers=n))
    build = lambda r: c.copy(r, layers)
    yield c.distilled(c.inherited(f'distilbert-{n}', build, origin))


def sub_modules(c):
    """The first layers' attention, MLPs or norms alone, and every two of them (Table 3)."""
    n = c.n
    for parts in [*combinations(PARTS, 1), *combinations(PARTS, 2)]:
        origin = Origin('first layers', settings=dict(layers=n, parts=' '.join(parts)))
        build = lambda r, parts=parts: inherit(r, n, parts)
        yield c.inherited(f'{"+".join(parts)}-{n}', build, origin)


BASELINES = {
    'random': random_init,
    'random-2x': random_2x,
    'last-layers': last_layers,
    'stacking': stacking,
    'hybrid-stacking': hybrid_stacking,
    'half-width': half_width_child,
    'distillation': distillation,
    'distilbert': distilbert,
    'sub-modules': sub_modules,
}


# ----------------------------------------------------------------------------------------------
# the method


@dataclass
class Inheritune:
    """Sanyal et al., Algorithm 1: inherit the first half, train, regrow until it matches."""

    reference: str = ''  # trained reference, folder or hub name; empty: train one of `size` first
    size: str = '64x8'  # shape of the reference that is trained
    tokens: Positive = 1.5e6  # training tokens of the reference and of every round
    child_tokens: NonNegative = 0.0  # ... of every round and baseline, if not as many
    distillation_tokens: NonNegative = 0.0  # ... of those that are distilled, if not as many
    n: Natural = 0  # layers that the child starts with; 0: half of the reference's
    grow_by: Count = 2  # layers that it inherits before each further round
    regrow: Literal['restart', 'continue'] = 'restart'  # from the reference, or from the child
    max_rounds: Natural = 0  # rounds at most; 0: until the reference is matched or used up
    parts: tuple[Literal[*PARTS], ...] = PARTS  # what is inherited of each layer (Table 3)
    rescale: bool = False  # keep the attention of layers whose number changes, by their queries
    depths: tuple[Count, ...] = ()  # more children, trained whether one matched or not (Figure 11)
    baselines: tuple[Literal[*BASELINES], ...] = ()  # what it is compared with
    alpha: Fraction = 0.6  # distillation: weight of the data; the teacher has the rest
    temperature: Positive = 1.0  # distillation: temperature of both distributions
    no_bias: bool = False  # train the reference without biases, as the paper's GPT-2 ...
    attn_scale_by_layer: bool = False  # ... and with attention logits / layer number
    observe_attention: bool = False  # log how attentive every head is at each evaluation

    def __post_init__(self):
        self.outcomes = []  # (reference, last child) of each seed

    def stages(self, run):
        """Algorithm 1, then what its child is compared with."""
        config = self.reference_config(run)
        c = Comparison(self, run, config)
        yield from self.algorithm_1(c)
        for baseline in self.baselines:
            yield from BASELINES[baseline](c)
        tried = range(self.first_n(config), c.n + 1, self.grow_by)
        for n in self.depths:
            if n not in tried and n <= config.n_layer:
                yield replace(c, n=n).child()

    def algorithm_1(self, c):
        """The reference, then children of n, n + 2, ... layers until one matches it."""
        k = c.config.n_layer
        c.reference = self.given_reference(c) or (yield c.trained_reference())
        c.n = self.first_n(c.config)
        child = yield c.child()  # lines 1 and 2
        rounds = 1
        while child.val_loss > c.reference.val_loss and c.n + self.grow_by <= k:  # line 3
            if rounds == self.max_rounds:
                break
            c.n += self.grow_by
            child = yield c.child(child)  # lines 4 and 5
            rounds += 1
        self.outcomes.append((c.reference, child))

    def first_n(self, config):
        """Layers of the first child. Raises UserError where half of them is not a number."""
        k = config.n_layer
        if self.n > k:
            raise UserError(f'n={self.n}: the reference has {k} layers')
        if not self.n and (k % 2 or k < 2):
            raise UserError(f'half of {k} layers is not a whole number: say how many, --n={k // 2}')
        return self.n or k // 2

    def given_reference(self, c):
        """The Result of the reference that was given, or None: a toy trains a small one instead."""
        if not self.reference or c.run.toy:
            return None
        labels = dict(variant='reference', seed=len(self.outcomes))
        return replace(given_reference(self.reference, c.run), labels=labels)

    def reference_config(self, run):
        """The reference's shape. Raises UserError for what cannot work, before training."""
        changes = dict(attn_scale_by_layer=self.attn_scale_by_layer)
        if self.no_bias:
            changes['bias'] = False
        config = run.model_config(self.size, **changes)
        here = not run.dry_run or Path(self.reference).is_dir()  # else a plan takes it from `size`
        if self.reference and not run.toy and here:
            config = run.given_config(self.reference)
        if run.toy:  # of as many layers as a toy has
            self.n, self.depths = 0, self.depths[:1]
        n = self.first_n(config)
        if 'half-width' in self.baselines:
            half_width_config(config)  # it complains where that is not defined
        if 'stacking' in self.baselines and n < 2:
            raise UserError('stacking needs a child of two layers: half of it is trained first')
        return config

    def summary(self, results):
        """Whether the children match; the losses, paired by seed, and the costs; pictures."""
        given = [reference for reference, _ in self.outcomes if reference not in results]
        groups = by_label(given + results, 'variant')
        child = self.outcomes[0][1].labels['variant']
        records = compare_variants(given + results, 'reference')
        for record, other in zip(records, compare_variants(given + results, child)):
            record[f'against {child}'] = other.get(f'against {child}')
            record['its 95% interval'] = other.get('95% interval')
            runs = groups[record['variant']]
            record['N'] = runs[0].n_params
            record['own FLOPs'] = mean(r.flops for r in runs)
            record['with all ancestors'] = mean(r.total_flops for r in runs)
        blocks = [verdict(reference, child) for reference, child in self.outcomes]
        blocks += [records, ('losses.png', loss_panels(groups))]
        seen = observed_panels({name: groups[name] for name in ('reference', child)})
        return [*blocks, ('lazy.png', seen)]


def verdict(reference, child):
    """Whether a child matches its reference, in words."""
    matches = 'matches' if child.val_loss <= reference.val_loss else 'does not match'
    saved = 1 - child.n_params / reference.n_params
    losses = f'{child.val_loss:.4f} against {reference.val_loss:.4f}'
    return f'{child.name} {matches} the reference ({losses}), with {saved:.0%} fewer parameters'


def loss_panels(groups):
    """Convergence (Figures 3 to 8), and what decides: loss against all that was spent."""
    curves = Panel('training tokens', 'validation loss (nats per token)')
    frontier = Panel('FLOPs with all ancestors', 'validation loss (nats per token)', log='x')
    for i, (variant, runs) in enumerate(groups.items()):
        color, style = f'C{i % 10}', '-' if i < 10 else '--'
        losses = [r.val_loss for r in runs]
        cost = [r.total_flops or math.nan for r in runs]  # unknown of a model from elsewhere
        frontier.lines.append(Line(cost, losses, variant, 'o' if i < 10 else 's', color))
        trained = [r for r in runs if has_metrics(r.folder)]
        curve = mean_curve(trained)[1:] if trained else []
        if len(curve) > 1:  # it was evaluated on the way
            x = [share * trained[0].tokens for share, _ in curve]
            curves.lines.append(Line(x, [loss for _, loss in curve], variant, style, color))
    return [curves, frontier] if curves.lines else [frontier]


def given_reference(name, run):
    """
    The Result of a given reference. Its loss is measured as the children's will be: on this run's
    data, context and device, and is kept in out_dir/reference.json.
    """
    trained_here = (Path(name) / 'result.json').is_file()
    result = Result.of(name) if trained_here else Result('reference', str(name))
    if run.dry_run:
        return result
    corpus = run.val_data or next(iter(run.corpora))
    settings = dict(reference=str(name), data=corpus, eval_tokens=run.eval_tokens)
    settings |= dict(block_size=run.block_size, device=run.device, dtype=run.dtype)
    settings['weights'] = [file.stat().st_mtime_ns for file in weight_files(model_folder(name))]
    path, found = Path(run.out_dir) / 'reference.json', {}
    with contextlib.suppress(OSError, UserError):
        found = read_json(path, val_loss=float, settings=dict)
    found = gather(found)[0]  # one process decides, and all measure
    if found.get('settings') != settings:
        found = dict(val_loss=reference_loss(name, run), settings=settings)
        if processes()[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
    result.val_loss = found['val_loss']
    result.n_params = read_config(model_folder(name)).num_params()
    return result


def reference_loss(name, run):
    """The validation loss of a model as a stage measures its own, on all processes together."""
    hardware = find_hardware(run)
    model = load(name, hardware.device).float()
    source = replace(run, block_size=min(run.block_size, model.config.block_size)).source()
    with hardware.autocast:
        return evaluate(model, source.validation(8, hardware))


# ----------------------------------------------------------------------------------------------
# the command line: how attentive is each layer, and smaller models of some of them


def write_child(options):
    """Make the folder `child`: the model with the first n layers, or those listed. UserError."""
    layers = [layer - 1 for layer in options.layers] or list(range(options.n))
    if not layers:
        raise UserError('which layers? --n=FIRST_LAYERS or --layers=1,2,5')
    with new_folder(options.child) as unfinished:
        how = dict(layers=layers, rescale=options.rescale)
        child = inherit(load(options.folder), len(layers), **how)
        child.save(unfinished, tokenizer_to_carry(options.folder))
    print(f'{options.child}: {len(layers)} layers of {options.folder}')


def main(argv):
    """Command line: a model's folder, or that and a child's, then knobs."""
    words = ('folder', 'child')
    options, _, _ = configure(argv, Attention, program='inheritune.py FOLDER [CHILD]', words=words)
    if not options.folder:
        raise UserError('missing argument; usage: inheritune.py FOLDER [CHILD --n=LAYERS]')
    if options.child:
        write_child(options)
    else:
        attention_command(options)


if __name__ == '__main__':
    run_as_program(main)
