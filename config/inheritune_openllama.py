# Inheritune (Sanyal et al.), Appendix B (low data): the first 13 of OpenLLaMA-3B's 26 layers,
# trained on 1B tokens for 8 epochs.
#   python data/prepare.py slimpajama --tokenizer=FOLDER --max_tokens=1e9
# FOLDER is a folder with OpenLLaMA's tokenizer.json. SlimPajama replaces the paper's corpus, a
# sample of RedPajama. 8 epochs are 61,036 steps; the paper says 64K.
# Table 5:  python evaluate.py out/inheritune_openllama config/tasks_inheritune_table5.py
# Figure 11, other depths:
#   for n in 4 6 8 10 13 16 18 20; do python train.py config/inheritune_openllama.py --n=$n \
#     --max_n=$n --out_dir=out/openllama-$n; done
# Figure 13 and Table 9, 20 epochs, keeping a model after each: --tokens=20e9 --keep_every=7630
# Figure 12 and Table 8, 50B tokens without repetition, keeping a model every 5B (those at 10B and
# 20B are "fresh" in Table 9): --tokens=50e9 --unique_tokens=0 --keep_every=38147 (Appendix C.2 has
# 191K steps of 131K tokens, which are half of 50B)
method = 'inheritune'
reference = 'openlm-research/open_llama_3b'
size = 'openllama-3b'  # its shape, for a dry run and, shrunk, for --toy=True
n = 13
max_n = 13  # no growth (the recipe skips step 3)
tokens = 8e9
unique_tokens = 10**9

data = 'slimpajama'
order = 'epoch'
block_size = 2048
batch_size = 64  # sequences of 2,048: 131K tokens
learning_rate = 3e-4
schedule = 'cosine'
warmup = 1000  # steps
