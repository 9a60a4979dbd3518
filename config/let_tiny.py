# Late-to-Early Training (Zhao et al.) at a ten-thousandth of the scale, offline: a small teacher is
# trained on twenty times the target's tokens, as public models are; then a target of twelve layers
# is trained from scratch, its third layer aligned with the teacher's last. lambda0 is 10 to 300
# times the paper's, as the batch is 2,560 times smaller (docs/let.md).
# Controls, for as many steps: a teacher of random weights at the largest lambda0, RKD and SALT.
method = 'let'
size = '32x12'
tokens = 2e5
teacher_size = '32x2'
teacher_tokens = 4e6
variants = ('baseline', 'let,lambda0=1', 'let,lambda0=10', 'let,lambda0=30')
variants += ('let,lambda0=30,untrained=True', 'rkd', 'salt')
s_stop = 0.5
seeds = 5

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**15
eval_interval = 24
learning_rate = 4e-3
schedule = 'cosine'
warmup = 0.1
