"""Frozen models that teach."""

from functools import cache
from pathlib import Path

import torch

from data.vocabulary import tokenizer_in
from engine.errors import UserError
from engine.hub import model_folder
from model import GPT, SIZES, GPTConfig, load, read_config


def planned_config(name):
    """
    The GPTConfig of a model for a plan, which asks no hub: a folder's, or that of the named size
    that a hub name ends in; None where neither is known.
    """
    if Path(name).is_dir():
        return read_config(name)
    public = name.rpartition('/')[2].lower()
    return GPTConfig.named(public) if public in SIZES else None


def open_teacher(name, corpus=None, device='cpu', untrained=False):
    """
    The frozen model of this name, a folder or one of the hub, in autocast's dtype. corpus: whose
    tokens it will read, which must be its tokenizer's; None: not checked. untrained: with fresh
    random weights in place of its own. Raises UserError.
    """
    config, device, dtype = read_config(model_folder(name)), torch.device(device), torch.float32
    if corpus:
        if not tokenizer_in(name):
            raise UserError(f'{name} has no tokenizer: put its files there')
        corpus.check_vocabulary(config, name)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    model = as_initialised(config) if untrained else load(name, device)
    return model.to(device, dtype).eval().requires_grad_(False)


def as_initialised(config):
    """A model of random weights, on the CPU, whose generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT(config)


def lazy_teacher(name_or_model, untrained=False):
    """
    device -> a teacher, which is opened by the first call, at the first batch; its `cache_clear()`
    forgets it. name_or_model: what open_teacher reads, or a GPT.
    """
    if callable(name_or_model):
        return cache(lambda device: name_or_model)
    return cache(lambda device: open_teacher(name_or_model, None, device, untrained))
