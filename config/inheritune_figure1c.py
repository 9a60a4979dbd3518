# Inheritune (Sanyal et al.), Figure 1c: what lazy layers are worth. Children of 12 layers of GPT-2
# medium, from its last layers, its first, and from nothing, trained for 10K steps.
from inheritune_gpt2_medium import *

child_tokens = 10_000 * 48 * 1024  # 10K steps
max_rounds = 1
baselines = ('last-layers', 'random')
