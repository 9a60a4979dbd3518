"""
How one model trains on several processes, and in less memory: replicas (DDP) while one fits into
a GPU, shards (FSDP2) when it does not; torch.compile; activations recomputed in the backward pass;
matrix products in FP8. What only shards or FP8 need is imported where it is used: a plan need not
wait for it.
"""

import contextlib
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from engine.errors import UserError, import_extra

# ----------------------------------------------------------------------------------------------
# placing and wrapping the model


def place(tensors, empty, strategy, hardware):
    """
    A model in float32 on its device: whole, or under fsdp this process's shards. tensors(): yields
    the (name, tensor)s that it starts from, in the order of its parameters; under fsdp process 0
    alone asks for them, and deals out one after the other. empty: a model of that shape on the
    meta device, without memory.
    """
    device = hardware.device
    if strategy != 'fsdp':
        state = {name: tensor.to(device, torch.float32) for name, tensor in tensors()}
        empty.load_state_dict(state, assign=True)
        empty.build_rope(device)
        return empty
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (hardware.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if hardware.dtype == torch.float32 else hardware.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's tables stay float32
    )
    for block in empty.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    model = fully_shard(empty, mesh=mesh, mp_policy=policy).to_empty(device=device)
    model.build_rope(device)
    deal(tensors() if hardware.is_main else (), model, hardware)
    return model


@torch.no_grad()
def deal(tensors, model, hardware):
    """Fill a sharded model with the (name, tensor)s that process 0 has, one at a time."""
    tensors = iter(tensors)
    for name, parameter in model.named_parameters():
        whole = None
        if hardware.is_main:
            given, whole = next(tensors)
            assert given == name, f'{given} in place of {name}'
        parameter.to_local().copy_(placed_like(parameter, whole, torch.float32).to_local())


def placed_like(parameter, whole, dtype):
    """A whole tensor in a dtype, on the parameter's device and cut as it is; None: process 0's."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if whole is None:
        whole = torch.empty(parameter.shape)
    whole = whole.to(parameter.device, dtype)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def wrap(model, strategy, knobs, hardware):
    """What the loop calls: the placed model, recomputing, compiled, exchanging gradients."""
    if knobs.recompute != 'none':
        recompute(model, knobs.recompute)
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


def use_float8(model, device):
    """
    Let the blocks of a model, before it is placed, multiply matrices in FP8: torchao's dynamic
    scaling, one factor a tensor, e4m3 for activations and weights and e5m2 for gradients. On a CPU
    only the rounding is FP8's. Raises UserError without torchao, or on a GPU without such products.
    """
    on_gpu = device.type == 'cuda'
    if on_gpu and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError('--fp8 needs a GPU with FP8: an H100, an L40 or a newer one')
    float8 = import_extra('torchao.float8', '--fp8 needs torchao')
    config = float8.Float8LinearConfig(emulate=not on_gpu)
    float8.convert_to_float8_training(model.blocks, config=config, module_filter_fn=fits_float8)


def fits_float8(module, name):
    """Whether a linear layer has sizes with which the kernels work."""
    return module.in_features % 16 == 0 and module.out_features % 16 == 0


def unwrap(model):
    """The bare GPT inside what `wrap` returned."""
    model = getattr(model, 'module', model)
    return getattr(model, '_orig_mod', model)


def recompute(model, which):
    """Let blocks compute activations again in the backward pass: all ('full') or half of them."""
    contexts = dict(context_fn=keep_half) if which == 'selective' else {}
    for block in model.blocks:
        block.recompute = partial(checkpoint, use_reentrant=False, **contexts)


def keep_half():
    """Selective recomputation: keep attention's output and every second matrix product."""
    aten = torch.ops.aten
    products = {aten.mm.default, aten.addmm.default, aten._scaled_mm.default}
    attention = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    seen = {True: 0, False: 0}

    def policy(context, operation, *args, **kwargs):
        kept = operation in attention
        if operation in products:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


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


def load_full_state(model, state):
    """Fill the model with whole tensors; where it is sharded, with those of process 0."""
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.reshard()  # after an evaluation it is whole
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def full_tensor(tensor):
    """All of a tensor of which each process may hold a part."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Meter:
    """Means of each step's scalars, kept on the device: the host waits only when they are read."""

    def __init__(self):
        self.steps = 0
        self.sums = {}  # name: (sum, number of values)

    def add(self, scalars):
        """Add one step's scalars, {name: tensor without dimensions}."""
        for name, value in scalars.items():
            total, n = self.sums.get(name, (0, 0))
            self.sums[name] = total + value.float(), n + 1
        self.steps += 1

    def read(self, world_size):
        """{name: mean since the last call, over the steps that had it and the processes}."""
        means = torch.stack([total / (n * world_size) for total, n in self.sums.values()])
        if world_size > 1:
            dist.all_reduce(means)
        means = dict(zip(self.sums, means.tolist()))
        self.__init__()
        return means
