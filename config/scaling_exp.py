# Scaling laws of model reuse (Liew and Kato), Table 1, column Exp x2: width times the square root
# of two, function preserving.
from _scaling import *

reuse = ('exp',)
