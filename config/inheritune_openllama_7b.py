# Inheritune (Sanyal et al.), Appendix B.2, Figure 12 and Table 8: the first 7 of OpenLLaMA-7B's 32
# layers, on 50B tokens, none repeated. LLaMA-2: --reference=meta-llama/Llama-2-7b-hf.
from config.inheritune_openllama import *

reference = 'openlm-research/open_llama_7b'
size = '7b'  # its shape
n = 7
tokens = 50e9
unique_tokens = 0
