# Scaling laws of model reuse (Liew and Kato) at a ten-thousandth of the scale, offline: 4 x 4 grids
# of continual pretraining on code and of stacking, and both second-stage models from scratch; then
# the laws of Table 1 are fitted to the losses.
method = 'sweep'
size = '48x2'
longest = 2**20
first = (0.125, 0.25, 0.5, 1.0)
second = (0.0625, 0.125, 0.25, 0.5)
reuse = ('cpt', 'stk2')
scratch = (0.0625, 0.125, 0.25, 0.5, 1.0)
second_data = 'pycode'

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**16
learning_rate = 4e-3
warmup = 20
decay_fraction = 0.2
