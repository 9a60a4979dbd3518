# Inheritune (Sanyal et al.), Figure 11: children of 4 to 20 of OpenLLaMA-3B's 26 layers, on 1B
# tokens.
from inheritune_openllama import *

depths = (4, 6, 8, 10, 16, 18, 20)
