# Scaling laws of model reuse (Liew and Kato), Appendix E.3, Table 8: a 15M base is stacked and
# trained on up to 2,000 tokens per parameter of the base; every run decays three times, each time
# on other data, to measure the noise of the loss.
# Table 9 and Figure 11, 0.5B to 1B: --size=0.5b --longest=3.69e10 --batch_size=512
#   --learning_rate=4e-4 --warmup=800 --first=0.25,0.5,1,2 --second=4,5,6,7 --decays=1
from config.scaling_cpt_code import *

size = '15m'
longest = 17600 * 128 * 1024
first = (1 / 8, 3 / 16, 1 / 4, 1 / 2, 1.0, 4.0)
second = (4.0, 8.0, 12.0)
decays = 3
batch_size = 128
learning_rate = 8e-3
reuse = ('stk2',)
second_data = ''
scratch = ()
