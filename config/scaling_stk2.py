# Scaling laws of model reuse (Liew and Kato), Table 1, column Stk x2: a 0.1B base is stacked to
# twice its depth and trained on the base's data; and the stacked shape from scratch (section 5.2).
# The table's other growths: --reuse=stk4 --scratch= (Stk x4); --reuse=exp --scratch= (Exp x2: width
# times sqrt 2, function preserving); --variants=stable --scratch= (Stk (sta))
# Figure 6, second stages on data that the base has not seen: --fresh_data=True --scratch=
from config.scaling_cpt_code import *

reuse = ('stk2',)
second_data = ''
