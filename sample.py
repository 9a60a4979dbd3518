"""
Generate text with trained models, alone or with a smaller member of the family as draft model.

    python sample.py --model=out/progressive_tiny/64x4 --prompt="Return the"
    python sample.py --model=out/progressive_tiny/64x4 --draft=out/progressive_tiny/48x2 \\
                     --draft_tokens=4 --max_new_tokens=100 --temperature=0
    python sample.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True

Speculative decoding (Leviathan et al.; progressive training, section 5.3): the draft model
proposes a few tokens, and the model scores them all in one forward pass. It accepts each with
probability min(1, p / q), p being its own probability of the token and q the draft's, and replaces
the first rejected one by a sample from max(0, p - q), normalised. The output has exactly the
distribution of sampling from the model alone; with greedy decoding it is the same text.
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
    """How tokens are sampled, as in model.probabilities; any of the ids in `stop` ends a text."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple = ()


AS_IT_IS = Sampling()  # the model's own distribution, unmodified


def generate(model, prompts, max_new_tokens, sampling=AS_IT_IS):
    """Continue prompts (n, T) int64: n tensors (new,), each cut before its first stop token."""
    found = model.generate(prompts, max_new_tokens, *sampling)[:, prompts.shape[1] :]
    return [before_end(ids, sampling.stop) for ids in found]


def before_end(ids, stop):
    """The part of ids (T,) before the first token that is in the tuple `stop`; all if none is."""
    ends = torch.isin(ids, torch.tensor(stop, device=ids.device)).nonzero()
    return ids[: ends[0]] if len(ends) else ids


@torch.no_grad()
def speculate(model, draft, idx, max_new_tokens, draft_tokens=8, sampling=AS_IT_IS):
    """
    Continue idx (1, T) int64 by the model's own distribution, with tokens drafted by a smaller
    model that has the same tokenizer. Returns (the continuation (new,), cut before its first stop
    token; number of tokens drafted; number accepted). Raises UserError if the context of either
    model is too short.
    """
    *how, stop = sampling
    start, goal, rows = idx.shape[1], idx.shape[1] + max_new_tokens, draft.config.vocab_size
    longest = min(model.config.block_size, draft.config.block_size)
    if goal > longest:
        raise UserError(
            f'{goal} tokens do not fit the context of {longest}: reduce --max_new_tokens'
        )
    # heads of one tokenizer may be padded differently: the draft proposes no id beyond its own
    more = model.config.vocab_size - rows
    reading, drafting = Decoding(model, 1, goal), Decoding(draft, 1, goal)
    drafted = taken = 0
    while idx.shape[1] < goal:
        known, q = idx.shape[1], []
        for _ in range(min(draft_tokens, goal - known - 1)):  # the model itself adds one more
            # after full acceptance two tokens are unread: the draft's own last one and the model's
            unread = idx[:, drafting.length :].clamp(max=rows - 1)
            logits = F.pad(drafting.read(unread)[0, -1], (0, more), value=-math.inf)
            q.append(probabilities(logits, *how))
            idx = torch.cat((idx, torch.multinomial(q[-1], 1)[None]), 1)
        # logits at the last known and every drafted token: each predicts the token after it
        logits = reading.read(idx[:, reading.length :])[0, -len(q) - 1 :]
        accepted, token = accept(probabilities(logits, *how), q, idx[0, known:])
        idx = torch.cat((idx[:, : known + accepted], token[None]), 1)
        for decoding in (reading, drafting):  # drop rejected tokens from the key/value caches
            decoding.length = min(decoding.length, known + accepted)
        drafted, taken = drafted + len(q), taken + accepted
        if len(before_end(idx[0, known:], stop)) < idx.shape[1] - known:
            break
    return before_end(idx[0, start:], stop), drafted, taken


