"""
Text from trained models, alone or with a smaller member of the family that drafts for the larger one.

    python sample.py --model=out/progressive_tiny/64x4 --prompt="Return the"
    python sample.py --model=out/progressive_tiny/64x4 --draft=out/progressive_tiny/48x2 --draft_tokens=4 --temperature=0

Speculative decoding (Leviathan et al., used in paper 000, section 5.3): the draft model proposes a few tokens, the model
scores them all in one pass, accepts the first of them with probability min(1, p / q) each, and replaces the first that it
rejects by a token from the part of p above q. What comes out is distributed exactly as if the model had written it alone;
greedy, it is the same text.
"""
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from configurator import UserError, check_ranges, configure, run_as_program
from data.prepare import load_tokenizer, tokenizer_of_model
from evaluate import kl_of_logits, table
from machine import choose_device, share_work
from model import load, probabilities


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None, generator=None):
    """
    Continue each prompt (1-d int64 tensors, of any lengths); returns the continuations, up to and without `stop`, in the same
    order. Prompts of one length go through the model together.
    """
    outcome = [None] * len(prompts)
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = torch.stack([prompts[i] for i in rows])
        out = model.generate(batch, max_new_tokens, temperature, top_k, top_p, stop, generator)
        for i, sequence in zip(rows, out[:, length:]):
            ends = (sequence == stop).nonzero() if stop is not None else ()
            outcome[i] = sequence[:int(ends[0])] if len(ends) else sequence
    return outcome


@dataclass
class Speculation:
    """What drafting did: rounds of the model, tokens drafted and accepted, KL(draft || model) at every drafted position."""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    divergences: list = field(default_factory=list)

    @property
    def acceptance_rate(self):
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(1, self.drafted)


@torch.no_grad()
def speculate(model, draft, idx, max_new_tokens, draft_tokens=8, temperature=1.0, top_k=0, top_p=1.0, stop=None,
              generator=None):
    """
    Continue idx (1, T) by up to `max_new_tokens` tokens of the model's own distribution, drafted by a smaller model of the
    same vocabulary. Returns (1, T + new) and a Speculation. Both caches are only set back after a rejection: the prompt is
    read once. Raises UserError when vocabularies differ or the context does not suffice.
    """
    if model.config.vocab_size != draft.config.vocab_size:
        raise UserError(f'the model has a vocabulary of {model.config.vocab_size}, its draft one of '
                        f'{draft.config.vocab_size}')
    goal = idx.shape[1] + max_new_tokens
    if goal > min(model.config.block_size, draft.config.block_size):
        raise UserError(f'{goal} tokens do not fit the context of {min(model.config.block_size, draft.config.block_size)}')
    cache, draft_cache, stats = model.new_cache(1), draft.new_cache(1), Speculation()
    while idx.shape[1] < goal:
        known, count = idx.shape[1], min(draft_tokens, goal - idx.shape[1] - 1)   # the model adds one token to the accepted
        q = []
        for _ in range(count):
            logits = draft(idx[:, draft_cache.length:], cache=draft_cache).logits[0, -1]
            q.append((logits, probabilities(logits, temperature, top_k, top_p)))
            idx = torch.cat((idx, torch.multinomial(q[-1][1], 1, generator=generator)[None]), 1)
        logits = model(idx[:, cache.length:], cache=cache).logits[0, -count - 1:]
        p = probabilities(logits, temperature, top_k, top_p)
        accepted, token = 0, None
        for i in range(count):
            proposed = idx[0, known + i]
            if torch.rand((), generator=generator, device=idx.device) * q[i][1][proposed] >= p[i, proposed]:
                left = (p[i] - q[i][1]).clamp(min=0)
                token = torch.multinomial(left / left.sum(), 1, generator=generator)
                break
            accepted += 1
        if token is None:   # all were accepted: the model's last distribution gives one more
            token = torch.multinomial(p[count], 1, generator=generator)
        idx = torch.cat((idx[:, :known + accepted], token[None]), 1)
        cache.length = min(cache.length, known + accepted)
        draft_cache.length = min(draft_cache.length, known + accepted)
        stats.rounds, stats.drafted, stats.accepted = stats.rounds + 1, stats.drafted + count, stats.accepted + accepted
        if count:
            stats.divergences += kl_of_logits(torch.stack([of_draft for of_draft, _ in q]), logits[:count]).tolist()
        if stop is not None and (idx[0, known:] == stop).any():
            return idx[:, :known + int((idx[0, known:] == stop).nonzero()[0]) + 1], stats
    return idx, stats


