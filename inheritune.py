"""
Inheritune: deep layers of a trained model turn lazy; inherit the early ones, train on, and grow
until the child matches its parent.

Paper: Sanyal et al., Inheritune: Training Smaller Yet More Attentive Language Models.

    python inheritune.py out/progressive_tiny/64x4             # how attentive is each layer
    python inheritune.py out/progressive_tiny/64x4 child --n=2 # a model of the first two
    python train.py config/inheritune_tiny.py                  # the method and its baselines

How attentive a layer is shows in the attention matrices A (T, T) of its heads (section 2):

    rank k* = the fewest singular values with 90% of sum sigma^2
    mass m* = the fewest columns with 90% of |A|_F^2

A layer's value is the maximum over its heads. Where its rank is one, every head has collapsed to
rank one: the layer is lazy.

Algorithm 1: train a child of the first n = k/2 layers of a reference of k layers for as many steps
as the reference had; while its validation loss is above the reference's, let it inherit two more
layers and train again.
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    configure,
    with_positionals,
)
from data.corpus import check_vocabulary, verify_corpus
from data.instruct import run_source
from data.loader import Share, validation_batches
from data.vocabulary import tokenizer_to_carry
from engine.device import choose_device, gather, processes
from engine.errors import UserError, run_as_program, unknown
from engine.files import new_folder, read_json, write_atomically, write_json
from engine.hub import model_folder
from engine.loss import evaluate
from engine.report import Line, Panel, draw_images, draw_panels, table
from engine.rows import weight_files
from engine.stage import Origin, Result, Stage
from let import distil
from model import GPT, load, read_config

# ----------------------------------------------------------------------------------------------
# how attentive a layer is


def fewest(shares, threshold):
    """How many of the largest of the last dimension's shares hold `threshold` of their sum."""
    cumulative = shares.double().sort(-1, descending=True).values.cumsum(-1)
    enough = (threshold - 1e-7) * cumulative[..., -1:]  # less what rounding may have taken
    return (cumulative < enough).sum(-1) + 1


def attention_rank(attention, threshold=0.9):
    """k*: the fewest singular values with `threshold` of sum sigma^2; (..., T, T) -> (...)."""
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    squares = torch.linalg.eigvalsh(attention.mT @ attention)  # sigma^2, faster than an SVD
    return fewest(squares.clamp(min=0), threshold)


def column_mass(attention, threshold=0.9):
    """m*: the fewest columns with `threshold` of |A|_F^2; (..., T, T) -> int64 (...)."""
    return fewest(attention.double().square().sum(-2), threshold)


