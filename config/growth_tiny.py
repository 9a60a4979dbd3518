# Three of the papers grow models by different operators: here each of them starts the same second
# stage, from the same base, on the same tokens, beside random initialisation. Three seeds, about
# ten minutes on a CPU; ends with the ranking.
method = 'growth'
base = '48x2'
target = '64x4'
base_tokens = 1e6
tokens = 5e5
variants = (
    'random',
    'fpi+stack',
    'fpi+interleave',
    'fpi+identity',
    'aki+stack',
    'aki+stack+noise',
    'lossless+stack',
    'lossless+stack+noise',
    'lossless+identity',
    'lossless+identity+noise',
)
noise = 0.1
seeds = 3

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**17
learning_rate = 4e-3
schedule = 'cosine'
