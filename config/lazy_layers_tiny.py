# What makes a layer lazy? Inheritune's GPT-2 at a tiny scale with and without logits divided by the
# layer's number, learned positions, depth. Three seeds took 64 minutes on a busy core.
method = 'lazy_layers'
width = 32
depths = (24, 12)
positions = ('learned', 'rope')
scaling = ('by-layer', 'none')
tokens = 1100 * 8 * 128  # 1,100 steps
seeds = 3

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**17
eval_interval = 220
learning_rate = 4e-3
schedule = 'cosine'
