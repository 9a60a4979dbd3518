# Scaling laws of model reuse (Liew and Kato), Figure 5: 4,000 steps of a 0.1B model from scratch
# with the WSD schedule; for the cosine schedule,
# --schedule=cosine --out_dir=out/scaling_schedule_cosine
method = 'pretrain'
size = '0.1b'
tokens = 4000 * 512 * 1024

data = 'slimpajama'
block_size = 1024
batch_size = 512
learning_rate = 4e-3
warmup = 200
schedule = 'wsd'
decay_fraction = 0.1
min_lr_fraction = 0.1
