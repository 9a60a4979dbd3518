# Scaling laws of model reuse (Liew and Kato), section 6: the share of replayed data as a variable
# of the law. A 4 x 4 grid of continual pretraining on code for each of four shares.
from scaling_tiny import *

reuse = ('cpt', 'cpt+replay0.25', 'cpt+replay0.5', 'cpt+replay0.75')
scratch = ()
