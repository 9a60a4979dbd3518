# Chain-of-Learngene on a real model, on a CPU: SmolLM2-135M-Instruct, of 30 layers, is distilled
# into its first 15; three depths in between are initialised without training and then recover
# (section 3.4). It takes the forward KL: after 150 steps of the reverse KL, text was improbable
# (9.4 nats a token). docs/models.md shows how to make `out/smollm2-135m` and its corpus.
method = 'col'
ansnet = 'out/smollm2-135m'
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
