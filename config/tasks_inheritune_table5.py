# Inheritune (Sanyal et al.), Table 5: nine zero-shot tasks with their average, as in Figure 10, and
# five-shot MMLU, which is not in the average.
#   python evaluate.py FOLDER ... config/tasks_inheritune_table5.py
tasks = (
    'wsc',  # the paper's "Winograd": its scores are multiples of 1/104, so of SuperGLUE's WSC
    'piqa',
    'boolq',
    'winogrande',
    'logiqa',
    'wnli',
    'qnli',
    'mnli',
    'truthfulqa_mc2',
)
average = tuple(f'{task} acc' for task in tasks)
tasks += ('mmlu:5',)