@dataclass
class Sampling:
    """Generate text from a model folder."""
    model: str = 'out/progressive_tiny/64x4'  # folder or hub name
    draft: str = ''                # folder of a smaller model of the same family that drafts; empty: none
    draft_tokens: int = 8          # tokens drafted at a time
    prompt: str = ''               # text to continue; empty: from the end-of-text token
    prompts: str = ''              # file with a prompt a line, instead
    tokenizer: str = ''            # bytes, gpt2, or a folder with tokenizer.json; empty: the model's
    samples: int = 1               # continuations of each prompt
    max_new_tokens: int = 200      # longest continuation
    temperature: float = 0.8       # 0: greedy
    top_k: int = 0                 # only the k most likely tokens; 0: all
    top_p: float = 1.0             # only the fewest tokens that hold this much probability
    stop: bool = True              # end at the end-of-text token
    seed: int = 0                  # of the sampling
    device: str = 'auto'           # cuda, mps or cpu


def main(argv):
    """Command line: print the continuations; with a draft model, what it brought."""
    options, _, _ = configure(argv, Sampling, program='sample.py')
    device = choose_device(options.device)
    check_ranges(options, draft_tokens=(1, None), samples=(1, None), max_new_tokens=(1, None), temperature=(0, None),
                 top_k=(0, None), top_p=(1e-9, 1))
    model = load(options.model, device).eval()
    share_work(device, model.config, 1)
    encode, decode, vocab_size, end = load_tokenizer(options.tokenizer or tokenizer_of_model(options.model))
    if vocab_size > model.config.vocab_size:
        raise UserError(f'the tokenizer has {vocab_size} tokens, the model only {model.config.vocab_size}: choose with '
                        '--tokenizer=')
    texts = [options.prompt]
    if options.prompts:
        if not Path(options.prompts).is_file():
            raise UserError(f'there is no file {options.prompts}')
        texts = Path(options.prompts).read_text(encoding='utf-8').splitlines()
    ids = [torch.tensor([int(i) for i in encode(text)] or [end], device=device)
           for text in texts for _ in range(options.samples)]
    generator, stop = torch.Generator(device).manual_seed(options.seed), end if options.stop else None
    how = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, stop=stop, generator=generator)
    started = time.time()
    if options.draft:   # one by one, as drafting goes, so that the speeds can be compared
        outcome = [generate(model, [prompt], options.max_new_tokens, **how)[0] for prompt in ids]
    else:
        outcome = generate(model, ids, options.max_new_tokens, **how)
    rows = [['', 'tokens/s', 'acceptance rate', 'tokens a round', 'KL(draft || model)']]
    rows.append(['alone', f'{sum(map(len, outcome)) / (time.time() - started):.1f}', '', '', ''])
    if options.draft:
        draft, outcome, stats, started = load(options.draft, device).eval(), [], [], time.time()
        for prompt in ids:
            sequence, stat = speculate(model, draft, prompt[None], options.max_new_tokens, options.draft_tokens, **how)
            outcome.append(sequence[0, len(prompt):])
            stats.append(stat)
        drafted, rounds = sum(s.drafted for s in stats), sum(s.rounds for s in stats)
        divergences = [d for s in stats for d in s.divergences]
        rows.append(['drafted', f'{sum(map(len, outcome)) / (time.time() - started):.1f}',
                     f'{sum(s.accepted for s in stats) / max(1, drafted):.1%}',
                     f'{sum(map(len, outcome)) / max(1, rounds):.2f}',
                     f'{sum(divergences) / max(1, len(divergences)):.4f}'])
    for i, continuation in enumerate(outcome):
        kept = [token for token in continuation.tolist() if token != end and token < vocab_size]   # padding is no text
        print(f'--- {i + 1}\n{texts[i // options.samples]}{decode(kept)}')
    print('\n' + table(rows))


if __name__ == '__main__':
    run_as_program(main)
