# Chain-of-Learngene, Table 1, AnsNet GPT2-XL: the chain XL -> L -> M -> B and the five DesNets of
# Table 7.
#   for name in dolly mmlu xlsum hellaswag winogrande boolq; do python data/prepare.py $name; done
#   python data/prepare.py openwebtext --max_tokens=1e8
# --baselines=random,single,auto-learngene,van-learngene,kd,seqkd,minillm,hypercloning: Tables 4,
# 9 and 11, Figure 5; --alphas=0.1,0.3,0.5,0.7,0.9: Figure 6; --direct=True: Table 3;
# --recovery_tokens=1e8, 5e8, 1e10: Figure 3.
from _col import *

ancestor = 'openai-community/gpt2-xl'
ancestor_size = 'gpt2-xl'
chain = ('gpt2-large', 'gpt2-medium', 'gpt2')
public = ('openai-community/gpt2-large', 'openai-community/gpt2-medium', 'openai-community/gpt2')
descendants = ('138m', '220m', '277m', '380m', '537m')
