# Chain-of-Learngene at a ten-thousandth of the scale, offline: an AnsNet, a chain of three
# checkpoints distilled from it step by step, and three descendants of sizes in between, compared
# with random initialisation and with the smallest checkpoint alone (Figures 3 and 4, Table 4); and
# the smallest checkpoint distilled directly from the AnsNet (Table 3).
method = 'col'
ansnet = '64x6'
ansnet_tokens = 1.5e6
chain = ('64x4', '48x4', '48x2')
distillation = 'reverse'
tokens = 5e5
desnets = ('48x3', '64x2', '64x3')
recovery_tokens = 3e5
baselines = ('random', 'single', 'direct')

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**15
eval_interval = 25
learning_rate = 4e-3
schedule = 'cosine'
