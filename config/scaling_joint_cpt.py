# Scaling laws of model reuse (Liew and Kato), section 4.1 and Table 7: the joint law in D1, D2
# and N, continual pretraining on code, six sizes (Table 4).
from scaling_cpt_code import *
from _six_sizes import *
