# Inheritune (Sanyal et al.), Algorithm 1 with a first child that is too small: one of a Llama's
# eight layers, then three, five, ... until it matches the reference. The settings were chosen on
# seeds 1 to 3, which all matched in the third round, and then run once on seeds 11 to 13
# (--seeds=3). A seed takes about 8 minutes on one core. With baselines:
# --baselines=random,random-2x,stacking
method = 'inheritune'
size = '64x8'
tokens = 1500 * 8 * 128  # 1,500 steps
n = 1
max_n = 7

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**17
eval_interval = 100
learning_rate = 4e-3
schedule = 'cosine'
seed = 11
