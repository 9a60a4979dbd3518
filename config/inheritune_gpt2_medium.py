# Inheritune (Sanyal et al.), Table 1, GPT-2 medium: 24 layers, children of 12, 14 and 16 layers,
# and the baselines of Table 2 and Figure 3. Figures 5 to 7 are the losses.png of these runs.
# Figure 1c, the value of lazy layers: children of 12 layers that start from the last layers, the
# first ones, and at random, for 10K steps:
# --child_tokens=491520000 --max_n=12 --baselines=last-layers,random
# Figure 8, 12 layers: alternate ones, distilled; from scratch; and inherited:
# --max_n=12 --baselines=distilbert,random
# Table 3, which parts of each of 16 layers are inherited:
# --n=16 --max_n=16 --baselines=attention+norms,mlp+norms,attention+mlp
# Tasks of Table 1:
#   python evaluate.py out/inheritune_gpt2_medium --tasks=wikitext,lambada_openai
method = 'inheritune'
size = 'gpt2-medium'
paper_gpt2 = True  # Appendix C.1: GELU, no biases, no dropout, attention logits / layer number
tokens = 100_000 * 48 * 1024  # 100K steps
distillation_tokens = 50_000 * 48 * 1024  # both distilled students: 50K steps
grow_by = 2
max_n = 16  # as many as Table 1 needed; 0: grow until the loss is matched
baselines = (
    'random',
    'random-2x',
    'stacking',
    'hybrid-stacking',
    'half-width',
    'distillation',
    'distilbert',
)

observe_attention = True  # log rank and mass, on 8 samples (100 in Figures 1 and 9)

data = 'openwebtext'
order = 'random'  # drawn with replacement (section 4)
block_size = 1024
eval_interval = 1000  # steps, for the curves of Figures 3 and 5 to 8
batch_size = 48  # sequences of 1,024: "50K tokens"
learning_rate = 3e-4
warmup = 2000
schedule = 'cosine'
min_lr_fraction = 0.1
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
