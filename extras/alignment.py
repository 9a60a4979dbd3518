"""
Measure what a teacher would teach before a run of Late-to-Early Training (Zhao et al.). Each
pairing names a layer k of the target model and a layer of the teacher; for it we print

    similarity   cosine of the hidden states after both, beside that of the best constant vector
    agreement    cos(grad L_proj, grad CE): below 0 the alignment works against the data
    curvature    |H_proj|_F, the norm of the Hessian of L_proj (Appendix I), with --probes

Gradients are taken in the parameters on which L_proj depends: embeddings and layers up to k.

    python -m extras.alignment out/let_tiny/teacher --target=32x12 --probes=8
    python -m extras.alignment out/let_tiny/teacher --target=out/let_tiny/baseline
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from configurator import Count, Natural, configure
from data.corpus import verify_corpus
from data.loader import Order, sequences
from engine.errors import run_as_program
from engine.log import progress_bar
from engine.parallel import choose_device, to_device
from engine.report import table
from engine.teacher import as_initialised, open_teacher
from extras.diagnostics import hessian_vector_product
from let import alignment_loss, constant_similarity, pair_layers, teacher_states
from model import GPTConfig

MICRO_BATCH = 8  # sequences per gradient; gradients are averaged


@dataclass
class Options:
    """Measure what a teacher would teach a target model: alignment.py TEACHER --target=SIZE."""

    teacher: str = ''  # model folder or hub name, with the corpus's tokenizer
    target: str = '64x4'  # a size, for a freshly initialised model, or a trained model's folder
    pairings: tuple[str, ...] = ('L2E', 'L2M', 'L2L')  # of layers, as in let.py
    probes: Natural = 0  # random vectors that estimate the curvature; 0: not measured
    # data
    data: str = 'pydocs'  # prepared corpus, whose training split is read
    data_dir: str = 'data'  # where prepared corpora are
    samples: Count = 128  # sequences to measure on
    block_size: Count = 128  # tokens in each


def reached(model, layer):
    """The target's parameters on which L_proj depends: embeddings and layers up to `layer`."""
    later = ('norm', 'lm_head', *(f'blocks.{i}.' for i in range(layer, len(model.blocks))))
    return [p for name, p in model.named_parameters() if not name.startswith(later)]


def curvature(loss, parameters, probes):
    """
    Estimate the Frobenius norm of the Hessian of loss() in `parameters` (Appendix I, for L_proj):
    |H|_F^2 = E |H v|^2 for v with independent entries of mean 0 and variance 1. probes: how many v.
    """
    generator, squares = torch.Generator().manual_seed(0), 0.0
    for _ in range(probes):
        # drawn on the CPU, the same for every device
        v = torch.cat([torch.randn(p.shape, generator=generator).flatten() for p in parameters])
        product = hessian_vector_product(loss, parameters, v.to(parameters[0]))
        squares += product.double().square().sum().item()
    return math.sqrt(squares / probes)


def measure(model, teacher, batches, pair, probes=0):
    """
    The record of a pair of layers, (the target's, the teacher's): means over `batches` of (x, y),
    int64 (B, T). probes: random vectors for the curvature, that of the first batch; 0: without it.
    """
    layer, parameters, gradient = pair[0], reached(model, pair[0]), torch.autograd.grad
    totals = [0.0] * 4
    for x, y in batches:
        teacher_hidden, _ = teacher_states(teacher, x, pair[1])
        output = model(x, y, hidden_at=layer)
        loss = alignment_loss(output.hidden, teacher_hidden)
        both = gradient(loss, parameters, retain_graph=True), gradient(output.loss, parameters)
        similarities = -loss.detach(), constant_similarity(teacher_hidden)
        found = *similarities, *map(parameters_to_vector, both)
        totals = [total + part / len(batches) for total, part in zip(totals, found)]
    similarity, constant, proj, data = totals
    record = {
        'layer': layer,
        'similarity': similarity.item(),
        'of a constant': constant.item(),
        'gradient of L_proj': proj.norm().item(),
        'gradient of CE': data.norm().item(),
        'agreement': F.cosine_similarity(proj, data, dim=0).item(),
    }
    if probes:
        x, _ = batches[0]
        teacher_hidden, _ = teacher_states(teacher, x, pair[1])
        loss = lambda: alignment_loss(model(x, hidden_at=layer).hidden, teacher_hidden)
        record['curvature'] = curvature(loss, parameters, probes)
    return record


def open_target(options, corpus, device):
    """The target model: that of a folder, or a freshly initialised one of a named size."""
    if Path(options.target).is_dir():
        return open_teacher(options.target, corpus, device).requires_grad_()
    shape = dict(vocab_size=corpus.meta['vocab_size'], block_size=options.block_size)
    return as_initialised(GPTConfig.named(options.target, **shape)).to(device)


def main(argv):
    """Command line: TEACHER, then knobs."""
    words = ('teacher',)
    options, _, _ = configure(
        argv, Options, program='python -m extras.alignment TEACHER', words=words
    )
    device, corpus = choose_device('auto'), verify_corpus(options.data, options.data_dir)
    teacher = open_teacher(options.teacher, corpus, device)
    model = open_target(options, corpus, device)
    depths = teacher.config.n_layer, model.config.n_layer
    pairs = dict.fromkeys(pair_layers(pairing, *depths) for pairing in options.pairings)
    order = Order(min(options.block_size, model.config.block_size))
    rows, n = sequences([corpus], [1.0], order, range(options.samples)), MICRO_BATCH
    batches = [to_device(rows[i : i + n], device) for i in range(0, options.samples, n)]
    bar = progress_bar(pairs)
    print(table([measure(model, teacher, batches, pair, options.probes) for pair in bar]))


if __name__ == '__main__':
    run_as_program(main)
