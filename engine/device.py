"""Where a run trains: the processes, the device, and the signals and clocks that end it early."""

import contextlib
import math
import os
import platform
import shlex
import signal
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def join_processes(backend):
    """(rank, number) of the processes that torchrun started, joined. Raises UserError."""
    names = ('RANK', 'WORLD_SIZE')
    try:
        rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        if not 0 <= rank < world_size:
            raise ValueError('0 <= RANK < WORLD_SIZE does not hold')
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        found = ', '.join(f'{name}={os.environ.get(name)}' for name in names)
        raise UserError(
            f'{found} of the environment do not work ({first_line(error)}): start several '
            'processes with torchrun, or unset them'
        ) from error
    return rank, world_size


# ----------------------------------------------------------------------------------------------
# hardware

# FLOP/s of dense bfloat16 matrix products (before Ampere: float16) by the makers' data sheets;
# of two names that fit, the first counts
PEAK_FLOPS = {
    'B200': 2250e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'A100': 312e12,
    'L40S': 362e12,
    'L4': 121e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
    'V100': 125e12,
    'T4': 65e12,
}


class Hardware(NamedTuple):
    """What this process trains on, and until when."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products
    compile: bool
    rank: int
    world_size: int
    deadline: float  # seconds since 1970 at which max_minutes are over
    memory: float  # bytes of a GPU that training may fill; infinite elsewhere

    @property
    def name(self):
        """The device with its model: cuda:0 (NVIDIA H100 80GB HBM3), cpu (x86_64)."""
        if self.device.type == 'cuda':
            return f'{self.device} ({torch.cuda.get_device_name(self.device)})'
        return f'{self.device} ({platform.machine()})'

    @property
    def is_main(self):
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def peak_flops(self):
        """FLOP/s of the GPU by its data sheet; None where MFU is not defined."""
        known = [flops for gpu, flops in PEAK_FLOPS.items() if gpu in self.name]
        return known[0] if known and self.dtype == torch.bfloat16 else None

    @contextlib.contextmanager
    def forward(self):
        """Context of the forward pass: its dtype, and the fastest attention kernel."""
        with contextlib.ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            stack.enter_context(attention_kernels(self.device))
            yield


def attention_kernels(device):
    """Context in which cuDNN's attention is tried first: faster on Hopper, slower elsewhere."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] != 9:
        return contextlib.nullcontext()
    flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    order = [SDPBackend.CUDNN_ATTENTION, flash, efficient, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def choose_device(name):
    """The torch.device of a knob; auto: a CUDA GPU, else Apple's, else the CPU. UserError."""
    if name == 'auto':
        name = 'mps' if torch.backends.mps.is_available() else 'cpu'
        name = 'cuda' if torch.cuda.is_available() else name
    if name == 'cuda':
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f'device {name!r} cannot be used ({first_line(error)})') from None
    return device


def find_hardware(run):
    """Choose the device and join the processes that torchrun started. Raises UserError."""
    device, memory, dtype = choose_device(run.device), math.inf, torch.float32
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
        memory = 0.85 * torch.cuda.get_device_properties(device).total_memory
    rank, world_size = join_processes('nccl' if on_gpu else 'gloo')
    if run.dtype == 'bfloat16' or run.dtype == 'auto' and on_gpu and bfloat16_is_fast():
        dtype = torch.bfloat16
    compiled = on_gpu if run.compile == 'auto' else run.compile == 'True'
    deadline = time.time() + 60 * run.max_minutes if run.max_minutes else math.inf
    return Hardware(device, dtype, compiled, rank, world_size, deadline, min(gather(memory)))


def bfloat16_is_fast():
    """Whether this GPU multiplies bfloat16 matrices itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


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
    """
    Print what was saved and how to continue, and end the program: exit code 75 (to be tried again)
    after max_minutes, 128 + signal after a signal.
    """
    if hardware.is_main:
        program = 'python'
        if hardware.world_size > 1:
            here = int(os.environ.get('LOCAL_WORLD_SIZE', hardware.world_size))
            nodes = hardware.world_size // here
            how = '--standalone' if nodes == 1 else f'--nnodes={nodes} ...'
            program = f'torchrun {how} --nproc_per_node={here} --'  # -- : its own knobs end
        command = f'{program} {shlex.join(sys.argv)}'
        print(f'\n{message}; the same command continues from there:\n  {command}', flush=True)
    if hardware.world_size > 1:
        dist.destroy_process_group()
    raise SystemExit(128 + SIGNALS[0] if SIGNALS else TRY_AGAIN)
