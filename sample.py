"""
Text from trained models, alone or with a smaller member of the family that drafts.

    python sample.py --model=out/progressive_tiny/64x4 --prompt="Return the"
    python sample.py --model=out/progressive_tiny/64x4 --draft=out/progressive_tiny/48x2 \\
                     --draft_tokens=4 --max_new_tokens=100 --temperature=0
    python sample.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True

Speculative decoding (Leviathan et al.; progressive training, section 5.3): the draft model
proposes a few tokens, the model scores them all in one pass, accepts each with probability
min(1, p / q), and replaces the first that it rejects by a token from the part of p above q. What
comes out is distributed exactly as if the model had written it alone; greedy, it is the same text.
"""

import math
import time
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch.nn import functional as F

from configurator import Count, Natural, NonNegative, Range, configure
from data.instruct import encode_turns
from data.vocabulary import (
    check_tokenizer,
    load_tokenizer,
    same_tokenizer,
    tokenizer_in,
    tokenizer_of_model,
)
from engine.decoding import Decoding
from engine.errors import UserError, run_as_program
from engine.hub import model_folder
from engine.parallel import choose_device, set_threads
from engine.report import table
from engine.tokenizer_files import has_chat_template
from model import load, probabilities


class Sampling(NamedTuple):
    """How tokens are drawn, as in model.probabilities; any token in `stop` ends a text."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple = ()


AS_IT_IS = Sampling()  # from the model's own distribution


def generate(model, prompts, max_new_tokens, sampling=AS_IT_IS):
    """The continuations of prompts (n, T) int64, a list of (new,), each without its end."""
    found = model.generate(prompts, max_new_tokens, *sampling)[:, prompts.shape[1] :]
    return [before_end(ids, sampling.stop) for ids in found]


def before_end(ids, stop):
    """The tokens ids (T,) before the first of the tokens `stop`."""
    ends = torch.isin(ids, torch.tensor(stop, device=ids.device)).nonzero()
    return ids[: ends[0]] if len(ends) else ids


@torch.no_grad()
def speculate(model, draft, idx, max_new_tokens, draft_tokens=8, sampling=AS_IT_IS):
    """
    Continue idx (1, T) by the model's own distribution, drafted by a smaller model of the same
    tokenizer. Returns the continuation (new,), without its end, how many tokens were drafted, and
    how many of them accepted. Raises UserError if a context is too short.
    """
    *how, stop = sampling
    start, goal, rows = idx.shape[1], idx.shape[1] + max_new_tokens, draft.config.vocab_size
    longest = min(model.config.block_size, draft.config.block_size)
    if goal > longest:
        raise UserError(f'{goal} tokens do not fit the context of {longest}: --max_new_tokens')
    more = model.config.vocab_size - rows  # padding of one tokenizer's heads: never drawn
    reading, drafting = Decoding(model, 1, goal), Decoding(draft, 1, goal)
    drafted = taken = 0
    while idx.shape[1] < goal:
        known, q = idx.shape[1], []
        for _ in range(min(draft_tokens, goal - known - 1)):  # the model adds one more
            # after full acceptance the draft has not read the last two tokens: read both again
            unread = idx[:, drafting.length :].clamp(max=rows - 1)
            logits = F.pad(drafting.read(unread)[0, -1], (0, more), value=-math.inf)
            q.append(probabilities(logits, *how))
            idx = torch.cat((idx, torch.multinomial(q[-1], 1)[None]), 1)
        logits = reading.read(idx[:, reading.length :])[0, -len(q) - 1 :]
        accepted, token = accept(probabilities(logits, *how), q, idx[0, known:])
        idx = torch.cat((idx[:, : known + accepted], token[None]), 1)
        for decoding in (reading, drafting):  # forget what was rejected
            decoding.length = min(decoding.length, known + accepted)
        drafted, taken = drafted + len(q), taken + accepted
        if len(before_end(idx[0, known:], stop)) < idx.shape[1] - known:
            break
    return before_end(idx[0, start:], stop), drafted, taken


def accept(p, q, proposed):
    """
    (how many of the proposed tokens (n,) are accepted, the token (1,) that follows them), given the
    model's distributions p (n + 1, V) and the draft's q, a list of n (V,).
    """
    q = torch.stack([*q, torch.zeros_like(p[0])])  # nothing was drafted after them
    n = torch.arange(len(proposed), device=p.device)
    kept = torch.rand(len(n), device=p.device) * q[n, proposed] < p[n, proposed]
    accepted = int(kept.int().cumprod(0).sum())
    return accepted, torch.multinomial((p[accepted] - q[accepted]).clamp(min=0), 1)


def check_same_tokenizer(model, name):
    """Raise UserError if a model, a folder or hub name, has another tokenizer than `name`."""
    if not same_tokenizer(tokenizer_in(model), name):
        raise UserError(f'{model} has another tokenizer than {name}')


def draft_for(model, draft, prompts, limits, sampling):
    """
    (the continuations of prompts, each (1, T), with a draft model; a record of its speed and
    acceptance rate). limits: most tokens of a continuation, tokens that are drafted ahead.
    """
    started = time.time()
    found, drafted, accepted = zip(
        *[speculate(model, draft, p, *limits, sampling) for p in prompts]
    )
    record = {'seconds': (time.time() - started) / len(found)}
    return found, record | {'acceptance rate': sum(accepted) / max(1, sum(drafted))}


# ----------------------------------------------------------------------------------------------
# conversations


def conversation_encoder(name):
    """
    A function messages [dict(role='user', content=...), ...] -> the ids before the answer: by the
    template in the model's folder, else as data/prepare.py lays conversations out without one.
    """
    folder = model_folder(name)
    if has_chat_template(folder):
        from extras.chat import prompt_encoder  # with transformers

        return prompt_encoder(folder)
    tokenizer = load_tokenizer(tokenizer_of_model(name))
    return lambda messages: [int(i) for i in encode_turns(messages, tokenizer)[0]]


def reply(model, tokenizer, ids, max_new_tokens, sampling):
    """The text that a model says after a conversation of token ids."""
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    (found,) = generate(model, prompt, max_new_tokens, sampling)
    return tokenizer.text(found.tolist(), ids).strip()


def converse(model, tokenizer, options, sampling):
    """
    Answer every line that is typed, to the end of the input. When the context is full, the model
    sees the end of the conversation.
    """
    encode, messages = conversation_encoder(options.model), []
    while True:
        try:
            messages.append(dict(role='user', content=input('> ')))
        except EOFError:
            return print()
        ids = encode(messages)
        answer = reply(model, tokenizer, ids, options.max_new_tokens, sampling)
        print(answer, flush=True)
        messages.append(dict(role='assistant', content=answer))


# ----------------------------------------------------------------------------------------------
# the command line


@dataclass
class Options:
    """Generate text from a model folder."""

    model: str = 'out/progressive_tiny/64x4'  # folder or hub name
    draft: str = ''  # folder of a smaller model of the same family that drafts; empty: none
    draft_tokens: Count = 8  # tokens drafted at a time
    prompt: str = ''  # text to continue; empty: from the end-of-text token
    tokenizer: str = ''  # bytes, gpt2, or a folder with tokenizer.json; empty: the model's
    samples: Count = 1  # continuations
    max_new_tokens: Count = 200  # longest continuation
    temperature: NonNegative = 0.8  # 0: greedy
    top_k: Natural = 0  # only the k most likely tokens; 0: all
    top_p: Annotated[float, Range(1e-9, 1)] = 1.0  # only the fewest tokens that hold this much
    stop: bool = True  # end at the end-of-text token
    chat: bool = False  # talk at the terminal, by the model's chat template
    seed: Natural = 0  # of the sampling
    device: str = 'auto'  # cuda, mps or cpu


def main(argv):
    """Command line: print the continuations; with a draft model, what it brought."""
    options, _, _ = configure(argv, Options, program='sample.py')
    device = choose_device(options.device)
    model = load(options.model, device).eval()
    set_threads(device, model.config, 1)
    name = options.tokenizer or tokenizer_of_model(options.model)
    tokenizer = load_tokenizer(name)
    check_same_tokenizer(options.model, name)
    check_tokenizer(name, model.config)
    stop = tokenizer.ends if options.stop else ()
    sampling = Sampling(options.temperature, options.top_k, options.top_p, stop)
    torch.manual_seed(options.seed)
    if options.chat:
        return converse(model, tokenizer, options, sampling)
    ids = [int(i) for i in tokenizer.encode(options.prompt)] or [tokenizer.end]
    prompts = torch.tensor([ids], device=device).repeat(options.samples, 1)
    started = time.time()
    found = generate(model, prompts, options.max_new_tokens, sampling)
    records = [{'': 'alone', 'seconds': (time.time() - started) / len(found)}]
    if options.draft:
        check_same_tokenizer(options.draft, name)
        draft = load(options.draft, device).eval()
        limits = options.max_new_tokens, options.draft_tokens
        found, record = draft_for(model, draft, prompts[:, None], limits, sampling)
        records.append({'': 'drafted'} | record)
    for i, continuation in enumerate(found, 1):
        print(f'--- {i}\n{options.prompt}{tokenizer.text(continuation.tolist(), ids)}')
    print(f'\n{table(records)}')


if __name__ == '__main__':
    run_as_program(main)
