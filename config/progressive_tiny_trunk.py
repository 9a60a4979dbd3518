# Progressive training (Yano et al.) along a trunk: the tiny family as one run at a constant
# learning rate that grows from size to size, with a short branch per size in which the rate decays.
# The whole takes 60% of the compute of all sizes from scratch; the largest gets what the smaller
# ones leave of it. Against each size alone, under the better of two schedules, five paired seeds of
# about 15 minutes:
#   python train.py config/progressive_tiny_trunk.py --seeds=5 --compare=independent
from config.progressive_tiny import *

schedule = 'wsd'
decay_fraction = 0.15
warmup = 30  # steps; each growth starts a fresh optimizer
noise = 0.1
shares = (1, 1, 0.95)  # tokens of the smaller sizes / their tokens from scratch
budget = 0.6
