"""
Conversations in the chat template of a model's folder, which transformers renders.

A chat model must be trained on the format in which it is used: in a set prepared with such a
folder, conversations are in its template, and the targets are the answers, each with the control
token that the template puts after it.
"""

import re

import numpy as np

from data.vocabulary import load_tokenizer, open_tokenizer
from engine.errors import UserError, first_line, import_extra

HIDDEN = '\ufdd0'  # placeholder for an answer: a noncharacter, which texts do not contain


def open_chat(folder):
    """
    (render, tokenizer, control) of a folder with a chat template: the function render(messages) ->
    text; its tokenizers.Tokenizer; a regular expression of its control tokens. Raises UserError
    without transformers. render raises UserError if the template fails, or if a message contains a
    control token, as only the template may write them.
    """
    transformers = import_extra('transformers', 'chat templates need the package transformers')
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every class of tokenizers raises its own
        raise UserError(f'transformers cannot open {folder} ({first_line(error)})') from None
    tokenizer = open_tokenizer(folder)
    added = tokenizer.get_added_tokens_decoder().values()
    # longest first: the pattern takes the first that matches, and one may begin another
    texts = sorted((token.content for token in added if token.special), key=len, reverse=True)
    control = '|'.join(map(re.escape, texts)) or '(?!)'  # which matches nothing

    def render(messages, **how):
        # many templates strip contents; stripped here, answers are the same with any of them
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
    The function messages -> (ids, marks), two lists, in a folder's chat template. A mark is 1 for a
    target: answers, and the control token after each; if the last answer has none, end-of-text is
    added. The function raises ValueError if the template leaves out or changes an answer.
    """
    (render, tokenizer, control), end = open_chat(folder), load_tokenizer(folder).end

    def encode(messages):
        answers = [m['content'].strip() for m in messages if m['role'] == 'assistant']
        # rendered with placeholders, the template shows where each answer begins
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
        marks = sum((first < stop) & (last > start) for start, stop in spans)  # any overlap
        more = [] if ended else [end]  # `ended` is that of the last answer
        return encoded.ids + more, marks.tolist() + [1] * len(more)

    return encode


def prompt_encoder(folder):
    """
    The function messages -> ids, a list, up to where the next answer begins. It raises UserError as
    render does in `open_chat`.
    """
    render, tokenizer, _ = open_chat(folder)

    def encode(messages):
        text = render(messages, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode
