"""
Hardware and parallelism: processes, devices, signals and time limits, memory estimates, and
training on several GPUs, with replicas (DDP) if the model fits on one of them and shards (FSDP2)
otherwise. FSDP's modules are slow to import, and are imported only where they are used.
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

PATIENCE = timedelta(hours=4)  # timeout: processes wait while one verifies or writes a terabyte


def processes():
    """(rank, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value):
    """The list of every process's `value`, any picklable object. Every process must call this."""
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
    """The device of this process, its rank among the processes, and limits on time and memory."""

    device: torch.device
    name: str  # of device and model: cuda:0 (NVIDIA H100 80GB HBM3), cpu (x86_64)
    dtype: torch.dtype  # of matrix products
    autocast: torch.autocast  # context manager for forward passes, with that dtype
    compile: bool  # whether to use torch.compile
    rank: int
    world_size: int
    is_main: bool  # rank 0, which writes files and prints
    deadline: float  # Unix time, in seconds, after which to save and exit (max_minutes)
    memory: float  # bytes of GPU memory that training may use; infinite on other devices


def attention_kernels(device):
    """A context manager that prefers cuDNN's attention on Hopper GPUs; it is slower elsewhere."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] != 9:  # 9: Hopper
        return contextlib.nullcontext()
    names = 'CUDNN_ATTENTION', 'FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH'
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def choose_device(name):
    """
    The torch.device for a name; auto: the accelerator, of any kind, or else the CPU. Under torchrun
    cuda is this process's GPU. Raises UserError if the device cannot be used.
    """
    if name == 'auto':
        name = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    if name == 'cuda':
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # raises if the device does not exist
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
        # 15% in reserve; the minimum, as all processes must choose the same batch and strategy
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
    On a CPU, choose the number of threads: one for a small model, as more gain little on an idle
    machine and are ten times slower on a busy one; all cores otherwise. OMP_NUM_THREADS takes
    precedence. tokens: per forward pass.
    """
    if torch.device(device).type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        small = tokens * config.n_embd < 2**18  # size of the residual stream
        torch.set_num_threads(1 if small else os.cpu_count() or 1)


# ----------------------------------------------------------------------------------------------
# stopping

TRY_AGAIN = 75  # exit code of a run to be resumed (max_minutes): EX_TEMPFAIL of sysexits.h
SIGNALS = []  # received so far; the loop saves and exits after the current step


def catch_signals():
    """
    Let Ctrl-C and SIGTERM make the training loop save and stop after the current step; a second
    signal ends the program at once.
    """

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
    (stop now, save now, steps until the next call), the same on every process: a signal or the
    deadline on one counts for all. Several processes, which must synchronise for this, ask about
    every five seconds, a single one after each step. save_at: Unix time of the next regular save.
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
    """Print what was saved and exit: with 75 after max_minutes, 128 + signal after a signal."""
    if hardware.is_main:
        print(f'\n{message}; the same command continues from there', flush=True)
    if hardware.world_size > 1:
        dist.destroy_process_group()
    raise SystemExit(128 + SIGNALS[0] if SIGNALS else TRY_AGAIN)


# ----------------------------------------------------------------------------------------------
# what fits

LOGITS = {'cpu': 2**22, 'cuda': 2**28}  # logits in a chunk of the loss: 16 MB and 1 GB in float32


def estimate_memory(config, knobs, sequences=1, shards=1, teacher_params=0.0):
    """
    An estimate of (training state, activations) on one GPU, in bytes. The state is float32 weights,
    gradients and AdamW's two moments, divided into `shards`, and a frozen bfloat16 teacher of
    `teacher_params` parameters. Activations are what a compiled bfloat16 step on `sequences`
    sequences keeps for its backward pass, and one chunk of logits. On an H100 the estimate was 1.03
    to 1.4 times the measured memory (docs/benchmarks.md).
    """
    # bytes per token: bfloat16 q, k, v and output, then the layer's vectors of widths C and n_mlp
    attention = 4 * (config.n_head + config.n_kv_head) * config.head_dim
    per_layer = 10 * config.n_embd + attention + 6 * config.n_mlp
    at_work = per_layer if knobs.recompute else 0  # the one layer that is being recomputed
    per_layer = 4 * config.n_embd if knobs.recompute else per_layer
    n_params, n_layers_params = config.num_params(embedding=True, head=True), config.num_params()
    state = 16 * n_params / shards + 2 * teacher_params  # 4 float32 numbers per parameter
    if shards > 1:  # gathered: the block at work, the one being prefetched, embeddings and head
        state += 2 * 8 * n_layers_params / config.n_layer + 8 * (n_params - n_layers_params)
    tokens, V = sequences * knobs.block_size, config.vocab_size
    # a chunk in float32 and bfloat16; copies and gradients of the head
    logits = 6 * min(tokens * V, LOGITS['cuda']) + 10 * V * config.n_embd
    return state, tokens * (config.n_layer * per_layer + at_work) + logits


def choose_batch(knobs, stage, hardware):
    """
    (strategy, micro-batch size). Unless knobs set them, these are 'fsdp' if a replica with one
    sequence does not fit into GPU memory, otherwise 'ddp', and the largest micro-batch that fits
    and divides the process's share of the batch. Raises UserError if the batch cannot be divided.
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
    A model in float32 on the device. shards=None: `model` itself, moved there. Otherwise `shards`,
    the same model on meta, becomes this process's shards; they are filled from `model`, which only
    process 0 has and broadcasts tensor by tensor.
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
    for part in (*shards.blocks, shards):  # FSDP2 wraps inner modules first
        fully_shard(part, mesh=mesh, mp_policy=policy)
    shards.to_empty(device=device)
    whole = model.float().state_dict() if model else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(shards, whole, options=options)
    return shards


def wrap(model, strategy, knobs, hardware):
    """Add activation checkpointing, torch.compile and DDP, as configured, to a placed model."""
    torch.compiler.reset()  # otherwise earlier stages count towards torch's recompilation limit
    if knobs.recompute:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if strategy == 'fsdp':
        if hardware.compile:
            for block in model.blocks:  # one by one, as FSDP gathers parameters between blocks
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
    """{name: whole tensor}; if sharded, on process 0 only. Every process must call this."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def to_device(examples, device):
    """
    (inputs x, targets y) as tensors on the device; a GPU gets them asynchronously, from pinned
    memory. examples: an array (n, T+1) int64, whose targets are the next tokens, or a tuple of
    arrays (x, y).
    """
    both = examples if isinstance(examples, tuple) else (examples[:, :-1], examples[:, 1:])
    x, y = map(torch.from_numpy, map(np.ascontiguousarray, both))
    if torch.device(device).type == 'cuda':
        x, y = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (x, y))
    return x, y
