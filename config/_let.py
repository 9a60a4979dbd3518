# Settings that the presets of Late-to-Early Training (Zhao et al.) share, from section 3.1 and
# Appendix B: 1.4B parameters, 7600 steps of 2048 x 1280 tokens of the Pile, the first 1500 with the
# teacher. As in the paper, validation losses are on the Pile's test split.
method = 'let'
size = '1.4b'
tokens = 20e9
variants = ('let',)
lambda0 = 0.1
s_stop = 1500
pairing = 'L2E'  # the target's third layer is aligned with the teacher's last

block_size = 1280
batch_size = 2048
learning_rate = 4e-4
schedule = 'cosine'
warmup = 0.1
min_lr_fraction = 0.1
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
eval_interval = 500
