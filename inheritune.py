"""
Inheritune: deep layers of a trained model turn lazy; inherit the early ones, train on, and grow until the child matches its
parent.

Paper: Sanyal et al., Inheritune: Training Smaller Yet More Attentive Language Models (003).

    python inheritune.py out/progressive_tiny/64x4      # how attentive is each layer: table and pictures
    python train.py config/inheritune_tiny.py           # the method and its baselines, minutes on a CPU

How attentive a layer is, is read off the attention matrices A (T, T) of its heads (section 2):

    rank k* = the fewest singular values with 90% of sum sigma^2        mass m* = the fewest columns with 90% of |A|_F^2

A layer is the maximum over its heads. Where it is one, every head has collapsed to rank one: the layer is lazy.

Algorithm 1: train a child of the first n = k/2 layers of a reference of k layers for as many steps as the reference had;
while its validation loss is above the reference's, let it inherit two more layers and train again.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import Result, Stage, UserError, check_ranges, configure, run_as_program, unknown
from data.loader import open_corpus, validation_batches
from evaluate import count, evaluate, human, pyplot, table
from expand import deepen
from let import distil
from machine import choose_device
from model import GPT, load, rotate

# ---------------------------------------------------------------------------------------------------------------------
# how attentive a layer is


def _fewest(shares, threshold):
    """How many of the largest of the last dimension's numbers, none negative, hold `threshold` of their sum."""
    cumulative = shares.double().sort(-1, descending=True).values.cumsum(-1)
    return (cumulative < (threshold - 1e-7) * cumulative[..., -1:]).sum(-1) + 1   # less what rounding may have taken


def attention_rank(attention, threshold=0.9):
    """k*: the fewest singular values that hold `threshold` of sum sigma^2, for attention (..., T, T); int64 (...)."""
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    squares = torch.linalg.eigvalsh(attention.mT @ attention)   # sigma^2, several times faster than singular values
    return _fewest(squares.clamp(min=0), threshold)


def column_mass(attention, threshold=0.9):
    """m*: the fewest columns that hold `threshold` of the squared Frobenius norm, for attention (..., T, T); int64 (...)."""
    return _fewest(attention.double().square().sum(-2), threshold)


@torch.no_grad()
def attention_maps(model, idx, causal=True):
    """
    Yield each layer's attention weights (B, H, T, T), float32, computed beside the model's own forward pass. causal=False: as
    if every position saw all others, which the paper draws (Figure 2); the hidden states are the causal model's all the same.
    """
    x, config, T = model.wte(idx), model.config, idx.shape[1]
    rope = (model.cos[:T], model.sin[:T]) if config.pos == 'rope' else None
    if model.wpe is not None:
        x = x + model.wpe.weight[:T]
    for block in model.blocks:
        attn, h = block.attn, block.norm1(x)
        q, k = (project(h).view(*idx.shape, -1, config.head_dim).transpose(1, 2) for project in (attn.q, attn.k))
        if config.qk_norm:
            q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        logits = q @ k.repeat_interleave(config.n_head // config.n_kv_head, 1).transpose(-1, -2) * attn.scale
        if causal:
            logits = logits.masked_fill(torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1), -torch.inf)
        yield logits.float().softmax(-1)
        if block is not model.blocks[-1]:
            x = block(x, rope, None)


def analyse(model, samples, threshold=0.9, causal=True, batch_size=10):
    """(rank, mass), each (layers, n) int64: the maximum over a layer's heads. samples: (n, T) int64; paper: n = T = 100."""
    ranks, masses = [], []
    for x in tqdm(samples.split(batch_size), desc='attention', leave=False):
        of_layers = [(attention_rank(a, threshold).amax(1), column_mass(a, threshold).amax(1))
                     for a in attention_maps(model, x, causal)]
        ranks.append(torch.stack([rank for rank, _ in of_layers]))
        masses.append(torch.stack([mass for _, mass in of_layers]))
    return torch.cat(ranks, 1), torch.cat(masses, 1)