def accept(p, q, proposed):
    """
    One round of acceptance (Leviathan et al., Algorithm 1): (how many of the `proposed` tokens
    (n,) are accepted, the token (1,) that follows them). p: the model's probabilities (n + 1, V);
    q: the draft's, a list of n tensors (V,).
    """
    # q = 0 behind the last: if all are accepted, the next token is sampled from p itself
    q = torch.stack([*q, torch.zeros_like(p[0])])
    n = torch.arange(len(proposed), device=p.device)
    kept = torch.rand(len(n), device=p.device) * q[n, proposed] < p[n, proposed]  # u < p / q
    accepted = int(kept.int().cumprod(0).sum())  # those before the first rejection
    return accepted, torch.multinomial((p[accepted] - q[accepted]).clamp(min=0), 1)


def check_same_tokenizer(model, name):
    """
    Raise UserError if `model`, a folder or hub name, has a different tokenizer from `name`. A model
    whose tokenizer is unknown passes.
    """
    if not same_tokenizer(tokenizer_in(model), name):
        raise UserError(f'{model} has another tokenizer than {name}')


def draft_for(model, draft, prompts, limits, sampling):
    """
    Continue every one of `prompts`, tensors (1, T) int64, by `speculate`. limits: (max_new_tokens,
    draft_tokens). Returns (the continuations (new,), {'seconds': mean time of one, 'acceptance
    rate': accepted / drafted tokens}).
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
    A function from messages [dict(role='user', content=...), ...] to the token ids that precede the
    answer: by the chat template in the model's folder or, without one, in the layout that
    data/prepare.py gives conversations.
    """
    folder = model_folder(name)
    if has_chat_template(folder):
        from extras.chat import prompt_encoder  # needs transformers

        return prompt_encoder(folder)
    tokenizer = load_tokenizer(tokenizer_of_model(name))
    return lambda messages: [int(i) for i in encode_turns(messages, tokenizer)[0]]


def reply(model, tokenizer, ids, max_new_tokens, sampling):
    """The model's answer, a text, to a conversation given as a list of token ids."""
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    (found,) = generate(model, prompt, max_new_tokens, sampling)
    return tokenizer.text(found.tolist(), ids).strip()


def converse(model, tokenizer, options, sampling):
    """
    Chat at the terminal: answer every line typed, until end of file. A conversation longer than the
    context is cut at the front.
    """
    encode, messages = conversation_encoder(options.model), []
    while True:
        try:
            messages.append(dict(role='user', content=input('> ')))
        except EOFError:
            return print()  # so that the shell's prompt starts a new line
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
    draft: str = ''  # folder of a smaller model of the same family, the draft model; empty: none
    draft_tokens: Count = 8  # tokens drafted at a time
    prompt: str = ''  # text to continue; empty: start from the end-of-text token
    tokenizer: str = ''  # bytes, gpt2, or a folder with tokenizer.json; empty: the model's
    samples: Count = 1  # number of continuations
    max_new_tokens: Count = 200  # longest continuation, in tokens
    temperature: NonNegative = 0.8  # of the sampling; 0: greedy
    top_k: Natural = 0  # sample from the k most likely tokens only; 0: from all
    top_p: Annotated[float, Range(1e-9, 1)] = 1.0  # fewest tokens with this total probability
    stop: bool = True  # stop at the end-of-text token
    chat: bool = False  # chat at the terminal, in the model's chat template if it has one
    seed: Natural = 0  # random seed of the sampling
    device: str = 'auto'  # cuda, mps or cpu


def main(argv):
    """Command line: print continuations and times; with a draft model, its acceptance rate, too."""
    options, _, _ = configure(argv, Options, program='sample.py')
    if options.chat and options.prompt:
        raise UserError('--prompt is a text to continue; with --chat, type at the terminal')
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
        # speculate() continues one prompt at a time: (samples, 1, T)
        found, record = draft_for(model, draft, prompts[:, None], limits, sampling)
        records.append({'': 'drafted'} | record)
    for i, continuation in enumerate(found, 1):
        print(f'--- {i}\n{options.prompt}{tokenizer.text(continuation.tolist(), ids)}')
    print(f'\n{table(records)}')


if __name__ == '__main__':
    run_as_program(main)
