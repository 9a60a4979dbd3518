# Late-to-Early Training (Zhao et al.), Table 1, SALT (Rawat et al., without selecting data):
# distillation for the first 1500 steps.
from _let import *

teacher = 'HuggingFaceTB/SmolLM2-135M'
variants = ('salt',)
data = 'pile_smollm2'
