# Chain-of-Learngene, Appendix B: do the assumptions hold under which distilling step by step has a
# better bound? Every step of a chain and the direct one, from random initialisation, at five
# numbers of tokens.
from col_tiny import *

method = 'stepwise'
start = 'random'
direct = False
tokens = 1e6
seeds = 3
downstream = ()
baselines = ()
