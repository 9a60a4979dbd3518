"""
Other mixtures of two models than LInit's (Chain-of-Learngene, section 3.4), all of them ours: which
units of the larger model are kept, instead of the first ones, and how much of it every layer takes,
instead of one alpha.

    python train.py config/col_tiny.py --baselines=single,important,matched,fitted,matched-fitted

The neurons of an MLP, and the groups of heads that share keys, can be put into any order without a
change of what the model computes (permute_units). So the chosen units are moved to the front, and
LInit is applied unchanged. `important` are those with the largest weights; `matched` those most
alike the units of the smaller model that they are mixed with. `fitted` learns an alpha for each
layer on a few batches.
"""

import re
from dataclasses import replace

import numpy as np
import torch
from torch.func import functional_call

from data.loader import text_source, to_device
from engine.errors import import_extra
from model import GPT

BATCHES = 40  # on which alphas are fitted
PARTS = ('mlp', 'attn')  # whose units are neurons, and groups of heads


def units(block, config, part, width):
    """
    The weights of a layer's units, by kind: tensors (units, rows of each, width), as they read from
    and write to the first `width` dimensions of the residual stream.
    """
    if part == 'mlp':
        n, found = config.n_mlp, [block.mlp.up.weight, block.mlp.down.weight.T]
        if config.act == 'swiglu':
            found.append(block.mlp.gate.weight)
    else:
        n, attn = config.n_kv_head, block.attn
        found = [attn.q.weight, attn.k.weight, attn.v.weight, attn.o.weight.T]
    return [weight[:, :width].float().reshape(n, -1, width) for weight in found]


def most_important(model, config):
    """
    Permutations of the units of a model from which one of shape `config` is cut, by the product of
    the norms of their weights, largest first: {(layer, part): int64 (units,)}.
    """
    permutations = {}
    for layer, block in enumerate(model.blocks[: config.n_layer]):
        for part in PARTS:
            weights = units(block, model.config, part, config.n_embd)
            norms = torch.stack([weight.flatten(1).norm(dim=1) for weight in weights])
            permutations[layer, part] = norms.log().sum(0).argsort(descending=True)
    return permutations


def best_matching(model, grown):
    """
    The same, the units first that are most alike those of `grown`, the smaller model at the wanted
    shape, each at the place of its counterpart: the assignment of the largest sum of cosines.
    """
    assign = import_extra('scipy.optimize', 'matching units needs scipy').linear_sum_assignment
    config, permutations = grown.config, {}
    for layer, (ours, theirs) in enumerate(zip(grown.blocks, model.blocks)):
        for part in PARTS:
            similarity = 0.0
            kinds = [units(ours, config, part, config.n_embd)]
            kinds.append(units(theirs, model.config, part, config.n_embd))
            for a, b in zip(*kinds):
                rows = min(a.shape[1], b.shape[1])  # of fewer queries in a group
                a, b = (w[:, :rows].flatten(1) for w in (a, b))
                a, b = (w / w.norm(dim=1, keepdim=True).clamp(min=1e-12) for w in (a, b))
                similarity = similarity + a @ b.T
            _, chosen = assign(similarity.detach().cpu().numpy(), maximize=True)
            kept = torch.as_tensor(chosen)
            rest = torch.ones(similarity.shape[1], dtype=torch.bool)
            rest[kept] = False
            permutations[layer, part] = torch.cat([kept, rest.nonzero()[:, 0]])
    return permutations


@torch.no_grad()
def permute_units(model, permutations):
    """A model that computes the same, with the units of some layers in another order."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        match = re.fullmatch(r'blocks\.(\d+)\.(mlp|attn)\.(\w+)\.(weight|bias)', name)
        if not match or (int(match[1]), match[2]) not in permutations or 'norm' in match[3]:
            continue
        order = permutations[int(match[1]), match[2]].to(tensor.device)
        writes = match[3] in ('down', 'o')  # to the residual stream: a column for each unit
        if writes and match[4] == 'bias':
            continue
        along = tensor.T if writes else tensor
        by_unit = along.reshape(len(order), -1, *along.shape[1:])[order].reshape(along.shape)
        state[name] = (by_unit.T if writes else by_unit).contiguous()
    return GPT.from_state(model.config, state, model.wte.weight.device)


def layer_of(name, n_layer):
    """The layer that a parameter is in; n_layer for embeddings, final norm and head."""
    match = re.match(r'blocks\.(\d+)\.', name)
    return int(match[1]) if match else n_layer


def mix(grown, cut, alphas):
    """
    {name: alpha grown + (1 - alpha) cut} of two models' parameters, in grown's dtype, with an alpha
    for each layer and a last one, float32 (n_layer + 1,).
    """
    theirs, found = dict(cut.named_parameters()), {}
    for name, parameter in grown.named_parameters():
        pair = theirs[name].detach().float(), parameter.detach().float()
        mixed = torch.lerp(*pair, alphas[layer_of(name, grown.config.n_layer)])
        found[name] = mixed.to(parameter.dtype)
    return found


def fit_alphas(grown, cut, batches, start=0.9, rate=0.1):
    """
    The alpha of each layer, and a last one of what is in none, float32 (n_layer + 1,), by Adam on
    the loss of the mixture, a step for each batch (x, y).
    """
    n, device = grown.config.n_layer + 1, grown.wte.weight.device
    logits = torch.full((n,), start, device=device).logit().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    for x, y in batches:
        mixture = mix(grown, cut, logits.sigmoid())
        functional_call(grown, mixture, (x, y)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits.detach().sigmoid()


def calibration(run, config, device):
    """Yield BATCHES batches (x, y) of the run's training text, its first."""
    knobs = replace(run, block_size=min(run.block_size, config.block_size))
    read, size = text_source(knobs).read, run.sequences
    for i in range(BATCHES):
        yield to_device(read(np.arange(i * size, (i + 1) * size)), device)


def fitted_model(grown, cut, batches):
    """The mixture of two models of one shape with alphas fitted on batches."""
    alphas = fit_alphas(grown, cut, batches)
    state = grown.state_dict() | mix(grown, cut, alphas)
    return GPT.from_state(grown.config, state, grown.wte.weight.device)
