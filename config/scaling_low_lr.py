# Scaling laws of model reuse (Liew and Kato), Figure 7: continual pretraining and stacking with the
# base's learning rate and schedule, and at a constant rate, the last one of the base.
from config.scaling_cpt_code import *

first = (1.0,)
second = (1 / 16, 1 / 8, 1 / 4)
reuse = ('cpt', 'stk2')
variants = ('low',)
second_data = 'starcoder'
scratch = ()
