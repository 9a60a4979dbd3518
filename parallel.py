"""
How one model trains on several processes, and in less memory: replicas (DDP) while one fits into a GPU, shards (FSDP2) when it
does not; torch.compile; activations that are computed again in the backward pass.
"""
import contextlib
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configurator import UserError
from plan import estimate_memory


def choose_parallel(knobs, config, machine):
    """'fsdp' or 'ddp': the knob, or ddp where the estimated memory of a replica and one sequence fits. Raises UserError."""
    if machine.world_size == 1 and knobs.parallel == 'fsdp':
        raise UserError('parallel=fsdp shards a model over several processes, and there is one: start them with torchrun')
    if knobs.parallel != 'auto' or machine.world_size == 1 or sum(estimate_memory(config, knobs, 1)) < machine.memory:
        return knobs.parallel if knobs.parallel != 'auto' else 'ddp'
    return 'fsdp'


def choose_micro_batch(knobs, config, machine):
    """Sequences a process trains at once: the knob, or the largest divisor of its share that fits. Raises UserError."""
    share = knobs.batch_size // machine.world_size
    if knobs.micro_batch_size:
        if share % knobs.micro_batch_size:
            raise UserError(f'micro_batch_size {knobs.micro_batch_size} does not divide the {share} sequences of a process')
        return knobs.micro_batch_size
    limit = 2 ** 17 if machine.device.type == 'cuda' else 2 ** 13   # tokens: more overflow a CPU's caches, and gain a GPU nothing
    shards = machine.world_size if choose_parallel(knobs, config, machine) == 'fsdp' else 1
    state = estimate_memory(config, knobs, 1, shards)[0]
    if state > machine.memory:
        raise UserError(f'{config.num_params(embedding=True, head=True):,} parameters need {state / 1e9:.0f} GB of training state '
                        f'on each of {machine.world_size} GPUs, which have {machine.memory / 1e9:.0f} for it: use more of them, '
                        'or --optimizer_dtype=bfloat16')
    for size in range(share, 1, -1):
        fits = size * config.block_size <= limit and sum(estimate_memory(config, knobs, size, shards)) < machine.memory
        if share % size == 0 and fits:
            return size
    return 1


def place(model, how, machine):
    """The model in float32 on its device: whole, or with how='fsdp' this process's shard of every parameter."""
    model = model.float()
    if how != 'fsdp':
        return model.to(machine.device)
    mesh = init_device_mesh(machine.device.type, (machine.world_size,))
    low = None if machine.dtype == torch.float32 else machine.dtype   # what is computed in; gradients are summed in float32
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)   # RoPE's tables: float32
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy).to(machine.device)


def wrap(model, how, knobs, machine):
    """What the loop calls in place of the placed model: recomputing, compiled, exchanging gradients as the knobs say."""
    if knobs.recompute != 'none':
        recompute(model, knobs.recompute)
    if machine.compile:   # what was compiled for the stages before counts towards a limit after which torch gives up compiling
        torch.compiler.reset()
    if how == 'fsdp':
        for block in model.blocks if machine.compile else ():   # block by block: between them shards are fetched
            block.compile()
        return model
    trained = torch.compile(model) if machine.compile else model
    if machine.world_size == 1:
        return trained
    with warnings.catch_warnings():   # torch 2.13 has a new name for this, which older ones do not know
        warnings.simplefilter('ignore', FutureWarning)
        return DistributedDataParallel(trained, gradient_as_bucket_view=True, broadcast_buffers=False)   # RoPE's tables


def recompute(model, how):
    """Let the blocks of a model make their activations again in the backward pass: all of them ('full') or half ('selective')."""
    contexts = dict(context_fn=keep_half) if how == 'selective' else {}
    for block in model.blocks:
        block.recompute = partial(checkpoint, use_reentrant=False, **contexts)


def keep_half():
    """
    Selective recomputation: of a block's forward pass the attention kernel's output and every second matrix product are kept, all
    else is computed again in the backward pass.
    """
    products, seen = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}, {True: 0, False: 0}
    attention = {getattr(torch.ops.aten, f'_scaled_dot_product_{kind}').default for kind in (
        'flash_attention', 'flash_attention_for_cpu', 'efficient_attention', 'cudnn_attention')}

    def policy(context, operation, *args, **kwargs):
        if operation in products:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        else:
            kept = operation in attention
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
    return create_selective_checkpoint_contexts(policy)


def exchanging(trained, last):
    """Context of one micro-batch: replicas exchange gradients once, in the `last` backward pass of a step."""
    if isinstance(trained, DistributedDataParallel):
        return contextlib.nullcontext() if last else trained.no_sync()
    return contextlib.nullcontext()   # of shards each keeps its own after every backward pass: whole gradients would not fit


def whole_state(model):
    """{name: tensor} of all parameters: of a sharded model on the CPU of process 0, and empty on the others. For every process."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole(model, state):
    """Fill the model, sharded or not, with whole tensors."""
    if not isinstance(model, FSDPModule):
        model.load_state_dict(state)
    else:
        model.reshard()   # after an evaluation it is whole
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def whole(tensor):
    """A tensor of which each process may hold a part, as all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Meter:
    """Means of what each step measures, kept on the device: the host waits for the GPU only when they are read."""

    def __init__(self):
        self.sums, self.steps = {}, 0   # {name: (sum, number of values)}, steps

    def add(self, scalars):
        """Add one step's scalars, {name: tensor of no dimension}."""
        for name, value in scalars.items():
            total, n = self.sums.get(name, (0, 0))
            self.sums[name] = total + value.float(), n + 1
        self.steps += 1

    def read(self, world_size):
        """{name: mean over the steps since the last call that had it, and over the processes}."""
        means = torch.stack([total / (n * world_size) for total, n in self.sums.values()])
        if world_size > 1:
            dist.all_reduce(means)
        means = dict(zip(self.sums, means.tolist()))
        self.sums, self.steps = {}, 0
        return means
