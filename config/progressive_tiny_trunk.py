# The tiny family along a trunk: one run at a constant learning rate that grows from size to size,
# with a short branch per size in which the rate decays. Three fifths of the compute of training all
# sizes from scratch; what the smaller sizes leave of it goes to the largest. The comparison, five
# paired seeds against each size alone under the better of two schedules, 15 minutes a seed:
#   python train.py config/progressive_tiny_trunk.py --seeds=5 --compare=independent
from config.progressive_tiny import *

schedule = 'wsd'
decay_fraction = 0.15
warmup = 30  # steps; each growth starts a fresh optimizer
noise = 0.1
shares = (1, 1, 0.95)  # tokens of the smaller sizes / their tokens from scratch
budget = 0.6
