"""
Why reuse saturates (paper 001, sections 5.1 and 5.3, Appendices E.4 and E.5): what a base model's training and its surroundings in
weight space say about how hard its second stage will be, and a toy model in which the exponent falls with log D1.

    python scaling.py diagnose out/scaling_tiny/48x2-* --data=pycode
    python scaling.py toy

The paper finds that gradient norms in the second stage grow with D1; parameter norms, the variance of the loss curve and the
largest eigenvalue of the Hessian show no clear trend.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from configurator import UserError, check_ranges, configure, read_json
from data.loader import open_corpus, validation_batches
from evaluate import pyplot, read_metrics, table
from machine import choose_device
from model import load


def loss_variance(losses, width=20):
    """Mean variance of a training curve within windows of `width` values, after a line through each is taken off."""
    losses = np.asarray(losses, np.float64)
    width = min(width, len(losses))
    if width < 4:
        return math.nan
    windows = losses[:len(losses) // width * width].reshape(-1, width)
    x = np.vander(np.arange(width), 2)
    residual = windows.T - x @ np.linalg.lstsq(x, windows.T, rcond=None)[0]
    return float((residual ** 2).sum(0).mean() / (width - 2))


def hessian_vector_product(model, x, y, vector):
    """H v for the Hessian H of the mean cross entropy on (x, y), v and the result lists like model.parameters()."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):   # the fused kernels have no second derivative, nor has head_loss
        logits = model(x).logits
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradient, vector)), parameters)


