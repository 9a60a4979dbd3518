# Inheritune (Sanyal et al.), Tables 1 and 2, GPT-2 xlarge: 48 layers, a child of 24.
from config.inheritune_gpt2_large import *

size = 'gpt2-xl'
max_n = 24
learning_rate = 1.5e-4
min_lr_fraction = 1 / 15  # to 1e-5
