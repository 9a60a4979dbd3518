"""
How long a model of a shape takes for a token on this machine, and which size of a chain takes so
long (Chain-of-Learngene's descendants, chosen by what they cost to use).
"""

import math
import statistics
import time

import torch

from engine.between import shape_of_size
from engine.device import set_threads
from engine.plan import all_params
from engine.progress import progress_bar
from model import GPT

TOKENS = 16  # generated at a time, after as many
REPEATS = 5
HALVINGS = 6  # of the range of sizes, in its logarithm


@torch.no_grad()
def seconds_a_token(config, device, dtype=torch.float32):
    """Median seconds of a generated token of one text, with random weights of a shape."""
    set_threads(device, config, 1)
    model = GPT(config).to(device, dtype).eval()
    model.build_rope(device)
    prompt = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    model.generate(prompt, TOKENS)  # compiles and records, if it does
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model.generate(prompt, TOKENS).tolist()  # waits for the device
        times.append((time.perf_counter() - started) / TOKENS)
    return statistics.median(times)


def params_of_latency(shapes, seconds, device, dtype=torch.float32):
    """
    The number of parameters, embeddings and head included, at which a shape between those of
    {name: GPTConfig} takes about so many seconds a token: bisection, a measurement for each
    halving. It ends at the chain's own ends where they are faster or slower.
    """
    *_, largest = ordered = sorted(shapes.values(), key=all_params)
    if seconds_a_token(largest, device, dtype) <= seconds:
        return all_params(largest)
    low, high = (math.log(all_params(config)) for config in (ordered[0], largest))
    for _ in progress_bar(range(HALVINGS), desc='measuring'):
        middle = (low + high) / 2
        config = shape_of_size(shapes, math.exp(middle))
        if seconds_a_token(config, device, dtype) > seconds:
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)
