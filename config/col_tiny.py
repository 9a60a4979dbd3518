# Chain-of-Learngene at a ten-thousandth of the scale, offline: an ancestor, a chain of three
# checkpoints distilled from it step by step, and three descendants of sizes in between, against
# random initialisation and the smallest checkpoint alone (Figures 3 and 4, Table 4).
method = 'col'
ancestor_size = '64x6'
ancestor_tokens = 1.5e6
chain = ('64x4', '48x4', '48x2')
start = 'subset'
distillation = 'reverse'
tokens = 5e5
direct = True
descendants = ('48x3', '64x2', '64x3')
recovery_tokens = 3e5
baselines = ('random', 'single')
downstream = ('signatures',)
downstream_epochs = 0.05
downstream_learning_rate = 4e-3

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**15
eval_interval = 25
learning_rate = 4e-3
schedule = 'cosine'
