# Progressive training (Yano et al.), Table 3: 1B -> 2B -> 4B -> 8B at 2x Chinchilla, with a maximum
# learning rate for each size. The headline result: the family takes 15.4 ZFLOPs instead of 20.4.
#   python data/prepare.py fineweb_edu --max_tokens=470e9
#   torchrun --standalone --nproc_per_node=8 train.py config/progressive_8b.py
# These come from 6 X T with X rounded to 1, 2, 4 and 8B; here, as in every run, X counts the
# parameters of layers and head, which gives 15.9 and 21.2.
# Every size also trained alone, at 3e-4 (section 4.1; Figure 2): --compare=independent
# Table 2, one maximum learning rate: --learning_rates=3e-4,3e-4,3e-4,3e-4 --out_dir=out/fixed_8b
# Figure 4, the largest size alone at 1.5e-3, which spikes (and at 3e-4, in out/alone_3e-4):
#   --sizes=8b --scratch_tokens=320e9 --shares=1 --batch_sizes=7680 --learning_rates=1.5e-3 \
#   --out_dir=out/alone_1.5e-3
# Table 4: python evaluate.py out/progressive_8b --data=fineweb_edu --kl_examples=10000
# Table 1 has this and 1x Chinchilla: --scratch_tokens=20e9,40e9,80e9,160e9
# Table 3, "+Fixed Data", at most 320B unique tokens, as many as the 8B model reads when trained
# alone: --unique_tokens=320e9 --order=repeat. The last stage reads the remaining 100B tokens, then
# the first 140B again, which earlier stages have read (section 4.3, Figure 3); it reads no token
# twice itself.
method = 'progressive'
sizes = ('1b', '2b', '4b', '8b')  # Table 6
scratch_tokens = (40e9, 80e9, 160e9, 320e9)  # Table 8: 40 tokens a parameter
shares = (1, 0.75, 0.75, 0.75)  # what Eq. 4 gives with the paper's nominal 1, 2, 4 and 8B
learning_rates = (1.5e-3, 1.1e-3, 7.0e-4, 3.0e-4)  # Appendix D
learning_rate = 3e-4  # of the sizes that are trained alone
batch_sizes = (960, 1920, 3840, 7680)  # Table 6
width = 'aki'  # section 3: bert2BERT, its AKI variant (footnote 4) ...
depth = 'bert2bert'  # ... and its depth expansion

data = 'fineweb_edu'  # with the GPT-2 tokenizer, section 4.1
block_size = 1024
schedule = 'cosine'
warmup = 0.01
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
