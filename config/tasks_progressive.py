# Progressive training (Yano et al.), Table 1: WikiText's test split (perplexity of words) and seven
# zero-shot tasks. FineWeb-Edu's validation loss is evaluate.py's own.
#   python evaluate.py out/progressive_8b config/tasks_progressive.py --data=fineweb_edu
tasks = ('wikitext', 'lambada_openai', 'arc_easy', 'arc_challenge', 'winogrande', 'piqa')
tasks += ('openbookqa', 'hellaswag')
