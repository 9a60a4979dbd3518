# How cheap can a family be before a member is worse than the same size trained alone? The family
# of progressive_tiny, grown along a trunk at a constant learning rate (Liew and Kato, section 4.3)
# and as Progressive training (Yano et al.) does it, at several costs; independent models under
# both schedules. Half an hour a seed on one CPU core (--seeds=1 --seed=1338: that one alone).
from progressive_tiny import *

method = 'frontier'
shares = (1.0, 1.0, 0.95)  # of each size's tokens from scratch; the largest gets what is left
noise = 0.1
optimizer = 'grown'
last_schedule = 'cosine'
law_shares = (1.0, 0.78, 0.64)  # what allocation_tiny found
families = ('trunk:80', 'trunk:70', 'trunk:60', 'trunk:50', 'laws:55', 'laws:50', 'paper:70')
seeds = 5

decay_fraction = 0.15  # wsd
warmup = 30.0
