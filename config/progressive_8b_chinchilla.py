# Progressive training (Yano et al.), Table 1: the family at 1x Chinchilla (20 tokens a
# parameter), one maximum learning rate for all sizes.
from progressive_8b import *

scratch_tokens = (20e9, 40e9, 80e9, 160e9)  # Table 7
learning_rates = (3e-4, 3e-4, 3e-4, 3e-4)  # section 4.1
