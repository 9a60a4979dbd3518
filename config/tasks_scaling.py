# Scaling laws of model reuse (Liew and Kato), Table 5: seven zero-shot tasks.
#   python evaluate.py out/scaling_joint/1b-reuse-73.8G config/tasks_scaling.py --data=slimpajama
tasks = ('arc_challenge', 'arc_easy', 'lambada_openai', 'logiqa', 'piqa', 'sciq', 'winogrande')
kl_examples = 0
