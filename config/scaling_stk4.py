# Scaling laws of model reuse (Liew and Kato), Table 1, column Stk x4: stacked four times.
from _scaling import *

reuse = ('stk4',)
