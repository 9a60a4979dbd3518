"""
Where a run trains: the processes, the device, the signals and clocks that end it early; what fits
into a GPU, and how one model trains on several: replicas (DDP) while one fits, shards (FSDP2) when
it does not. What only shards need is imported where it is used: a plan need not wait for it.
"""

import contextlib
import math
import os
import platform
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError, first_line

# ----------------------------------------------------------------------------------------------
# processes

PATIENCE = timedelta(hours=4)  # one may verify or write a terabyte while the others wait


def processes():
    """(rank, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value):
    """[value of every process]."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


# ----------------------------------------------------------------------------------------------
# hardware


class Hardware(NamedTuple):
    """What this process trains on, and until when."""

    device: torch.device
    name: str  # with its model: cuda:0 (NVIDIA H100 80GB HBM3), cpu (x86_64)
    dtype: torch.dtype  # of the matrix products
    autocast: torch.autocast  # context of a forward pass, for that dtype
    compile: bool
    rank: int
    world_size: int
    is_main: bool  # whether this is the process that writes files and prints
    deadline: float  # seconds since 1970 at which max_minutes are over
    memory: float  # bytes of a GPU that training may fill; infinite elsewhere


def attention_kernels(device):
    """Context in which cuDNN's attention is tried first: faster on Hopper, slower elsewhere."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] != 9:
        return contextlib.nullcontext()
    names = 'CUDNN_ATTENTION', 'FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH'
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def choose_device(name):
    """The torch.device of a knob; auto: a GPU, of whatever make, else the CPU. UserError."""
    if name == 'auto':
        name = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    if name == 'cuda':
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device {name!r} cannot be used ({first_line(error)})') from None
    return device


def find_hardware(run):
    """Choose the device and join the processes that torchrun started. Raises UserError."""
    device, memory, model = choose_device(run.device), math.inf, platform.machine()
    on_gpu, fast = device.type == 'cuda', run.dtype == 'bfloat16'
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        if not 0 <= rank < world_size:
            raise ValueError('0 <= RANK < WORLD_SIZE does not hold')
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f'RANK and WORLD_SIZE of the environment do not work ({first_line(error)}): start '
            'several processes with torchrun, or unset them'
        ) from error
    if on_gpu:
        torch.set_float32_matmul_precision('high')
        memory = min(gather(0.85 * torch.cuda.get_device_properties(device).total_memory))
        model = torch.cuda.get_device_name(device)
        if run.dtype == 'auto':
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if fast else torch.float32
    return Hardware(
        device,
        f'{device} ({model})',
        dtype,
        torch.autocast(device.type, dtype, enabled=fast),
        on_gpu if run.compile == 'auto' else run.compile == 'True',
        rank,
        world_size,
        rank == 0,
        time.time() + 60 * run.max_minutes if run.max_minutes else math.inf,
        memory,
    )


def set_threads(device, config, tokens):
    """
    On a CPU, use one thread for models too small to share: threads that wait for each other gain
    little on an idle machine and are ten times slower on a busy one. OMP_NUM_THREADS decides
    where it is set.
    """
    if torch.device(device).type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        small = tokens * config.n_embd < 2**18
        torch.set_num_threads(1 if small else os.cpu_count() or 1)


# ----------------------------------------------------------------------------------------------
# stopping

TRY_AGAIN = 75  # exit code of a run that was saved and stopped: EX_TEMPFAIL of sysexits.h
SIGNALS = []  # received so far; the loop saves and exits after the current step


def catch_signals():
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second one ends the program at once."""

    def remember(number, frame):
        SIGNALS.append(number)
        if len(SIGNALS) > 1:
            signal.default_int_handler(number, frame)
        print('\nstopping after this step (again: at once, without saving)', file=sys.stderr)

    SIGNALS.clear()
    signal.signal(signal.SIGINT, remember)
    signal.signal(signal.SIGTERM, remember)


def should_stop(hardware, save_at, step_seconds):
    """
    (stop now, save now, steps until the next look), the same on every process: a signal, or the
    deadline, on any of them counts for all, which look again after about five seconds.
    save_at: the time, in seconds since 1970, of the next regular save.
    """
    stop = bool(SIGNALS) or time.time() > hardware.deadline
    save = stop or time.time() > save_at
    if hardware.world_size == 1:
        return stop, save, 1
    flags = torch.tensor([float(stop), float(save), step_seconds], device=hardware.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stop, save, step_seconds = flags.tolist()
    return stop > 0, save > 0, max(1, int(5 / max(step_seconds, 1e-3)))


def exit_saved(message, hardware):
    """Say what was saved, and end: exit code 75 after max_minutes, 128 + signal after a signal."""
    if hardware.is_main:
        print(f'\n{message}; the same command continues from there', flush=True)
    if hardware.world_size > 1:
        dist.destroy_process_group()
    raise SystemExit(128 + SIGNALS[0] if SIGNALS else TRY_AGAIN)


# ----------------------------------------------------------------------------------------------
# what fits

LOGITS = {'cpu': 2**22, 'cuda': 2**28}  # that a loss has at once: 16 MB of them, 1 GB


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
    teacher_params = stage.teaching.get('teacher_params', 0.0)
    estimate = partial(estimate_memory, stage.config, knobs, teacher_params=teacher_params)
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


def place(model, shards, hardware):
    """
    A model in float32 on its device: whole, or the `shards` (a model on meta) of this process.
    model: the whole one; of shards process 0 alone has it, and deals out tensor after tensor.
    """
    device = hardware.device
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()  # the memory of a stage is counted from here
    if shards is None:
        return model.to(device, torch.float32)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (hardware.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if hardware.dtype == torch.float32 else hardware.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's tables stay float32
    )
    for part in (*shards.blocks, shards):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    shards.to_empty(device=device)
    whole = model.float().state_dict() if model else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(shards, whole, options=options)
    return shards


def wrap(model, strategy, knobs, hardware):
    """What the loop calls: the placed model, recomputing, compiled, exchanging gradients."""
    torch.compiler.reset()  # the stages before count towards torch's limit on compilations
    if knobs.recompute:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if strategy == 'fsdp':
        if hardware.compile:
            for block in model.blocks:  # one by one: shards are fetched between them
                block.compile()
        return model
    ddp_model = torch.compile(model) if hardware.compile else model
    if hardware.world_size == 1:
        return ddp_model
    return DistributedDataParallel(ddp_model, gradient_as_bucket_view=True)


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


def to_device(examples, device):
    """
    (inputs x, targets y) on the device; to a GPU asynchronously, from pinned memory. examples:
    sequences (n, T+1) int64, whose targets are the next tokens; or the two arrays.
    """
    both = examples if isinstance(examples, tuple) else (examples[:, :-1], examples[:, 1:])
    x, y = map(torch.from_numpy, map(np.ascontiguousarray, both))
    if torch.device(device).type == 'cuda':
        x, y = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (x, y))
    return x, y
