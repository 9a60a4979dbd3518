# Scaling laws of model reuse (Liew and Kato), section 4.1 and Table 7: the joint law in D1, D2 and
# N for continual pretraining on code. It is fitted to runs of six sizes (Table 4): 1b-reuse, which
# is this preset, and these, each with its own --out_dir=out/scaling_joint_SIZE:
#   --size=15m --longest=2.307e9 --batch_size=128 --learning_rate=8e-3 --warmup=200
#   --size=44m --longest=4.614e9 --batch_size=256 --learning_rate=4e-3 --warmup=200
#   --size=0.1b --longest=9.227e9 --batch_size=512 --learning_rate=4e-3 --warmup=200
#   --size=0.2b --longest=1.845e10 --batch_size=512 --learning_rate=2e-3 --warmup=400
#   --size=0.5b --longest=3.691e10 --batch_size=512
# then
#   python scaling.py fit out/scaling_joint*/results.csv
# Appendix D.3, stacking: --reuse=stk2 --second_data=
# Table 5, benchmarks of the largest base:
#   python evaluate.py out/scaling_joint/1b-reuse-73.8G config/tasks_scaling.py --data=slimpajama
from config.scaling_cpt_code import *

size = '1b-reuse'
longest = 70400 * 1024 * 1024
batch_size = 1024
learning_rate = 4e-4
warmup = 800
