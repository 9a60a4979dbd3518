# Late-to-Early Training (Zhao et al.), Table 6, where it fails: a teacher that has seen too
# little, GPT-2 small, does worse than none.
#   python data/prepare.py pile --max_tokens=20.2e9
# --teacher=gpt2-medium: the other row. GPT-2 reads 1024 tokens at once, so of a sequence of 1280
# it is shown two halves.
from _let import *

teacher = 'gpt2'
data = 'pile'