def largest_eigenvalue(model, batches, iterations=10, seed=0):
    """
    lambda_max of the Hessian of the mean cross entropy over `batches`, a list of (x, y), by power iteration on Hessian-vector
    products (the paper: 10 iterations, 128 samples): the eigenvalue largest in size, with its sign, as a Rayleigh quotient.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()]
    value = math.nan
    for _ in tqdm(range(iterations), desc='power iteration', leave=False):
        norm = math.sqrt(sum(v.double().square().sum().item() for v in vector))
        vector = [v / norm for v in vector]
        product = [torch.zeros_like(v) for v in vector]
        for x, y in batches:
            for total, part in zip(product, hessian_vector_product(model, x, y, vector)):
                total += part / len(batches)
        value = sum((p.double() * v.double()).sum().item() for p, v in zip(product, vector))
        vector = product
    return value


# ---------------------------------------------------------------------------------------------------------------------
# the toy model

def toy_exponents(D1, branching=4.0, decay=1.0, growth=0.05, features=10 ** 6, D2=None):
    """
    The toy model of section 5.3: features are nodes of a tree whose branching factor k = branching x D1^growth the first stage has
    widened; the one of rank r is met with probability ~ r^-(1 + alpha), alpha = decay / log k, and known once it was met
    (Hutter), so that after D2 samples the loss is sum P (1 - P)^D2. D1: tokens of the first stage. Returns, for every D1, the
    slope of -log loss in log D2 between D2's two ends, and alpha: (measured, alpha), float64 arrays. The measured exponent is
    alpha / (1 + alpha), which is alpha where alpha is small.
    """
    D2 = np.logspace(2, 4, 9) if D2 is None else np.asarray(D2)
    rank, measured, alphas = np.arange(1, features + 1, dtype=np.float64), [], []
    for d1 in D1:
        alpha = decay / math.log(branching * d1 ** growth)
        p = rank ** -(1 + alpha)
        p /= p.sum()
        loss = np.array([(p * np.exp(d2 * np.log1p(-p))).sum() for d2 in D2])
        measured.append(-np.polyfit(np.log(D2), np.log(loss), 1)[0])
        alphas.append(alpha)
    return np.array(measured), np.array(alphas)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def training_curves(folder):
    """
    {step, loss, grad_norm, param_norm} of a run, float64 arrays, from its metrics.jsonl: a stage that went on with its parent's
    optimizer is one run with it (sweep.py's decay branches and stable phases).
    """
    folder = Path(folder)
    lines = [m for m in read_metrics(folder) if 'loss' in m]   # without the evaluation before the first step
    curves = {name: np.array([m.get(name, math.nan) for m in lines]) for name in ('step', 'loss', 'grad_norm', 'param_norm')}
    stage = read_json(folder / 'stage.json', start=str)
    if stage['start'].endswith('and its optimizer'):
        before = training_curves(folder.parent / stage['parent'])
        curves['step'] = curves['step'] + before['step'][-1]
        curves = {name: np.concatenate([before[name], curve]) for name, curve in curves.items()}
    return curves


def draw_norms(curves, path):
    """Gradient and parameter norms over the steps, a line a run (Figures 4, 12 and 13)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, curve in curves.items():
        width = max(1, len(curve['step']) // 40)   # of a moving average: single steps are noise
        for ax, key in zip(axes, ('grad_norm', 'param_norm')):
            smooth = np.convolve(curve[key], np.ones(width) / width, 'valid')
            ax.plot(curve['step'][width - 1:], smooth, label=name, linewidth=1.2)
            ax.set(xlabel='step', title=key.replace('grad_norm', 'gradient norm').replace('param_norm', 'parameter norm'))
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


@dataclass
class Diagnosis:
    """Norms, variance and curvature of models: scaling.py diagnose FOLDER [FOLDER ...]"""
    data: str = 'pydocs'      # prepared corpus on which curvature and gradient are taken, its validation split
    data_dir: str = 'data'    # where prepared corpora are
    samples: int = 128        # sequences
    block_size: int = 128     # tokens in each
    iterations: int = 10      # of power iteration
    out: str = '.'            # folder for norms.png, the norms along training
    device: str = 'auto'      # cuda or cpu


def diagnose(folder, options):
    """One model's row: tokens seen in all, gradient norm, parameter norm, lambda_max, and what its metrics.jsonl holds."""
    device = choose_device(options.device)
    model, corpus = load(folder, device).float().eval(), open_corpus(options.data, options.data_dir)
    if corpus.meta['vocab_size'] > model.config.vocab_size:
        raise UserError(f'{folder} has a vocabulary of {model.config.vocab_size}, {options.data} a larger one')
    block_size = min(options.block_size, model.config.block_size)
    batches = [(x, y) for x, y, _ in validation_batches(corpus.val, block_size, min(8, options.samples),
                                                        options.samples * block_size, device)]
    gradient = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches:
        for total, part in zip(gradient, torch.autograd.grad(model(x, y).loss, list(model.parameters()))):
            total += part / len(batches)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient))
    row = dict(gradient_norm=norm, parameter_norm=torch.nn.utils.get_total_norm(model.parameters()).item(),
               largest_eigenvalue=largest_eigenvalue(model, batches, options.iterations))
    if (Path(folder) / 'metrics.jsonl').is_file():
        curves = training_curves(folder)
        row['variance of the loss curve'] = loss_variance(curves['loss'])
        row['gradient norm in training'] = float(np.nanmean(curves['grad_norm'][len(curves['grad_norm']) // 2:]))
    return row


def main(argv):
    """scaling.py diagnose FOLDER [FOLDER ...]"""
    folders = [arg for arg in argv if not arg.startswith('-')]
    options, _, _ = configure([arg for arg in argv if arg.startswith('-')], Diagnosis, program='scaling.py diagnose FOLDER ...')
    check_ranges(options, samples=(1, None), block_size=(1, None), iterations=(1, None))
    if not folders:
        raise UserError('say which models: scaling.py diagnose FOLDER [FOLDER ...]')
    rows = {folder: diagnose(folder, options) for folder in folders}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(table([['model', *(name.replace('_', ' ') for name in columns)]] + [
        [Path(folder).name, *(f'{row[name]:.4g}' if name in row else '' for name in columns)] for folder, row in rows.items()]))
    curves = {Path(folder).name: training_curves(folder) for folder in folders if (Path(folder) / 'metrics.jsonl').is_file()}
    if curves:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        draw_norms(curves, Path(options.out) / 'norms.png')
        print(f'\nnorms.png is in {options.out}/')


@dataclass
class Toy:
    """The toy model of section 5.3: scaling.py toy"""
    branching: float = 4.0    # k, before the first stage
    decay: float = 1.0        # lambda: P(depth) ~ exp(-lambda depth)
    growth: float = 0.05      # delta: k grows as D1^delta
    features: int = 1000000   # ranks that are summed over


def toy_main(argv):
    """scaling.py toy"""
    options, _, _ = configure(argv, Toy, program='scaling.py toy')
    check_ranges(options, branching=(1.01, None), decay=(1e-6, None), growth=(0, None), features=(1000, None))
    D1 = np.logspace(0, 8, 9)
    measured, alphas = toy_exponents(D1, options.branching, options.decay, options.growth, options.features)
    theta = options.decay * options.growth / math.log(options.branching) ** 2
    linear = options.decay / math.log(options.branching) - theta * np.log(D1)
    print(table([['D1', 'log D1', 'measured exponent', 'alpha', 'alpha/(1 + alpha)', 'to first order']] + [
        [f'{d1:.0e}', f'{math.log(d1):.1f}', f'{m:.4f}', f'{a:.4f}', f'{a / (1 + a):.4f}', f'{line:.4f}']
        for d1, m, a, line in zip(D1, measured, alphas, linear)]))
