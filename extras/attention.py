"""
How attentive the layers of a model are.

Paper: Sanyal et al., Inheritune, section 2. Of a head's attention matrix A (T, T):

    rank k* = the fewest singular values with 90% of sum sigma^2
    mass m* = the fewest columns with 90% of |A|_F^2

A layer's value is the maximum over its heads. Where its rank is one, every head has collapsed to
rank one: the layer is lazy. Rank depends on the mask: uniform attention has rank 1 over all
positions, and 5 under the causal mask (T = 100). So one more measure, not the paper's, tells
uniform heads apart: evenness, the entropy of a row / log of its positions.

    python inheritune.py out/progressive_tiny/64x4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from configurator import Count, Fraction, Natural, Range
from data.corpus import check_vocabulary, open_corpus, verify_corpus
from data.loader import Share, validation_batches
from engine.errors import UserError
from engine.files import write_atomically
from engine.log import has_metrics, read_metrics
from engine.parallel import choose_device
from engine.progress import progress_bar
from engine.report import Line, Panel, draw_panels, pyplot, save_figure, table
from model import load, rotations

# ----------------------------------------------------------------------------------------------
# measures of an attention matrix


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


def evenness(attention):
    """
    Entropy of each row of causal attention as a share of log t, the most that t positions allow:
    the mean over rows from the second on; (..., T, T) -> (...).
    """
    positions = torch.arange(2, attention.shape[-1] + 1, device=attention.device)
    entropy = torch.special.entr(attention).sum(-1)[..., 1:]
    return (entropy / positions.log()).mean(-1)


# ----------------------------------------------------------------------------------------------
# measures of a model


@torch.no_grad()
def attention_maps(model, idx, causal=True):
    """
    Yield each layer's attention weights (B, H, T, T), float32. causal=False: as if every position
    saw all others, as the paper draws them (Figure 2); the hidden states stay causal.
    """
    config, T = model.config, idx.shape[1]
    x, rope = model.wte(idx), None
    if model.wpe is None:
        rope = rotations(config, torch.arange(T, device=x.device))
    else:
        x = x + model.wpe.weight[:T]
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    for block in model.blocks:
        q, k, _ = block.attn.project(block.norm1(x), rope)
        k = k.repeat_interleave(config.n_head // config.n_kv_head, 1)
        logits = q @ k.transpose(-1, -2) * block.attn.scale
        if causal:
            logits = logits.masked_fill(future, -torch.inf)
        yield logits.float().softmax(-1)
        x = block(x, rope, None)


def analyse(model, samples, threshold=0.9, causal=True, batch_size=10):
    """
    (rank, mass), each int64 (layers, n, H), of every head for samples (n, T) int64; the paper
    takes n = T = 100.
    """
    ranks, masses = [], []
    few = len(samples) <= batch_size
    for x in progress_bar(samples.split(batch_size), desc='attention', disable=few or None):
        maps = list(attention_maps(model, x, causal))
        ranks.append(torch.stack([attention_rank(a, threshold) for a in maps]))
        masses.append(torch.stack([column_mass(a, threshold) for a in maps]))
    return torch.cat(ranks, 1), torch.cat(masses, 1)


UNIFORM = 0.95  # evenness from which a head counts as uniform; the limit is ours


def mean_evenness(model, samples, batch_size=10):
    """The evenness of every head, float64 (layers, H): the mean over samples (n, T) int64."""
    sums = torch.zeros(model.config.n_layer, model.config.n_head, dtype=torch.float64)
    for x in samples.split(batch_size):
        for layer, attention in enumerate(attention_maps(model, x)):
            sums[layer] += evenness(attention).double().sum(0).cpu()
    return sums / len(samples)


def lazy_layers(rank):
    """
    The layers, from 1, whose heads all have rank one, by the mean over samples of the largest
    (< 1.5); rank (layers, n, H).
    """
    largest = rank.amax(-1).double().mean(1)
    return (torch.nonzero(largest < 1.5).flatten() + 1).tolist()


def query_key_gradients(model, x, y):
    """
    |dL/dW_Q| and |dL/dW_K| of the mean cross entropy on (x, y), two lists by layer (Appendix A:
    vanishing where attention degenerates).
    """
    attentions = [block.attn for block in model.blocks]
    weights = [a.q.weight for a in attentions] + [a.k.weight for a in attentions]
    norms = [g.norm().item() for g in torch.autograd.grad(model(x, y).loss, weights)]
    return norms[: len(attentions)], norms[len(attentions) :]


# ----------------------------------------------------------------------------------------------
# over training


def observe_attention(samples):
    """
    A function for Stage.observe: what the heads do on samples (n, T+1) int64, lists by layer of
    lists by head, and the norms of the gradients of W_Q and W_K, lists by layer.
    """

    def observe(model):
        tokens = samples.to(model.wte.weight.device)
        x, y = tokens[:, :-1], tokens[:, 1:]
        rank, mass = analyse(model, x)
        seen = dict(rank=rank.double().mean(1), mass=mass.double().mean(1))
        seen['evenness'] = mean_evenness(model, x)
        seen = {name: values.cpu().numpy().round(4).tolist() for name, values in seen.items()}
        queries, keys = query_key_gradients(model, x, y)
        return dict(attention=seen | dict(gradient_q=queries, gradient_k=keys))

    return observe


def observed(result):
    """[(step, {measure: array by layer})] that a stage logged about its attention."""
    found = []
    for line in read_metrics(result.folder) if has_metrics(result.folder) else ():
        if 'attention' in line:
            arrays = {name: np.array(values) for name, values in line['attention'].items()}
            found.append((line['step'], arrays))
    return found


def observed_panels(groups):
    """
    Panels of what {variant: results} observed, means over seeds: rank by layer at the start and
    the end (Figure 9), uniform heads over training, gradients of queries; [] if nothing was.
    """
    ranks = Panel('layer', 'rank k*, maximum over heads', ylim=(0, None))
    uniform = Panel('step', 'share of the heads that are uniform', ylim=(0, 1))
    gradients = Panel('layer', 'gradient norm of W_Q', log='y')
    for i, (variant, results) in enumerate(groups.items()):
        runs = [seen for seen in map(observed, results) if seen]
        if not runs:
            continue
        steps = sorted(set.intersection(*({step for step, _ in seen} for seen in runs)))
        runs = [[(step, now) for step, now in seen if step in steps] for seen in runs]
        layers = list(range(1, len(runs[0][0][1]['rank']) + 1))
        for place, when, style in ((0, 'before', ':'), (-1, 'after', '-')):
            rank = np.mean([seen[place][1]['rank'].max(1) for seen in runs], 0).tolist()
            name = f'{variant}, {when} training'
            if when == 'before' and len(groups) > 4:
                name = ''  # dotted; the legend would hide the lines
            ranks.lines.append(Line(layers, rank, name, style, f'C{i}'))
        shares = [[(now['evenness'] >= UNIFORM).mean() for _, now in seen] for seen in runs]
        uniform.lines.append(Line(steps, np.mean(shares, 0).tolist(), variant, '-', f'C{i}'))
        norms = np.mean([seen[-1][1]['gradient_q'] for seen in runs], 0).tolist()
        gradients.lines.append(Line(layers, norms, variant))
    return [ranks, uniform, gradients] if ranks.lines else []


def validation_samples(corpus, data_dir, n, length):
    """n sequences (n, length + 1) int64 of a corpus' validation split, evenly spaced."""
    tokens = open_corpus(corpus, data_dir).val
    found = validation_batches(tokens, length, 1, n * length, Share())
    return torch.cat([torch.cat((x, y[:, -1:]), 1) for x, y, _ in found])


