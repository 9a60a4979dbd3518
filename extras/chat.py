"""
Conversations as the chat template in a model's folder writes them; transformers renders it.

A model is used as it was trained: a set prepared with such a folder has every conversation in its
template, and each answer with the token that the template writes behind it is a target.
"""

import re

import numpy as np

from data.vocabulary import load_tokenizer, open_tokenizer
from engine.errors import UserError, first_line, import_extra

HIDDEN = '\ufdd0'  # stands for an answer, and in no text


def open_chat(folder):
    """
    (render, tokenizer, control): messages -> text by the chat template in a folder; its
    tokenizers.Tokenizer; a pattern of its control tokens. Raises UserError without transformers;
    render does for a template that gives no text, and for a message with a control token: they come
    from the template alone.
    """
    transformers = import_extra('transformers', 'chat templates need the package transformers')
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as many as there are classes of tokenizers
        raise UserError(f'transformers cannot open {folder} ({first_line(error)})') from None
    tokenizer = open_tokenizer(folder)
    added = tokenizer.get_added_tokens_decoder().values()
    texts = sorted((token.content for token in added if token.special), key=len, reverse=True)
    control = '|'.join(map(re.escape, texts)) or '(?!)'  # which matches nothing

    def render(messages, **how):
        messages = [m | dict(content=m['content'].strip()) for m in messages]
        for message in messages:
            if mentioned := re.search(control, message['content']):
                raise UserError(f'a message holds the control token {mentioned[0]}')
        try:
            return found.apply_chat_template(messages, tokenize=False, **how)
        except Exception as error:  # a template may do anything
            raise UserError(
                f'the chat template of {folder} gives no text ({type(error).__name__}); remove it '
                'for plain conversations'
            ) from None

    return render, tokenizer, control


def chat_encoder(folder):
    """
    messages -> (ids, which of them are targets: 0 or 1), in a folder's chat template. An answer
    ends with the control token behind it; where none is, the end-of-text ends the whole. Raises
    ValueError for a conversation that the template changes.
    """
    (render, tokenizer, control), end = open_chat(folder), load_tokenizer(folder).end

    def encode(messages):
        answers = [m['content'].strip() for m in messages if m['role'] == 'assistant']
        hidden = [m | dict(content=HIDDEN) if m['role'] == 'assistant' else m for m in messages]
        text, *parts = render(hidden).split(HIDDEN)
        if len(parts) != len(answers):
            raise ValueError('the chat template leaves an answer out')
        spans = []
        for answer, part in zip(answers, parts):
            ended = re.match(rf'\s*({control})', part)
            spans.append((len(text), len(text) + len(answer) + (ended.end() if ended else 0)))
            text += answer + part
        if text != render(messages):
            raise ValueError('the chat template changes an answer')
        encoded = tokenizer.encode(text[: spans[-1][1]], add_special_tokens=False)
        first, last = np.array(encoded.offsets).T
        marks = sum((first < stop) & (last > start) for start, stop in spans)
        more = [] if ended else [end]
        return encoded.ids + more, marks.tolist() + [1] * len(more)

    return encode


def prompt_encoder(folder):
    """messages -> ids to the point where an answer begins. Raises UserError as render does."""
    render, tokenizer, _ = open_chat(folder)

    def encode(messages):
        text = render(messages, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode
