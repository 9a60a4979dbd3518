# Inheritune (Sanyal et al.) at a ten-thousandth of the scale, on the offline corpus: a GPT-2 of 24
# layers, as deep as the paper's and otherwise small, so that its late layers stay lazy; Algorithm
# 1, every baseline of Tables 1 and 2 and Figures 1c and 3. A seed: 24 to 32 minutes on a busy core.
method = 'inheritune'
size = 'gpt2-32x24'
paper_gpt2 = True  # no biases, attention logits divided by the layer number
tokens = 1100 * 8 * 128  # 1,100 steps
max_n = 16
observe_attention = True
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
eval_interval = 100
learning_rate = 4e-3
schedule = 'cosine'
