"""Frozen models that teach: ours, or any that transformers opens."""

import torch

from engine.errors import UserError, first_line, import_extra
from engine.files import read_json
from engine.hub import model_folder
from engine.hugging_face import FAMILIES, READ_AS, config_from_hugging_face
from model import GPT, load


def is_ours(name):
    """Whether load() reads the architecture of a folder or hub name, or reports what is wrong."""
    path = model_folder(name) / 'config.json'
    config = read_json(path) if path.is_file() else {}
    if config.get('model_type') in READ_AS:  # in some of their variants
        try:
            return bool(config_from_hugging_face(config))
        except UserError:
            return False
    return not config or 'nanofamily' in config or config.get('model_type') in FAMILIES


def open_teacher(name, device='cpu'):
    """The frozen model of this name, in autocast's dtype: ours, else transformers'. UserError."""
    device, dtype = torch.device(device), torch.float32
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if is_ours(name):
        model = load(name, device).to(dtype)
    else:
        model = transformers_model(name, 'AutoModel', dtype).to(device)
    return model.eval().requires_grad_(False)


def transformers_model(name, kind, dtype=torch.float32):
    """A model that only transformers knows, by its class `kind` (AutoModel: no head). UserError."""
    transformers = import_extra('transformers', f'the architecture of {name} needs transformers')
    try:
        found = getattr(transformers, kind)
        return found.from_pretrained(model_folder(name), use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'transformers cannot open {name}: {first_line(error)}') from error


class LazyTeacher:
    """A teacher that is opened when the first batch comes, and forgotten when it is done."""

    def __init__(self, name_or_model):
        self.name_or_model, self.model = name_or_model, None

    def on(self, device):
        """The model, opened on the device."""
        if self.model is None:
            self.model = self.name_or_model
            if not callable(self.model):  # a folder or hub name
                self.model = open_teacher(self.model, device)
        return self.model

    def forget(self):
        """Free its memory."""
        self.model = None


def hidden_states(teacher, layer=0):
    """
    A function ids (B, T) -> hidden states (B, T, D) of a teacher after `layer` (0: its last) and
    before the final norm; transformers normalises its last. Other callables are used as they are.
    """
    if isinstance(teacher, GPT):
        return lambda ids: teacher.residual_stream(ids, layers=layer or None)[0]
    if not hasattr(teacher, 'get_input_embeddings'):
        return teacher
    if layer == 0:
        return lambda ids: teacher(ids, use_cache=False).last_hidden_state
    how = dict(use_cache=False, output_hidden_states=True)
    return lambda ids: teacher(ids, **how).hidden_states[layer]


def longest_context(teacher):
    """Positions a teacher reads at once."""
    config = getattr(teacher, 'config', None)
    for name in ('block_size', 'max_position_embeddings'):
        if getattr(config, name, None):
            return getattr(config, name)
    return 2**30


def in_windows(hidden, ids, longest):
    """hidden(ids) of a teacher that reads `longest` positions, in equal windows of ids (B, T)."""
    T = ids.shape[1]
    if T <= longest:
        return hidden(ids)
    windows = -(-T // longest)
    return torch.cat([hidden(part) for part in ids.split(-(-T // windows), dim=1)], 1)
