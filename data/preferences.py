"""
Preferences: a prompt, the answer that is preferred, and one that is not, for extras/dpo.py.

    python data/prepare.py ultrafeedback
    python data/prepare.py mine.jsonl      # lines of {"prompt", "chosen", "rejected"}, all texts
    python data/prepare.py preferences     # offline: a function's own documentation, not another's

A prepared set is one of instructions and answers (data/instruct.py) whose examples stand in pairs:
the answer that is preferred, then the other.
"""

import sys
from collections import deque

import numpy as np

from data.instruct import Examples, file_records, first_record, hub_rows, write_supervised
from data.offline import is_held_out, signatures
from engine.errors import UserError

NAME, HUB_NAME = 'preferences', 'ultrafeedback'  # of the offline set and of the hub's
HUB_SET = ('HuggingFaceH4/ultrafeedback_binarized', 'default', 'train_prefs', 'test_prefs')
LAG = 64  # functions
RECORD = '{"prompt", "chosen", "rejected"} with texts'


def offline_preferences(options):
    """
    Yield (prompt, chosen, rejected, is it for validation): a function's own documentation, and
    that of the function LAG before it, which mostly is from another file.
    """
    before = {is_val: deque(maxlen=LAG) for is_val in (False, True)}
    for name, signature, line in signatures():
        is_val = is_held_out(name, options.val_fraction)
        if len(before[is_val]) == LAG:
            yield signature, line, before[is_val][0], is_val
        before[is_val].append(line)


def file_preferences(options):
    """The same of a .jsonl or .json file. Raises UserError, with its number, for a bad record."""
    for number, record in file_records(options.corpus):
        try:
            texts = [record[field] for field in ('prompt', 'chosen', 'rejected')]
            assert all(isinstance(text, str) and text for text in texts)
        except (TypeError, KeyError, AssertionError):
            raise UserError(f'{options.corpus}, record {number}: not {RECORD}') from None
        yield *texts, is_held_out(texts[0], options.val_fraction)


def hub_preferences(options):
    """The same of UltraFeedback, the last answer of each conversation."""
    for row, is_val in hub_rows(options.corpus, *HUB_SET):
        chosen, rejected = (row[side][-1]['content'] for side in ('chosen', 'rejected'))
        if chosen.strip() and rejected.strip():
            yield row['prompt'], chosen, rejected, is_val


def is_preferences(corpus):
    """Whether a name given to data/prepare.py is one of preferences."""
    if corpus in (NAME, HUB_NAME):
        return True
    first = first_record(corpus) or ''
    return '"chosen"' in first and '"rejected"' in first


def prepare_preferences(options, out):
    """Write the preferences that `options` (a Preparation) describe into the folder `out`."""
    read = hub_preferences if options.corpus == HUB_NAME else file_preferences
    if options.corpus == NAME:
        read = offline_preferences

    def examples():
        for prompt, chosen, rejected, is_val in read(options):
            for answer in (chosen, rejected):
                yield dict(instruction=prompt, input='', output=answer), is_val

    return write_supervised(examples(), options, out, kind='preferences')


class Pairs:
    """One split of a prepared set of preferences, or its first `most` pairs."""

    def __init__(self, name, data_dir, split, most=sys.maxsize):
        self.examples, self.most = Examples(name, data_dir, split, kind='preferences'), most

    def __len__(self):
        return min(self.most, len(self.examples) // 2)

    def rows(self, indices, block_size):
        """
        Inputs (n, 2, block_size) and targets (n, 2, block_size + 1) int64 of pairs, the preferred
        answer first. The targets' last column is the number of the pair.
        """
        indices = np.asarray(indices)
        both = np.stack([2 * indices, 2 * indices + 1], 1).ravel()
        x, y = self.examples.rows(both, block_size)
        y = np.concatenate([y, indices.repeat(2)[:, None]], 1)
        return x.reshape(-1, 2, block_size), y.reshape(-1, 2, block_size + 1)

    def preferred(self, indices, block_size):
        """Inputs and targets (n, block_size) of the preferred answers alone."""
        return self.examples.rows(2 * np.asarray(indices), block_size)
