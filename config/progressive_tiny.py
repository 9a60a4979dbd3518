# A family of four sizes on the offline corpus, minutes on a CPU: Progressive training (Yano et
# al.) at a hundred-thousandth of the scale. Each size has about twice the parameters of the one
# before: two width growths, then a depth growth.
method = 'progressive'
sizes = ('32x2', '48x2', '64x2', '64x4')
width = 'aki'
depth = 'stack'
tokens_per_param = 20  # Chinchilla, for the size trained from scratch

data = 'pydocs'
block_size = 128
batch_size = 8
eval_tokens = 2**18

learning_rate = 4e-3
schedule = 'cosine'
