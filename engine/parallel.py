"""
How one model trains on several processes, and in less memory: replicas (DDP) while one fits into
a GPU, shards (FSDP2) when it does not; torch.compile; activations recomputed in the backward pass.
What only shards need is imported where it is used: a plan need not wait for it.
"""

import contextlib
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model import GPT

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
    whole = model.state_dict() if model else {}
    with torch.no_grad():
        for name, parameter in shards.named_parameters():
            parameter.to_local().copy_(placed_like(parameter, whole.get(name)).to_local())
    return shards


def placed_like(parameter, whole):
    """A whole tensor in the parameter's dtype, on its device and cut as it; None: process 0's."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if whole is None:
        whole = torch.empty(parameter.shape)
    whole = whole.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def wrap(model, strategy, knobs, hardware):
    """What the loop calls: the placed model, recomputing, compiled, exchanging gradients."""
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
