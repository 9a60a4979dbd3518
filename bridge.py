"""
Text in, text out: the answers of any model, in any vocabulary, as a supervised set that another model learns from (the bridge of
paper 004, section 3.2, and sequence-level distillation), and how good answers are.
"""
import json
import re
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import UserError, read_json
from data.instruct import prompt, write_supervised
from data.prepare import Preparation, load_tokenizer, tokenizer_of_model
from let import is_ours, transformers_model
from machine import choose_device, processes
from minillm import answer
from model import GPT, load


def text_generator(name, device='cpu', max_new_tokens=256):
    """prompts -> answers (lists of texts), greedy, of any model that load() or transformers opens, in its own vocabulary."""
    encode, decode, _, end = load_tokenizer(tokenizer_of_model(name))
    model = load(name, device) if is_ours(name) else transformers_model(name, 'AutoModelForCausalLM').to(device)
    model.eval()

    def ours(prompts):
        ids = [torch.tensor([int(i) for i in encode(text)] or [end], device=device) for text in prompts]
        room = max(1, model.config.block_size - max_new_tokens)
        out, answers, *_ = answer(model, [i[-room:] for i in ids], max_new_tokens, end, temperature=0)
        return [decode([t for t in row[said].tolist() if t != end]).strip() for row, said in zip(out, answers)]

    @torch.no_grad()
    def theirs(prompts):
        ids = [[int(i) for i in encode(text)] or [end] for text in prompts]
        longest = max(map(len, ids))
        batch = torch.tensor([[end] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        out = model.generate(batch, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=end,
                             eos_token_id=end)
        return [decode([t for t in row[longest:].tolist() if t != end]).strip() for row in out]
    return ours if isinstance(model, GPT) else theirs


def write_answers(generate, examples, path, style='paper', batch_size=16):
    """
    Let `generate` (prompts -> answers) answer examples, [dict(instruction, input)], and append them to the .jsonl file `path`, a
    batch at a time; what is there already is kept, so an interrupted run goes on. Returns the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_text(encoding='utf-8').rpartition('\n')[0] if path.is_file() else ''   # a last line may be cut short
    done = whole.count('\n') + 1 if whole else 0
    path.write_text(whole + '\n' * bool(whole), encoding='utf-8')
    with open(path, 'a', encoding='utf-8') as file:
        for i in tqdm(range(done, len(examples), batch_size), desc=f'answers for {path.parent.name}', leave=False):
            chunk = examples[i:i + batch_size]
            said = generate([prompt(e['instruction'], e['input'], style) for e in chunk])
            file.writelines(json.dumps(dict(e, output=a), ensure_ascii=False) + '\n' for e, a in zip(chunk, said))
            file.flush()
    return path


def read_examples(path):
    """The examples of a .jsonl file, a list of dicts. Raises UserError for a damaged one."""
    try:
        examples = [json.loads(line) for line in Path(path).read_text(encoding='utf-8').split('\n') if line]
        assert all(isinstance(example[key], str) for example in examples for key in ('instruction', 'input', 'output'))
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__})') from None
    return examples


def pseudo_answers(ancestor, name, run, out, limit=0):
    """
    A supervised set in the folder `out` (made once) with the prompts of the prepared set `name` and the ancestor's answers to them
    (sequence-level distillation, Eq. 2), in the tokenizer of `name`. limit: answers at most; 0: all.
    """
    what = f'{limit or "all"} answers of {ancestor} to {name}'
    if (Path(out) / 'meta.json').is_file():
        found = read_json(Path(out) / 'meta.json').get('corpus')
        if found != what:
            raise UserError(f'{out} holds {found}, not {what}: remove it and {out}.answers, or choose another --out_dir')
        return out
    if processes()[0]:   # one process writes, the others wait for it
        while not (Path(out) / 'meta.json').is_file():
            time.sleep(1)
        return out
    source = Path(run.data_dir) / name
    meta = read_json(source / 'meta.json', options=dict, tokenizer=str)
    style, generate = meta['options']['prompt'], text_generator(ancestor, choose_device(run.device), min(256, run.block_size // 2))
    examples = []
    for split in ('train', 'val'):
        wanted = read_examples(source / f'{split}.jsonl')[:max(1, limit // (1 if split == 'train' else 8)) if limit else None]
        said = read_examples(write_answers(generate, wanted, Path(f'{out}.answers') / f'{split}.jsonl', style))
        examples += [(e, split == 'val') for e in said if e['output']]
    options = Preparation(corpus=what, out=str(out), tokenizer=meta['tokenizer'], prompt=style)
    return write_supervised(examples, options, Path(out))


def rouge_l(text, reference):
    """Rouge-L of two texts (Eq. 8, beta = 1): the F-measure of their longest common subsequence of lower-case words."""
    a, b = (re.findall(r'[a-z0-9]+', t.lower()) for t in (text, reference))
    before = [0] * (len(b) + 1)
    for word in a:
        now = [0]
        for j, other in enumerate(b):
            now.append(before[j] + 1 if word == other else max(before[j + 1], now[j]))
        before = now
    common = before[-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


@torch.no_grad()
def answer_scores(model, examples, n=64, max_new_tokens=48):
    """(mean Rouge-L, share of exact answers) of greedy answers to the first n examples (data.instruct.Examples)."""
    decode = load_tokenizer(examples.tokenizer)[1]
    device, n, max_new_tokens = model.wte.weight.device, min(n, len(examples)), min(max_new_tokens, model.config.block_size // 2)
    room = model.config.block_size - max_new_tokens
    prompts = [torch.from_numpy(examples.prompt(i, room)).to(device) for i in range(n)]
    ids, answers, *_ = answer(model, prompts, max_new_tokens, examples.end, temperature=0)
    said = [decode([t for t in row[mask].tolist() if t != examples.end]) for row, mask in zip(ids, answers)]
    right = [e['output'] for e in read_examples(examples.folder / 'val.jsonl')[:n]]
    return statistics.mean(map(rouge_l, said, right)), statistics.mean(a.strip() == b.strip() for a, b in zip(said, right))
