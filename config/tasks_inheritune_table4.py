# Inheritune (Sanyal et al.), Table 4: five tasks without examples.
#   python evaluate.py FOLDER ... config/tasks_inheritune_table4.py
tasks = ('arc_easy', 'piqa', 'sciq', 'hellaswag', 'lambada_openai')
