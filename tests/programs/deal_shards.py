"""
One of two processes that train together: it shards a model and prints whether it had to build it,
how much of it it holds, and whether its shards are those of the whole.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from engine.device import find_hardware  # noqa: E402
from engine.parallel import full_state, place  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import Run  # noqa: E402

hardware = find_hardware(Run(device='cpu'))
config = GPTConfig.named('32x2', vocab_size=64, block_size=16)
built = []


def make():
    built.append(True)
    torch.manual_seed(7)
    return GPT(config)


model = place(make, GPT.on_meta(config), 'fsdp', hardware)
whole = full_state(model)  # on process 0
held = sum(parameter.to_local().numel() for parameter in model.parameters())
found = dict(built=bool(built), held=held)
if hardware.rank == 0:
    torch.manual_seed(7)
    expected = GPT(config).state_dict()
    found['same'] = all(torch.equal(whole[name], expected[name]) for name in expected)
    found['all'] = sum(tensor.numel() for tensor in expected.values())
print(json.dumps(found), flush=True)
dist.destroy_process_group()
