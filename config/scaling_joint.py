# Scaling laws of model reuse (Liew and Kato), section 4.1 and Table 7: the joint law in D1, D2 and
# N, continual pretraining on code, six sizes and their longest runs (Table 4).
# Appendix D.3, stacking: --reuse=stk2 --second_data=
from config.scaling_cpt_code import *

sizes = ('15m', '44m', '0.1b', '0.2b', '0.5b', '1b-reuse')
longest = tuple(
    steps * batch * 1024
    for steps, batch in zip(
        (17600, 17600, 17600, 35200, 70400, 70400), (128, 256, 512, 512, 512, 1024)
    )
)
batch_sizes = (128, 256, 512, 512, 512, 1024)
learning_rates = (8e-3, 4e-3, 4e-3, 2e-3, 4e-4, 4e-4)
warmups = (200, 200, 200, 400, 800, 800)
