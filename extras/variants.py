"""
What bench.py measures: our training step under several objectives, losses and ways to train, and
other implementations, called as ours is.
"""

import contextlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from engine.device import Hardware
from engine.errors import UserError, import_extra, unknown
from engine.hugging_face import config_to_hugging_face
from engine.optimizer import make_optimizer
from engine.parallel import place, use_float8, wrap
from engine.stage import Progress, next_token
from let import Alignment, distil, let, pair_layers
from model import GPT

# ----------------------------------------------------------------------------------------------
# other implementations, called as ours is: model(x, y).loss


class OwnKernels(Hardware):
    """Hardware on which attention has the kernel that torch prefers, as others' loops leave it."""

    def forward(self):
        """Context of the forward pass: its dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


class Peer(nn.Module):
    """Another implementation; loss_of: (its model, x, y) -> mean cross entropy."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, x, y):
        """What our model returns, with the loss alone."""
        return SimpleNamespace(loss=self.loss_of(self.model, x, y))


def transformers_peer(config, _options):
    """transformers' model of our shape, randomly initialised."""
    transformers = import_extra('transformers', 'the variant transformers needs')
    fields = config_to_hugging_face(config)
    for name in ('nanofamily', 'architectures', 'torch_dtype'):
        fields.pop(name)
    how = dict(attn_implementation='sdpa', use_cache=False)
    theirs = transformers.AutoConfig.for_model(**fields, **how)
    model = transformers.AutoModelForCausalLM.from_config(theirs).float()
    return Peer(model, lambda m, x, y: m(input_ids=x, labels=y, shift_labels=y).loss)


def nanogpt_peer(config, options):
    """nanoGPT's model of our shape, from its own file."""
    path = Path(options.nanogpt) / 'model.py'
    if not options.nanogpt or not path.is_file():
        raise UserError('the variant nanogpt needs --nanogpt=FOLDER, with a copy of nanoGPT')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
    fields = {name: getattr(config, name) for name in names}
    model = module.GPT(module.GPTConfig(dropout=0.0, **fields))
    return Peer(model, lambda m, x, y: m(x, y)[1])


def logits_peer(config, _options):
    """Our layers, with all logits at once and torch's cross entropy."""

    def loss_of(model, x, y):
        return F.cross_entropy(model(x).logits.flatten(0, 1).float(), y.flatten())

    return Peer(GPT(config), loss_of)


def linear_cross_entropy_peer(config, _options):
    """Our layers, with torch's own fusion of head and loss."""
    if not hasattr(F, 'linear_cross_entropy'):
        raise UserError(f'torch {torch.__version__} has no linear_cross_entropy')

    def loss_of(model, x, y):
        hidden = model.norm(model.residual_stream(x)[0])
        return F.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, y.flatten())

    return Peer(GPT(config), loss_of)


PEERS = {'transformers': transformers_peer, 'nanogpt': nanogpt_peer}
PEERS |= {'logits': logits_peer, 'linear_cross_entropy': linear_cross_entropy_peer}
KINDS = ('baseline', 'let', 'rkd', *PEERS)
CHANGES = ('compile', 'fp8', 'selective', 'full', 'compact', 'ddp', 'fsdp')  # of how it is trained


# ----------------------------------------------------------------------------------------------
# a variant, ready to train


def parse_variant(name):
    """'let+compile' -> ('let', ['compile']); 'compile' -> ('baseline', ['compile']). UserError."""
    kind, *changes = name.split('+')
    if kind in CHANGES:
        kind, changes = 'baseline', [kind, *changes]
    if kind not in KINDS or not set(changes) <= set(CHANGES):
        raise unknown('variant', name, (*KINDS, *(f'baseline+{change}' for change in CHANGES)))
    for change, what in (('fsdp', 'are cut into shards'), ('fp8', 'multiply in FP8')):
        if kind in PEERS and change in changes:
            raise UserError(f'{name}: only our own models {what}')
    return kind, changes


def make_teacher(kind, options, hardware, config):
    """(the objective of a kind, its teacher or None)."""
    if kind not in ('let', 'rkd'):
        return next_token, None
    teacher = GPT(replace(options, gpt2=False).config(options.teacher_size))
    teacher = teacher.to(hardware.device, hardware.dtype).eval().requires_grad_(False)
    if kind == 'rkd':
        return distil(teacher, 0.5), teacher
    layers = pair_layers('L2E', teacher.config.n_layer, config.n_layer)
    return let(teacher, Alignment(*layers)), teacher


def join_alone(device):
    """A process group of this process alone: what several exchange, it exchanges with itself."""
    if not dist.is_initialized():
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def knobs_of(changes, options):
    """The general knobs of a run with these changes."""
    recomputed = [change for change in changes if change in ('selective', 'full')]
    return options.knobs(
        recompute=recomputed[0] if recomputed else 'none',
        optimizer_dtype='bfloat16' if 'compact' in changes else 'float32',
        compile=str('compile' in changes),
    )


def make_variant(name, options, hardware):
    """What train.train_step needs, without its batches, and the bytes held between steps."""
    kind, changes = parse_variant(name)
    knobs = knobs_of(changes, options)
    shared = {'ddp', 'fsdp'} & set(changes)
    if shared:
        join_alone(hardware.device)
    strategy = 'fsdp' if 'fsdp' in changes else 'ddp'
    torch.manual_seed(0)
    config = options.config(options.size)
    if kind in PEERS:
        model = PEERS[kind](config, options).float().to(hardware.device)
    else:
        tensors, empty = GPT(config).state_dict().items, GPT.on_meta(config)
        if 'fp8' in changes:
            use_float8(empty, hardware.device)
        model = place(tensors, empty, strategy, hardware)
    objective, teacher = make_teacher(kind, options, hardware, config)
    step = SimpleNamespace(objective=objective, progress=Progress(0, 1000), accumulate=1)
    step.raw_model, step.hardware, step.knobs = model, hardware, knobs
    if kind in ('transformers', 'nanogpt'):
        step.hardware = OwnKernels(*hardware)
    step.optimizer = make_optimizer(model, knobs)
    # DDP wraps what several processes train
    how = hardware._replace(compile='compile' in changes, world_size=1 + len(shared))
    step.ddp_model = wrap(model, strategy, knobs, how)
    held = (4 if 'compact' in changes else 8) * sum(p.numel() for p in model.parameters())
    for m in filter(None, (model, teacher)):
        held += sum(p.numel() * p.element_size() for p in m.parameters())
    return step, held
