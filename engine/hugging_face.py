"""
Our models as Hugging Face folders and back: which architecture of transformers computes the same
function, its config.json, the names and layouts in which it stores our tensors, and the files that
hold them. GPT-2, Llama (also OpenLLaMA, SmolLM2, Mistral), Qwen2, Qwen3, GPT-NeoX (Pythia) and OPT
can be read; what we save opens there.
"""

import contextlib
import errno
import re
import tempfile
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from engine.errors import UserError, first_line, unknown
from engine.files import commit_file, find_damage, read_json


class Family(NamedTuple):
    """How transformers describes one architecture."""

    architecture: str
    layer: str  # prefix of the names in layer {}
    names: dict  # our names -> theirs
    fields: dict  # our configuration's fields -> theirs
    switches: dict  # fields of ours that the architecture fixes
    demands: dict  # fields of theirs that must have this value for our block to be the same


def read_families():
    """
    {model type: Family}, from architectures.toml. One that is `like` another has what that has, but
    for what it says itself; "" takes an entry away.
    """
    content = (Path(__file__).parent / 'architectures.toml').read_text(encoding='utf-8')
    tables = tomllib.loads(content)
    for name, table in tables.items():
        like = tables.get(table.pop('like', ''), {})  # an earlier one, which is whole
        for part in ('names', 'fields', 'switches', 'demands'):
            entries = {**like.get(part, {}), **table.get(part, {})}
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
LLAMA3 = 'factor low_freq_factor high_freq_factor original_max_position_embeddings'.split()
TIED_BY_DEFAULT = {'gpt2', 'opt'}
READ_AS = {'mistral': 'llama'}  # the same function under another name
BUFFERS = re.compile(r'\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$')  # no weights


def family_of(config):
    """The model type of the transformers architecture that computes the same as ours, or None."""
    if config.channels:
        return None
    heads_fill_width = config.n_head * config.head_dim == config.n_embd
    plain_heads = heads_fill_width and config.n_kv_head == config.n_head
    candidates = ['llama', 'qwen2', 'qwen3']
    if plain_heads and config.act in ACTIVATIONS:
        if config.act == 'relu' and config.bias:
            candidates.append('opt')
        candidates += ['gpt2', 'gpt_neox']
    for model_type in candidates:
        switches = FAMILIES[model_type].switches
        if all(getattr(config, field) == value for field, value in switches.items()):
            return model_type
    return None


# ----------------------------------------------------------------------------------------------
# tensors


class Stored(NamedTuple):
    """A tensor of transformers: our tensors in it, and how they are packed."""

    names: list  # ours; empty: a bias of zeros, where we have none
    packed: str = ''  # '' (rows one below the other), transposed, by head, or offset


def layout(config, names):
    """
    How transformers stores our tensors `names`: {its name: Stored}. What no architecture of
    transformers equals is stored as it is.
    """
    model_type = family_of(config)
    if model_type is None:
        return {name: Stored([name]) for name in names}
    family, stored = FAMILIES[model_type], {}
    for name in names:
        layer, stem, kind = re.match(r'(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)$', name).groups()
        packed = ''
        if model_type == 'gpt2' and layer and kind == 'weight' and 'norm' not in stem:
            packed = 'transposed'
        elif model_type == 'gpt_neox' and stem in ('attn.q', 'attn.k', 'attn.v'):
            packed = 'by head'
        elif model_type == 'opt' and stem == 'wpe':
            packed = 'offset'
        prefix = family.layer.format(layer) if layer else ''
        theirs = f'{prefix}{family.names[stem]}.{kind}'
        stored.setdefault(theirs, Stored([], packed)).names.append(name)
    if model_type == 'gpt2' and not config.bias:
        for theirs in list(stored):
            if theirs.startswith(('transformer.h.', 'transformer.ln_f.')):
                stored[theirs.replace('.weight', '.bias')] = Stored([])
    return stored


def pack(parts, packed, config):
    """Our tensors as the one that transformers stores."""
    if packed == 'by head':  # GPT-NeoX: q, k and v of a head stand together
        heads = [p.view(config.n_head, 1, config.head_dim, *p.shape[1:]) for p in parts]
        return torch.cat(heads, 1).flatten(0, 2)
    if packed == 'transposed':
        return torch.cat([part.T for part in parts], 1)
    if packed == 'offset':  # OPT's positions begin at row 2
        parts = [parts[0].new_zeros(2, parts[0].shape[1]), *parts]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def find_tensors(config, found, template):
    """
    {transformers' name: the name in the folder} for the tensor names `found` in a folder of a
    model with the tensors `template`. Raises UserError listing missing and surplus tensors.
    """
    known = {name: name for name in found if not BUFFERS.search(name)}
    if family_of(config) == 'gpt2' and not any(n.startswith('transformer.') for n in known):
        prefixed = {f'transformer.{name}': name for name in known if name != 'lm_head.weight'}
        known = prefixed | {name: name for name in known if name == 'lm_head.weight'}
    if config.tied:  # some save the head too
        known = {n: o for n, o in known.items() if n not in ('lm_head.weight', 'embed_out.weight')}
    stored = layout(config, template)
    missing = [theirs for theirs in stored if stored[theirs].names and theirs not in known]
    surplus = [theirs for theirs in known if theirs not in stored]
    problems = []
    for what, names in (('missing', missing), ('surplus', surplus)):
        if names:
            more = ', ...' if len(names) > 6 else ''
            problems.append(f'tensors {what}: {", ".join(sorted(names)[:6])}{more}')
    if problems:
        raise UserError('; '.join(problems))
    return {theirs: known[theirs] for theirs in stored if theirs in known}


