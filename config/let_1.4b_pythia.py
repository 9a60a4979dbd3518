# Late-to-Early Training (Zhao et al.), Figures 2 and 8: the 1.4B target model taught by
# Pythia-160M, with Pythia's tokenizer.
#   python data/prepare.py pile --tokenizer=FOLDER --out=data/pile_pythia --max_tokens=20.2e9
from _let import *

teacher = 'EleutherAI/pythia-160m'
data = 'pile_pythia'
