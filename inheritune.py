"""
Inheritune: the deep layers of a trained model turn lazy; inherit the early ones, train on, and grow
until the child matches its parent.

Paper: Sanyal et al., Inheritune: Training Smaller Yet More Attentive Language Models.

    python train.py config/inheritune_tiny.py                       # the method and its baselines
    python inheritune.py out/inheritune_tiny/reference              # how attentive is each layer
    python inheritune.py out/inheritune_tiny/reference child --n=2  # a model of its first two

Of a head's attention matrix A (T, T), with singular values sigma_i and columns A_j (section 2):

    rank k* = the fewest singular values with 90% of sum sigma_i^2
    mass m* = the fewest columns with 90% of |A|_F^2

The value of a layer is the maximum over its heads. A layer is lazy if that rank is one: by full
attention, as the causal mask alone gives uniform heads rank 5 (T = 100). Algorithm 1 takes a
reference of k layers that was trained for T steps:

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
# what a lazy layer is (section 2)


@torch.no_grad()
def attention_maps(model, idx, causal=True):
    """
    Yield the attention matrices A of each layer (Eq. 1), float32 (B, H, T, T) on the CPU, for
    tokens idx (B, T). causal=False: as if every position saw all others, which Figure 2 shows; the
    hidden states stay those of the causal model.
    """
    inputs = []
    keep = lambda attn, given: inputs.append((attn, *given))
    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    model.residual_stream(idx)
    for hook in hooks:
        hook.remove()
    for attn, x, rope, _ in inputs:
        q, k, _ = attn.project(x, rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # a group of queries shares its keys
        logits = q @ k.mT * attn.scale
        if causal:
            logits += torch.full_like(logits, -torch.inf).triu(1)
        yield logits.float().softmax(-1).cpu()


def fewest(shares, threshold):
    """The fewest entries, largest first, with `threshold` of the sum; (..., n) -> int64 (...)."""
    cumulative = shares.double().sort(-1, descending=True).values.cumsum(-1)
    enough = (threshold - 1e-7) * cumulative[..., -1:]  # less what rounding may have taken
    return (cumulative < enough).sum(-1) + 1


def attention_rank(attention, threshold=0.9):
    """k*: the fewest singular values with `threshold` of sum sigma^2: (..., T, T) -> (...)."""
    attention = attention.double()
    squares = torch.linalg.eigvalsh(attention.mT @ attention)  # sigma^2, faster than an SVD
    return fewest(squares.clamp(min=0), threshold)


def column_mass(attention, threshold=0.9):
    """m*: the fewest columns with `threshold` of |A|_F^2; (..., T, T) -> int64 (...)."""
    return fewest(attention.double().square().sum(-2), threshold)


UNIFORM = 0.95  # evenness from which a head counts as uniform; the limit is ours


def evenness(attention):
    """
    Entropy of each row of causal attention as a share of log t, the most that t positions allow:
    the mean over rows from the second on; (..., T, T) -> (...). It is not the paper's. Rank depends
    on the mask: uniform attention has rank 1 over all positions, and 5 under the causal mask
    (T = 100), where evenness tells such heads apart.
    """
    positions = torch.arange(2, attention.shape[-1] + 1)
    entropy = torch.special.entr(attention).sum(-1)[..., 1:]
    return (entropy / positions.log()).mean(-1)


def analyse(model, samples, mask='causal'):
    """
    {measure: float64 array (layers, n)} on samples (n, T) int64 (the paper: n = T = 100): the
    largest rank and mass among a layer's heads and, for causal attention, the share of uniform
    heads. mask: causal, as the model computes it, or full (Figure 2; of the others the paper names
    no mask).
    """
    found = []
    for a in attention_maps(model, samples, mask == 'causal'):
        uniform = (evenness(a) >= UNIFORM).double().mean(1)
        found.append(torch.stack((attention_rank(a).amax(1), column_mass(a).amax(1), uniform)))
    rank, mass, uniform = torch.stack(found, 1).numpy()
    measures = {f'rank k*, {mask} attention': rank, f'mass m*, {mask} attention': mass}
    return measures | ({'share of uniform heads': uniform} if mask == 'causal' else {})


def lazy_layers(rank):
    """The layers, from 1, whose mean rank (layers, n) over samples is one (below 1.5)."""
    return (np.flatnonzero(rank.mean(1) < 1.5) + 1).tolist()


def query_key_norms(model, x, y):
    """
    Norms of W_Q and W_K and of the gradients that the mean cross entropy on (x, y) has by them,
    lists by layer: where attention degenerates, these gradients vanish (Appendix A).
    """
    weights = [getattr(block.attn, name).weight for name in 'qk' for block in model.blocks]
    gradients = torch.autograd.grad(model(x, y).loss, weights)
    found, L = {}, model.config.n_layer
    for name, tensors in (('W', weights), ('dL/dW', gradients)):
        norms = [tensor.norm().item() for tensor in tensors]
        found |= {f'|{name}_Q|': norms[:L], f'|{name}_K|': norms[L:]}
    return found


def observe_attention(run, model):
    """
    What Stage.observe logs, {measure: list by layer}: on eight validation samples of a run's corpus
    the means of `analyse`, and the query_key_norms.
    """
    corpus = open_corpus(run.val_data or next(iter(run.corpora)), run.data_dir)
    tokens = validation_samples(corpus, 8, model)
    x, y = tokens[:, :-1], tokens[:, 1:]
    seen = {name: values.mean(1).tolist() for name, values in analyse(model, x).items()}
    return dict(attention=seen | query_key_norms(model, x, y))


def validation_samples(corpus, n, model):
    """
    n sequences (n, T+1) int64 from random places of a Corpus' validation split, on a model's
    device: T = 100, or what the model reads.
    """
    T = min(100, model.config.block_size)
    starts = np.random.default_rng(0).integers(len(corpus.val) - T, size=(n, 1))
    tokens = corpus.val[starts + np.arange(T + 1)].astype(int)
    return torch.tensor(tokens, device=model.wte.weight.device)


# ----------------------------------------------------------------------------------------------
# inheriting

PARTS = {'attention': 'attn.', 'mlp': 'mlp.', 'norms': 'norm'}  # of a layer: names begin with it


@torch.no_grad()
def inherit(reference, n_layer, parts=PARTS, layers=None, rescale=False):
    """
    A model of the first n_layer layers of the reference, or of those that `layers` lists, with its
    embeddings, final norm and head. parts: what is inherited of each layer; the rest starts
    at random (Table 3). rescale: multiply queries so that a layer that gets another number keeps
    its attention logits; the paper copies them unchanged. Raises UserError for layers that do not
    exist.
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
        if rescale and config.attn_scale_by_layer:  # logits are q k / layer number
            for weight in (block.attn.q_norm if config.qk_norm else block.attn.q).parameters():
                weight *= (layer + 1) / (source + 1)
    return child


