# Chain-of-Learngene, Table 2: the chain Pythia-1.4b -> 1b -> 410m -> 160m -> 70m and a DesNet of
# 113.63M between the last two. Prepare sets and text with Pythia's tokenizer:
# --tokenizer=FOLDER.
# A descendant's neighbours must have the same head dimension: 410m, 160m and 70m have 64, but 1.4b
# has 128 and 1b 256. So Table 6's chain {1b, 70m} is refused: the paper does not say how its heads
# are interpolated.
# Instead: --chain=EleutherAI/pythia-410m,EleutherAI/pythia-70m or with pythia-160m in between.
from config.col_gpt2 import *

ansnet = 'EleutherAI/pythia-1.4b'
chain = tuple(f'EleutherAI/pythia-{size}' for size in ('1b', '410m', '160m', '70m'))
desnets = ('113.63m',)
downstream = ('boolq', 'arc_easy', 'winogrande')
