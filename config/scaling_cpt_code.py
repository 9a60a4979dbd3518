# Scaling laws of model reuse (Liew and Kato), Table 1, column Code: continual pretraining of a
# 0.1B base on code.
#   python data/prepare.py starcoder --tokenizer=FOLDER
from _scaling import *

reuse = ('cpt',)
second_data = 'starcoder'
scratch = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
