# Progressive training (Yano et al.) along a trunk: one model is trained at a constant learning rate
# and grown from size to size; from each size a short branch, in which the learning rate decays,
# gives the member of the family. The family takes 60% of the compute of all sizes from scratch, and
# its largest size gets what the smaller ones leave of it. Compared with each size alone, under the
# better of two schedules, on five paired seeds of about 15 minutes:
#   python train.py config/progressive_tiny_trunk.py --seeds=5 --compare=independent
from config.progressive_tiny import *

schedule = 'wsd'
decay_fraction = 0.15
warmup = 30  # steps; each growth starts a fresh optimizer
noise = 0.1
shares = (1, 1, 0.95)  # tokens of the smaller sizes / their tokens from scratch
budget = 0.6
