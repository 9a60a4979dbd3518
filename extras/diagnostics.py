"""
Why reuse saturates (scaling laws of model reuse, sections 5.1 and 5.3, Appendices E.4 and E.5):
what a base model's training and its surroundings in weight space say about its second stage, and
a toy model in which the exponent falls with log D1.

    python scaling.py diagnose out/scaling_tiny/48x2-* --data=pycode
    python scaling.py toy

The paper finds that gradient norms in the second stage grow with D1; parameter norms, the variance
of the loss curve and the largest eigenvalue of the Hessian show no clear trend.
"""

import math
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import Count, NonNegative, Positive, Range, configure
from data.corpus import verify_corpus
from data.loader import Share, validation_batches
from engine.errors import UserError
from engine.files import read_json
from engine.log import progress_bar, read_metrics
from engine.parallel import choose_device
from engine.report import Line, Panel, draw_panels, format_count, table
from engine.stage import Result
from model import load

PIECES = 20  # of a training curve, whose variances are drawn


def loss_variance(losses, width=20):
    """Mean variance of a training curve within windows of `width`, each less its own trend."""
    from scipy.signal import detrend  # a second, which not every command needs

    width = min(width, len(losses))
    if width < 4:
        return math.nan
    windows = np.reshape(losses[: len(losses) // width * width], (-1, width))
    return float((detrend(windows) ** 2).sum(1).mean() / (width - 2))


def hessian_vector_product(loss, parameters, vector):
    """H v for the Hessian H of loss(), a scalar tensor, in parameters that it depends on."""
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(gradient, vector))
        return torch.autograd.grad(slope, parameters)


def plain_cross_entropy(model, x, y):
    """The mean cross entropy through whole logits, which has second derivatives."""
    return F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


def norm(vector):
    """The Euclidean norm of a list of tensors."""
    return math.sqrt(sum(v.double().square().sum().item() for v in vector))


def mean_over(batches, function):
    """The mean over batches of a function that returns a list of tensors."""
    total = None
    for batch in batches:
        parts = [part / len(batches) for part in function(*batch)]
        total = parts if total is None else [a + b for a, b in zip(total, parts)]
    return total


def largest_eigenvalue(model, batches, iterations=10, seed=0):
    """
    The eigenvalue of the Hessian of the mean cross entropy over `batches` of (x, y) that is
    largest in size, with its sign, by power iteration (the paper: 10 iterations, 128 samples).
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    value = math.nan

    def product_on(x, y):
        return hessian_vector_product(lambda: plain_cross_entropy(model, x, y), parameters, vector)

    for _ in progress_bar(range(iterations), desc='power iteration'):
        length = norm(vector)
        vector = [v / length for v in vector]
        product = mean_over(batches, product_on)
        value = sum((p.double() * v.double()).sum().item() for p, v in zip(product, vector))
        vector = product
    return value


# ----------------------------------------------------------------------------------------------
# the toy model


@dataclass
class Toy:
    """The toy model of section 5.3: scaling.py toy."""

    branching: Annotated[float, Range(1.01)] = 4.0  # k, before the first stage
    decay: Positive = 1.0  # lambda: P(depth) ~ exp(-lambda depth)
    growth: NonNegative = 0.05  # delta: k grows as D1^delta
    features: Annotated[int, Range(1000)] = 1000000  # ranks that are summed over


def toy_exponents(D1, toy):
    """
    Features are nodes of a tree whose branching factor k = branching x D1^growth the first stage
    has widened; the one of rank r is met with probability ~ r^-(1 + alpha), alpha = decay / log k,
    and known once it was met (Hutter): after D2 samples the loss is sum P (1 - P)^D2. Returns for
    every D1 the slope of -log loss in log D2 and alpha, float64 arrays; the slope is alpha /
    (1 + alpha), which is alpha where alpha is small.
    """
    D2 = np.logspace(2, 4, 9)
    rank = np.arange(1, toy.features + 1, dtype=np.float64)
    slopes, alphas = [], []
    for d1 in D1:
        alpha = toy.decay / math.log(toy.branching * d1**toy.growth)
        p = rank ** -(1 + alpha)
        p /= p.sum()
        loss = np.array([(p * np.exp(d2 * np.log1p(-p))).sum() for d2 in D2])
        slopes.append(-np.polyfit(np.log(D2), np.log(loss), 1)[0])
        alphas.append(alpha)
    return np.array(slopes), np.array(alphas)


def toy_command(argv):
    """scaling.py toy"""
    toy, _, _ = configure(argv, Toy, program='scaling.py toy')
    D1 = np.logspace(0, 8, 9)
    slopes, alphas = toy_exponents(D1, toy)
    log_k = math.log(toy.branching)
    records = []
    for d1, slope, alpha in zip(D1, slopes, alphas):
        first_order = toy.decay / log_k - toy.decay * toy.growth / log_k**2 * math.log(d1)
        record = {'D1': f'{d1:.0e}', 'measured exponent': slope}
        record |= {'alpha': alpha, 'alpha/(1 + alpha)': alpha / (1 + alpha)}
        records.append(record | {'to first order': first_order})
    print(table(records))


# ----------------------------------------------------------------------------------------------
# models


@dataclass
class Diagnosis:
    """Norms, variance and curvature of models: scaling.py diagnose FOLDER [FOLDER ...]."""

    data: str = 'pydocs'  # prepared corpus for curvature and gradient, its validation split
    data_dir: str = 'data'  # where prepared corpora are
    samples: Count = 128  # sequences
    block_size: Count = 128  # tokens in each
    iterations: Count = 10  # of power iteration
    out: str = '.'  # folder for norms.png: norms and variance along training, curvature over D1
    device: str = 'auto'  # cuda or cpu


def training_curves(folder):
    """
    {step, loss, grad_norm, param_norm} of a run, float64 arrays: a stage that continues its
    parent's optimizer state is one run with it.
    """
    import pandas  # a second, which not every command needs

    folder, columns = Path(folder), ['step', 'loss', 'grad_norm', 'param_norm']
    lines = [line for line in read_metrics(folder) if 'loss' in line]
    curves = pandas.DataFrame(lines, columns=columns, dtype=float)
    identity = read_json(folder / 'stage.json')
    if identity.get('continues_optimizer'):
        before = training_curves(folder.parent / identity['parent'])
        curves['step'] += before['step'][-1]
        curves = pandas.concat([pandas.DataFrame(before), curves])
    return {name: curves[name].to_numpy() for name in columns}


def diagnose(folder, options):
    """One model's record: gradient norm, parameter norm, curvature, and its training curve's."""
    device = choose_device(options.device)
    model = load(folder, device).float().eval()
    corpus = verify_corpus(options.data, options.data_dir)
    corpus.check_vocabulary(model.config, folder)
    length = min(options.block_size, model.config.block_size)
    size, n_tokens = min(8, options.samples), options.samples * length
    found = validation_batches(corpus.val, length, size, n_tokens, Share(device))
    batches = [(x, y) for x, y, _ in found]
    parameters = list(model.parameters())
    gradient = mean_over(batches, lambda x, y: torch.autograd.grad(model(x, y).loss, parameters))
    record = {'model': Path(folder).name, 'gradient norm': norm(gradient)}
    if (Path(folder) / 'result.json').is_file():  # of a sweep
        labels = Result.of(folder).labels
        record |= {key: labels[key] for key in ('method', 'D1', 'D2') if key in labels}
    record['parameter norm'] = norm(parameters)
    record['largest eigenvalue'] = largest_eigenvalue(model, batches, options.iterations)
    if (Path(folder) / 'metrics.jsonl').is_file():
        curves = training_curves(folder)
        half = len(curves['grad_norm']) // 2
        record['variance of the loss curve'] = loss_variance(curves['loss'])
        record['gradient norm in training'] = float(np.nanmean(curves['grad_norm'][half:]))
    return record


def norm_panels(folders):
    """
    Gradient and parameter norms, and the variance of the loss, over the steps, a line per run
    (Figures 4, 12, 13 and 14).
    """
    panels = [Panel('step', what) for what in ('gradient norm', 'parameter norm')]
    panels.append(Panel('step', 'variance of the loss', log='y'))
    for folder in folders:
        curves = training_curves(folder)
        width = max(1, len(curves['step']) // 40)  # of a moving average: single steps are noise
        steps = curves['step'][width - 1 :].tolist()
        for panel, key in zip(panels, ('grad_norm', 'param_norm')):
            smooth = np.convolve(curves[key], np.ones(width) / width, 'valid').tolist()
            panel.lines.append(Line(steps, smooth, Path(folder).name))
        pieces = zip(*(np.array_split(curves[key], PIECES) for key in ('step', 'loss')))
        pieces = [(float(step[-1]), loss_variance(loss)) for step, loss in pieces if len(loss) > 3]
        if pieces:
            panels[2].lines.append(Line(*map(list, zip(*pieces)), Path(folder).name))
    return panels


def curvature_panel(records):
    """
    The largest eigenvalue over D1, a line for each method and D2 of a sweep, the mean over its
    seeds (Figure 15).
    """
    import pandas  # a second, which not every command needs

    panel = Panel('D1 (tokens)', 'largest eigenvalue', log='x')
    found = pandas.DataFrame([record for record in records if record.get('D1')])
    for (method, D2), rows in found.groupby(['method', 'D2']) if len(found) else ():
        mean = rows.groupby('D1')['largest eigenvalue'].mean()
        label = f'{method}, D2 = {format_count(D2)}'
        panel.lines.append(Line(mean.index.tolist(), mean.tolist(), label, 'o-'))
    return panel


def diagnose_command(argv):
    """scaling.py diagnose FOLDER [FOLDER ...]"""
    folders = list(takewhile(lambda arg: arg[:1] != '-', argv))
    knobs = argv[len(folders) :]
    options, _, _ = configure(knobs, Diagnosis, program='scaling.py diagnose FOLDER ...')
    if not folders:
        raise UserError('missing arguments; usage: scaling.py diagnose FOLDER [FOLDER ...]')
    records = [diagnose(folder, options) for folder in folders]
    print(table(records))
    panels = norm_panels([f for f in folders if (Path(f) / 'metrics.jsonl').is_file()])
    panels = [panel for panel in (*panels, curvature_panel(records)) if panel.lines]
    if panels:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        draw_panels(panels, Path(options.out) / 'norms.png')
        print(f'\nnorms.png is in {options.out}/')
