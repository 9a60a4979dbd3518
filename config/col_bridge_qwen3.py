# Chain-of-Learngene, Table 1, AnsNet Qwen3-4B: it answers Dolly's questions, GPT2-XL learns from
# the answers and begins the chain.
from col_gpt2 import *

bridge = 'Qwen/Qwen3-4B'
