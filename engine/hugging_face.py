"""
Conversion between our models and Hugging Face folders: which architecture of transformers computes
the same function, config.json, the names and layouts of the tensors, and the weight files. GPT-2,
Llama (also OpenLLaMA, SmolLM2, Mistral), Qwen2, Qwen3, GPT-NeoX (Pythia) and OPT can be read, and
transformers can load what we save of these architectures.
"""

import contextlib
import errno
import math
import re
import tempfile
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.errors import UserError, first_line, unknown
from engine.files import commit_file, find_damage, read_json


class Family(NamedTuple):
    """How one architecture of transformers maps to GPTConfig and our tensor names."""

    architecture: str  # class name in transformers
    layer: str  # prefix of tensor names in a layer; {}: its number
    names: dict  # our module names -> theirs
    fields: dict  # fields of GPTConfig -> keys of config.json
    switches: dict  # fields of GPTConfig that the architecture fixes, with their values
    demands: dict  # keys of config.json -> the only value that our model supports


def read_families():
    """
    {model type: Family}, from architectures.toml. `like` inherits from an earlier table; a table's
    own entries override inherited ones, and "" removes one.
    """
    content = (Path(__file__).parent / 'architectures.toml').read_text(encoding='utf-8')
    tables = tomllib.loads(content)
    for name, table in tables.items():
        like = tables.get(table.pop('like', ''), {})  # an earlier table, complete by now
        for part in ('names', 'fields', 'switches', 'demands'):
            entries = like.get(part, {}) | table.get(part, {})
            table[part] = {key: value for key, value in entries.items() if value != ''}
        tables[name] = like | table
    return {name: Family(**table) for name, table in tables.items()}


FAMILIES = read_families()
ACTIVATIONS = {'gelu': 'gelu_new', 'gelu_exact': 'gelu', 'relu': 'relu'}  # ours -> theirs
FROM_ACTIVATIONS = {
    'gelu_new': 'gelu',
    'gelu_pytorch_tanh': 'gelu',
    'gelu_fast': 'gelu',
    'gelu': 'gelu_exact',
    'relu': 'relu',
}
# keys of config.json for the four numbers of GPTConfig.rope_scaling
LLAMA3 = 'factor low_freq_factor high_freq_factor original_max_position_embeddings'.split()
TIED_BY_DEFAULT = {'gpt2', 'opt'}  # if config.json has no tie_word_embeddings
BUFFERS = re.compile(r'\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$')  # not weights


def family_of(config):
    """The model type of the transformers architecture equivalent to a GPTConfig, or None."""
    # without a head_dim field: as many key/value as query heads, of n_embd / n_head dimensions
    plain = config.n_head * config.head_dim == config.n_embd == config.n_kv_head * config.head_dim
    for model_type, family in FAMILIES.items():
        same = all(getattr(config, field) == value for field, value in family.switches.items())
        heads = plain or 'head_dim' in family.fields
        act = config.act in ACTIVATIONS or 'act' not in family.fields
        if same and heads and act and not config.channels:
            return model_type
    return None


# ----------------------------------------------------------------------------------------------
# tensors


class Stored(NamedTuple):
    """A tensor of transformers: which of our tensors it holds, and in which layout."""

    names: list  # our tensors; empty: a bias of zeros that our model does not have
    packed: str = ''  # '' (rows concatenated), 'transposed', 'by head' or 'offset': see `pack`


def layout(config, names):
    """
    How transformers stores our tensors `names`: {its name: Stored}. If no architecture of
    transformers is equivalent to `config`, our own names and layouts are used.
    """
    model_type = family_of(config)
    if model_type is None:
        return {name: Stored([name]) for name in names}
    family, stored = FAMILIES[model_type], {}
    for name in names:
        layer, stem, kind = re.match(r'(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)$', name).groups()
        packed = ''
        if model_type == 'gpt2' and layer and kind == 'weight' and 'norm' not in stem:
            packed = 'transposed'  # GPT-2 uses Conv1D, whose weights are (in, out)
        elif model_type == 'gpt_neox' and stem in ('attn.q', 'attn.k', 'attn.v'):
            packed = 'by head'
        elif model_type == 'opt' and stem == 'wpe':
            packed = 'offset'
        prefix = family.layer.format(layer) if layer else ''
        theirs = f'{prefix}{family.names[stem]}.{kind}'
        stored.setdefault(theirs, Stored([], packed)).names.append(name)
    if model_type == 'gpt2' and not config.bias:  # GPT-2 in transformers always has these biases
        for theirs in list(stored):
            if theirs.startswith(('transformer.h.', 'transformer.ln_f.')):
                stored[theirs.replace('.weight', '.bias')] = Stored([])
    return stored


