# Late-to-Early Training (Zhao et al.), Figure 7: a 3B model without a teacher, with which the 1.4B
# one is compared. The paper names no shape: this is OpenLLaMA-3B's.
from _let import *

size = 'openllama-3b'
variants = ('baseline',)
data = 'pile_smollm2'
