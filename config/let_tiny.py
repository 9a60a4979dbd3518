# Late-to-Early Training (Zhao et al.), Table 1 at a ten-thousandth of the scale, offline: a small
# teacher is trained first, then the same target model eight times its size from nothing, with LET
# (also ten times as strong), with RKD and with SALT, at equal steps.
method = 'let'
size = '64x4'
tokens = 1.2e6
teacher_size = '32x2'
teacher_tokens = 5e6
variants = ('baseline', 'let', 'let+1.0', 'rkd', 'salt')
lambda0 = 0.1
s_stop = 0.15
seeds = 2

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**16
eval_interval = 100
learning_rate = 4e-3
schedule = 'cosine'
warmup = 0.1
