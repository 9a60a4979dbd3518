# Inheritune (Sanyal et al.), Appendix B.2, Figure 12 and Table 8: the first 7 of OpenLLaMA-7B's 32
# layers, on 50B tokens without repetition, keeping a model every 5B tokens.
# LLaMA-2: --reference=meta-llama/Llama-2-7b-hf, with a corpus in its tokenizer (--data); for 8
# epochs of 1B tokens add --tokens=8e9 --unique_tokens=1e9
from config.inheritune_openllama import *

reference = 'openlm-research/open_llama_7b'
size = '7b'  # its shape
n = 7
max_n = 7
tokens = 50e9
unique_tokens = 0
keep_every = 38_147
