# Scaling laws of model reuse (Liew and Kato), Table 1, column Stk (sta): stacked from the stable
# phase.
from _scaling import *

reuse = ('stk2+stable',)
