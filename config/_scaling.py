# What the sweeps of Scaling laws of model reuse (Liew and Kato) share: Appendix B, Tables 3 and
# 4, for the base of 0.1B: 17600 iterations of 512 x 1024 tokens are the longest run, and both
# stages have five budgets up to it.
#   python data/prepare.py slimpajama --tokenizer=FOLDER
# FOLDER is a folder with Llama's tokenizer.json: 32,000 tokens
method = 'sweep'
sizes = ('0.1b',)
longest = (17600 * 512 * 1024,)
first = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
second = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

data = 'slimpajama'
block_size = 1024
batch_size = 512
learning_rate = 4e-3
warmup = 200
decay_fraction = 0.1
min_lr_fraction = 0.1