def lazy_layers(rank):
    """The layers, counted from 1, of which all heads have rank one on average over the samples (below 1.5)."""
    return (torch.nonzero(rank.double().mean(1) < 1.5).flatten() + 1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# inheriting

PARTS = ('attention', 'mlp', 'norms')


def inherit(reference, n_layer, parts=PARTS, layers=None):
    """
    A model of n_layer layers of the reference, the first ones unless `layers` lists others, with its embeddings, final norm
    and head. parts: the sub-modules that are inherited, the others start at random (Table 3). Raises UserError for more
    layers than the reference has, or an unknown part.
    """
    layers = list(range(n_layer)) if layers is None else layers
    if n_layer < 1 or max(layers) >= reference.config.n_layer:
        raise UserError(f'{n_layer} layers cannot be inherited from a reference of {reference.config.n_layer}')
    for part in parts:
        if part not in PARTS:
            raise unknown('part of a layer', part, PARTS)
    child, state = GPT(replace(reference.config, n_layer=n_layer)).to(reference.wte.weight), reference.state_dict()
    inherited = {}
    for name, tensor in child.state_dict().items():
        source, part = name, None
        if name.startswith('blocks.'):
            _, layer, rest = name.split('.', 2)
            source = f'blocks.{layers[int(layer)]}.{rest}'
            part = 'attention' if rest.startswith('attn.') else 'mlp' if rest.startswith('mlp.') else 'norms'
        inherited[name] = state[source].clone() if part is None or part in parts else tensor
    child.load_state_dict(inherited)
    return child


def inherit_next(reference, smaller, n_layer):
    """The trained `smaller` model, grown to n_layer layers by the next ones of the reference (Algorithm 1, line 4)."""
    child, state = inherit(reference, n_layer), smaller.state_dict()
    child.load_state_dict(child.state_dict() | state)
    return child


def half_width(reference):
    """All layers at half the width: the first half of heads, MLP units and hidden dimensions (baseline of Table 2)."""
    config, n_head = reference.config, reference.config.n_head // 2
    if n_head < 1 or config.n_kv_head != config.n_head:
        raise UserError(f'half the width of {config.n_head} heads and {config.n_kv_head} key heads is not defined here')
    child = GPT(replace(config, n_head=n_head, n_kv_head=n_head, n_embd=config.n_embd * n_head // config.n_head,
                        n_mlp=config.n_mlp // 2)).to(reference.wte.weight)
    state = reference.state_dict()
    child.load_state_dict({name: state[name][tuple(slice(n) for n in tensor.shape)]
                           for name, tensor in child.state_dict().items()})
    return child


def alternate_layers(k, n):
    """DistilBERT's choice: every other one of k layers, then, if n are more, those before the last two (paper 003)."""
    every_other = list(range(0, k, 2))[:n]
    missing = n - len(every_other)
    return every_other + list(range(k - 2 - missing, k - 2))


# ---------------------------------------------------------------------------------------------------------------------
# the method

BASELINES = ('random', 'random-2x', 'last-layers', 'stacking', 'hybrid-stacking', 'half-width', 'distillation', 'distilbert')


@dataclass
class Inheritune:
    """Sanyal et al., Algorithm 1: inherit the first half of a model, train, regrow until it matches."""
    reference: str = ''             # trained reference, a folder or hub name; empty: train one of `size` first
    size: str = '64x8'              # shape of the reference that is trained
    tokens: float = 1.5e6           # training tokens of the reference and of every round
    start_fraction: float = 0.5     # share of the reference's layers that the child starts with
    grow_by: int = 2                # layers that it inherits before each further round
    regrow: str = 'continue'        # further rounds from the child (Algorithm 1), or restart from the reference (section 4)
    max_rounds: int = 0             # rounds at most; 0: until the reference is matched or has no more layers
    parts: tuple[str, ...] = PARTS  # sub-modules that are inherited (Table 3)
    baselines: tuple[str, ...] = ()  # random, random-2x, last-layers, (hybrid-)stacking, half-width, distillation, distilbert
    alpha: float = 0.6              # distillation: weight of the data; the teacher has the rest
    temperature: float = 1.0        # distillation: temperature of both distributions
    no_bias: bool = False           # train the reference without biases, as the paper's GPT-2 ...
    attn_scale_by_layer: bool = False  # ... and with attention logits divided by the layer's number

    def stages(self, run):
        """The reference; children of n, n + 2, ... layers until one matches; the baselines at the size of the last child."""
        config = self.check(run)
        if self.reference and not run.toy:   # a toy trains a small one in its place
            reference = self.given = reference_result(self.reference, run)
        else:
            reference = yield Stage('reference', config, self.tokens, config.num_params(head=True))
        n, child, rounds = round(self.start_fraction * config.n_layer), None, 0
        while True:
            child = yield self.round(config, reference, child, n)
            rounds += 1
            if child.val_loss <= reference.val_loss or n + self.grow_by > config.n_layer or rounds == self.max_rounds:
                break
            n += self.grow_by
        for baseline in self.baselines:
            yield from self.baseline(baseline, config, reference, n)

    def check(self, run):
        """The reference's shape. Raises UserError for what cannot work, before anything is trained."""
        check_ranges(self, tokens=(1, None), start_fraction=(1e-9, 1), grow_by=(1, None), max_rounds=(0, None), alpha=(0, 1),
                     temperature=(1e-9, None))
        changes = dict(attn_scale_by_layer=self.attn_scale_by_layer) | (dict(bias=False) if self.no_bias else {})
        config = run.model_config(self.size, **changes)
        if self.reference and not run.toy and not run.dry_run:   # a plan takes the shape from `size`
            config = load(self.reference).config
            if config.vocab_size != run.vocab_size:
                raise UserError(f'{self.reference} has a vocabulary of {config.vocab_size}, the data one of {run.vocab_size}')
        n = self.start_fraction * config.n_layer
        if abs(n - round(n)) > 1e-6 or round(n) < 1:
            raise UserError(f'start_fraction {self.start_fraction:g} of {config.n_layer} layers is no whole number of layers')
        if self.regrow not in ('continue', 'restart'):
            raise unknown('way to regrow', self.regrow, ('continue', 'restart'))
        for names, known, what in ((self.baselines, BASELINES, 'baseline'), (self.parts, PARTS, 'part of a layer')):
            for name in names:
                if name not in known:
                    raise unknown(what, name, known)
        return config

    def round(self, config, reference, smaller, n):
        """The stage that trains a child of n layers, from the reference or, after the first round, from the smaller child."""
        if smaller and self.regrow == 'continue':
            return Stage(f'{n}-layers', *self.budget(config, n), parent=smaller,
                         start=f'{smaller.name} + layers of the reference',
                         model=lambda: inherit_next(load(reference.folder), load(smaller.folder), n))
        return Stage(f'{n}-layers', *self.budget(config, n), parent=reference,
                     start=f'first {n} layers: {", ".join(self.parts)}',
                     model=lambda: inherit(load(reference.folder), n, self.parts))

    def budget(self, config, n, times=1):
        """(shape, tokens, X in FLOPs = 6 X T) of a model of n layers."""
        shape = replace(config, n_layer=n)
        return shape, times * self.tokens, shape.num_params(head=True)

    def baseline(self, name, config, reference, n):
        """The stages of one baseline at n layers (Tables 1 and 2, Figure 3)."""
        full, folder, half = f'{name}-{n}', reference.folder, max(1, n // 2)
        if name in ('random', 'random-2x'):
            yield Stage(full, *self.budget(config, n, 2 if name == 'random-2x' else 1))
        elif name == 'last-layers':
            last = list(range(config.n_layer - n, config.n_layer))
            yield Stage(full, *self.budget(config, n), parent=reference, start=f'last {n} layers',
                        model=lambda: inherit(load(folder), n, layers=last))
        elif name == 'stacking':
            small = yield Stage(f'stacking-{half}', *self.budget(config, half))
            yield Stage(full, *self.budget(config, n), parent=small, start=f'{small.name} + stack',
                        model=lambda: deepen(load(small.folder), n, 'stack'))
        elif name == 'hybrid-stacking':
            yield Stage(full, *self.budget(config, n), parent=reference, start=f'first {half} layers + stack',
                        model=lambda: deepen(inherit(load(folder), half), n, 'stack'))
        elif name == 'half-width':
            shape = replace(config, n_head=config.n_head // 2, n_kv_head=config.n_head // 2,
                            n_embd=config.n_embd * (config.n_head // 2) // config.n_head, n_mlp=config.n_mlp // 2)
            yield Stage('half-width', shape, self.tokens, shape.num_params(head=True), parent=reference,
                        start='first half of the width',
                        model=lambda: half_width(load(folder)))
        else:   # the teacher's forward passes are not counted in FLOPs, its training is
            layers = alternate_layers(config.n_layer, n)
            yield Stage(full, *self.budget(config, n), parent=reference,
                        objective=distil(folder, self.alpha, self.temperature),
                        start='random initialisation, taught' if name == 'distillation' else f'layers {layers}, taught',
                        model=None if name == 'distillation' else lambda: inherit(load(folder), n, layers=layers))

    def summary(self, results):
        """Which child matched its reference, what it saves, and every model's loss and cost beside the reference's."""
        reference = results[0] if results[0].name == 'reference' else self.given
        children = [r for r in results if r.name.endswith('-layers') and r.name[0].isdigit()]
        best, target = children[-1], reference.val_loss
        rows = [['model', 'N', 'val loss', 'against the reference', 'own FLOPs', 'with all ancestors']]
        rows += [[r.name, count(r.n_params), f'{r.val_loss:.4f}', f'{r.val_loss - target:+.4f}', human(r.flops),
                  human(r.total_flops)] for r in results]
        verdict = 'matches the reference' if best.val_loss <= target else 'does not match the reference'
        return (f'{best.name} {verdict} ({best.val_loss:.4f} against {target:.4f}), with '
                f'{1 - best.n_params / reference.n_params:.0%} fewer parameters\n\n{table(rows)}')


def reference_result(name, run):
    """The Result of a reference that is there already: its own, or, for a public model, the loss it has here at unknown cost."""
    if (Path(name) / 'result.json').is_file():
        return Result.of(name)
    if run.dry_run:
        return Result('reference', str(name), 0, 0.0, 0, 0.0, 0.0, 0.0, float('nan'), float('nan'), 0, 0.0)
    model, corpus = load(name), open_corpus(run.val_data or next(iter(run.corpora)), run.data_dir)
    block_size = min(run.block_size, model.config.block_size)
    loss = evaluate(model, validation_batches(corpus.val, block_size, 8, run.eval_tokens, 'cpu'))
    return Result('reference', str(name), model.num_params(), 0.0, 0, 0.0, 0.0, 0.0, loss, 0.0, 0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# the command line: how attentive is each layer

@dataclass
class Attention:
    """How attentive is each layer of a model: inheritune.py FOLDER."""
    folder: str = ''               # model folder or hub name
    data: str = 'pydocs'           # prepared corpus; its validation split is used
    data_dir: str = 'data'         # where prepared corpora are
    samples: int = 100             # sequences
    length: int = 100              # tokens in each
    threshold: float = 0.9         # share of the variance, and of the mass
    full: bool = False             # full attention in place of causal, as in the paper's pictures
    out: str = ''                  # where attention.md and the pictures go; empty: the model's folder
    device: str = 'auto'           # cuda or cpu


def draw_attention(rank, mass, maps, folder):
    """attention.png: rank and mass against depth (Figure 1); attention_maps.png: the mean map of some layers (Figure 2)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    layers = np.arange(1, len(rank) + 1)
    for ax, values, title in zip(axes, (rank, mass), ('rank k*, maximum over heads', 'mass m*, maximum over heads')):
        mean, spread = values.double().mean(1).numpy(), values.double().std(1).numpy()
        ax.plot(layers, mean)
        ax.fill_between(layers, mean - spread, mean + spread, alpha=0.25)
        ax.set(xlabel='layer', title=title, ylim=(0, None))
    figure.tight_layout()
    figure.savefig(folder / 'attention.png', dpi=150)
    chosen = sorted({round(i) for i in np.linspace(0, len(maps) - 1, 4)})
    figure, axes = plt.subplots(1, len(chosen), figsize=(3 * len(chosen), 3), squeeze=False)
    for ax, layer in zip(axes[0], chosen):
        ax.imshow(maps[layer].numpy() ** 0.5, cmap='viridis')   # the root shows small weights too
        ax.set_title(f'layer {layer + 1}')
        ax.axis('off')
    figure.tight_layout()
    figure.savefig(folder / 'attention_maps.png', dpi=150)
    plt.close('all')


def main(argv):
    """Command line: a model's folder, then knobs."""
    if argv and not argv[0].startswith('-'):
        argv = [f'--folder={argv[0]}', *argv[1:]]
    options, _, _ = configure(argv, Attention, program='inheritune.py FOLDER')
    check_ranges(options, samples=(2, None), length=(2, None), threshold=(1e-9, 1))
    if not options.folder:
        raise UserError('say which model: inheritune.py FOLDER')
    device = choose_device(options.device)
    model, corpus = load(options.folder, device).eval(), open_corpus(options.data, options.data_dir)
    if corpus.meta['vocab_size'] > model.config.vocab_size:
        raise UserError(f'{options.folder} has a vocabulary of {model.config.vocab_size}, {options.data} a larger one')
    if options.length > model.config.block_size:
        raise UserError(f'{options.folder} reads {model.config.block_size} tokens at most, not {options.length}')
    batches = validation_batches(corpus.val, options.length, 1, options.samples * options.length, device)
    samples = torch.cat([x for x, _, _ in batches])
    rank, mass = (values.cpu() for values in analyse(model, samples, options.threshold, not options.full))
    rows = [['layer', 'rank k*', 'standard deviation', 'mass m*', 'standard deviation']]
    for i, (r, m) in enumerate(zip(rank.double(), mass.double()), 1):
        rows.append([str(i), f'{r.mean():.1f}', f'{r.std():.1f}', f'{m.mean():.1f}', f'{m.std():.1f}'])
    lazy = lazy_layers(rank)
    text = table(rows) + '\n\nlazy layers (every head of rank one): ' + (', '.join(map(str, lazy)) if lazy else 'none')
    maps = [a.mean((0, 1)).cpu() for a in attention_maps(model, samples[:3, :40], causal=not options.full)]
    out = Path(options.out or options.folder)
    out.mkdir(parents=True, exist_ok=True)
    draw_attention(rank, mass, maps, out)
    (out / 'attention.md').write_text(text + '\n', encoding='utf-8')
    print(text + f'\n\nattention.md, attention.png and attention_maps.png are in {out}/')


if __name__ == '__main__':
    run_as_program(main)
