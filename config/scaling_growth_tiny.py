# Scaling laws of model reuse (Liew and Kato), section 6: the growth factor as a variable of the
# law. A 4 x 4 grid each of training on, stacking twice and stacking four times, on the base's data.
from scaling_tiny import *

reuse = ('cpt', 'stk2', 'stk4')
second_data = ''
scratch = ()
