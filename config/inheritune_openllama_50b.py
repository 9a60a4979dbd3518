# Inheritune (Sanyal et al.), Appendix B.2, Figure 12 and Tables 8 and 9: 13 layers of OpenLLaMA-3B
# on 50B tokens, none repeated. Appendix C.2 has 191K steps of 131K tokens, which is half as many.
from inheritune_openllama import *

tokens = 50e9
unique_tokens = 0
