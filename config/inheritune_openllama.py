# Inheritune (Sanyal et al.), Appendix B (low data): the first 13 of OpenLLaMA-3B's 26 layers,
# trained on 1B tokens for 8 epochs.
#   python data/prepare.py slimpajama --tokenizer=FOLDER --max_tokens=1e9
# FOLDER is a folder with OpenLLaMA's tokenizer.json
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
batch_tokens = 64 * 2048  # 131K tokens
learning_rate = 3e-4
schedule = 'cosine'
warmup = 1000  # steps
