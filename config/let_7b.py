# Late-to-Early Training (Zhao et al.), Table 1: a 7B target model taught by SmolLM2-1.7B, for
# 1500 steps. Figure 11: --teacher=meta-llama/Llama-3.2-1B --data=pile_llama3, prepared with its
# tokenizer.
from config._let import *

size = '7b'
teacher = 'HuggingFaceTB/SmolLM2-1.7B'
learning_rate = 3e-4
data = 'pile_smollm2'
