"""
One of two processes that train together: it shards a model, which process 0 alone has, and prints
how much of the model it holds, and whether the shards together are the whole.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from engine.parallel import find_hardware, full_state, place  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import Run  # noqa: E402

hardware = find_hardware(Run(device='cpu'))
config = GPTConfig.named('32x2', vocab_size=64, block_size=16)
torch.manual_seed(7)
expected = GPT(config)
model = place(expected if hardware.is_main else None, GPT.on_meta(config), hardware)
whole = full_state(model)  # on process 0
found = dict(held=sum(parameter.to_local().numel() for parameter in model.parameters()))
if hardware.is_main:
    state = expected.state_dict()
    found['same'] = all(torch.equal(whole[name], state[name]) for name in state)
    found['all'] = sum(tensor.numel() for tensor in state.values())
print(json.dumps(found), flush=True)
dist.destroy_process_group()
