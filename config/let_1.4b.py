# Late-to-Early Training (Zhao et al.), Table 1: a 1.4B target model, taught for 1500 of its 7600
# steps by SmolLM2-135M, ten times smaller. Section 3.1 and Appendix B. The target has its
# teacher's tokenizer: FOLDER is where the hub's SmolLM2-135M lies.
#   python data/prepare.py pile --tokenizer=FOLDER --out=data/pile_smollm2 --max_tokens=20.2e9
#   torchrun --standalone --nproc_per_node=8 train.py config/let_1.4b.py
# With --variants=baseline,let,rkd,salt everything in the table, one after the other (SALT without
# its selection of data). Figures, by their variants:
#   3, 4    --variants=let,let,pairing=L2M,let,pairing=L2L   and M2E, M2M, M2L
#   5, 6    --variants=let,lambda0=0.01,let,lambda0=0.3,let,lambda0=1.0,let,lambda0=3.0
#   10, 12  --variants=let,s_stop=3000    --variants=let,pairing=L1F1,let,pairing=L1F5
#   Table 5 --variants=let,alignment=logsum,let,alignment=cca
# Other teachers, each with its corpus prepared by its own tokenizer as above:
#   --teacher=facebook/opt-125m --data=pile_opt             Figures 2 and 8; with pile_smollm2 the
#                                                           tokenizer mismatch of Table 5
#   --teacher=EleutherAI/pythia-160m --data=pile_pythia     Figures 2 and 8
#   --teacher=gpt2 --data=pile, --teacher=gpt2-medium       Table 6, where it fails: a teacher that
#                                                           has seen too little. GPT-2 reads 1024
#                                                           tokens: 1280 are shown to it in halves
# Figure 7, a 3B model without a teacher, in OpenLLaMA-3B's shape, as the paper names none:
# --size=openllama-3b --variants=baseline
from config._let import *

teacher = 'HuggingFaceTB/SmolLM2-135M'
data = 'pile_smollm2'
