# Chain-of-Learngene, Table 1, AnsNet Llama3-8B: it answers Dolly's questions, GPT2-XL learns from
# the answers and begins the chain. The paper fine-tunes Llama3-8B on Dolly first: prepare Dolly
# with its tokenizer and  python train.py --init_from=meta-llama/Meta-Llama-3-8B
# --data=dolly_llama3 --learning_rate=1e-5 --batch_size=2, and give that folder as --bridge.
from col_gpt2 import *

bridge = 'meta-llama/Meta-Llama-3-8B'
