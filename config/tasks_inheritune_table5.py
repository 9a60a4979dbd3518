# Inheritune (Sanyal et al.), Table 5: nine tasks without examples and their average, and MMLU with
# five, which is not part of it.
#   python evaluate.py FOLDER ... config/tasks_inheritune_table5.py
tasks = (
    'wsc273',  # Winograd
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
