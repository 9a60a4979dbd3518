"""
Inheritune: attention in the late layers of deep language models degenerates ("lazy" layers). Start
a smaller model from the early layers, train it, and add layers until it matches its parent.

Paper: Sanyal et al., Inheritune: Training Smaller Yet More Attentive Language Models.

    python train.py config/inheritune_tiny.py                       # the method and its baselines
    python inheritune.py out/inheritune_tiny/reference              # how attentive each layer is
    python inheritune.py out/inheritune_tiny/reference child --n=2  # save its first two layers

For a head's attention matrix A (T, T) with singular values sigma_i and columns A_j (section 2):

    rank k* = the smallest number of singular values that hold 90% of sum sigma_i^2
    mass m* = the smallest number of columns that hold 90% of |A|_F^2 = sum |A_j|^2

A layer's rank and mass are the maxima over its heads. A layer is lazy if its rank is one. Measure
that on full, unmasked attention: under the causal mask even uniform attention has rank 5
(T = 100). Algorithm 1 takes a reference of k layers that was trained for T steps:

    1   the target is the first n = k/2 layers of the reference
    2   train it for T steps
    3   while its validation loss is above the reference's:
    4       let it inherit two more layers
    5       train it for T steps
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
import torch

from configurator import Count, Natural, NonNegative, Positive, configure
from data.corpus import open_corpus, verify_corpus
from data.vocabulary import tokenizer_to_carry
from engine.errors import UserError, run_as_program
from engine.files import new_folder, write_atomically
from engine.log import read_metrics
from engine.parallel import choose_device
from engine.report import (
    Line,
    Panel,
    by_label,
    compare_variants,
    curve_panels,
    draw_panels,
    render,
    save_figure,
)
from engine.stage import Origin, Result, Stage
from engine.teacher import planned_config
from model import GPT, GPTConfig, all_params, load

# ----------------------------------------------------------------------------------------------
# measuring lazy layers (section 2)


@torch.no_grad()
def attention_maps(model, idx, causal=True):
    """
    Yield the attention matrices A of each layer (Eq. 1), float32 (B, H, T, T) on the CPU, for
    tokens idx (B, T). causal=False: the softmax without the mask, as in Figure 2; the hidden states
    are still those of the causal model.
    """
    # scaled_dot_product_attention does not return A: record the inputs and recompute A
    inputs = []
    keep = lambda attn, given: inputs.append((attn, *given))  # returns None: changes nothing
    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    model.residual_stream(idx)
    for hook in hooks:
        hook.remove()
    for attn, x, rope, _ in inputs:
        q, k, _ = attn.project(x, rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # query heads of a group share keys
        logits = q @ k.mT * attn.scale
        if causal:
            logits += torch.full_like(logits, -torch.inf).triu(1)
        yield logits.float().softmax(-1).cpu()


def fewest(shares, threshold):
    """How many of the largest entries hold `threshold` of the sum; (..., n) -> int64 (...)."""
    cumulative = shares.double().sort(-1, descending=True).values.cumsum(-1)
    enough = (threshold - 1e-7) * cumulative[..., -1:]  # a sum that rounding left just short counts
    return (cumulative < enough).sum(-1) + 1


def attention_rank(attention, threshold=0.9):
    """k*: how many singular values hold `threshold` of sum sigma^2; (..., T, T) -> int64 (...)."""
    attention = attention.double()
    squares = torch.linalg.eigvalsh(attention.mT @ attention)  # sigma^2, faster than an SVD
    return fewest(squares.clamp(min=0), threshold)  # rounding makes some slightly negative


def column_mass(attention, threshold=0.9):
    """m*: how many columns hold `threshold` of |A|_F^2; (..., T, T) -> int64 (...)."""
    return fewest(attention.double().square().sum(-2), threshold)


UNIFORM = 0.95  # evenness from which a head counts as uniform; our threshold, not the paper's


def evenness(attention):
    """
    How uniform causal attention is, from 0 to 1: the entropy of row t divided by its maximum,
    log t, averaged over rows t = 2 ... T; (..., T, T) -> (...). Our measure, not the paper's. Rank
    depends on the mask: uniform attention has rank 1 without a mask and 5 under the causal mask
    (T = 100). There evenness recognises uniform heads and rank does not.
    """
    positions = torch.arange(2, attention.shape[-1] + 1)
    entropy = torch.special.entr(attention).sum(-1)[..., 1:]
    return (entropy / positions.log()).mean(-1)


def analyse(model, samples, mask='causal'):
    """
    {measure: float64 array (layers, n)} for samples (n, T) int64 (the paper: n = T = 100): the
    maxima of rank and mass over each layer's heads and, for causal attention, the share of uniform
    heads. mask: 'causal', as the model computes it, or 'full', as in Figure 2 (for its other
    figures the paper does not name the mask).
    """
    found = []
    for a in attention_maps(model, samples, mask == 'causal'):
        uniform = (evenness(a) >= UNIFORM).double().mean(1)
        found.append(torch.stack((attention_rank(a).amax(1), column_mass(a).amax(1), uniform)))
    rank, mass, uniform = torch.stack(found, 1).numpy()
    measures = {f'rank k*, {mask} attention': rank, f'mass m*, {mask} attention': mass}
    return measures | ({'share of uniform heads': uniform} if mask == 'causal' else {})


def lazy_layers(rank):
    """The lazy layers, numbered from 1: their mean `rank` (layers, n) over samples is below 1.5."""
    return (np.flatnonzero(rank.mean(1) < 1.5) + 1).tolist()


def query_key_norms(model, x, y):
    """
    {name: list over layers} of the norms of W_Q and W_K, and of the gradients of the mean cross
    entropy with respect to them, on tokens x and targets y, (n, T) int64. Where attention
    degenerates, these gradients vanish (Appendix A).
    """
    # W_Q of all layers, then W_K of all layers
    weights = [getattr(block.attn, name).weight for name in 'qk' for block in model.blocks]
    gradients = torch.autograd.grad(model(x, y).loss, weights)
    found, L = {}, model.config.n_layer
    for name, tensors in (('W', weights), ('dL/dW', gradients)):
        norms = [tensor.norm().item() for tensor in tensors]
        found |= {f'|{name}_Q|': norms[:L], f'|{name}_K|': norms[L:]}
    return found


def observe_attention(run, model):
    """
    For Stage.observe: {'attention': {measure: list over layers}}, the means of `analyse` over eight
    validation samples of the run's corpus, and their query_key_norms.
    """
    corpus = open_corpus(run.val_data or next(iter(run.corpora)), run.data_dir)
    tokens = validation_samples(corpus, 8, model)
    x, y = tokens[:, :-1], tokens[:, 1:]
    seen = {name: values.mean(1).tolist() for name, values in analyse(model, x).items()}
    return dict(attention=seen | query_key_norms(model, x, y))


def validation_samples(corpus, n, model):
    """
    n random sequences (n, T + 1) int64 from the validation split of a Corpus, on the model's
    device; T is 100, or the model's context if that is shorter. They are the same at every call.
    """
    T = min(100, model.config.block_size)
    starts = np.random.default_rng(0).integers(len(corpus.val) - T, size=(n, 1))
    tokens = corpus.val[starts + np.arange(T + 1)].astype(int)
    return torch.tensor(tokens, device=model.wte.weight.device)


# ----------------------------------------------------------------------------------------------
# inheriting

PARTS = {'attention': 'attn.', 'mlp': 'mlp.', 'norms': 'norm'}  # prefixes of names in a layer


@torch.no_grad()
def inherit(reference, n_layer, parts=PARTS, layers=None, rescale=False):
    """
    A new GPT of the reference's first n_layer layers, or of those that `layers` lists (from 0),
    with its embeddings, final norm and head (Algorithm 1, line 1). parts: keys of PARTS, what is
    inherited of each layer; the rest is initialised at random (Table 3). rescale: with
    attn_scale_by_layer, scale the queries of layers whose number changes to keep their attention
    logits; the paper copies them unchanged. Raises UserError for layers that do not exist.
    """
    config, layers = reference.config, layers or list(range(n_layer))
    if max(layers, default=0) >= config.n_layer:
        raise UserError(f'a reference of {config.n_layer} layers has no layer {max(layers) + 1}')
    child = GPT(replace(config, n_layer=len(layers))).to(reference.wte.weight)
    tensors = reference.state_dict()
    around = {name: tensors[name] for name in tensors if not name.startswith('blocks.')}
    child.load_state_dict(around, strict=False)
    prefixes = tuple(PARTS[part] for part in parts)
    for layer, source in enumerate(layers):
        block, tensors = child.blocks[layer], reference.blocks[source].state_dict()
        inherited = {name: tensors[name] for name in tensors if name.startswith(prefixes)}
        block.load_state_dict(inherited, strict=False)
        if rescale and config.attn_scale_by_layer:
            # logits are q k / layer number: multiply q by new / old, after q_norm if there is one
            for weight in (block.attn.q_norm if config.qk_norm else block.attn.q).parameters():
                weight *= (layer + 1) / (source + 1)
    return child


def half_width_config(config):
    """
    The GPTConfig with all layers and half the heads and widths. Raises UserError for a single head.
    """
    n_head, n_kv_head = config.n_head // 2, max(1, config.n_kv_head // 2)
    width, mlp = (size * n_head // config.n_head for size in (config.n_embd, config.n_mlp))
    return replace(config, n_head=n_head, n_kv_head=n_kv_head, n_embd=width, n_mlp=mlp)


def half_width(reference):
    """
    A new GPT with the first half of the reference's heads, MLP units and hidden dimensions in every
    layer (half-width, Table 2). Raises UserError for a single head.
    """
    config, old = half_width_config(reference.config), reference.state_dict()
    shapes = GPT.on_meta(config).state_dict().items()
    # a head is a run of consecutive rows: the leading block of a tensor holds the first ones
    cut = {name: old[name][tuple(map(slice, new.shape))].clone() for name, new in shapes}
    return GPT.from_state(config, cut)


def inherit_more(reference, smaller, n_layer):
    """
    The trained child of the Result `smaller`, extended to n_layer layers with the next ones of the
    Result `reference` (Algorithm 1, line 4, with regrow=continue).
    """
    child = inherit(load(reference.folder), n_layer)
    # replaces everything but the added layers, which `smaller` does not have
    child.load_state_dict(load(smaller.folder).state_dict(), strict=False)
    return child


def start_from(stage, source, build=inherit, kind='layers', **how):
    """
    Make a stage start from build(model of the Result `source`, **how). kind: of its Origin, for the
    report. Returns the stage.
    """
    stage.parent, stage.origin = source, Origin(kind, (source.name,), how)
    stage.model = lambda: build(load(source.folder), **how)
    return stage


# ----------------------------------------------------------------------------------------------
# the baselines (section 4): which of k layers, from 0, a model of n layers starts from


def last_layers(k, n):
    """The last n of the reference's k layers (Figure 1c)."""
    return list(range(k - n, k))


