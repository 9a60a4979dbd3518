# Inheritune (Sanyal et al.), Table 1: perplexity on WikiText, accuracy on LAMBADA.
#   python evaluate.py FOLDER ... config/tasks_inheritune_table1.py
tasks = ('wikitext', 'lambada_openai')
