"""Where a run trains: device, processes, and the signals and clocks that end it early."""
import contextlib
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import UserError


# ---------------------------------------------------------------------------------------------------------------------
# processes

def processes():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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


# ---------------------------------------------------------------------------------------------------------------------
# the machine

class Machine(NamedTuple):
    """Where this process runs, and until when."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int
    world_size: int
    deadline: float   # seconds since 1970, when max_minutes are over
    memory: float     # bytes of the device that a plan may fill; infinite for a CPU

    @contextlib.contextmanager
    def forward(self):
        """Context of the forward pass: bfloat16 matrix products where dtype says so, the card's fastest attention kernel."""
        low = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()
        with low, attention_kernels(self.device):
            yield


def attention_kernels(device):
    """Context in which attention tries cuDNN's kernel before flash attention: faster on Hopper, slower on other cards."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] != 9:
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def attention_kernel(config, machine):
    """The name of the attention kernel that torch will use for a model of this shape."""
    q = torch.empty(1, config.n_head, config.block_size, config.head_dim, device=machine.device, dtype=machine.dtype)
    k = q[:, :config.n_kv_head]
    with machine.forward():
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=config.n_kv_head < config.n_head)
    return SDPBackend(choice).name.lower()


def choose_device(name):
    """The torch.device of a knob; auto: a CUDA GPU if there is one, else the CPU. UserError: one that cannot be used."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if name == 'cuda' else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f'device {name!r} cannot be used: {str(error).splitlines()[0]}') from None
    return device


def find_machine(run):
    """Choose the device and join the other processes, if torchrun started some. Raises UserError for what cannot be used."""
    apple = run.device == 'auto' and not torch.cuda.is_available() and torch.backends.mps.is_available()
    device = choose_device('mps' if apple else run.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world_size > 1 and not dist.is_initialized():
        # hours: one process may have a terabyte to verify or to write while the others wait
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(hours=4))
    bf16 = run.dtype == 'bfloat16'
    if run.dtype == 'auto' and device.type == 'cuda':
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    compiled = device.type == 'cuda' if run.compile == 'auto' else run.compile == 'True'
    deadline = time.time() + 60 * run.max_minutes if run.max_minutes else math.inf
    memory = 0.85 * torch.cuda.get_device_properties(device).total_memory if device.type == 'cuda' else math.inf
    return Machine(device, torch.bfloat16 if bf16 else torch.float32, compiled, rank, world_size, deadline, memory)


def share_work(device, config, tokens):
    """
    On a CPU, use one thread for models too small to share: threads that wait for each other gain them little on an idle
    machine, and on a busy one make them ten times slower. OMP_NUM_THREADS, where it is set, decides instead.
    """
    if torch.device(device).type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1 if tokens * config.n_embd < 2 ** 18 else os.cpu_count() or 1)


STOP = []   # signals received; the loop saves and exits at the next step


def catch_signals():
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second one ends the program at once."""
    def remember(number, frame):
        if STOP:
            signal.default_int_handler(number, frame)
        STOP.append(number)
        print('\nstopping after this step (once more: at once, without saving)', file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)


def agree(machine, saved, knobs, step_seconds):
    """
    (stop now?, save now?, steps until the next look), the same on every process: a signal or max_minutes on any of them counts
    for all, and they look again after about five seconds.
    """
    stop = bool(STOP) or time.time() > machine.deadline
    save = stop or time.time() - saved > 60 * knobs.save_minutes
    if machine.world_size > 1:
        flags = torch.tensor([stop, save, step_seconds], dtype=torch.float32, device=machine.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, save, step_seconds = flags.tolist()
    return stop > 0, save > 0, max(1, int(5 / max(step_seconds, 1e-3)))


def leave(what, machine):
    """Say what is saved and how to go on, and end the program: exit code 0 after max_minutes, 128 + signal after a signal."""
    if machine.rank == 0:
        print(f'\n{what}; the same command goes on from there:\n  python {shlex.join(sys.argv)}', flush=True)
    if machine.world_size > 1:
        dist.destroy_process_group()
    raise SystemExit(128 + STOP[0] if STOP else 0)
