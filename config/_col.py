# What the runs of Chain-of-Learngene share: Appendix C.1. Everyone is fine-tuned on Dolly (3
# epochs); the chain is distilled on-policy for 5000 steps, the best by Rouge-L; descendants
# recover on 78M tokens of OpenWebText, twice, and are fine-tuned on each task (10 epochs, 16 or 8
# at a time). The paper names no batch of the distillations, and a batch of 2 for fine-tuning where
# the ancestor is of another architecture; scores here are of all of a set's validation examples.
method = 'col'
start = 'public'
sft_data = 'dolly'
sft_epochs = 3
sft_learning_rate = 1e-5
sft_batch_size = 2
distillation = 'minillm'
samples = 256
inner_epochs = 4
tokens = 5000 * 64 * 512
score_examples = 500
recovery_tokens = 78e6
recovery_epochs = 2
recovery_learning_rate = 5e-4
recovery_batch_size = 2
baselines = ('random', 'single')
downstream = ('mmlu', 'xlsum', 'hellaswag', 'winogrande', 'boolq', 'dolly')
downstream_epochs = 10
downstream_learning_rate = 1e-5
downstream_batch_size = 16
answers = 10_000
answer_tokens = 256

data = 'openwebtext'
block_size = 512
batch_size = 64
eval_interval = 250
learning_rate = 5e-6  # of the distillations: MiniLLM's; the paper names none
schedule = 'cosine'
