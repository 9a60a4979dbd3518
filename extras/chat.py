"""
Conversations as the chat template in a model's folder writes them; transformers renders it.

A model is used as it was trained: a set prepared with such a folder has every conversation in its
template, and each answer with the token that the template writes behind it is a target.
"""

import re
from functools import partial

import numpy as np

from data.vocabulary import load_tokenizer, open_tokenizer
from engine.errors import UserError, first_line, import_extra
from engine.hub import within

HIDDEN = '\ufdd0'  # stands for an answer, and in no text
WAY_OUT = 'remove it for plain conversations'


def chat_template(folder):
    """
    (messages, add_generation_prompt=False) -> text, by the chat template in a folder. Raises
    UserError without transformers; the function does for a template that gives no text.
    """
    transformers = import_extra('transformers', 'chat templates need the package transformers')
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as many as there are classes of tokenizers
        raise UserError(f'transformers cannot open {folder} ({first_line(error)})') from None
    apply = found.apply_chat_template

    def render(messages, **how):
        call = partial(apply, messages, tokenize=False, **how)
        return within(30, call, f'the chat template of {folder} gives no text', WAY_OUT)

    return render


def control_tokens(tokenizer):
    """A pattern of the control tokens of a tokenizers.Tokenizer."""
    added = tokenizer.get_added_tokens_decoder().values()
    texts = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return '|'.join(map(re.escape, texts)) or '(?!)'  # which matches nothing


def chat_encoder(folder):
    """messages -> (ids, which of them are targets: 0 or 1), in a folder's chat template."""
    tokenizer = open_tokenizer(folder)
    control, end = control_tokens(tokenizer), load_tokenizer(folder).end
    return partial(encode_chat, chat_template(folder), tokenizer, control, end)


def encode_chat(template, tokenizer, control, end, messages):
    """
    (ids, marks) of a conversation. An answer ends with the control token behind it; where none is,
    `end` ends the whole. Raises ValueError for a conversation that the template changes.
    """
    check_messages(messages, control)
    said = [m['role'] == 'assistant' for m in messages]
    messages = [m | dict(content=m['content'].strip()) if a else m for m, a in zip(messages, said)]
    answers = [m['content'] for m, a in zip(messages, said) if a]
    hidden = [m | dict(content=HIDDEN) if a else m for m, a in zip(messages, said)]
    text, *parts = template(hidden).split(HIDDEN)
    if len(parts) != len(answers):
        raise ValueError('the chat template leaves an answer out')
    spans = []
    for answer, part in zip(answers, parts):
        ended = re.match(rf'\s*({control})', part)
        spans.append((len(text), len(text) + len(answer) + (ended.end() if ended else 0)))
        text += answer + part
    if text != template(messages):
        raise ValueError('the chat template changes an answer')
    text = text if ended else text[: spans[-1][1]]
    encoded = tokenizer.encode(text, add_special_tokens=False)
    first, last = np.array(encoded.offsets).T
    marks = np.zeros(len(first), int)
    for start, stop in spans:
        marks |= (first < stop) & (last > start)
    if ended:
        return encoded.ids, marks.tolist()
    return [*encoded.ids, end], [*marks.tolist(), 1]


def check_messages(messages, control):
    """Raise UserError for a message with a control token: they come from the template alone."""
    for message in messages:
        if found := re.search(control, message['content']):
            raise UserError(f'a message holds the control token {found[0]}')


def prompt_encoder(folder):
    """messages -> ids to the point where an answer begins, which raises UserError as above."""
    template, tokenizer = chat_template(folder), open_tokenizer(folder)
    control = control_tokens(tokenizer)

    def encode(messages):
        check_messages(messages, control)
        text = template(messages, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode
