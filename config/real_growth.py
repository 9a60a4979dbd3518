# What growth by the papers' operators does to a model that people have: SmolLM2-135M, 9 heads wide
# and 30 layers deep, grows to 12 heads and 34 layers, and trains on for a few steps on Python's
# documentation. A quarter of an hour on two CPU cores.
#   python -m extras.from_gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2   # or any folder, hub name
#   python data/prepare.py pydocs --tokenizer=smollm2 --out=data/pydocs_smollm2
# --target=stk2: the depth that doubles; --target=1152x30: the width; --tokens=5e4: it heals longer.
method = 'growth'
base = 'smollm2-135m'
base_model = 'smollm2'
target = '768x34'
tokens = 8e3
widths = ('lossless', 'aki')
depths = ('identity',)
noise = 0.1
seeds = 1

data = 'pydocs_smollm2'
block_size = 256
batch_size = 4
eval_tokens = 2**12
eval_interval = 4
learning_rate = 3e-4
schedule = 'constant'
warmup = 5
