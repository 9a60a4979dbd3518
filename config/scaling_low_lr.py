# Scaling laws of model reuse (Liew and Kato), Figure 7: continual pretraining and stacking at the
# base's learning rate, and at a constant one, that at which the base ended.
from config.scaling_cpt_code import *

first = (1.0,)
second = (1 / 16, 1 / 8, 1 / 4)
reuse = ('cpt', 'stk2')
variants = ('low',)
second_data = 'starcoder'
scratch = ()
