# Scaling laws of model reuse (Liew and Kato), Appendix D.3 and Table 7: the joint law in D1, D2
# and N, stacking, six sizes (Table 4).
from scaling_stk2 import *
from _six_sizes import *
