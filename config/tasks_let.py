# Late-to-Early Training (Zhao et al.), Table 1: nine one-shot tasks and their average. For runs
# that kept models on the way (--keep_every=500), also the average over training, as in Figures 1
# and 8 to 11:
#   python evaluate.py out/let_1.4b/*/ out/let_1.4b/*/step-* config/tasks_let.py --data=pile_smollm2
tasks = ('arc_challenge:1', 'arc_easy:1', 'hellaswag:1', 'lambada_openai:1', 'openbookqa:1')
tasks += ('piqa:1', 'sciq:1', 'winogrande:1', 'boolq:1')
kl_examples = 0