def pack(parts, packed, config):
    """Combine our tensors `parts` into the one that transformers stores. packed: as in Stored."""
    if packed == 'by head':  # GPT-NeoX: rows ordered by head, and within a head q, k, v
        heads = [part.unflatten(0, (config.n_head, -1)) for part in parts]
        return torch.stack(heads, 1).flatten(0, 2)
    if packed == 'offset':  # OPT's positions begin at row 2
        return F.pad(parts[0], (0, 0, 2, 0))
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.T if packed == 'transposed' else whole


def unpack(tensor, sizes, packed, config):
    """The inverse of `pack`: split a tensor into ours, which have `sizes` rows."""
    if packed == 'by head':
        heads = tensor.unflatten(0, (config.n_head, 3, -1))
        return [part.flatten(0, 1) for part in heads.unbind(1)]
    if packed == 'offset':
        return [tensor[2:]]
    return (tensor.T if packed == 'transposed' else tensor).split(sizes)


def tensors_to_hugging_face(config, state):
    """Convert our {name: tensor} to the names and layouts of transformers."""
    tensors = {}
    for theirs, (names, packed) in layout(config, state).items():
        if names:
            parts = [state[name] for name in names]
            tensors[theirs] = pack(parts, packed, config).contiguous()
        else:
            weight = tensors[theirs.replace('.bias', '.weight')]
            tensors[theirs] = weight.new_zeros(weight.shape[-1])  # Conv1D: the last is the output
    return tensors


def with_usual_names(config, tensors):
    """Drop buffers and tied heads from a folder's tensors; use current transformers' names."""
    known = [name for name in tensors if not BUFFERS.search(name)]
    if config.tied:  # some folders store the head as well
        known = [name for name in known if not name.startswith(('lm_head.', 'embed_out.'))]
    old = family_of(config) == 'gpt2' and 'wte.weight' in known  # lacks the prefix `transformer.`
    prefix = {name: 'transformer.' if old and name != 'lm_head.weight' else '' for name in known}
    return {prefix[name] + name: tensors[name] for name in known}


def tensors_from_hugging_face(config, tensors, template):
    """
    Convert a folder's {name: tensor} to ours. template: our {name: tensor} on meta, for names and
    shapes. Raises UserError for tensors that are missing, surplus, misshapen or not finite.
    """
    tensors, stored, state = with_usual_names(config, tensors), layout(config, template), {}
    wanted = [theirs for theirs, (names, _) in stored.items() if names]
    for what, some in (('missing', {*wanted} - {*tensors}), ('surplus', {*tensors} - {*stored})):
        if some:
            raise UserError(f'{len(some)} tensors {what}: {", ".join(sorted(some)[:6])}')
    for theirs in wanted:
        (names, packed), tensor = stored[theirs], tensors[theirs]
        check_finite(theirs, tensor)
        ours = [template[name] for name in names]
        # packing meta tensors costs nothing and gives the shape that the file should have
        shape, found = tuple(pack(ours, packed, config).shape), tuple(tensor.shape)
        if found != shape:
            raise UserError(f'{theirs} has shape {found}, the configuration says {shape}')
        parts = unpack(tensor, [len(part) for part in ours], packed, config)
        state |= zip(names, [part.contiguous() for part in parts])
    return state


# ----------------------------------------------------------------------------------------------
# config.json


