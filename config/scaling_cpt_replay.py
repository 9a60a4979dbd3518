# Scaling laws of model reuse (Liew and Kato), Table 1, column CPT (rep): a quarter of the second
# stage's data is the base's.
from _scaling import *

reuse = ('cpt+replay0.25',)
second_data = 'starcoder'
