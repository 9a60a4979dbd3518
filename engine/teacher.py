"""Frozen models that teach: ours, or any that transformers opens."""

from pathlib import Path

import torch

from data.translate import translate
from engine.errors import UserError, first_line, import_extra
from engine.files import read_json
from engine.hub import model_folder
from engine.hugging_face import FAMILIES, READ_AS, config_from_hugging_face
from engine.sizes import SIZES
from model import GPT, GPTConfig, load, read_config


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


def planned_config(name):
    """
    The GPTConfig of a model for a plan, which asks no hub: a folder's, or that of the named size
    that a hub name ends in; None where neither is known, or it is not ours.
    """
    if Path(name).is_dir():
        return read_config(name) if is_ours(name) else None
    public = name.rpartition('/')[2].lower()
    return GPTConfig.named(public) if public in SIZES else None


def open_teacher(name, device='cpu', untrained=False):
    """
    The frozen model of this name, in autocast's dtype: ours, else transformers'. untrained: one of
    ours as it was initialised, in place of its weights. Raises UserError.
    """
    device, dtype = torch.device(device), torch.float32
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if untrained:
        model = as_initialised(read_config(model_folder(name))).to(device, dtype)
    elif is_ours(name):
        model = load(name, device).to(dtype)
    else:
        model = transformers_model(name, 'AutoModel', dtype).to(device)
    if isinstance(model, GPT):
        model.build_rope(device)  # whose tables stay float32
    return model.eval().requires_grad_(False)


def as_initialised(config, seed=0):
    """A model of random weights, on the CPU, whose generator is left as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    model = GPT(config)
    torch.set_rng_state(before)
    return model


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

    def __init__(self, name_or_model, untrained=False):
        assert not (untrained and callable(name_or_model)), 'it says no shape to initialise'
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


def hidden_states(teacher, layer=0):
    """
    A function ids (B, T) -> hidden states (B, T, D) of a teacher after `layer` (0: its last) and
    before the final norm. Other callables than models are used as they are.
    """
    if isinstance(teacher, GPT):
        return lambda ids: teacher.residual_stream(ids, layers=layer or None)[0]
    if not hasattr(teacher, 'get_input_embeddings'):
        return teacher
    # transformers returns its last hidden state normalised: what the layer itself returns is not
    layers = next(m for m in teacher.modules() if isinstance(m, torch.nn.ModuleList))

    def after_layer(ids):
        found = []
        keep = lambda module, inputs, output: found.append(output)
        hook = layers[layer - 1].register_forward_hook(keep)
        try:
            teacher(ids, use_cache=False)
        finally:
            hook.remove()
        return found[0][0] if isinstance(found[0], tuple) else found[0]

    return after_layer


def teacher_states(x, teacher, layer, tokenizers=None):
    """
    (the teacher's hidden state for each position of x (B, T), which positions have one or None:
    all). tokenizers: the names of (x's, the teacher's) if they differ.
    """
    hidden = hidden_states(teacher, layer)
    longest = longest_context(teacher)
    if tokenizers is None:
        return in_windows(hidden, x, longest), None
    found = translate(x.cpu().numpy(), *tokenizers, longest)
    ids, place, covered = (torch.from_numpy(array).to(x.device) for array in found)
    states = hidden(ids)
    return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1])), covered


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
