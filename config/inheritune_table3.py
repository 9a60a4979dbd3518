# Inheritune (Sanyal et al.), Table 3: what is inherited of each layer. Sixteen layers of GPT-2
# medium: all of them, then attention, MLPs and norms alone and in pairs.
from inheritune_gpt2_medium import *

n = 16
max_rounds = 1
baselines = ('sub-modules',)