def stacked_layers(k, n):
    """The first n // 2 layers, repeated until there are n. Raises UserError for n < 2."""
    if n < 2:
        raise UserError('stacking needs a child of two layers: it begins with half of them')
    return [layer % (n // 2) for layer in range(n)]


def alternate_layers(k, n):
    """DistilBERT's choice: every other one of k layers, then the missing ones below the top two."""
    every_other = list(range(0, k, 2))[:n]
    missing = n - len(every_other)
    # for k = 24, n = 16: 0, 2, ..., 22, then 18 to 21; max: a small k would go below 0
    return every_other + [max(0, layer) for layer in range(k - 2 - missing, k - 2)]


LAYERS = {
    'last-layers': last_layers,
    'stacking': stacked_layers,  # layers of a model of n // 2 layers that is trained first
    'hybrid-stacking': stacked_layers,  # layers of the reference
    'distilbert': alternate_layers,  # layers of the reference, from which it is also distilled
}
TABLE_3 = ('attention+norms', 'mlp+norms', 'attention+mlp')  # what of the first n layers is kept
BASELINES = ('random', 'random-2x', 'distillation', *LAYERS, 'half-width', *TABLE_3)


# ----------------------------------------------------------------------------------------------
# the method


@dataclass
class Inheritune:
    """Inheritune (Sanyal et al.): inherit the first half, train, grow until the child matches."""

    reference: str = ''  # trained reference, folder or hub name; empty: train one of `size` first
    size: str = '64x8'  # shape of the reference if it is trained here
    tokens: Positive = 1.5e6  # training tokens of the reference and of every round
    child_tokens: NonNegative = 0.0  # tokens of every round and baseline; 0: as `tokens`
    distillation_tokens: NonNegative = 0.0  # tokens of distilled baselines; 0: as the others
    n: Natural = 0  # layers that the child starts with; 0: half of the reference's
    grow_by: Count = 2  # layers that it inherits before each further round
    max_n: Natural = 0  # most layers of a child, which a dry run plans for; 0: the reference's
    regrow: Literal['restart', 'continue'] = 'restart'  # from the reference, or the trained child
    rescale: bool = False  # scale queries so that layers whose number changes keep their attention
    baselines: tuple[Literal[*BASELINES], ...] = ()  # models to compare the child with (section 4)
    paper_gpt2: bool = False  # train the reference without biases, attention logits / layer number
    observe_attention: bool = False  # log how attentive every layer is at each evaluation

    def stages(self, run):
        """
        Yield the stages of Algorithm 1, then the baselines. `yield` hands a stage to train.py and
        is sent back its Result (loss, folder, FLOPs).
        """
        stage = self.reference_stage(run)
        config = stage.config
        k = config.n_layer
        n = self.first_n(k, run)
        reference = yield stage
        child = yield self.child(run, reference, config, n)  # lines 1 and 2
        tried = (child,)
        limit = min(k, self.max_n or k)
        planned = run.dry_run and self.max_n  # a dry run has no losses to compare: grow to max_n
        while (planned or child.val_loss > reference.val_loss) and n + self.grow_by <= limit:
            n += self.grow_by
            stage = self.child(run, reference, config, n, tried)  # line 4: from the reference again
            if self.regrow == 'continue':  # line 4: or more layers on top of the trained child
                stage.parent, stage.origin.models = child, (reference.name, child.name)
                stage.model = partial(inherit_more, reference, child, n)
            child = yield stage  # line 5
            tried += (child,)
        for name in self.baselines:
            yield from self.baseline(name, run, reference, config, n)

    def reference_stage(self, run):
        """The Stage that trains the reference, or measures the loss of a given one."""
        given = '' if run.toy else self.reference  # a toy run trains a small one instead
        if not given:
            changes = dict(bias=False, attn_scale_by_layer=True) if self.paper_gpt2 else {}
            stage = self.stage(run, 'reference', run.model_config(self.size, **changes))
            stage.tokens = self.tokens
            return stage
        if run.dry_run:  # downloads nothing: if the shape is unknown, `size` stands in
            named = GPTConfig.named(self.size, block_size=run.block_size)
            config = planned_config(given) or named
        else:
            config = run.given_config(given)
        stage = self.stage(run, 'reference', config)
        stage.tokens, stage.model = 0, partial(load, given)  # 0 tokens: it is only evaluated
        stage.origin = Origin('weights', (given,))
        if (Path(given) / 'result.json').is_file():
            stage.parent = Result.of(given)  # trained here: its compute is known
        return stage

    def first_n(self, k, run):
        """Number of layers of the first child. Raises UserError if it is above k or not whole."""
        if run.toy:
            return max(1, k // 2)
        if self.n > k and not run.dry_run:
            raise UserError(f'n={self.n}: the reference has {k} layers')
        if not self.n and k % 2:
            raise UserError(f'half of {k} layers is not a whole number: --n=LAYERS says how many')
        return self.n or k // 2

    def stage(self, run, name, config):
        """A Stage that trains a model of this shape, from random weights, as long as a child."""
        stage = Stage(name, config, self.child_tokens or self.tokens, config.num_params(head=True))
        stage.labels = dict(variant=name, parameters=all_params(config))
        stage.tokenizer = '' if run.toy else self.reference
        if self.observe_attention:
            stage.observe = partial(observe_attention, run)
        return stage

    def child(self, run, reference, config, n, tried=()):
        """The Stage of a child of n layers. tried: Results of earlier rounds, part of its cost."""
        stage = self.stage(run, f'{n}-layers', replace(config, n_layer=n))
        stage.labels['round'], stage.also = len(tried) + 1, tried
        return start_from(stage, reference, n_layer=n)

    def baseline(self, name, run, reference, config, n):
        """
        Yield the stages of a baseline of n layers. It reads the same data as the first child;
        random-2x, which trains twice as long, reads from the beginning of the data's order.
        """
        shape = half_width_config(config) if name == 'half-width' else replace(config, n_layer=n)
        stage = self.stage(run, f'{name}-{shape.n_layer}', shape)
        stage.begin = reference.position
        if name == 'random-2x':
            stage.tokens, stage.begin = 2 * stage.tokens, 0
        elif name == 'half-width':
            start_from(stage, reference, half_width, 'half width')
        elif name in TABLE_3:
            start_from(stage, reference, n_layer=n, parts=name.split('+'))
        elif name in LAYERS:
            layers, source = LAYERS[name](config.n_layer, n), reference
            if name == 'stacking':
                source = yield self.stage(run, f'{name}-{n // 2}', replace(config, n_layer=n // 2))
            start_from(stage, source, n_layer=n, layers=layers, rescale=self.rescale)
        if name.startswith('distil'):  # distillation, distilbert
            from let import distil, teach

            stage.tokens = self.distillation_tokens or stage.tokens
            stage.also = (reference,)
            how = dict(alpha=0.6, temperature=1.0)  # Appendix C.1
            objective = distil(reference.folder, **how)
            teach(stage, 'distillation', reference.name, objective, reference.params, how)
        yield stage

    def summary(self, results):
        """
        Blocks of the report: a verdict for each seed; losses, differences paired by seed, and
        compute, also against each final child; loss curves and attention by layer.
        """
        groups, finals, verdicts = by_label(results, 'variant'), {}, []
        for runs in by_label(results, 'seed').values():  # the reference is the first
            *_, child = (r for r in runs if 'round' in r.labels)
            finals[child.labels['variant']] = child
            verdicts.append(verdict(runs[0], child))
        records = compare_variants(results, 'reference')
        for record in records:
            runs = groups[record['variant']]
            costs = mean(r.flops for r in runs), mean(r.total_flops for r in runs)
            record |= zip(('N', 'own FLOPs', 'with all ancestors'), (runs[0].n_params, *costs))
        against = [compare_variants(results, name) for name in finals]
        panels = attention_panels({name: groups[name] for name in ('reference', *finals)})
        convergence = curve_panels(groups)  # Figures 3, 5 to 8
        pictures = [('losses.png', convergence), ('lazy.png', panels[:3])]
        return [*verdicts, records, *against, *pictures, ('gradients.png', panels[3:])]


# ----------------------------------------------------------------------------------------------
# the report


def verdict(reference, child):
    """A sentence: whether a child matches its reference, in which round, and how much smaller."""
    matches = 'matches' if child.val_loss <= reference.val_loss else 'does not match'
    losses = f'{child.val_loss:.4f} against {reference.val_loss:.4f}'
    layers = 1 - child.n_params / reference.n_params
    whole = 1 - child.labels['parameters'] / reference.labels['parameters']
    return (
        f'{child.name} {matches} the reference in round {child.labels["round"]} ({losses}), with '
        f'{whole:.0%} fewer parameters, {layers:.0%} without embeddings and head'
    )


def layer_panels(seen):
    """
    One Panel per measure and in it a line per label: mean and standard deviation by layer over n
    samples or seeds. seen: {label: {measure: array (layers, n)}}.
    """
    panels = {}
    for label, measures in seen.items():
        for name, values in measures.items():
            panel = panels.setdefault(name, Panel('layer', name, ylim=(0, None)))
            layers = list(range(1, len(values) + 1))
            panel.lines.append(Line(layers, values.mean(1), label, band=values.std(1)))
    for name, panel in panels.items():
        if name.startswith(('rank', 'mass')):
            x = panel.lines[0].x
            panel.lines.append(Line(x, [1] * len(x), 'lazy: 1', ':', 'gray'))
    return list(panels.values())


def attention_panels(groups):
    """
    The layer_panels of what runs with observe_attention logged last (Figure 9, Appendix A); [] if
    none did. groups: {variant: Results}.
    """
    seen = {}
    for variant, runs in groups.items():
        last = [read_metrics(run.folder)[-1].get('attention') for run in runs]
        if all(last):
            seen[variant] = {k: np.stack([found[k] for found in last], 1) for k in last[0]}
    return layer_panels(seen) if seen else []


# ----------------------------------------------------------------------------------------------
# the command line: a report on attention by layer, and smaller models of some layers


@dataclass
class Attention:
    """Report how attentive each layer of a model is or, with CHILD, save a model of some layers."""

    folder: str = ''  # model folder or hub name
    child: str = ''  # folder to create, of a model that inherits ...
    layers: tuple[Count, ...] = ()  # ... these layers, from 1: --layers=1,2,5; or ...
    n: Natural = 0  # ... the first n
    data: str = 'pydocs'  # prepared corpus; its validation split is used
    data_dir: str = 'data'  # where prepared corpora are
    samples: Count = 100  # sequences of 100 tokens
    out: str = 'out/attention'  # report and pictures go into a subfolder named after the model
    device: str = 'auto'  # cuda, mps or cpu


def attention_report(options):
    """
    Print and draw the rank and mass of every layer under causal attention, which the model
    computes, and full attention, which Figure 2 shows; write both to options.out. Raises UserError.
    """
    model = load(options.folder, choose_device(options.device)).eval()
    corpus = verify_corpus(options.data, options.data_dir)
    corpus.check_vocabulary(model.config, options.folder)
    samples = validation_samples(corpus, options.samples, model)[:, :-1]
    measures = analyse(model, samples) | analyse(model, samples, mask='full')
    records = [{'layer': str(i + 1)} for i in range(model.config.n_layer)]
    for name, values in measures.items():
        for record, value in zip(records, values.mean(1)):
            record[name] = f'{value:.1f}'
    blocks = [records]
    for mask in ('causal', 'full'):
        lazy = lazy_layers(measures[f'rank k*, {mask} attention']) or 'none'
        blocks.append(f'lazy layers (every head of rank one) by {mask} attention: {lazy}')
    text = render(blocks)
    print(text)
    out = Path(options.out, Path(options.folder).name)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / 'attention.md', text + '\n')
    draw_panels(layer_panels({options.folder: measures}), out / 'attention.png')
    # Figure 2: full attention, the mean of three texts of 40 tokens
    draw_maps([*attention_maps(model, samples[:3, :40], causal=False)], out / 'attention_maps.png')
    print(f'\nattention.md, attention.png and attention_maps.png are in {out}/')


def draw_maps(maps, path):
    """
    Draw the head of highest rank in each of four layers, averaged over sequences, into a PNG file
    (Figure 2). maps: for every layer the attention (B, H, T, T).
    """
    from matplotlib.figure import Figure  # takes a second, which not every command needs

    layers = np.unique(np.linspace(0, len(maps) - 1, 4, dtype=int))
    figure = Figure((4 * len(layers), 3.2), layout='tight')
    for ax, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers):
        head = attention_rank(maps[layer]).double().mean(0).argmax()
        image = ax.imshow(maps[layer][:, head].mean(0).numpy())
        ax.set(xlabel='key position', ylabel=f'query position, layer {layer + 1}, head {head + 1}')
        figure.colorbar(image, label='full attention')
    save_figure(figure, path)


def write_child(options):
    """
    Save a model of the first n layers, or of those listed, as options.child. Raises UserError if
    the folder exists or the layers do not.
    """
    layers = [layer - 1 for layer in options.layers]
    with new_folder(options.child) as unfinished:
        child = inherit(load(options.folder), options.n, layers=layers)
        child.save(unfinished, tokenizer_to_carry(options.folder))
    print(f'{options.child}: {child.config.n_layer} layers of {options.folder}')


def main(argv):
    """Command line: report on the model FOLDER or, with CHILD, save a model of some layers."""
    options, _, _ = configure(
        argv, Attention, program='inheritune.py FOLDER [CHILD]', words=('folder', 'child')
    )
    if not options.folder:
        raise UserError('missing argument; usage: inheritune.py FOLDER [CHILD --n=LAYERS]')
    command = write_child if options.child else attention_report
    command(options)


if __name__ == '__main__':
    run_as_program(main)
