"""
How long a model of a shape takes for a token on this machine, and which size of a chain takes so
long (Chain-of-Learngene's descendants, chosen by what they cost to use).
"""

import math
import statistics
import time

import torch

from engine.between import shape_of_size
from engine.decoding import Decoding
from engine.device import set_threads
from engine.errors import UserError
from engine.plan import all_params
from engine.progress import progress_bar
from model import GPT

PROMPT = 16  # tokens that are read before
TOKENS = 24  # that are timed, one at a time
HALVINGS = 6  # of the range of sizes, in its logarithm


@torch.no_grad()
def seconds_a_token(config, device, dtype=torch.float32):
    """Median seconds of a token that follows a short text, with random weights of a shape."""
    before = torch.get_num_threads()
    set_threads(device, config, 1)
    model = GPT(config).to(device, dtype).eval()
    model.build_rope(device)
    decoding, times = Decoding(model, 1), []
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    decoding.read(token.expand(1, min(PROMPT, config.block_size // 4)))
    for _ in range(min(TOKENS, config.block_size // 2)):
        started = time.perf_counter()
        decoding.read(token).argmax().item()  # waits for the device
        times.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return statistics.median(times)


def params_of_latency(shapes, seconds, device, dtype=torch.float32):
    """
    The number of parameters, embeddings and head included, at which a shape between those of
    {name: GPTConfig} takes about so many seconds a token: bisection, a measurement for each
    halving; that of the largest, if it is fast enough. Raises UserError where none is.
    """
    smallest, *_, largest = sorted(shapes.values(), key=all_params)
    if seconds_a_token(largest, device, dtype) <= seconds:
        return all_params(largest)
    least = seconds_a_token(smallest, device, dtype)
    if least > seconds:
        raise UserError(f'the smallest of the chain takes {least:.2g} seconds a token here')
    low, high = math.log(all_params(smallest)), math.log(all_params(largest))
    for _ in progress_bar(range(HALVINGS), desc='measuring'):
        middle = (low + high) / 2
        config = shape_of_size(shapes, math.exp(middle))
        if seconds_a_token(config, device, dtype) > seconds:
            high = middle
        else:
            low = middle
    return math.exp(low)
