# Late-to-Early Training (Zhao et al.), Figure 11: the 7B target model taught by Llama-3.2-1B,
# with its tokenizer.
#   python data/prepare.py pile --tokenizer=FOLDER --out=data/pile_llama3 --max_tokens=20.2e9
from let_7b import *

teacher = 'meta-llama/Llama-3.2-1B'
data = 'pile_llama3'