def run_samples(run, config, n):
    """validation_samples of a run's corpus, n of at most 100 tokens, that a model can read."""
    corpus = run.val_data or next(iter(run.corpora))
    length = min(100, run.block_size, config.block_size)
    return validation_samples(corpus, run.data_dir, n, length)


# ----------------------------------------------------------------------------------------------
# the command: inheritune.py FOLDER


@dataclass
class Attention:
    """How attentive each layer of a model is, or with CHILD a smaller model of some of them."""

    folder: str = ''  # model folder or hub name
    child: str = ''  # folder to be made, of a model that inherits ...
    layers: tuple[Count, ...] = ()  # ... these layers, from 1: --layers=1,2,5; or ...
    n: Natural = 0  # ... the first n
    rescale: bool = False  # keep the attention of layers that move, if it is divided by the layer
    data: str = 'pydocs'  # prepared corpus; its validation split is used
    data_dir: str = 'data'  # where prepared corpora are
    samples: Annotated[int, Range(2)] = 100  # sequences
    length: Annotated[int, Range(2)] = 100  # tokens in each
    threshold: Fraction = 0.9  # share of the variance, and of the mass
    full: bool = False  # full attention instead of causal, as in the paper's pictures
    out: str = ''  # where attention.md and the pictures go; empty: out/attention/NAME
    device: str = 'auto'  # cuda or cpu


