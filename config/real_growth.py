# What the papers' growth operators do to a public model: SmolLM2-135M, with 9 heads and 30 layers,
# is grown to 12 heads and 34 layers and trained for a few steps on Python's documentation. Takes a
# quarter of an hour on two CPU cores. docs/models.md shows how to make the model and its corpus.
# --target=stk2 doubles the depth, --target=1152x30 the width; --tokens=5e4 trains on for longer.
method = 'growth'
base = 'smollm2-135m'
base_model = 'out/smollm2-135m'
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
