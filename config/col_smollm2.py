# Chain-of-Learngene on a real model, on a CPU: SmolLM2-135M-Instruct of 30 layers is distilled into
# its first 15, and three depths in between are made without training and recovered (section 3.4).
# By the forward divergence: 150 steps of the reverse one left text improbable (9.4 nats a token).
#   docs/models.md makes `smollm2` and `data/pydocs_smollm2`; ln -s smollm2 smollm2-135m
method = 'col'
ansnet = './smollm2-135m'
chain = ('smollm2-135mx15',)
distillation = 'forward'
tokens = 2e5
desnets = ('smollm2-135mx18', 'smollm2-135mx22', 'smollm2-135mx26')
recovery_tokens = 1e5
baselines = ('single',)

data = 'pydocs_smollm2'
block_size = 256
batch_size = 4
eval_tokens = 2**13
eval_interval = 50
learning_rate = 5e-4
warmup = 0.1
schedule = 'cosine'
