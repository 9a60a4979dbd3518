# Chain-of-Learngene, Table 1, AnsNet GPT2-XL: the chain XL -> L -> M -> B and the five DesNets of
# Table 7.
#   for name in dolly mmlu xsum hellaswag winogrande boolq
#   do python data/prepare.py $name --prompt=paper; done
#   python data/prepare.py openwebtext --max_tokens=1e8
# --baselines=random,single,auto-learngene,van-learngene,kd,seqkd,minillm,hypercloning-2x,\
#   hypercloning-4x                              Tables 4, 9 and 11, Figure 5 (with direct: Table 3)
# --alphas=0.1,0.3,0.5,0.7,0.9                   Figure 6
# --recovery_tokens=0,78e6,1e8,5e8,1e9,5e9,1e10  Figures 3 and 10, Table 8, with all of openwebtext
# --desnets=51.47m --recovery_tokens=1e8 --baselines=random --downstream=boolq,mmlu,winogrande,\
#   xsum,hellaswag,arc_easy                      Table 13: smaller than the whole chain, so cut from
#                                                GPT-2 (the paper does not say where it starts)
# Table 1's other AnsNets are fine-tuned on Dolly in their own vocabularies and then answer Dolly's
# questions; GPT2-XL learns from the answers and heads the chain:
#   python data/prepare.py dolly --prompt=paper --tokenizer=FOLDER --out=data/dolly_llama3
# --ansnet=meta-llama/Meta-Llama-3-8B --ansnet_data=dolly_llama3 --bridge=openai-community/gpt2-xl
# --ansnet=Qwen/Qwen3-4B --ansnet_data=dolly_qwen3 --bridge=openai-community/gpt2-xl
#
# Appendix C.1: all models are fine-tuned on Dolly (3 epochs, batch size 2); the chain is distilled
# on-policy for 5000 steps, keeping the best model by Rouge-L; descendants recover on 78M tokens of
# OpenWebText for 2 epochs and are fine-tuned on each task (10 epochs, batch size 16 or 8). What the
# paper leaves open we choose: distillation has batches of 64 and the learning rate of fine-tuning.
# The paper samples from the teacher alone (--share=1); MiniLLM, on which it builds, mixes in 0.2 of
# the teacher, and so do we. The paper's XLSum has the citation and the number of examples of XSum,
# so we use XSum (xlsum can be prepared, too). Scores are over a set's whole validation split.
method = 'col'
ansnet = 'openai-community/gpt2-xl'
chain = ('openai-community/gpt2-large', 'openai-community/gpt2-medium', 'openai-community/gpt2')
sft_data = 'dolly'
sft_epochs = 3
tuning_learning_rate = 1e-5
distillation = 'minillm'
distillation_batch_size = 64
samples = 256
tokens = 5000 * 64 * 512
desnets = ('138m', '220m', '277m', '380m', '537m')
recovery_tokens = 78e6
recovery_epochs = 2
baselines = ('random', 'single')
downstream = ('mmlu', 'xsum', 'hellaswag', 'winogrande', 'boolq', 'dolly')
downstream_epochs = 10
downstream_batch_size = 16
answers = 20_000  # more than any validation split has: all of it

data = 'openwebtext'
block_size = 512
batch_size = 2
eval_interval = 250
learning_rate = 5e-4
schedule = 'cosine'
