# Inheritune (Sanyal et al.) with a thousandth of the parameters, on the offline corpus: a GPT-2
# with the paper's 24 layers, but narrow. Measured by full attention, its late layers are lazy. Runs
# Algorithm 1 and every baseline of Tables 1 and 2 and Figures 1c and 3. A seed takes about 23
# minutes on one core of a busy machine.
# Figure 1c, 300 steps: --child_tokens=307200 --max_n=12 --baselines=random,last-layers
# Table 3: --baselines=attention+norms,mlp+norms,attention+mlp
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
