# Inheritune (Sanyal et al.), Appendix B (low data): the first 13 of OpenLLaMA-3B's 26 layers,
# trained on 1B tokens for 8 epochs.
#   python data/prepare.py slimpajama --tokenizer=FOLDER --max_tokens=1e9
# FOLDER is a folder with OpenLLaMA's tokenizer.json.
# Figure 11, children of other depths: --depths=4,6,8,10,16,18,20
# Appendix B.2, Figure 12 and Tables 8 and 9, 50B tokens, none repeated: --tokens=50e9
# --unique_tokens=0 (Appendix C.2 has 191K steps of 131K tokens, which is half as many)
method = 'inheritune'
reference = 'openlm-research/open_llama_3b'
size = 'openllama-3b'  # its shape, for --toy=True, which trains a small one in its place
n = 13
max_rounds = 1  # no growth (the recipe skips step 3)
tokens = 8e9
unique_tokens = 10**9

data = 'slimpajama'
order = 'epoch'
block_size = 2048
batch_size = 64  # sequences of 2,048: 131K tokens
learning_rate = 3e-4
schedule = 'cosine'
warmup = 1000  # steps
