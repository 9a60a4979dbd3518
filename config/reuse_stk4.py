# Scaling laws of model reuse (Liew and Kato), Table 1: the second stage "stk (x4)", stacking,
# growth factor 4 (section 3.2), of a 0.1B base model.
from reuse_exp import *

sizes = ('0.1b', 'stk4')
depth = 'stack'
