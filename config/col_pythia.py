# Chain-of-Learngene, Table 2: the chain Pythia-1.4b -> 1b -> 410m -> 160m -> 70m and a DesNet of
# 113.63M between the last two. Sets and text are prepared with Pythia's tokenizer:
# --tokenizer=FOLDER.
from config.col_gpt2 import *

ancestor = 'EleutherAI/pythia-1.4b'
ancestor_size = 'pythia-1.4b'
chain = ('pythia-1b', 'pythia-410m', 'pythia-160m', 'pythia-70m')
public = tuple(f'EleutherAI/{name}' for name in chain)
descendants = ('113.63m',)
downstream = ('boolq', 'arc_easy', 'winogrande')
