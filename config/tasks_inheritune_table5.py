# Inheritune (Sanyal et al.), Table 5: nine tasks without examples, MMLU with five.
#   python evaluate.py FOLDER ... config/tasks_inheritune_table5.py
# Table 1: --tasks=wikitext,lambada_openai
# Table 4, without examples: --tasks=arc_easy,piqa,sciq,hellaswag,lambada_openai
tasks = (
    'wsc273',  # Winograd
    'piqa',
    'boolq',
    'winogrande',
    'logiqa',
    'mmlu:5',
    'wnli',
    'qnli',
    'mnli',
    'truthfulqa_mc2',
)
