# Scaling laws of model reuse (Liew and Kato), Table 1, column Stk x2: stacked twice; and the
# stacked shape from scratch (section 5.2).
from _scaling import *

reuse = ('stk2',)
scratch = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
