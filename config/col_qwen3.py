# Chain-of-Learngene, Table 10: the chain Qwen3-4B -> 1.7B -> 0.6B and a DesNet of 1.09B between
# the last two. Prepare sets and text with Qwen3's tokenizer: --tokenizer=FOLDER.
from config.col_gpt2 import *

ansnet = 'Qwen/Qwen3-4B'
chain = ('Qwen/Qwen3-1.7B', 'Qwen/Qwen3-0.6B')
desnets = ('1.09b',)
downstream = ('boolq', 'arc_easy', 'winogrande')
