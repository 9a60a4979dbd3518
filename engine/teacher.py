"""Frozen models that teach."""

from pathlib import Path

import torch

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


def open_teacher(name, device='cpu', untrained=False):
    """
    The frozen model of this name, in autocast's dtype. untrained: as it was initialised, in place
    of its weights. Raises UserError.
    """
    device, dtype = torch.device(device), torch.float32
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if untrained:
        model = as_initialised(read_config(model_folder(name))).to(device, dtype)
    else:
        model = load(name, device).to(dtype)
    return model.eval().requires_grad_(False)


def as_initialised(config, seed=0):
    """A model of random weights, on the CPU, whose generator is left as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    model = GPT(config)
    torch.set_rng_state(before)
    return model


class LazyTeacher:
    """A teacher that is opened when the first batch comes, and forgotten when it is done."""

    def __init__(self, name_or_model, untrained=False):
        self.name_or_model, self.untrained, self.model = name_or_model, untrained, None

    def on(self, device):
        """The model, opened on the device."""
        if self.model is None:
            self.model = self.name_or_model
            if not callable(self.model):  # a folder or hub name
                self.model = open_teacher(self.model, device, self.untrained)
        return self.model

    def forget(self):
        """Free its memory."""
        self.model = None
