# Chain-of-Learngene, Table 1, AnsNet Qwen3-4B: it answers Dolly's questions, GPT2-XL learns from
# the answers and begins the chain. It is fine-tuned on Dolly first, in its own vocabulary:
#   python data/prepare.py dolly --tokenizer=FOLDER --out=data/dolly_qwen3
from col_gpt2 import *

bridge = 'Qwen/Qwen3-4B'
bridge_data = 'dolly_qwen3'