def tensors_to_hugging_face(config, state):
    """Our tensors, {name: tensor}, as transformers stores them."""
    tensors = {}
    for theirs, stored in layout(config, state).items():
        if stored.names:
            parts = [state[name] for name in stored.names]
            tensors[theirs] = pack(parts, stored.packed, config).contiguous()
        else:
            weight = tensors[theirs.replace('.bias', '.weight')]
            tensors[theirs] = weight.new_zeros(weight.shape[-1])
    return tensors


def tensors_from_hugging_face(config, tensors, template):
    """
    Our tensors, with the names and shapes of `template` (on meta), from a folder's. Raises
    UserError for what does not fit.
    """
    names, state = find_tensors(config, tensors, template), {}
    for theirs, stored in layout(config, template).items():
        if not stored.names:
            continue
        tensor, sizes = tensors[names[theirs]], [len(template[name]) for name in stored.names]
        check_finite(names[theirs], tensor)
        if stored.packed == 'transposed':
            tensor = tensor.T
        elif stored.packed == 'offset':
            tensor = tensor[2:]
        wanted = (sum(sizes), *template[stored.names[0]].shape[1:])
        if tensor.shape != wanted:
            found = tuple(tensor.shape)
            raise UserError(f'{theirs} has shape {found}, the configuration says {wanted}')
        parts = tensor.split(sizes)
        if stored.packed == 'by head':
            heads = tensor.view(config.n_head, 3, config.head_dim, *tensor.shape[1:])
            parts = [part.flatten(0, 1) for part in heads.unbind(1)]
        state |= zip(stored.names, [part.contiguous() for part in parts])
    return state


# ----------------------------------------------------------------------------------------------
# config.json


