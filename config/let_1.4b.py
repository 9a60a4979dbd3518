# Late-to-Early Training (Zhao et al.), Table 1: a 1.4B target model, taught for 1500 of its 7600
# steps by SmolLM2-135M, ten times smaller. Section 3.1 and Appendix B. The target has its
# teacher's tokenizer: FOLDER is where the hub's SmolLM2-135M lies.
#   python data/prepare.py pile --tokenizer=FOLDER --out=data/pile_smollm2 --max_tokens=20.2e9
#   torchrun --standalone --nproc_per_node=8 train.py config/let_1.4b.py
# With --variants=baseline,let,rkd,salt everything in the table, one after the other;
# --variants=let+L2M and the like: Figures 3 and 4; --variants=let+0.01,let+0.3,let+1.0,let+3.0:
# Figures 5 and 6; --variants=let+L1F1,let+L1F5: Figure 12; --s_stop=3000: Figure 10.
from _let import *

teacher = 'HuggingFaceTB/SmolLM2-135M'
data = 'pile_smollm2'
