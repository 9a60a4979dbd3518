# Progressive training (Yano et al.), Table 1: word perplexity on WikiText's test split and seven
# zero-shot tasks. evaluate.py also prints the validation loss on FineWeb-Edu.
#   python evaluate.py out/progressive_8b config/tasks_progressive.py --data=fineweb_edu
tasks = ('wikitext', 'lambada_openai', 'arc_easy', 'arc_challenge', 'winogrande', 'piqa')
tasks += ('openbookqa', 'hellaswag')
