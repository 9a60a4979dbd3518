# Progressive training (Yano et al.), Table 3, "+Fixed Data": the headline family on at most 320B
# different tokens, as many as the 8B model sees when it is trained alone. The last stage reads the
# 100B that are left and then, from the beginning, 140B of the stages before it (section 4.3,
# Figure 3): none that it has seen itself.
from progressive_8b import *

unique_tokens = 320e9
order = 'repeat'
