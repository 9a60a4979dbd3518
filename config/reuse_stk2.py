# Scaling laws of model reuse (Liew and Kato), Table 1: the second stage "stk", stacking, growth
# factor 2 (section 3.2), of a 0.1B base model.
from reuse_exp import *

sizes = ('0.1b', 'stk2')
depth = 'stack'
