# Inheritune (Sanyal et al.) at a ten-thousandth of the scale: Algorithm 1 and every baseline of
# its Tables 1 and 2 and Figure 3, on the offline corpus. About ten minutes on a CPU.
method = 'inheritune'
size = '64x8'
tokens = 1.2e6
start_fraction = 0.5
grow_by = 2
max_rounds = 2
baselines = (
    'random',
    'random-2x',
    'last-layers',
    'stacking',
    'hybrid-stacking',
    'half-width',
    'distillation',
    'distilbert',
)

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**17
learning_rate = 4e-3
schedule = 'cosine'
