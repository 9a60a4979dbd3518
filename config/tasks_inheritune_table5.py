# Inheritune (Sanyal et al.), Table 5: nine zero-shot tasks, with their average as in Figure 10, and
# MMLU with five examples, which is not part of it.
#   python evaluate.py FOLDER ... config/tasks_inheritune_table5.py
tasks = (
    'wsc',  # "Winograd": its scores are of SuperGLUE's 104 examples
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
