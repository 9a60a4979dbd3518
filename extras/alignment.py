"""
What a teacher would teach, measured before a run of Late-to-Early Training (Zhao et al.) begins:
for early, middle and last layers k of a target model,

    similarity   of the target's hidden state after layer k and the teacher's after its last
    agreement    cos(grad L_proj, grad CE): below 0 the alignment works against the data
    curvature    |H_proj|_F of the Hessian of L_proj (Appendix I), with --probes

Gradients are those of the parameters that L_proj reaches, the layers up to k.

    python extras/alignment.py out/let_tiny/teacher --size=32x12
    python extras/alignment.py out/let_tiny/teacher --target=out/let_tiny/baseline
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch

from configurator import Count, Natural, configure
from data.corpus import check_vocabulary, verify_corpus
from data.loader import Order, sequences
from engine.errors import UserError, run_as_program
from engine.log import progress_bar
from engine.parallel import choose_device, set_threads, to_device
from engine.report import table
from engine.teacher import as_initialised, open_teacher
from extras.diagnostics import hessian_vector_product, mean_over, norm
from let import (
    alignment_loss,
    constant_similarity,
    cosine_similarity,
    pair_layers,
    teacher_states,
)
from model import GPTConfig, load

MICRO_BATCH = 8  # sequences of a gradient


@dataclass
class Options:
    """What a teacher would teach a target model: alignment.py TEACHER --size=SIZE."""

    teacher: str = ''  # model folder or hub name, of the corpus' tokenizer
    target: str = ''  # folder of the target model; empty: one of `size` as initialised
    size: str = '64x4'  # of a target as initialised
    layers: tuple[Count, ...] = ()  # layers k of the target; empty: early, middle and last
    probes: Natural = 0  # random vectors on which the curvature is estimated; 0: not measured
    # data
    data: str = 'pydocs'  # prepared corpus, its training split
    data_dir: str = 'data'  # where prepared corpora are
    samples: Count = 128  # sequences to measure on
    block_size: Count = 128  # tokens in each
    seed: Natural = 1337  # of the initialisation and of the sequences
    device: str = 'auto'  # cuda or cpu


# a batch is (x, y, the teacher's hidden states), x and y of MICRO_BATCH sequences


def batches_of(options, block_size, corpus, teacher, device):
    """The batches to measure on, from the training split."""
    order = Order(block_size, seed=options.seed)
    found = []
    for start in range(0, max(options.samples, 2 * MICRO_BATCH), MICRO_BATCH):
        positions = range(start, start + MICRO_BATCH)
        x, y = to_device(sequences([corpus], [1.0], order, positions), device)
        with torch.no_grad():
            found.append((x, y, teacher_states(x, teacher, 0)[0]))
    return found


def projection_loss(model, batch, layer):
    """L_proj (Eq. 4) of the target's hidden states after a layer."""
    x, _, theirs = batch
    return alignment_loss(model(x, hidden_at=layer).hidden, theirs)


def reached(model, batch, layer):
    """The indices, among the target's parameters, of those that L_proj has a gradient in."""
    loss = projection_loss(model, batch, layer)
    gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [i for i, g in enumerate(gradient) if g is not None]


def curvature(model, batch, layer, probes, seed=0):
    """
    The Frobenius norm of the Hessian of L_proj in the parameters that it reaches (Appendix I):
    |H|_F^2 = E |H v|^2 over vectors v of independent entries of variance 1.
    """
    generator, parameters = torch.Generator().manual_seed(seed), list(model.parameters())
    parameters = [parameters[i] for i in reached(model, batch, layer)]
    squares = []
    for _ in range(probes):
        v = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        loss = lambda: projection_loss(model, batch, layer)
        squares.append(norm(hessian_vector_product(loss, parameters, v)) ** 2)
    return math.sqrt(sum(squares) / probes)


def measure(model, batches, layer, data, options):
    """The record of a layer of the target; data: the gradient of CE, a tensor per parameter."""
    record, chosen = {'layer': layer}, reached(model, batches[0], layer)
    with torch.no_grad():
        found = [cosine_similarity(model(x, hidden_at=layer).hidden, t) for x, _, t in batches]
    record['similarity'] = sum(found).item() / len(found)
    parameters = [p for i, p in enumerate(model.parameters()) if i in chosen]

    def gradient(*batch):
        return torch.autograd.grad(projection_loss(model, batch, layer), parameters)

    ours = mean_over(batches, gradient)
    theirs = [data[i] for i in chosen]
    product = sum((a.double() * b.double()).sum().item() for a, b in zip(ours, theirs))
    record['gradient of L_proj'] = norm(ours)
    record['gradient of CE'] = norm(theirs)
    record['agreement'] = product / (norm(ours) * norm(theirs))
    if options.probes:
        record['curvature'] = curvature(model, batches[0], layer, options.probes, options.seed)
    return record


def open_target(options, corpus, device):
    """The target model: a folder's, or one as it would be initialised."""
    if options.target:
        model = load(options.target, device)
        check_vocabulary(corpus, model.config, options.target)
    else:
        vocab_size = corpus.meta['vocab_size']
        shape = dict(vocab_size=vocab_size, block_size=options.block_size)
        config = GPTConfig.named(options.size, **shape)
        model = as_initialised(config, options.seed).to(device)
    return model.float().train()


def main(argv):
    """Command line: TEACHER, then knobs."""
    words = ('teacher',)
    options, _, _ = configure(argv, Options, program='extras/alignment.py TEACHER', words=words)
    if not options.teacher:
        raise UserError('missing argument; usage: alignment.py TEACHER --size=SIZE')
    device = choose_device(options.device)
    corpus = verify_corpus(options.data, options.data_dir)
    teacher, model = open_teacher(options.teacher, device), open_target(options, corpus, device)
    check_vocabulary(corpus, teacher.config, options.teacher)
    set_threads(device, model.config, MICRO_BATCH * options.block_size)
    n_layer = model.config.n_layer
    layers = [pair_layers(pair, 1, n_layer)[0] for pair in ('L2E', 'L2M', 'L2L')]
    layers = list(dict.fromkeys(options.layers or layers))
    if max(layers) > n_layer:
        raise UserError(f'layers: the target has {n_layer}, there is no layer {max(layers)}')
    block_size = min(options.block_size, model.config.block_size)
    batches = batches_of(options, block_size, corpus, teacher, device)

    def data_gradient(x, y, _):
        return torch.autograd.grad(model(x, y).loss, list(model.parameters()))

    data = mean_over(batches, data_gradient)
    bar = progress_bar(layers, desc='layers')
    print(table([measure(model, batches, layer, data, options) for layer in bar]))
    constant = constant_similarity(torch.cat([theirs for _, _, theirs in batches]))
    print(f'\nsimilarity of the best constant vector: {constant:.2f}')


if __name__ == '__main__':
    run_as_program(main)