def half_width_config(config):
    """The shape of all layers at half the width. Raises UserError for a single head."""
    n_head, n_kv_head = config.n_head // 2, max(1, config.n_kv_head // 2)
    width, mlp = (size * n_head // config.n_head for size in (config.n_embd, config.n_mlp))
    return replace(config, n_head=n_head, n_kv_head=n_kv_head, n_embd=width, n_mlp=mlp)


def half_width(reference):
    """The first half of heads, MLP units and hidden dimensions of every layer (Table 2)."""
    config, old = half_width_config(reference.config), reference.state_dict()
    shapes = GPT.on_meta(config).state_dict().items()
    cut = {name: old[name][tuple(map(slice, new.shape))].clone() for name, new in shapes}
    return GPT.from_state(config, cut)


def inherit_more(reference, smaller, n_layer):
    """The model of the Result `smaller` with the next layers of that of `reference` (line 4)."""
    child = inherit(load(reference.folder), n_layer)
    child.load_state_dict(load(smaller.folder).state_dict(), strict=False)
    return child


def start_from(stage, source, build=inherit, kind='layers', **how):
    """Let a stage start from build(the model of the Result `source`, **how)."""
    stage.parent, stage.origin = source, Origin(kind, (source.name,), how)
    stage.model = lambda: build(load(source.folder), **how)
    return stage


# ----------------------------------------------------------------------------------------------
# the baselines (section 4): which layers a model of n layers starts from


def last_layers(k, n):
    """The last n of the reference's k layers (Figure 1c)."""
    return list(range(k - n, k))


def stacked_layers(k, n):
    """The first n / 2 layers, again and again until there are n. UserError for less than one."""
    if n < 2:
        raise UserError('stacking needs a child of two layers: it begins with half of them')
    return [layer % (n // 2) for layer in range(n)]


def alternate_layers(k, n):
    """DistilBERT's: every other one of k layers, then those before the last two."""
    every_other = list(range(0, k, 2))[:n]
    missing = n - len(every_other)
    return every_other + [max(0, layer) for layer in range(k - 2 - missing, k - 2)]


LAYERS = {
    'last-layers': last_layers,
    'stacking': stacked_layers,  # of a model of n / 2 layers that is trained first
    'hybrid-stacking': stacked_layers,  # of the reference
    'distilbert': alternate_layers,  # and taught by the reference
}
TABLE_3 = ('attention+norms', 'mlp+norms', 'attention+mlp')  # parts of the first n layers
BASELINES = ('random', 'random-2x', 'distillation', *LAYERS, 'half-width', *TABLE_3)


# ----------------------------------------------------------------------------------------------
# the method


@dataclass
class Inheritune:
    """Sanyal et al., Algorithm 1: inherit the first half, train, grow until it matches."""

    reference: str = ''  # trained reference, folder or hub name; empty: train one of `size` first
    size: str = '64x8'  # shape of the reference that is trained
    tokens: Positive = 1.5e6  # training tokens of the reference and of every round
    child_tokens: NonNegative = 0.0  # ... of every round and baseline, if not as many
    distillation_tokens: NonNegative = 0.0  # ... of those that are distilled, if not as many
    n: Natural = 0  # layers that the child starts with; 0: half of the reference's
    grow_by: Count = 2  # layers that it inherits before each further round
    max_n: Natural = 0  # layers up to which it grows, in a plan always; 0: the reference's
    regrow: Literal['restart', 'continue'] = 'restart'  # from the reference, or from the child
    rescale: bool = False  # keep the attention of layers whose number changes, by their queries
    baselines: tuple[Literal[*BASELINES], ...] = ()  # what it is compared with
    paper_gpt2: bool = False  # train it without biases, with attention logits / layer number
    observe_attention: bool = False  # log how attentive every layer is at each evaluation

    def stages(self, run):
        """
        Algorithm 1, then what its child is compared with. `yield` hands a stage to train.py and is
        sent back its Result (loss, folder, FLOPs).
        """
        stage = self.reference_stage(run)
        config = stage.config
        k = config.n_layer
        n = self.first_n(k, run)
        reference = yield stage
        child = yield self.child(run, reference, config, n)  # lines 1 and 2
        tried = (child,)
        limit = min(k, self.max_n or k)
        planned = run.dry_run and self.max_n  # a plan has no losses to compare
        while (planned or child.val_loss > reference.val_loss) and n + self.grow_by <= limit:
            n += self.grow_by
            stage = self.child(run, reference, config, n, tried)  # line 4: from the reference again
            if self.regrow == 'continue':  # or with more layers on the trained child
                stage.parent, stage.origin.models = child, (reference.name, child.name)
                stage.model = partial(inherit_more, reference, child, n)
            child = yield stage  # line 5
            tried += (child,)
        for name in self.baselines:
            yield from self.baseline(name, run, reference, config, n)

    def reference_stage(self, run):
        """The Stage that trains the reference, or measures the loss of a given one."""
        given = '' if run.toy else self.reference  # a toy trains a small one instead
        if not given:
            changes = dict(bias=False, attn_scale_by_layer=True) if self.paper_gpt2 else {}
            stage = self.stage(run, 'reference', run.model_config(self.size, **changes))
            stage.tokens = self.tokens
            return stage
        if run.dry_run:  # it downloads nothing
            named = GPTConfig.named(self.size, block_size=run.block_size)
            config = planned_config(given) or named
        else:
            config = run.given_config(given)
        stage = self.stage(run, 'reference', config)
        stage.tokens, stage.model = 0, partial(load, given)
        stage.origin = Origin('weights', (given,))
        if (Path(given) / 'result.json').is_file():
            stage.parent = Result.of(given)  # trained here: its compute is known
        return stage

    def first_n(self, k, run):
        """Layers of the first child. Raises UserError where that is no number of layers."""
        if run.toy:
            return max(1, k // 2)
        if self.n > k and not run.dry_run:
            raise UserError(f'n={self.n}: the reference has {k} layers')
        if not self.n and k % 2:
            raise UserError(f'half of {k} layers is not a whole number: --n=LAYERS says how many')
        return self.n or k // 2

    def stage(self, run, name, config):
        """A Stage of a model of this shape, trained as long as a child."""
        stage = Stage(name, config, self.child_tokens or self.tokens, config.num_params(head=True))
        stage.labels = dict(variant=name, parameters=all_params(config))
        stage.tokenizer = '' if run.toy else self.reference
        if self.observe_attention:
            stage.observe = partial(observe_attention, run)
        return stage

    def child(self, run, reference, config, n, tried=()):
        """The Stage of a child of n layers; what was tried before is part of its cost."""
        stage = self.stage(run, f'{n}-layers', replace(config, n_layer=n))
        stage.labels['round'], stage.also = len(tried) + 1, tried
        return start_from(stage, reference, n_layer=n)

    def baseline(self, name, run, reference, config, n):
        """
        The stages of a baseline of n layers. It reads what the first child reads; for twice as many
        steps, all from the beginning of the data's order.
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
        if name.startswith('distil'):
            from let import distil, teach

            stage.tokens = self.distillation_tokens or stage.tokens
            stage.also = (reference,)
            how = dict(alpha=0.6, temperature=1.0)  # Appendix C.1
            objective = distil(reference.folder, **how)
            teach(stage, 'distillation', reference.name, objective, reference.params, how)
        yield stage

    def summary(self, results):
        """
        The round in which each child matched its reference; losses, paired by seed, and all that
        was spent; pictures.
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
        shown = ['reference', *finals]
        panels = attention_panels({name: groups[name] for name in shown})
        convergence = curve_panels(groups)  # Figures 3, 5 to 8
        pictures = [('losses.png', convergence), ('lazy.png', panels[:3])]
        return [*verdicts, records, *against, *pictures, ('gradients.png', panels[3:])]


# ----------------------------------------------------------------------------------------------
# the report


def verdict(reference, child):
    """Whether a child matches its reference, and in which round, in words."""
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
    A panel by layer for each measure, means and standard deviations over n samples or seeds:
    {label of a line: {measure: array (layers, n)}}.
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
    The layer_panels of what {variant: results} observed at the end of training (Figure 9,
    Appendix A); [] if nothing was.
    """
    seen = {}
    for variant, runs in groups.items():
        last = [read_metrics(run.folder)[-1].get('attention') for run in runs]
        if all(last):
            seen[variant] = {k: np.stack([found[k] for found in last], 1) for k in last[0]}
    return layer_panels(seen) if seen else []


# ----------------------------------------------------------------------------------------------
# the command: how attentive is each layer, and smaller models of some of them


@dataclass
class Attention:
    """How attentive each layer of a model is, or with CHILD a smaller model of some of them."""

    folder: str = ''  # model folder or hub name
    child: str = ''  # folder to be made, of a model that inherits ...
    layers: tuple[Count, ...] = ()  # ... these layers, from 1: --layers=1,2,5; or ...
    n: Natural = 0  # ... the first n
    data: str = 'pydocs'  # prepared corpus; its validation split is used
    data_dir: str = 'data'  # where prepared corpora are
    samples: Count = 100  # sequences of 100 tokens
    out: str = 'out/attention'  # the report and its pictures go into a subfolder named as the model
    device: str = 'auto'  # cuda, mps or cpu


def attention_report(options):
    """
    Print and draw the rank and mass of every layer by causal attention, which the model computes,
    and by full attention, which Figure 2 shows. Raises UserError.
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
    draw_maps([*attention_maps(model, samples[:3, :40], causal=False)], out / 'attention_maps.png')
    print(f'\nattention.md, attention.png and attention_maps.png are in {out}/')


def draw_maps(maps, path):
    """Draw of four layers the most attentive head, the mean over the sequences (Figure 2)."""
    from matplotlib.figure import Figure  # a second, which not every command needs

    layers = np.unique(np.linspace(0, len(maps) - 1, 4, dtype=int))
    figure = Figure((4 * len(layers), 3.2), layout='tight')
    for ax, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers):
        head = attention_rank(maps[layer]).double().mean(0).argmax()
        image = ax.imshow(maps[layer][:, head].mean(0).numpy())
        ax.set(xlabel='key position', ylabel=f'query position, layer {layer + 1}, head {head + 1}')
        figure.colorbar(image, label='full attention')
    save_figure(figure, path)


def write_child(options):
    """Make the folder `child`: the model with the first n layers, or those listed. UserError."""
    layers = [layer - 1 for layer in options.layers]
    with new_folder(options.child) as unfinished:
        child = inherit(load(options.folder), options.n, layers=layers)
        child.save(unfinished, tokenizer_to_carry(options.folder))
    print(f'{options.child}: {child.config.n_layer} layers of {options.folder}')


def main(argv):
    """Command line: a model's folder, or that and a child's, then knobs."""
    options, _, _ = configure(
        argv, Attention, program='inheritune.py FOLDER [CHILD]', words=('folder', 'child')
    )
    if not options.folder:
        raise UserError('missing argument; usage: inheritune.py FOLDER [CHILD --n=LAYERS]')
    command = write_child if options.child else attention_report
    command(options)


if __name__ == '__main__':
    run_as_program(main)