@torch.no_grad()
def attention_maps(model, idx, causal=True):
    """
    Yield each layer's attention weights (B, H, T, T), float32. causal=False: as if every position
    saw all others, as the paper draws them (Figure 2); the hidden states stay causal.
    """
    config, T = model.config, idx.shape[1]
    x, rope = model.wte(idx), model.rope(0, T)
    if model.wpe is not None:
        x = x + model.wpe.weight[:T]
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    for block in model.blocks:
        q, k = block.attn.queries_and_keys(block.norm1(x), rope)
        k = k.repeat_interleave(config.n_head // config.n_kv_head, 1)
        logits = q @ k.transpose(-1, -2) * block.attn.scale
        if causal:
            logits = logits.masked_fill(future, -torch.inf)
        yield logits.float().softmax(-1)
        x = block(x, rope, None)


def analyse(model, samples, threshold=0.9, causal=True, batch_size=10):
    """
    (rank, mass), each (layers, n) int64, the maximum over a layer's heads, of samples (n, T)
    int64; the paper takes n = T = 100.
    """
    ranks, masses = [], []
    for x in tqdm(samples.split(batch_size), desc='attention', leave=False):
        maps = list(attention_maps(model, x, causal))
        ranks.append(torch.stack([attention_rank(a, threshold).amax(1) for a in maps]))
        masses.append(torch.stack([column_mass(a, threshold).amax(1) for a in maps]))
    return torch.cat(ranks, 1), torch.cat(masses, 1)


@torch.no_grad()
def losses_without(model, idx):
    """
    What each layer is worth: the losses in nats per token of idx (B, T), two lists by layer,
    without that layer alone, and without it and all above. No paper's: the test of the measures.
    """
    x, y = idx[:, :-1], idx[:, 1:]
    rope = model.rope(0, x.shape[1])

    def loss(stream):
        logits = F.linear(model.norm(stream), model.head_weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).item()

    alone, above = [], []
    for layer in tqdm(range(model.config.n_layer), desc='layers left out', leave=False):
        stream, _ = model.residual_stream(x, layers=layer)
        above.append(loss(stream))
        for block in model.blocks[layer + 1 :]:
            stream = block(stream, rope, None)
        alone.append(loss(stream))
    return alone, above


def lazy_layers(rank):
    """The layers, from 1, whose heads all have rank one on average over the samples (< 1.5)."""
    return (torch.nonzero(rank.double().mean(1) < 1.5).flatten() + 1).tolist()


# ----------------------------------------------------------------------------------------------
# inheriting

PARTS = ('attention', 'mlp', 'norms')


def part_of(name):
    """The part of a layer that a tensor belongs to."""
    if '.attn.' in name:
        return 'attention'
    return 'mlp' if '.mlp.' in name else 'norms'


def inherit(reference, n_layer, parts=PARTS, layers=None):
    """
    A model of n_layer layers of the reference, the first ones unless `layers` lists others, with
    its embeddings, final norm and head. parts: what is inherited of each layer; the rest starts
    at random (Table 3). Raises UserError for layers that do not exist, or an unknown part.
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
    old, new = reference.state_dict(), child.state_dict()
    for name in new:
        if not name.startswith('blocks.'):
            new[name] = old[name].clone()
        elif part_of(name) in parts:
            _, layer, rest = name.split('.', 2)
            new[name] = old[f'blocks.{layers[int(layer)]}.{rest}'].clone()
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
# baselines (Tables 1 and 2, Figure 3): each yields its stages


@dataclass
class Comparison:
    """What a baseline is compared with: a child of n layers of a reference."""

    method: Any  # Inheritune
    config: Any  # the reference's
    reference: Result
    n: int

    def stage(self, name, n_layer=None, **fields):
        """A Stage of n_layer layers (default: the child's), trained as long as it."""
        shape = replace(self.config, n_layer=n_layer or self.n)
        tokens = self.method.child_tokens or self.method.tokens
        fields.setdefault('tokenizer', self.reference.folder)
        return Stage(name, shape, tokens, shape.num_params(head=True), **fields)

    def inherited(self, name, build, origin, **fields):
        """A Stage that starts from build(the reference)."""
        folder = self.reference.folder
        origin.models = (self.reference.name,)
        fields |= dict(parent=self.reference, origin=origin)
        fields['model'] = lambda: build(load(folder))
        return self.stage(name, **fields)

    def distilled(self, stage):
        """Let the reference teach a stage by its logits; only its training is counted as FLOPs."""
        stage.tokens = self.method.distillation_tokens or stage.tokens
        settings = dict(alpha=self.method.alpha, temperature=self.method.temperature)
        stage.objective = distil(self.reference.folder, **settings)
        stage.teaching = dict(objective='distillation', teacher=self.reference.name, **settings)
        return stage


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
    k = c.config.n_layer
    last = list(range(k - c.n, k))
    origin = Origin('last layers', settings=dict(layers=c.n))
    yield c.inherited(f'last-layers-{c.n}', lambda r: inherit(r, c.n, layers=last), origin)


def stacking(c):
    """A model of half the layers from random initialisation, stacked once."""
    half = max(1, c.n // 2)
    small = yield c.stage(f'stacking-{half}', half)
    origin = Origin('growth', (small.name,), dict(depth='stack'))
    layers = stacked_layers(half, c.n)
    model = lambda: inherit(load(small.folder), c.n, layers=layers)
    yield c.stage(f'stacking-{c.n}', parent=small, origin=origin, model=model)


def hybrid_stacking(c):
    """The first layers of the reference, stacked."""
    half = max(1, c.n // 2)
    origin = Origin('growth', settings=dict(first_layers=half, depth='stack'))
    build = lambda r: inherit(r, c.n, layers=stacked_layers(half, c.n))
    yield c.inherited(f'hybrid-stacking-{c.n}', build, origin)


def half_width_child(c):
    """All layers at half the width."""
    stage = c.inherited('half-width', half_width, Origin('half width'))
    stage.config = half_width_config(c.config)
    stage.params = stage.config.num_params(head=True)
    yield stage


def distillation(c):
    """From random initialisation, taught by the reference."""
    yield c.distilled(c.stage(f'distillation-{c.n}', parent=c.reference))


def distilbert(c):
    """From alternate layers, taught by the reference."""
    layers = alternate_layers(c.config.n_layer, c.n)
    origin = Origin('alternate layers', settings=dict(layers=c.n))
    build = lambda r: inherit(r, c.n, layers=layers)
    yield c.distilled(c.inherited(f'distilbert-{c.n}', build, origin))


BASELINES = {
    'random': random_init,
    'random-2x': random_2x,
    'last-layers': last_layers,
    'stacking': stacking,
    'hybrid-stacking': hybrid_stacking,
    'half-width': half_width_child,
    'distillation': distillation,
    'distilbert': distilbert,
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
    start_fraction: Fraction = 0.5  # of the reference's layers that the child starts with
    grow_by: Count = 2  # layers that it inherits before each further round
    regrow: Literal['restart', 'continue'] = 'restart'  # from the reference, or from the child
    max_rounds: Natural = 0  # rounds at most; 0: until the reference is matched or used up
    parts: tuple[Literal[*PARTS], ...] = PARTS  # what is inherited of each layer (Table 3)
    baselines: tuple[Literal[*BASELINES], ...] = ()  # what it is compared with
    alpha: Fraction = 0.6  # distillation: weight of the data; the teacher has the rest
    temperature: Positive = 1.0  # distillation: temperature of both distributions
    no_bias: bool = False  # train the reference without biases, as the paper's GPT-2 ...
    attn_scale_by_layer: bool = False  # ... and with attention logits / layer number

    def stages(self, run):
        """The reference; children of n, n + 2, ... layers until one matches; the baselines."""
        config = self.reference_config(run)
        if self.reference and not run.toy:  # a toy trains a small one instead
            reference = self.given = given_reference(self.reference, run)
        else:
            X = config.num_params(head=True)
            reference = yield Stage('reference', config, self.tokens, X)
        n = round(self.start_fraction * config.n_layer)
        child = None
        rounds = 0
        while True:
            child = yield self.child(Comparison(self, config, reference, n), child)
            rounds += 1
            matched = child.val_loss <= reference.val_loss
            if matched or n + self.grow_by > config.n_layer or rounds == self.max_rounds:
                break
            n += self.grow_by
        for baseline in self.baselines:
            yield from BASELINES[baseline](Comparison(self, config, reference, n))

    def child(self, c, smaller):
        """The round that trains a child of n layers: the first, or grown from the `smaller`."""
        name, labels = f'{c.n}-layers', dict(child=c.n)
        if smaller and self.regrow == 'continue':
            folders = c.reference.folder, smaller.folder
            origin = Origin('growth', (smaller.name,), dict(layers_of=c.reference.name))
            model = lambda: inherit_next(*map(load, folders), c.n, self.parts)
            return c.stage(name, parent=smaller, origin=origin, model=model, labels=labels)
        origin = Origin('first layers', settings=dict(layers=c.n, parts=' '.join(self.parts)))
        build = lambda reference: inherit(reference, c.n, self.parts)
        return c.inherited(name, build, origin, labels=labels)

    def reference_config(self, run):
        """The reference's shape. Raises UserError for what cannot work, before training."""
        changes = dict(attn_scale_by_layer=self.attn_scale_by_layer)
        if self.no_bias:
            changes['bias'] = False
        config = run.model_config(self.size, **changes)
        if self.reference and not run.toy and not run.dry_run:  # a plan takes it from `size`
            config = run.given_config(self.reference)
        n = self.start_fraction * config.n_layer
        if abs(n - round(n)) > 1e-6 or round(n) < 1:
            fraction = f'start_fraction {self.start_fraction:g} of {config.n_layer} layers'
            raise UserError(f'{fraction} is not a whole number of layers')
        if 'half-width' in self.baselines:
            half_width_config(config)  # it complains where that is not defined
        if 'stacking' in self.baselines and round(n) < 2:
            raise UserError('stacking needs a child of two layers: half of it is trained first')
        return config

    def summary(self, results):
        """Whether the last child matches; every model's loss and cost beside the reference's."""
        reference = results[0] if results[0].name == 'reference' else self.given
        child = [r for r in results if 'child' in r.labels][-1]
        records = []
        for r in results:
            record = {'model': r.name, 'N': r.n_params, 'val loss': r.val_loss}
            record['against the reference'] = r.val_loss - reference.val_loss
            record |= {'own FLOPs': r.flops, 'with all ancestors': r.total_flops}
            records.append(record)
        matched = child.val_loss <= reference.val_loss
        verdict = 'matches the reference' if matched else 'does not match the reference'
        saved = 1 - child.n_params / reference.n_params
        losses = f'{child.val_loss:.4f} against {reference.val_loss:.4f}'
        return [f'{child.name} {verdict} ({losses}), with {saved:.0%} fewer parameters', records]


def given_reference(name, run):
    """
    The Result of a given reference. Its loss is measured as the children's will be: on this run's
    data, context and device, and is kept in out_dir/reference.json.
    """
    trained_here = (Path(name) / 'result.json').is_file()
    result = Result.of(name) if trained_here else Result.given('reference', name)
    if run.dry_run:
        return result
    corpus = run.val_data or next(iter(run.corpora))
    settings = dict(reference=str(name), data=corpus, eval_tokens=run.eval_tokens)
    settings['block_size'] = run.block_size
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
    """The validation loss of a model on a run's data, in float32, on all processes together."""
    device = choose_device(run.device)
    model = load(name, device).float()
    source = run_source(replace(run, block_size=min(run.block_size, model.config.block_size)))
    return evaluate(model, source.validation(8, Share(device, *processes())))


# ----------------------------------------------------------------------------------------------
# the command line: how attentive is each layer


@dataclass
class Attention:
    """How attentive each layer of a model is, or with CHILD a smaller model of some of them."""

    folder: str = ''  # model folder or hub name
    child: str = ''  # folder to be made, of a model that inherits ...
    layers: tuple[Count, ...] = ()  # ... these layers, from 1: --layers=1,2,5; or ...
    n: Natural = 0  # ... the first n
    data: str = 'pydocs'  # prepared corpus; its validation split is used
    data_dir: str = 'data'  # where prepared corpora are
    samples: Annotated[int, Range(2)] = 100  # sequences
    length: Annotated[int, Range(2)] = 100  # tokens in each
    threshold: Fraction = 0.9  # share of the variance, and of the mass
    full: bool = False  # full attention instead of causal, as in the paper's pictures
    out: str = ''  # where attention.md and the pictures go; empty: out/attention/NAME
    device: str = 'auto'  # cuda or cpu


def layer_records(rank, mass, alone, above):
    """Records of each layer: rank and mass over the samples, and the losses without it."""
    records = []
    for i, (r, m) in enumerate(zip(rank.double(), mass.double())):
        record = {'layer': str(i + 1), 'rank k*': f'{r.mean():.1f}', 'sd of k*': f'{r.std():.1f}'}
        record |= {'mass m*': f'{m.mean():.1f}', 'sd of m*': f'{m.std():.1f}'}
        record |= {'loss without it': f'{alone[i]:.3f}', 'and all above': f'{above[i]:.3f}'}
        records.append(record)
    return records


def depth_panel(values, name):
    """A measure against depth, with its standard deviation over samples (Figure 1)."""
    layers = list(range(1, len(values) + 1))
    mean = values.double().mean(1).tolist()
    sd = values.double().std(1).tolist()
    return Panel(
        'layer', f'{name}, maximum over heads', [Line(layers, mean, band=sd)], ylim=(0, None)
    )


def write_child(options):
    """Make the folder `child`: the model with the first n layers, or those listed. UserError."""
    layers = [layer - 1 for layer in options.layers] or list(range(options.n))
    if not layers:
        raise UserError('which layers? --n=FIRST_LAYERS or --layers=1,2,5')
    with new_folder(options.child) as unfinished:
        child = inherit(load(options.folder), len(layers), layers=layers)
        child.save(unfinished, tokenizer_to_carry(options.folder))
    print(f'{options.child}: {len(layers)} layers of {options.folder}')


def main(argv):
    """Command line: a model's folder, or that and a child's, then knobs."""
    argv = with_positionals(argv, 'folder', 'child')
    options, _, _ = configure(argv, Attention, program='inheritune.py FOLDER [CHILD]')
    if not options.folder:
        raise UserError('missing argument; usage: inheritune.py FOLDER [CHILD --n=LAYERS]')
    if options.child:
        return write_child(options)
    device = choose_device(options.device)
    model = load(options.folder, device).eval()
    corpus = verify_corpus(options.data, options.data_dir)
    check_vocabulary(corpus, model.config, options.folder)
    if options.length > model.config.block_size:
        longest = model.config.block_size
        raise UserError(f'{options.folder} reads at most {longest} tokens, not {options.length}')
    n_tokens = options.samples * options.length
    found = validation_batches(corpus.val, options.length, 1, n_tokens, Share(device))
    samples = torch.cat([x for x, _, _ in found])
    rank, mass = analyse(model, samples, options.threshold, not options.full)
    rank, mass = rank.cpu(), mass.cpu()
    lazy = ', '.join(map(str, lazy_layers(rank))) or 'none'
    text = table(layer_records(rank, mass, *losses_without(model, samples[:20])))
    text += f'\n\nlazy layers (every head of rank one): {lazy}'
    print(text)
    out = Path(options.out or Path('out', 'attention', Path(options.folder).name))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / 'attention.md', text + '\n')
    draw_panels([depth_panel(rank, 'rank k*'), depth_panel(mass, 'mass m*')], out / 'attention.png')
    maps = list(attention_maps(model, samples[:3, :40], causal=not options.full))
    images = []
    for layer in sorted({round(i) for i in np.linspace(0, len(maps) - 1, 4)}):
        head = int(attention_rank(maps[layer]).double().mean(0).argmax())  # the most attentive
        root = maps[layer][:, head].mean(0).cpu().numpy() ** 0.5  # shows small weights too
        images.append((f'layer {layer + 1}, head {head + 1}: root of the weight', root))
    draw_images(images, out / 'attention_maps.png', 'key position', 'query position')
    print(f'\nattention.md, attention.png and attention_maps.png are in {out}/')


if __name__ == '__main__':
    run_as_program(main)
