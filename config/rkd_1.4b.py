# Late-to-Early Training (Zhao et al.), Table 1, reverse distillation: SmolLM2-135M is the teacher
# of the 1.4B model for all of its steps.
from _let import *

teacher = 'HuggingFaceTB/SmolLM2-135M'
variants = ('rkd',)
data = 'pile_smollm2'
