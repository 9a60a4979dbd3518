# Chain-of-Learngene, Table 1, AnsNet Llama3-8B: it answers Dolly's questions, GPT2-XL learns from
# the answers and begins the chain. It is fine-tuned on Dolly first, in its own vocabulary:
#   python data/prepare.py dolly --tokenizer=FOLDER --out=data/dolly_llama3
from col_gpt2 import *

bridge = 'meta-llama/Meta-Llama-3-8B'
bridge_data = 'dolly_llama3'