def config_to_hugging_face(config, dtype=torch.float32):
    """The content of config.json. `nanofamily` holds our fields: reading it back is exact."""
    content = dict(
        nanofamily=asdict(config),
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tied,
        torch_dtype=str(dtype).removeprefix('torch.'),
        bos_token_id=None,
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
        content |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return content


def rope_scaling(config):
    """Llama 3's entry in config.json for RoPE stretched to a longer context, or None."""
    if not config.rope_scaling:
        return None
    scaling = dict(zip(LLAMA3, config.rope_scaling), rope_type='llama3')
    return scaling | {LLAMA3[3]: int(scaling[LLAMA3[3]])}


def read_fields(folder):
    """
    The fields of GPTConfig for the model in a folder; a head in its files counts, whatever
    config.json says. Raises UserError and what a damaged file raises.
    """
    content = read_json(Path(folder) / 'config.json')
    fields = config_from_hugging_face(content)
    if fields['tied'] and 'nanofamily' not in content:
        fields['tied'] = not has_other_head(folder)
    return fields


def config_from_hugging_face(content):
    """The fields of GPTConfig that a config.json describes. UserError: not what we compute."""
    if 'nanofamily' in content:
        fields = content['nanofamily']
        return fields | dict(rope_scaling=tuple(fields.get('rope_scaling', ())))
    model_type = str(content.get('model_type'))
    model_type = READ_AS.get(model_type, model_type)
    if model_type not in FAMILIES:
        raise unknown('model type that can be read', model_type, [*FAMILIES, *READ_AS])
    family = FAMILIES[model_type]
    check_supported(model_type, content)
    fields = dict(family.switches, vocab_size=content['vocab_size'])
    fields['tied'] = content.get('tie_word_embeddings', model_type in TIED_BY_DEFAULT)
    for field, theirs in family.fields.items():
        if content.get(theirs) is not None:
            fields[field] = content[theirs]
    if model_type == 'gpt2':
        fields['bias'] = True
    if 'act' in family.fields and 'act' in fields:
        if fields['act'] not in FROM_ACTIVATIONS:
            raise UserError(f'{model_type} with the activation {fields["act"]!r} cannot be read')
        fields['act'] = FROM_ACTIVATIONS[fields['act']]
    if fields['pos'] == 'rope':
        fields |= rope_from_hugging_face(content)
        if model_type != 'gpt_neox':
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
    if content.get('model_type') == 'mistral' and content.get('sliding_window') is not None:
        window = content['sliding_window']
        if window < content['max_position_embeddings']:
            raise UserError(f'mistral with a sliding window of {window} tokens cannot be read')
    if model_type == 'llama':
        if content.get('mlp_bias', False) != content.get('attention_bias', False):
            raise UserError('llama with biases in attention or MLP alone cannot be read')


def rope_from_hugging_face(content):
    """RoPE's fields, which config.json has held in three ways over the years."""
    rope = {**(content.get('rope_scaling') or {}), **(content.get('rope_parameters') or {})}
    theta = content.get('rope_theta', content.get('rotary_emb_base', 1e4))
    fraction = rope.get('partial_rotary_factor', content.get('rotary_pct', 0.25))
    fields = dict(rope_theta=float(rope.get('rope_theta', theta)), rotary_fraction=float(fraction))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'llama3':
        fields['rope_scaling'] = tuple(float(rope[key]) for key in LLAMA3)
    elif kind != 'default':
        raise UserError(f'RoPE of type {kind!r} cannot be read, only default and llama3')
    return fields


# ----------------------------------------------------------------------------------------------
# the files with the weights: safetensors, one or several with an index

SHARD_BYTES = 5 * 10**9  # weights in one file, as on the hub
HEADS = re.compile(r'(^|\.)(lm_head|embed_out|wte|embed_in|embed_tokens)\.weight$')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_files(folder):
    """
    The files with a model's weights: safetensors, or pickles where there is nothing else. Raises
    UserError where they are missing, some of those that the index names, or changed since they
    were written.
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
            files = [folder / Path(str(file)).name for file in sorted(set(map(str, listed)))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(
                    f'{folder} is incomplete: {len(missing)} of its {len(files)} files of weights '
                    f'are missing ({missing[0]})'
                )
            return files
    raise UserError(f'{folder} has no weights (model.safetensors)')


def load_pickle(file, device='cpu'):
    """
    {name: tensor} of a pickle, as older repositories of the hub have: read by torch's reader that
    knows tensors and nothing else, so that no code of the file runs. Raises UserError.
    """
    mapped = zipfile.is_zipfile(file)  # older ones cannot be read lazily
    try:
        found = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # damage and refused content raise all kinds
        raise UserError(f'{file} cannot be read: {first_line(error)}') from None
    if not isinstance(found, dict) or not all(torch.is_tensor(v) for v in found.values()):
        raise UserError(f'{file} holds other things than tensors by name')
    return found


def read_tensors(folder, device='cpu'):
    """{name: tensor} of all weights of a model folder. Raises UserError."""
    tensors = {}
    for file in weight_files(folder):
        if file.suffix == '.bin':
            tensors |= load_pickle(file, device)
            continue
        try:
            tensors |= load_file(file, device=str(device))
        except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
            raise UserError(f'{file} is damaged: {first_line(error)}') from error
    return tensors


def has_other_head(folder):
    """Whether the files of a folder hold a head that is not the token embedding."""
    found, folder = {}, Path(folder)
    for file in [*folder.glob('model*.safetensors')] or [*folder.glob('pytorch_model*.bin')]:
        with contextlib.suppress(SafetensorError):  # damage, which read_tensors names
            tensors = load_pickle(file) if file.suffix == '.bin' else safe_open(file, 'pt')
            for name in filter(HEADS.search, tensors.keys()):
                tensor = tensors[name] if file.suffix == '.bin' else tensors.get_tensor(name)
                found[name] = tensor.bfloat16()  # of one matrix, one may be rounded
    return len(found) == 2 and not torch.equal(*found.values())


def check_finite(name, tensor):
    """Raise UserError for numbers that are not finite, or no weights: quantised, say."""
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix('torch.')
        raise UserError(f'{name} is {kind}, not one of float64, float32, bfloat16 and float16')
    if tensor.sum().isfinite():  # only if all terms are; fifteen times faster than to ask each
        return
    if not tensor.isfinite().all():  # or the sum alone is too large
        raise UserError(f'{name} has values that are not finite in {tensor.dtype}')


def write_tensors(folder, tensors):
    """
    Write {name: tensor} as the weights of a model folder, in place of those it had: several files
    with an index where one would have more than SHARD_BYTES.
    """
    from huggingface_hub import save_torch_state_dict  # a second, which not every command needs

    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, tensor in tensors.items():
            check_finite(name, tensor)  # float16 has a small range
        # a view of a larger storage, as FSDP gathers them, is refused: give it its own
        own = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in tensors.items()
        }
        try:
            save_torch_state_dict(own, unfinished, max_shard_size=SHARD_BYTES)
        except SafetensorError as error:  # mostly a full disk
            raise OSError(errno.EIO, str(error), str(folder)) from error
        written = sorted(Path(unfinished).iterdir())  # the index last
        for path in written:
            commit_file(path, folder / path.name)
    for path in folder.glob('model*.safetensors*'):  # of an earlier model
        if path.name not in {new.name for new in written}:
            path.unlink()
