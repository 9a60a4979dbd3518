"""How long a call takes on a device, and what the device can do at most."""

import time

import torch


def synchronise(device):
    """Wait for the GPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(function, device, rounds=5):
    """The least seconds that a call takes, after one that is not counted."""
    found = []
    for _ in range(rounds + 1):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def matrix_product_rate(device, dtype, rounds=4):
    """FLOP/s of the product of two large square matrices."""
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(lambda: a @ b, device, rounds)