def config_to_hugging_face(config, dtype=torch.float32):
    """
    The content of config.json for a GPTConfig. The entry `nanofamily` holds all of its fields, so
    that read_fields restores it exactly. dtype: of the saved weights.
    """
    content = dict(
        nanofamily=asdict(config),
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tied,
        torch_dtype=str(dtype).removeprefix('torch.'),
        bos_token_id=None,  # otherwise transformers assumes the architecture's default ids
        eos_token_id=None,
    )
    model_type = family_of(config)
    if model_type is None:
        return content | dict(architectures=['GPT'], model_type='nanofamily')
    family = FAMILIES[model_type]
    content |= dict(architectures=[family.architecture], model_type=model_type) | family.demands
    for field, theirs in family.fields.items():
        value = getattr(config, field)
        content[theirs] = ACTIVATIONS[value] if field == 'act' else value
    if config.pos == 'rope':
        content |= dict(rope_theta=config.rope_theta, rope_scaling=rope_scaling(config))
    if model_type == 'llama':
        content |= dict(mlp_bias=config.bias)
    elif model_type == 'opt':
        content |= dict(word_embed_proj_dim=config.n_embd, dropout=0.0, pad_token_id=None)
    elif model_type == 'gpt_neox':
        content |= dict(rotary_pct=config.rotary_fraction, rotary_emb_base=config.rope_theta)
    elif model_type == 'gpt2':
        content |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # 0.1 by default
    return content


def rope_scaling(config):
    """The rope_scaling entry of config.json (only Llama 3's kind is supported), or None."""
    if not config.rope_scaling:
        return None
    scaling = dict(zip(LLAMA3, config.rope_scaling), rope_type='llama3')
    return scaling | {LLAMA3[3]: int(scaling[LLAMA3[3]])}


def read_fields(folder):
    """
    Read the GPTConfig fields of the model in a folder. In a folder that we did not write, a
    separate output head among the weights overrides a config.json that says they are tied. Raises
    UserError, or any exception that a damaged config.json causes.
    """
    content = read_json(Path(folder) / 'config.json')
    fields = config_from_hugging_face(content)
    if fields['tied'] and 'nanofamily' not in content:
        fields['tied'] = not has_other_head(folder)
    return fields


def config_from_hugging_face(content):
    """
    The GPTConfig fields for the content of a config.json. Raises UserError for a model that we do
    not support.
    """
    if 'nanofamily' in content:
        fields = content['nanofamily']
        return fields | dict(rope_scaling=tuple(fields.get('rope_scaling', ())))
    model_type = str(content.get('model_type'))
    if model_type not in FAMILIES:
        raise unknown('model type that can be read', model_type, FAMILIES)
    family = FAMILIES[model_type]
    check_supported(model_type, content)
    fields = dict(family.switches, vocab_size=content['vocab_size'])
    fields['tied'] = content.get('tie_word_embeddings', model_type in TIED_BY_DEFAULT)
    for field, theirs in family.fields.items():
        if content.get(theirs) is not None:
            fields[field] = content[theirs]
    if model_type == 'gpt2':
        fields['bias'] = True  # its config.json has no entry for biases
    if 'act' in family.fields and 'act' in fields:
        if fields['act'] not in FROM_ACTIVATIONS:
            raise UserError(f'{model_type} with the activation {fields["act"]!r} cannot be read')
        fields['act'] = FROM_ACTIVATIONS[fields['act']]
    if fields['pos'] == 'rope':
        fields |= rope_from_hugging_face(content)
        if model_type != 'gpt_neox':  # only GPT-NeoX rotates a part of each head
            fields['rotary_fraction'] = 1.0
    return fields


def check_supported(model_type, content):
    """Raise UserError for a config.json that asks for what our block does not compute."""
    for field, value in FAMILIES[model_type].demands.items():
        if content.get(field, value) != value:
            found = content[field]
            raise UserError(f'{model_type} with {field}={found!r} cannot be read, only {value!r}')
    if model_type == 'opt' and 'word_embed_proj_dim' in content:
        if content['word_embed_proj_dim'] != content['hidden_size']:
            raise UserError('opt with a word_embed_proj_dim other than its width cannot be read')
    window = content.get('sliding_window') or math.inf
    if model_type == 'mistral' and window < content['max_position_embeddings']:
        raise UserError(f'mistral with a sliding window of {window} tokens cannot be read')
    if model_type == 'llama':
        if content.get('mlp_bias', False) != content.get('attention_bias', False):
            raise UserError('llama with biases in attention or MLP alone cannot be read')


def rope_from_hugging_face(content):
    """
    The RoPE fields of GPTConfig. Versions of transformers store them at the top level of
    config.json, in rope_scaling or in rope_parameters. Raises UserError for unknown types of RoPE.
    """
    rope = (content.get('rope_scaling') or {}) | (content.get('rope_parameters') or {})
    theta = content.get('rope_theta', content.get('rotary_emb_base', 1e4))
    # 0.25: GPT-NeoX's default; config_from_hugging_face ignores it for other architectures
    fraction = rope.get('partial_rotary_factor', content.get('rotary_pct', 0.25))
    fields = dict(rope_theta=float(rope.get('rope_theta', theta)), rotary_fraction=float(fraction))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'llama3':
        fields['rope_scaling'] = tuple(float(rope[key]) for key in LLAMA3)
    elif kind != 'default':
        raise UserError(f'RoPE of type {kind!r} cannot be read, only default and llama3')
    return fields


