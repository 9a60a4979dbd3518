# Chain-of-Learngene, Table 13: a descendant of 51.47M, smaller than all of GPT-2's chain, on 100M
# tokens. The paper does not say what it starts from; here from the part of GPT-2 that it is.
from col_gpt2 import *

descendants = ('51.47m',)
recovery_tokens = 1e8
recovery_epochs = 1
baselines = ('random',)
downstream = ('boolq', 'mmlu', 'winogrande', 'xlsum', 'hellaswag', 'arc_easy')
