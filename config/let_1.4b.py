# Late-to-Early Training (Zhao et al.), Table 1: a 1.4B target model, taught for 1500 of its 7600
# steps by SmolLM2-135M, ten times smaller (section 3.1 and Appendix B). The target has its
# teacher's tokenizer: FOLDER is a copy of the hub's SmolLM2-135M.
#   python data/prepare.py pile --tokenizer=FOLDER --out=data/pile_smollm2 --max_tokens=20.2e9
#   torchrun --standalone --nproc_per_node=8 train.py config/let_1.4b.py
# --variants=baseline,let,rkd,salt trains everything in the table, one after the other (SALT without
# its data selection). The variants of other figures and tables:
#   3, 4    --variants=let,let,pairing=L2M,let,pairing=L2L   and M2E, M2M, M2L
#   5, 6    --variants=let,lambda0=0.01,let,lambda0=0.3,let,lambda0=1.0,let,lambda0=3.0
#   10, 12  --variants=let,s_stop=3000    --variants=let,pairing=L1F1,let,pairing=L1F5
#   Table 5 --variants=let,alignment=logsum,let,alignment=cca
# Other teachers, each with the corpus prepared in its own tokenizer, as above:
#   --teacher=facebook/opt-125m --data=pile_opt             Figures 2 and 8; with pile_smollm2 the
#                                                           tokenizer mismatch of Table 5
#   --teacher=EleutherAI/pythia-160m --data=pile_pythia     Figures 2 and 8
#   --teacher=gpt2 --data=pile, --teacher=gpt2-medium       Table 6, where LET fails: these teachers
#                                                           were trained on too little. GPT-2 reads
#                                                           the 1280 tokens in two halves, as its
#                                                           context is 1024
# Figure 7, a 3B model without a teacher; the paper gives no shape, so this is OpenLLaMA-3B's:
# --size=openllama-3b --variants=baseline
from config._let import *

teacher = 'HuggingFaceTB/SmolLM2-135M'
data = 'pile_smollm2'
