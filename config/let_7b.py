# Late-to-Early Training (Zhao et al.), Table 1: a 7B target model taught by SmolLM2-1.7B, for
# 1500 steps.
from _let import *

size = '7b'
teacher = 'HuggingFaceTB/SmolLM2-1.7B'
learning_rate = 3e-4
data = 'pile_smollm2'
