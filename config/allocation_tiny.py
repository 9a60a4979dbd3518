# How many tokens should each size of a family get? The family of frontier_tiny, grown along a
# trunk: members after several numbers of tokens of their size and of the one before, laws of model
# reuse (Liew and Kato, Eq. 6) fitted to them, and the cheapest family in which no member is worse
# than alone, where Progressive training (Yano et al.) has Eq. 4. Half an hour a seed on one core.
from progressive_tiny import *

method = 'allocation'
grid = (0.25, 0.5, 1.0)
noise = 0.1
optimizer = 'grown'
seeds = 2

schedule = 'wsd'
decay_fraction = 0.15
warmup = 30.0