def layer_records(rank, mass, even):
    """Records of each layer: rank and mass, and the heads that are uniform."""
    records = []
    rank, mass = rank.amax(-1).double(), mass.amax(-1).double()  # over heads
    for i, (r, m) in enumerate(zip(rank, mass)):
        record = {'layer': str(i + 1), 'rank k*': f'{r.mean():.1f}', 'sd of k*': f'{r.std():.1f}'}
        record |= {'mass m*': f'{m.mean():.1f}', 'sd of m*': f'{m.std():.1f}'}
        record['uniform heads'] = f'{int((even[i] >= UNIFORM).sum())}/{even.shape[1]}'
        records.append(record)
    return records


def depth_panel(values, name):
    """A measure (layers, n, H) against depth, with its standard deviation over samples."""
    largest = values.amax(-1).double()
    layers = list(range(1, len(values) + 1))
    line = Line(layers, largest.mean(1).tolist(), band=largest.std(1).tolist())
    return Panel('layer', f'{name}, maximum over heads', [line], ylim=(0, None))


def draw_images(images, path, xlabel, ylabel):
    """Draw (title, 2-d array) pairs side by side into a PNG file, atomically."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(images), figsize=(3.6 * len(images), 3.2), squeeze=False)
    for ax, (title, image) in zip(axes[0], images):
        shown = ax.imshow(image, cmap='viridis')
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.set_title(title, fontsize=8)
        figure.colorbar(shown, ax=ax, fraction=0.046)
    save_figure(figure, path)


def draw_attention(model, rank, mass, samples, options):
    """attention.png, rank and mass by layer (Figure 1), and attention_maps.png (Figure 2)."""
    out, causal = Path(options.out), not options.full
    draw_panels([depth_panel(rank, 'rank k*'), depth_panel(mass, 'mass m*')], out / 'attention.png')
    maps = list(attention_maps(model, samples[:3, :40], causal))
    images = []
    for layer in sorted({round(i) for i in np.linspace(0, len(maps) - 1, 4)}):
        head = int(attention_rank(maps[layer]).double().mean(0).argmax())  # the most attentive
        root = maps[layer][:, head].mean(0).cpu().numpy() ** 0.5  # shows small weights too
        images.append((f'layer {layer + 1}, head {head + 1}: root of the weight', root))
    draw_images(images, out / 'attention_maps.png', 'key position', 'query position')


def attention_command(options):
    """Print and draw how attentive each layer of a model is. Raises UserError."""
    device = choose_device(options.device)
    model = load(options.folder, device).eval()
    check_vocabulary(verify_corpus(options.data, options.data_dir), model.config, options.folder)
    if options.length > model.config.block_size:
        longest = model.config.block_size
        raise UserError(f'{options.folder} reads at most {longest} tokens, not {options.length}')
    size = options.samples, options.length
    x = validation_samples(options.data, options.data_dir, *size).to(device)[:, :-1]
    rank, mass = analyse(model, x, options.threshold, not options.full)
    lazy = ', '.join(map(str, lazy_layers(rank.cpu()))) or 'none'
    text = table(layer_records(rank.cpu(), mass.cpu(), mean_evenness(model, x[:20])))
    text += f'\n\nlazy layers (every head of rank one): {lazy}'
    print(text)
    options.out = options.out or str(Path('out', 'attention', Path(options.folder).name))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / 'attention.md', text + '\n')
    draw_attention(model, rank, mass, x, options)
    print(f'\nattention.md, attention.png and attention_maps.png are in {out}/')
