"""
What fits into a GPU, and how one model trains on several: replicas (DDP) while one fits, shards
(FSDP2) when it does not. What only shards need is imported where it is used: a plan need not wait
for it.
"""

import contextlib
import warnings
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.loss import LOGITS
from model import GPT

# ----------------------------------------------------------------------------------------------
# what fits


def estimate_memory(config, knobs, sequences=1, shards=1, teacher_params=0.0):
    """
    (bytes of the training state, bytes of the activations) on one GPU: float32 weights and
    gradients and AdamW's state, each cut into `shards`, and a frozen teacher in bfloat16; what a
    compiled bfloat16 step keeps for its backward pass, and one chunk of logits. An estimate: on an
    H100 it was 1.03 to 1.4 times what was measured (docs/benchmarks.md).
    """
    attention = 4 * (config.n_head + config.n_kv_head) * config.head_dim
    per_layer = 10 * config.n_embd + attention + 6 * config.n_mlp
    at_work = per_layer if knobs.recompute else 0  # the layer that is computed again
    per_layer = 4 * config.n_embd if knobs.recompute else per_layer
    n_params, n_layers_params = config.num_params(embedding=True, head=True), config.num_params()
    state = 16 * n_params / shards + 2 * teacher_params
    if shards > 1:  # whole: two blocks, the one at work and the one being fetched, and the head
        state += 2 * 8 * n_layers_params / config.n_layer + 8 * (n_params - n_layers_params)
    tokens, V = sequences * knobs.block_size, config.vocab_size
    logits = 6 * min(tokens * V, LOGITS['cuda']) + 10 * V * config.n_embd
    return state, tokens * (config.n_layer * per_layer + at_work) + logits


def choose_batch(knobs, stage, hardware):
    """
    (strategy, micro-batch): 'ddp', or 'fsdp' where a replica with one sequence does not fit, unless
    a knob decides; sequences that a process trains at once, the most that fit. Raises UserError.
    """
    world_size, strategy = hardware.world_size, knobs.parallel
    estimate = partial(estimate_memory, stage.config, knobs)
    estimate = partial(estimate, teacher_params=stage.teaching.get('teacher_params', 0.0))
    if strategy == 'auto':
        fits = world_size == 1 or sum(estimate()) < hardware.memory
        strategy = 'ddp' if fits else 'fsdp'
    if strategy == 'fsdp' and world_size == 1:
        raise UserError('parallel=fsdp needs several processes: start them with torchrun')
    share, rest = divmod(knobs.batch_size, world_size)
    if rest or knobs.micro_batch_size and share % knobs.micro_batch_size:
        raise UserError(
            f'{stage.name}: a batch of {knobs.batch_size} sequences cannot be divided among '
            f'{world_size} processes in micro-batches of {knobs.micro_batch_size or "any size"}'
        )
    if knobs.micro_batch_size:
        return strategy, knobs.micro_batch_size
    limit = 2**17 if hardware.device.type == 'cuda' else 2**13  # tokens; more gains nothing
    shards = world_size if strategy == 'fsdp' else 1
    for size in range(min(share, limit // knobs.block_size), 1, -1):
        if share % size == 0 and sum(estimate(size, shards)) < hardware.memory:
            return strategy, size
    return strategy, 1


# ----------------------------------------------------------------------------------------------
# placing and wrapping the model


def place(model, config, strategy, hardware):
    """
    A model in float32 on its device: whole, or under fsdp this process's shards. model: the whole
    one; under fsdp process 0 alone has it, and deals out one tensor after the other.
    """
    device = hardware.device
    if strategy != 'fsdp':
        return model.to(device, torch.float32)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh(device.type, (hardware.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if hardware.dtype == torch.float32 else hardware.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's tables stay float32
    )
    shards = GPT.on_meta(config)
    for block in shards.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    shards = fully_shard(shards, mesh=mesh, mp_policy=policy).to_empty(device=device)
    shards.build_rope(device)
    tensors = model.state_dict() if model else {}
    with torch.no_grad():
        for name, parameter in shards.named_parameters():
            whole = tensors.get(name, torch.empty(parameter.shape)).to(device, torch.float32)
            dealt = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(dealt.to_local())
    return shards


def wrap(model, strategy, knobs, hardware):
    """What the loop calls: the placed model, recomputing, compiled, exchanging gradients."""
    torch.compiler.reset()  # the stages before count towards torch's limit on compilations
    if knobs.recompute:
        for block in model.blocks:
            block.recompute = partial(checkpoint, use_reentrant=False)
    if strategy == 'fsdp':
        if hardware.compile:
            for block in model.blocks:  # one by one: shards are fetched between them
                block.compile()
        return model
    ddp_model = torch.compile(model) if hardware.compile else model
    if hardware.world_size == 1:
        return ddp_model
    with warnings.catch_warnings():  # torch 2.13 renamed an argument that older ones need
        warnings.simplefilter('ignore', FutureWarning)
        return DistributedDataParallel(
            ddp_model, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def unwrap(model):
    """The bare GPT inside what `wrap` returned."""
    model = getattr(model, 'module', model)
    return getattr(model, '_orig_mod', model)


def gradient_sync(model, last):
    """Context of a micro-batch: replicas exchange gradients once, in the last one of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()  # shards reduce every time: whole gradients would not fit


# ----------------------------------------------------------------------------------------------
# whole tensors


def is_sharded(model):
    """Whether each process holds only its shards of the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def full_state(model):
    """{name: tensor} of all parameters; of a sharded model only on process 0. For every process."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def full_tensor(tensor):
    """All of a tensor of which each process may hold a part."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
