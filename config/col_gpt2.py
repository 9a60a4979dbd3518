# Chain-of-Learngene, Table 1, AnsNet GPT2-XL: the chain XL -> L -> M -> B and the five DesNets of
# Table 7.
#   for name in dolly mmlu xlsum hellaswag winogrande boolq
#   do python data/prepare.py $name --prompt=paper; done
#   python data/prepare.py openwebtext --max_tokens=1e8
# --baselines=random,single,auto-learngene,van-learngene,kd,seqkd,minillm,hypercloning: Tables 4,
# 9 and 11, Figure 5; --alphas=0.1,0.3,0.5,0.7,0.9: Figure 6; --direct=True: Table 3;
# --recovery_tokens=1e8, 5e8, 1e10: Figure 3.
# Table 13, a DesNet smaller than the whole chain, from the part of GPT-2 that it is (the paper does
# not say what it starts from): --descendants=51.47m --recovery_tokens=1e8 --recovery_epochs=1
# --baselines=random --downstream=boolq,mmlu,winogrande,xlsum,hellaswag,arc_easy
# Table 1's other AnsNets answer Dolly's questions, GPT2-XL learns from the answers and begins the
# chain; each is fine-tuned on Dolly first, in its own vocabulary:
#   python data/prepare.py dolly --prompt=paper --tokenizer=FOLDER --out=data/dolly_llama3
# --bridge=meta-llama/Meta-Llama-3-8B --bridge_data=dolly_llama3, or
# --bridge=Qwen/Qwen3-4B --bridge_data=dolly_qwen3
#
# Appendix C.1: everyone is fine-tuned on Dolly (3 epochs); the chain is distilled on-policy for
# 5000 steps, the best by Rouge-L; descendants recover on 78M tokens of OpenWebText, twice, and are
# fine-tuned on each task (10 epochs, 16 or 8 at a time). The paper names no batch of the
# distillations, and a batch of 2 for fine-tuning where the ancestor is of another architecture;
# scores here are of all of a set's validation examples.
method = 'col'
ancestor = 'openai-community/gpt2-xl'
ancestor_size = 'gpt2-xl'
chain = ('gpt2-large', 'gpt2-medium', 'gpt2')
public = ('openai-community/gpt2-large', 'openai-community/gpt2-medium', 'openai-community/gpt2')
descendants = ('138m', '220m', '277m', '380m', '537m')
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
