"""Teachers: frozen models whose outputs other models learn from."""

from functools import cache
from pathlib import Path

import torch

from data.vocabulary import tokenizer_in
from engine.errors import UserError
from engine.hub import model_folder
from model import GPT, SIZES, GPTConfig, load, read_config


def planned_config(name):
    """
    The GPTConfig of a model without a request to the hub, for plans: that of a folder, or the named
    size (model.SIZES) that is the last part of a hub name; None if there is neither.
    """
    if Path(name).is_dir():
        return read_config(name)
    public = name.rpartition('/')[2].lower()
    return GPTConfig.named(public) if public in SIZES else None


def open_teacher(name, corpus=None, device='cpu', untrained=False):
    """
    Load a model (folder or hub name) as a teacher: frozen, in eval mode and in autocast's dtype.
    corpus: the Corpus it will read, which must have the model's tokenizer; None: no check.
    untrained: use random weights instead of its own. Raises UserError.
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
    """A GPT with random weights (seed 0) on the CPU; torch's random state is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
        return GPT(config)


def lazy_teacher(name_or_model, untrained=False):
    """
    A function device -> teacher that opens the teacher when it is first called, at the first batch,
    and caches it; its `cache_clear()` frees it. name_or_model: a folder or hub name, or a GPT.
    """
    if callable(name_or_model):  # a GPT
        return cache(lambda device: name_or_model)
    return cache(lambda device: open_teacher(name_or_model, None, device, untrained))
