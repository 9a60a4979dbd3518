# Scaling laws of model reuse (Liew and Kato), Table 1, column CPT (sta): from the stable phase,
# without warming up again.
from _scaling import *

reuse = ('cpt+stable',)
second_data = 'starcoder'
