# Progressive training (Yano et al.), Table 3: 1B -> 2B -> 4B -> 8B at 2x Chinchilla, maximum
# learning rate adjusted to the size. The headline: 15.4 ZFLOPs for the family instead of 20.4.
#   python data/prepare.py fineweb_edu --max_tokens=470e9
#   torchrun --standalone --nproc_per_node=8 train.py config/progressive_8b.py
# Table 2, one maximum learning rate for all sizes: --learning_rates=3e-4,3e-4,3e-4,3e-4
# Table 1, that and 1x Chinchilla: also --scratch_tokens=20e9,40e9,80e9,160e9
# Table 3, "+Fixed Data", at most 320B different tokens, as many as the 8B model sees when it is
# trained alone: --unique_tokens=320e9 --order=repeat. The last stage reads the 100B that are left
# and then, from the beginning, 140B of the stages before it (section 4.3, Figure 3): none that it
# has seen itself.
method = 'progressive'
sizes = ('1b', '2b', '4b', '8b')  # Table 6
params = (1e9, 2e9, 4e9, 8e9)  # the paper counts FLOPs by these nominal sizes
scratch_tokens = (40e9, 80e9, 160e9, 320e9)  # Table 8: 40 tokens a parameter
learning_rates = (1.5e-3, 1.1e-3, 7.0e-4, 3.0e-4)  # Appendix D
independent_learning_rates = (3e-4, 3e-4, 3e-4, 3e-4)  # with --compare=independent; section 4.1
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
