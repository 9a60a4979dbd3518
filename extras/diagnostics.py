"""
Why reuse saturates (Liew and Kato, sections 5.1 and 5.3, Appendices E.4 and E.5): gradient and
parameter norms in training and the curvature around trained weights, and a toy model in which the
exponent falls with log D1.

    python scaling.py diagnose out/scaling_tiny/48x2-*-stk2-262k
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
    """
    H v, (P,), with H the Hessian of the scalar loss() in `parameters`, a list of tensors of P
    numbers in all, each of which loss() must depend on. vector: v, (P,).
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
        slope = parameters_to_vector(gradient) @ vector
        return parameters_to_vector(torch.autograd.grad(slope, parameters))


def largest_eigenvalue(model, batches, iterations=10):
    """
    The eigenvalue of largest magnitude, with its sign, of the Hessian of the mean cross entropy
    over `batches` of (x, y), by power iteration (Appendix E.4: 10 iterations, 128 samples).
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
    return (vector @ product).item() / len(batches)  # Rayleigh quotient; product sums over batches


def training_curves(folder):
    """
    The loss, grad_norm and param_norm of the stage in `folder` at each step, a DataFrame. A stage
    that continues its parent's optimizer state is one run with it: the parent's steps come first.
    """
    import pandas  # takes a second; not every command needs it

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
    """
    A record of the finished stage in `folder`: norms of its gradients and parameters, variance of
    its loss, and largest eigenvalue on the validation split of options.data. Raises UserError.
    """
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
        # differences of neighbouring steps have no trend, and twice the variance
        'variance of the loss': curves.loss.diff().var() / 2,
        'largest eigenvalue': largest_eigenvalue(model, batches),
    }


def norm_panels(folders):
    """
    Panels of the gradient norm, the parameter norm and the variance of the loss over the steps, a
    line per run (Figures 4, 12, 13 and 14). Each point is taken over a window of a fortieth of the
    run, as single steps are noisy.
    """
    found = {}
    for folder in folders:
        curves = training_curves(folder)
        window = max(4, len(curves) // 40)
        smooth = curves[['grad_norm', 'param_norm']].rolling(window).mean()
        smooth['variance of the loss'] = curves.loss.diff().rolling(window).var() / 2
        found[Path(folder).name] = smooth
    panels = []
    for name in smooth:  # the columns, the same for every run
        lines = [Line(run.index, run[name], label) for label, run in found.items()]
        panels.append(Panel('step', name, lines))
    return panels


def curvature_panel(records, data):
    """
    A Panel of the largest eigenvalue on the corpus `data` over D1, a line for each method of a
    sweep, averaged over seeds and D2 (Figure 15). Models from scratch are the bases: they are drawn
    over their own tokens.
    """
    import pandas

    found = pandas.DataFrame(records)
    found['D1'] = found.D1.where(found.D1 > 0, found.D2)  # a base has D1 = 0, its tokens are D2
    means = found.pivot_table('largest eigenvalue', 'D1', 'method')
    lines = [Line(means.index, means[method], method, 'o-') for method in means]
    return Panel('D1 (tokens)', f'largest eigenvalue on {data}', lines, log='x')


def diagnose(folders, options):
    """
    Report blocks (engine/report.py) of scaling.py diagnose FOLDER [FOLDER ...], the folders of
    finished stages. options: a scaling.Options. Raises UserError.
    """
    if not folders:
        raise UserError('missing arguments; usage: scaling.py diagnose FOLDER [FOLDER ...]')
    records = [measure(folder, options) for folder in folders]
    panels = [*norm_panels(folders), curvature_panel(records, options.data)]
    return [records, ('norms.png', panels)]


# ----------------------------------------------------------------------------------------------
# the toy model (section 5.3)

BRANCHING, DECAY, WIDENING = 1e3, 0.5, 0.05  # k, lambda, delta; they make the exponents small


def toy_exponents(D1):
    """
    The toy model of section 5.3. Features are the nodes of a tree, whose branching factor the first
    stage widens to k = BRANCHING x D1^WIDENING. The feature of rank r is drawn with probability
    P ~ r^-(1 + alpha), alpha = DECAY / log k, and is known once seen (Hutter): after D2 samples the
    loss is sum P (1 - P)^D2. We sum over a million ranks and integrate over those beyond, of which
    1e4 samples see hardly any.

    Returns two float64 arrays, a value for each D1: the measured exponent, which is the slope of
    -log loss in log D2, and alpha. In theory the slope is alpha / (1 + alpha), close to alpha if
    that is small.
    """
    rank, D2, slopes = np.arange(1.0, 1e6), np.logspace(2, 4, 9), []
    alphas = DECAY / (math.log(BRANCHING) + WIDENING * np.log(D1))
    for alpha in alphas:
        beyond, p = 1e6**-alpha / alpha, rank ** -(1 + alpha)  # beyond: the integral from 1e6 on
        met = np.log1p(-p / (p.sum() + beyond))  # log(1 - P), with P normalised
        # p is not: a constant factor of the loss does not change the slope
        loss = [(p * np.exp(tokens * met)).sum() + beyond for tokens in D2]
        slopes.append(-np.polyfit(np.log(D2), np.log(loss), 1)[0])
    return np.array(slopes), alphas


def toy(files, options):
    """
    Report blocks of scaling.py toy: exponents over D1, and the D1 up to which the paper's first
    order in log D1 holds. Both arguments are unused.
    """
    D1, log_k = np.logspace(0, 8, 9), math.log(BRANCHING)
    straight = DECAY / log_k * (1 - WIDENING * np.log(D1) / log_k)
    names = 'log10 D1', 'measured exponent', 'alpha', 'alpha - theta log D1'
    # alpha ~ 1 / (1 + u) with u = WIDENING log D1 / log_k; its first order, 1 - u, is u^2 too low
    limit = math.exp(0.1**0.5 * log_k / WIDENING)
    return [
        [dict(zip(names, row)) for row in zip(range(9), *toy_exponents(D1), straight)],
        f'alpha falls as log D1 up to D1 = {limit:.0e}, where the first order is 10% off; the '
        'measured exponent is alpha / (1 + alpha), alpha only where it is small',
    ]
