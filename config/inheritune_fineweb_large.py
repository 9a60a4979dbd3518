# Inheritune (Sanyal et al.), section 5 and Table 4: a GPT-2 large of 32 layers on FineWeb-Edu,
# without repeated data, a child of 16 layers, and the child's shape from scratch.
# Table 4:  python evaluate.py out/inheritune_fineweb_large config/tasks_inheritune_table4.py
from config.inheritune_gpt2_large import *

size = 'gpt2-largex32'
n = 16
max_n = 16
baselines = ('random',)
data = 'fineweb_edu'
order = 'epoch'  # no sequence twice
