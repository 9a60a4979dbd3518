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
from dataclasses import dataclass, field
from pathlib import Path
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
from engine.loss import kl_of_logits
from engine.parallel import choose_device, set_threads
from engine.report import table
from engine.tokenizer_files import has_chat_template
from model import load, probabilities


class Sampling(NamedTuple):
    """How tokens are drawn, as in model.probabilities; `stop` ends a text."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple = ()


AS_IT_IS = Sampling()  # from the model's own distribution


def generate(model, prompts, max_new_tokens, sampling=AS_IT_IS):
    """
    Continue each prompt (1-d int64 tensors, of any lengths); returns the continuations, up to and
    without `stop`, in the same order. Prompts of one length go through the model together.
    """
    continuations = [None] * len(prompts)
    for length in dict.fromkeys(len(prompt) for prompt in prompts):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = torch.stack([prompts[i] for i in rows])
        out = model.generate(batch, max_new_tokens, *sampling)
        for i, sequence in zip(rows, out[:, length:]):
            continuations[i] = sequence[: first_of(sampling.stop, sequence)]
    return continuations


def first_of(stop, ids):
    """The place of the first of the tokens `stop` in ids (T,), or None."""
    return next(iter(torch.isin(ids, torch.tensor(stop, device=ids.device)).nonzero()), None)


@dataclass
class Speculation:
    """What drafting did."""

    rounds: int = 0  # of drafting and reading what was drafted
    drafted: int = 0  # tokens
    accepted: int = 0  # of these
    divergences: list = field(default_factory=list)  # KL(draft || model) at each drafted position

    def add(self, other):
        """Count what drafting other texts did as well."""
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.divergences += other.divergences

    @property
    def acceptance_rate(self):
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(1, self.drafted)

    @property
    def divergence(self):
        """The mean KL(draft || model) in nats."""
        return sum(self.divergences) / max(1, len(self.divergences))


@torch.no_grad()
def speculate(model, draft, idx, max_new_tokens, draft_tokens=8, sampling=AS_IT_IS):
    """
    Continue idx (1, T) by the model's own distribution, drafted by a smaller model of the same
    tokenizer. Returns the continuation (1-d, up to and without `stop`) and a Speculation. Raises
    UserError if the context is too short.
    """
    *how, stop = sampling
    start, goal = idx.shape[1], idx.shape[1] + max_new_tokens
    check_draft(model, draft, goal)
    more = model.config.vocab_size - draft.config.vocab_size  # padding of one tokenizer's heads
    reading, drafting, stats = Decoding(model, 1, goal), Decoding(draft, 1, goal), Speculation()
    while idx.shape[1] < goal:
        known = idx.shape[1]
        drafts = []  # the draft's logits, of fewer tokens than the goal: the model adds one more
        for _ in range(min(draft_tokens, goal - known - 1)):
            # after full acceptance the draft has not read the last two tokens: it reads both
            unread = idx[:, drafting.cache.length :].clamp(max=draft.config.vocab_size - 1)
            drafts.append(F.pad(drafting.read(unread)[0, -1], (0, more), value=-math.inf))
            token = torch.multinomial(probabilities(drafts[-1], *how), 1)
            idx = torch.cat((idx, token[None]), 1)
        logits = reading.read(idx[:, reading.cache.length :])[0, -len(drafts) - 1 :]
        theirs = torch.stack(drafts) if drafts else logits[:0]
        p, q = probabilities(logits, *how), probabilities(theirs, *how)
        accepted, token = accept(p, q, idx[0, known:])
        idx = torch.cat((idx[:, : known + accepted], token[None]), 1)
        for decoding in (reading, drafting):  # forget what was rejected
            decoding.cache.length = min(decoding.cache.length, known + accepted)
        theirs = theirs[:, : draft.config.vocab_size]  # without what it was filled up with
        divergences = kl_of_logits(theirs, logits[:-1]).tolist()
        stats.add(Speculation(1, len(drafts), accepted, divergences))
        if (end := first_of(stop, idx[0, known:])) is not None:
            return idx[0, start : known + end], stats
    return idx[0, start:], stats


def accept(p, q, proposed):
    """
    (how many of the proposed tokens (n,) are accepted, the token (1,) that follows them), given the
    model's distributions p (n + 1, V) and the draft's q (n, V).
    """
    n = torch.arange(len(proposed), device=p.device)
    kept = torch.rand(len(n), device=p.device) * q[n, proposed] < p[n, proposed]
    accepted = int(kept.int().cumprod(0).sum())
    left = p[accepted]
    if accepted < len(proposed):
        left = (left - q[accepted]).clamp(min=0)
    return accepted, torch.multinomial(left, 1)


def check_draft(model, draft, goal):
    """Raise UserError unless a draft can propose texts of `goal` tokens for a model."""
    longest = min(model.config.block_size, draft.config.block_size)
    if goal > longest:
        raise UserError(
            f'{goal} tokens do not fit the context of {longest}: use a smaller --max_new_tokens'
        )


# ----------------------------------------------------------------------------------------------
# the command line


@dataclass
class Options:
    """Generate text from a model folder."""

    model: str = 'out/progressive_tiny/64x4'  # folder or hub name
    draft: str = ''  # folder of a smaller model of the same family that drafts; empty: none
    draft_tokens: Count = 8  # tokens drafted at a time
    prompt: str = ''  # text to continue; empty: from the end-of-text token
    prompts: str = ''  # file with a prompt per line, instead
    tokenizer: str = ''  # bytes, gpt2, or a folder with tokenizer.json; empty: the model's
    samples: Annotated[int, Range(1, 10**5)] = 1  # continuations of each prompt
    max_new_tokens: Count = 200  # longest continuation
    temperature: NonNegative = 0.8  # 0: greedy
    top_k: Natural = 0  # only the k most likely tokens; 0: all
    top_p: Annotated[float, Range(1e-9, 1)] = 1.0  # only the fewest tokens that hold this much
    stop: bool = True  # end at the end-of-text token
    chat: bool = False  # talk at the terminal, by the model's chat template
    seed: Natural = 0  # of the sampling
    device: str = 'auto'  # cuda, mps or cpu


def read_prompts(options):
    """The texts to continue. Raises UserError for a missing file."""
    if not options.prompts:
        return [options.prompt]
    if not Path(options.prompts).is_file():
        raise UserError(f'no file {options.prompts}')
    return Path(options.prompts).read_text(encoding='utf-8').splitlines()


def choose_tokenizer(options, config):
    """
    The Tokenizer of the model of this GPTConfig, or the one given. Raises UserError if it has
    another.
    """
    name = options.tokenizer or tokenizer_of_model(options.model)
    tokenizer = load_tokenizer(name)
    if not same_tokenizer(tokenizer_in(options.model), name):
        raise UserError(f'{options.model} has another tokenizer than {name}')
    check_tokenizer(name, config)
    return tokenizer


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
    prompt = torch.tensor(ids, device=model.wte.weight.device)
    (found,) = generate(model, [prompt], max_new_tokens, sampling)
    return tokenizer.text(found.tolist(), ids).strip()


def converse(model, tokenizer, options, sampling):
    """Answer every line that is typed, with the conversation so far as context, to the end."""
    encode, messages = conversation_encoder(options.model), []
    while True:
        try:
            messages.append(dict(role='user', content=input('> ')))
        except EOFError:
            return print()
        ids = encode(messages)
        if len(ids) + options.max_new_tokens > model.config.block_size:
            sizes = f'{len(ids)} tokens so far and --max_new_tokens={options.max_new_tokens}'
            raise UserError(f'{sizes} do not fit the context of {model.config.block_size}')
        answer = reply(model, tokenizer, ids, options.max_new_tokens, sampling)
        print(answer, flush=True)
        messages.append(dict(role='assistant', content=answer))


def main(argv):
    """Command line: print the continuations; with a draft model, what it brought."""
    options, _, _ = configure(argv, Options, program='sample.py')
    device = choose_device(options.device)
    model = load(options.model, device).eval()
    set_threads(device, model.config, 1)
    tokenizer = choose_tokenizer(options, model.config)
    stop = tokenizer.ends if options.stop else ()
    sampling = Sampling(options.temperature, options.top_k, options.top_p, stop)
    torch.manual_seed(options.seed)
    if options.chat and options.draft:
        raise UserError('--chat has no draft: leave out --draft')
    if options.chat:
        return converse(model, tokenizer, options, sampling)
    texts = [text for text in read_prompts(options) for _ in range(options.samples)]
    prompts = []
    for text in texts:
        ids = [int(i) for i in tokenizer.encode(text)] or [tokenizer.end]
        prompts.append(torch.tensor(ids, device=device))
    started = time.time()
    found = generate(model, prompts, options.max_new_tokens, sampling)
    records = [{'': 'alone', 'tokens/s': sum(map(len, found)) / (time.time() - started)}]
    if options.draft:
        check_tokenizer_of_draft(options.model, options.draft)
        limits = options.max_new_tokens, options.draft_tokens
        draft = load(options.draft, device).eval()
        found, record = draft_for(model, draft, prompts, limits, sampling)
        records.append(record)
    for i, (text, ids, continuation) in enumerate(zip(texts, prompts, found), 1):
        print(f'--- {i}\n{text}{tokenizer.text(continuation.tolist(), ids.tolist())}')
    print(f'\n{table(records)}')


def check_tokenizer_of_draft(name, draft):
    """Raise UserError if a model, a folder or hub name, has another tokenizer than its draft."""
    if not same_tokenizer(tokenizer_in(name), tokenizer_in(draft)):
        raise UserError(f'{name} has another tokenizer than its draft {draft}')


def draft_for(model, draft, prompts, limits, sampling):
    """
    (the continuations of prompts with a draft model, the record of what it brought). limits:
    (most tokens of a continuation, tokens that are drafted ahead).
    """
    started = time.time()
    found, stats = [], Speculation()
    for prompt in prompts:
        continuation, more = speculate(model, draft, prompt[None], *limits, sampling)
        found.append(continuation)
        stats.add(more)
    tokens = sum(map(len, found))
    record = {'': 'drafted', 'tokens/s': tokens / (time.time() - started)}
    record['acceptance rate'] = stats.acceptance_rate
    record['tokens per round'] = tokens / max(1, stats.rounds)
    record['KL(draft || model)'] = stats.divergence
    return found, record


if __name__ == '__main__':
    run_as_program(main)
