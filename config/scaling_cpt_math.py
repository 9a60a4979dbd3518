# Scaling laws of model reuse (Liew and Kato), Table 1, column Math: continual pretraining of a
# 0.1B base on mathematics.
#   python data/prepare.py openwebmath --tokenizer=FOLDER
from _scaling import *

reuse = ('cpt',)
second_data = 'openwebmath'
scratch = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
