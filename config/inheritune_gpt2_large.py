# Inheritune (Sanyal et al.), Tables 1 and 2, GPT-2 large: 36 layers, a child of 18.
# Figure 1f, the value of lazy layers: children of 18 layers that start from the last layers, the
# first ones, and at random, for 10K steps: --child_tokens=163840000 --baselines=last-layers,random
from config.inheritune_gpt2_medium import *

size = 'gpt2-large'
tokens = 100_000 * 16 * 1024  # 100K steps
max_n = 18
baselines = ('random', 'random-2x', 'stacking', 'hybrid-stacking', 'half-width')
batch_size = 16  # sequences of 1,024: "16K tokens"
learning_rate = 2e-4
min_lr_fraction = 0.05  # to 1e-5
