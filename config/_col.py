# What the runs of Chain-of-Learngene share: Appendix C.1. Everyone is fine-tuned on Dolly (3
# epochs); the chain is distilled on-policy for 5000 steps, the best by Rouge-L; descendants
# recover on 78M tokens of OpenWebText and are fine-tuned on each task (10 epochs).
method = 'col'
start = 'public'
sft_data = 'dolly'
sft_epochs = 3
sft_learning_rate = 1e-5
distillation = 'minillm'
samples = 256
inner_epochs = 4
tokens = 5000 * 64 * 512
score_examples = 500
recovery_tokens = 78e6
recovery_learning_rate = 5e-4
baselines = ('random', 'single')
downstream = ('mmlu', 'xlsum', 'hellaswag', 'winogrande', 'boolq', 'dolly')
downstream_epochs = 10
downstream_learning_rate = 1e-5

data = 'openwebtext'
block_size = 512
batch_size = 64
eval_interval = 250
learning_rate = 5e-6  # of the distillations: MiniLLM's; the paper names none
schedule = 'cosine'
