# Three of the papers grow models, with different operators. Here every operator starts the same
# second stage, from the same base and on the same tokens, and so does random initialisation. Three
# seeds, about thirteen minutes each on one CPU core; the report ends with a ranking.
#
# An operator of your own is two functions; registered in WIDTH, it is a --width wherever there is
# one. This one keeps the old block and draws new units at half its scale: what helps, copying old
# units or just keeping them?
import torch

from expand import WIDTH as _WIDTH
from expand import Width, copied, round_robin


def keep_and_draw(old, rows, columns, above):
    new = copied(old, rows, columns)
    if old.ndim == 2:
        drawn = torch.randn_like(new) * old.std() / 2
        drawn[: old.shape[0], : old.shape[1]] = old
        new = drawn
    return new


_WIDTH['half'] = Width(round_robin, keep_and_draw)

method = 'growth'
base = '48x2'
target = '64x4'
base_tokens = 1e6
tokens = 5e5
widths = ('fpi', 'aki', 'lossless', 'half')
depths = ('stack', 'interleave', 'identity')
seeds = 3

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**17
learning_rate = 4e-3
schedule = 'cosine'
