# Late-to-Early Training (Zhao et al.), Figures 2 and 8: the 1.4B target model taught by OPT-125M,
# with OPT's tokenizer.
#   python data/prepare.py pile --tokenizer=FOLDER --out=data/pile_opt --max_tokens=20.2e9
# Its repository has no tokenizer.json: FOLDER is where transformers has saved one,
#   AutoTokenizer.from_pretrained('facebook/opt-125m').save_pretrained(FOLDER)
# The tokenizer mismatch of Table 5 (LET with a dagger) is this teacher on SmolLM2's tokens:
# --data=pile_smollm2.
from _let import *

teacher = 'facebook/opt-125m'
data = 'pile_opt'
