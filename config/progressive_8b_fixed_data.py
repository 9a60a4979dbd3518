# Progressive training (Yano et al.), Table 3, "+Fixed Data": the headline family on at most 320B
# different tokens, as many as the 8B model sees when it is trained alone. The second epoch begins
# within the last stage (section 4.3, Figure 3).
from progressive_8b import *

unique_tokens = 320e9
