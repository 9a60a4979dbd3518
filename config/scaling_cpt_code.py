# Scaling laws of model reuse (Liew and Kato), Table 1, column Code: continual pretraining of a
# 0.1B base on code, and the same shape from scratch on code. Appendix B, Tables 3 and 4: the
# longest run has 17600 iterations of 512 x 1024 tokens, and both stages have five budgets up to it.
#   python data/prepare.py slimpajama --tokenizer=FOLDER
#   python data/prepare.py starcoder --tokenizer=FOLDER
# FOLDER is a folder with Llama's tokenizer.json: 32,000 tokens.
# The table's other columns of continual pretraining: --second_data=openwebmath (Math), and
# --variants=replay,stable --scratch= (CPT (rep): a quarter of the second stage's data are the
# base's; CPT (sta): starts from the base's stable phase, without a second warmup)
method = 'sweep'
size = '0.1b'
reuse = ('cpt',)
second_data = 'starcoder'
longest = 17600 * 512 * 1024
first = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
second = scratch = first

data = 'slimpajama'
block_size = 1024
batch_size = 512
learning_rate = 4e-3
warmup = 200
decay_fraction = 0.1
min_lr_fraction = 0.1