# ----------------------------------------------------------------------------------------------
# weight files: safetensors, one or several with an index

SHARD_BYTES = 5 * 10**9  # maximum size of a weight file, as on the hub
# the names that architectures give to the output head and the token embedding
HEADS = re.compile(r'(^|\.)(lm_head|embed_out|wte|embed_in|embed_tokens)\.weight$')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # allowed for weights


def weight_files(folder):
    """
    The weight files of a model folder: safetensors, or pickles if there are none. Raises UserError
    if there are neither, or if the folder's manifest shows that a file is damaged.
    """
    folder = Path(folder)
    if (folder / 'checksums.json').is_file() and (damage := find_damage(folder)):
        raise UserError(damage)
    for name in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{name}.index.json'
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            listed = read_json(index, weight_map=dict)['weight_map'].values()
            # .name: an index must not lead outside the folder
            return sorted({folder / Path(str(file)).name for file in listed})
    raise UserError(f'{folder} has no weights (model.safetensors)')


def read_file(file, device='cpu'):
    """
    Read {name: tensor} from a weight file: safetensors, or a pickle, as in older repositories on
    the hub. Pickles are loaded with weights_only=True, so that none of their code runs. Raises
    UserError.
    """
    try:
        if file.suffix != '.bin':
            return load_file(file, str(device))
        # only torch's current format, a zip file, can be memory-mapped
        found = torch.load(file, device, weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            raise TypeError('it holds other things than tensors by name')
        return found
    except Exception as error:  # damage and refused content raise all kinds
        raise UserError(f'{file} cannot be read: {first_line(error)}') from error


def read_tensors(folder, device='cpu'):
    """{name: tensor} of all weights of a model folder. Raises UserError."""
    tensors = {}
    for file in weight_files(folder):
        tensors |= read_file(file, device)
    return tensors


def has_other_head(folder):
    """Whether the files of a folder hold a head that is not the token embedding."""
    found, folder = {}, Path(folder)
    for file in [*folder.glob('model*.safetensors')] or [*folder.glob('pytorch_model*.bin')]:
        with contextlib.suppress(UserError):  # read_tensors will report the damage
            tensors = read_file(file)  # memory-mapped, not copied
            for name in filter(HEADS.search, tensors):
                found[name] = tensors[name].bfloat16()  # a copy may have been rounded
    return len(found) == 2 and not torch.equal(*found.values())


def check_finite(name, tensor):
    """Raise UserError unless all values are finite and the dtype is in DTYPES (not quantised)."""
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix('torch.')
        raise UserError(f'{name} is {kind}, not one of float64, float32, bfloat16 and float16')
    if tensor.sum().isfinite():  # then all values are; 15 times faster than checking each
        return
    if not tensor.isfinite().all():  # otherwise only the sum overflowed
        raise UserError(f'{name} has values that are not finite in {tensor.dtype}')


def write_tensors(folder, tensors):
    """
    Write {name: tensor} as the weights of a model folder, replacing earlier ones: one file, or
    several with an index above SHARD_BYTES. Raises UserError for values that are not finite,
    OSError if writing fails.
    """
    from huggingface_hub import save_torch_state_dict  # imported here, as it takes a second

    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, tensor in tensors.items():
            check_finite(name, tensor)  # conversion to float16 may have overflowed
        # safetensors refuses views of a larger storage, which FSDP returns: copy them
        own = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in tensors.items()
        }
        try:
            save_torch_state_dict(own, unfinished, max_shard_size=SHARD_BYTES)
        except SafetensorError as error:  # mostly a full disk
            raise OSError(errno.EIO, str(error), str(folder)) from error
        written = sorted(Path(unfinished).iterdir())  # the index sorts after the files it lists
        for path in written:
            commit_file(path, folder / path.name)
    for path in folder.glob('model*.safetensors*'):  # remove files of an earlier model
        if path.name not in {new.name for new in written}:
            path.unlink()
