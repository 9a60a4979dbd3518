"""
One of two processes that train together: it shards a model and prints whether it was asked for
tensors, how many were in memory at a time, how much of the model it holds, and whether its shards
are those of the whole.
"""

import json
import sys
import weakref
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
torch.manual_seed(7)
expected = GPT(config).state_dict()
alive = []  # number of our tensors in memory, each time that one more is made


def tensors():
    made = weakref.WeakSet()
    for name, tensor in expected.items():
        tensor = tensor.clone()
        made.add(tensor)
        alive.append(len(made))
        yield name, tensor


model = place(tensors, GPT.on_meta(config), 'fsdp', hardware)
whole = full_state(model)  # on process 0
held = sum(parameter.to_local().numel() for parameter in model.parameters())
found = dict(alive=max(alive, default=0), held=held)
if hardware.rank == 0:
    found['same'] = all(torch.equal(whole[name], expected[name]) for name in expected)
    found['all'] = sum(tensor.numel() for tensor in expected.values())
print(json.dumps(found), flush=True)
dist.destroy_process_group()
