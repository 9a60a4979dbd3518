# Scaling laws of model reuse (Liew and Kato), Table 1: the second stage "exp" of a 0.1B base model,
# a function-preserving expansion of its width by sqrt 2 (section 3.2, Appendices B and C.5).
#   python data/prepare.py slimpajama --tokenizer=FOLDER
# FOLDER is a folder with Llama's tokenizer.json: 32,000 tokens.
# Stacking, "stk" and "stk (x4)" of the table: --sizes=0.1b,stk2 or --sizes=0.1b,stk4
method = 'progressive'
sizes = ('0.1b', 'exp')  # exp: relative to the base
width = 'lossless'  # exact at any ratio; fpi is not at this one (8 -> 11 heads)
scratch_tokens = (17600 * 512 * 1024,) * 2  # D1 and D2: the standard iterations (Table 4)
shares = (1, 1)
last_schedule = 'wsd'

data = 'slimpajama'
block_size = 1024
batch_size = 512
learning_rate = 4e-3  # the same in both stages (Appendix C: a lower one is worse)
schedule = 'wsd'
warmup = 200
decay_fraction = 0.1
min_lr_fraction = 0.1
