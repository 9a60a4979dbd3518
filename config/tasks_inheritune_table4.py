# Inheritune (Sanyal et al.), Table 4: zero-shot tasks. The average is over HellaSwag's normalised
# accuracy and the plain accuracy of the others.
#   python evaluate.py out/inheritune_fineweb_medium config/tasks_inheritune_table4.py
tasks = ('arc_easy', 'piqa', 'sciq', 'hellaswag', 'lambada_openai')
average = (
    'arc_easy acc',
    'piqa acc',
    'sciq acc',
    'hellaswag acc_norm',
    'lambada_openai acc',
)
