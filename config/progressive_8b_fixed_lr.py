# Progressive training (Yano et al.), Table 2: the family at 2x Chinchilla, one maximum learning
# rate for all sizes.
from progressive_8b import *

learning_rates = (3e-4, 3e-4, 3e-4, 3e-4)  # section 4.1
