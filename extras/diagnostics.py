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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from data.corpus import verify_corpus
from data.loader import Share, validation_batches
from engine.errors import UserError
from engine.files import read_json
from engine.log import progress_bar, read_metrics
from engine.parallel import choose_device
from engine.report import Line, Panel
from engine.stage import Result
from model import load

# ----------------------------------------------------------------------------------------------
# models


def hessian_vector_product(loss, parameters, vector):
    """H v for the Hessian H of loss(), a scalar, in parameters that it depends on; v a vector."""
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
        slope = parameters_to_vector(gradient) @ vector
        return parameters_to_vector(torch.autograd.grad(slope, parameters))


def largest_eigenvalue(model, batches, iterations=10):
    """
    The eigenvalue of the Hessian of the mean cross entropy over `batches` of (x, y) that is
    largest in size, with its sign, by power iteration (the paper: 10 iterations, 128 samples).
    """
    parameters, generator = [*model.parameters()], torch.Generator().manual_seed(0)
    product = torch.randn(sum(p.numel() for p in parameters), generator=generator)
    product = product.to(parameters[0])
    for _ in progress_bar(range(iterations), desc='power iteration'):
        vector, product = product / product.norm(), 0
        for x, y in batches:
            # through whole logits: the fused loss has no second derivative
            loss = lambda: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
            product = product + hessian_vector_product(loss, parameters, vector)
    return (vector @ product).item() / len(batches)


def training_curves(folder):
    """
    loss, grad_norm and param_norm of a run over its steps, a DataFrame: a stage that continues its
    parent's optimizer state is one run with it.
    """
    import pandas  # a second, which not every command needs

    folder, columns = Path(folder), ['step', 'loss', 'grad_norm', 'param_norm']
    lines = [line for line in read_metrics(folder) if 'loss' in line]
    curves = pandas.DataFrame(lines, columns=columns, dtype=float).set_index('step')
    origin = read_json(folder / 'stage.json', origin=dict)['origin']
    if origin.get('kind') == 'last state':
        before = training_curves(folder.parent / origin['models'][0])
        curves.index += before.index[-1]
        curves = pandas.concat([before, curves])
    return curves


def measure(folder, options):
    """A record of a finished stage: norms of its gradient in training and of it, curvature."""
    labels, curves = Result.of(folder).labels, training_curves(folder)
    device = choose_device('auto')
    model = load(folder, device).float().eval()
    corpus, length = verify_corpus(options.data, options.data_dir), model.config.block_size
    corpus.check_vocabulary(model.config, folder)
    found = validation_batches(corpus.val, length, 8, options.samples * length, Share(device))
    batches = [batch[:2] for batch in found]
    return {
        'model': Path(folder).name,
        **{key: labels.get(key, math.nan) for key in ('method', 'D1', 'D2')},  # of a sweep
        'gradient norm': curves.grad_norm[len(curves) // 2 :].mean(),  # of the second half
        'parameter norm': curves.param_norm.iloc[-1],
        'variance of the loss': curves.loss.diff().var() / 2,  # of the noise of a step
        'largest eigenvalue': largest_eigenvalue(model, batches),
    }


def norm_panels(folders):
    """
    Gradient and parameter norms, and the variance of the loss, over the steps, a line per run
    (Figures 4, 12, 13 and 14), over windows of a fortieth of it: single steps are noise.
    """
    found = {}
    for folder in folders:
        curves = training_curves(folder)
        window = max(4, len(curves) // 40)
        smooth = curves[['grad_norm', 'param_norm']].rolling(window).mean()
        smooth['variance of the loss'] = curves.loss.diff().rolling(window).var() / 2
        found[Path(folder).name] = smooth
    panels = []
    for name in smooth:
        lines = [Line(run.index, run[name], label) for label, run in found.items()]
        panels.append(Panel('step', name, lines))
    return panels


def curvature_panel(records, data):
    """
    The largest eigenvalue on a corpus over D1, a line for each method of a sweep, the mean over
    seeds and D2; of models from scratch, which are the bases, over their own tokens (Figure 15).
    """
    import pandas

    found = pandas.DataFrame(records)
    found['D1'] = found.D1.where(found.D1 > 0, found.D2)
    means = found.pivot_table('largest eigenvalue', 'D1', 'method')
    lines = [Line(means.index, means[method], method, 'o-') for method in means]
    return Panel('D1 (tokens)', f'largest eigenvalue on {data}', lines, log='x')


def diagnose(folders, options):
    """Blocks of scaling.py diagnose FOLDER [FOLDER ...], finished stages. Raises UserError."""
    if not folders:
        raise UserError('missing arguments; usage: scaling.py diagnose FOLDER [FOLDER ...]')
    records = [measure(folder, options) for folder in folders]
    panels = [*norm_panels(folders), curvature_panel(records, options.data)]
    return [records, ('norms.png', panels)]


# ----------------------------------------------------------------------------------------------
# the toy model (section 5.3)

BRANCHING, DECAY, WIDENING = 1e3, 0.5, 0.05  # k, lambda and delta: small exponents, as in the paper


def toy_exponents(D1):
    """
    Features are nodes of a tree whose branching factor BRANCHING x D1^WIDENING the first stage has
    widened; the one of rank r is met with probability ~ r^-(1 + alpha), alpha = DECAY / log of that
    factor, and known once it was met (Hutter): after D2 samples the loss is sum P (1 - P)^D2, here
    over a million ranks and an integral over those beyond, which D2 = 1e4 samples hardly meet.
    Returns for every D1 the slope of -log loss in log D2 and alpha, float64 arrays; the slope is
    alpha / (1 + alpha), which is alpha where alpha is small.
    """
    rank, D2, slopes = np.arange(1.0, 1e6), np.logspace(2, 4, 9), []
    alphas = DECAY / (math.log(BRANCHING) + WIDENING * np.log(D1))
    for alpha in alphas:
        beyond, p = 1e6**-alpha / alpha, rank ** -(1 + alpha)
        met = np.log1p(-p / (p.sum() + beyond))
        loss = [(p * np.exp(tokens * met)).sum() + beyond for tokens in D2]
        slopes.append(-np.polyfit(np.log(D2), np.log(loss), 1)[0])
    return np.array(slopes), alphas


def toy(files, options):
    """Blocks of scaling.py toy: exponents over D1, and how far the theory of small ones holds."""
    D1, log_k = np.logspace(0, 8, 9), math.log(BRANCHING)
    straight = DECAY / log_k * (1 - WIDENING * np.log(D1) / log_k)
    names = 'log10 D1', 'measured exponent', 'alpha', 'alpha - theta log D1'
    limit = math.exp(0.1**0.5 * log_k / WIDENING)
    return [
        [dict(zip(names, row)) for row in zip(range(9), *toy_exponents(D1), straight)],
        f'alpha falls as log D1 up to D1 = {limit:.0e}, where the first order is 10% off; the '
        'measured exponent is alpha / (1 + alpha), alpha only where it is small',
    ]
