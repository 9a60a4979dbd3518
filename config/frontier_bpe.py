# How cheap can a family be (Progressive training along a trunk), ten times larger than
# frontier_tiny's: 0.3 to 2 million parameters, on tokens of a byte-level BPE of 1,024 in
# FOLDER/tokenizer.json, three tokens a parameter. One to two hours on one CPU core.
#   python data/prepare.py pydocs --packages=all --tokenizer=FOLDER --out=data/bpe
from frontier_tiny import *

sizes = ('64x5', '96x5', '128x5', '128x10')
data = 'bpe'
tokens_per_param = 3
learning_rate = 3e-3
families = ('trunk:60',)
seeds = 1
