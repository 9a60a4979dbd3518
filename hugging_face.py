"""
Our models as Hugging Face folders and back: which architecture of transformers computes the same function, what its
config.json says, and under which names and in which layout it stores our tensors. Any folder or hub name of GPT-2, Llama
(and what is built like it: OpenLLaMA, SmolLM2), Qwen3, GPT-NeoX (Pythia) and OPT can be read; what we save opens there.
"""
import functools
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import UserError, unknown


class Family(NamedTuple):
    """How transformers writes one architecture down."""
    architecture: str
    layer: str      # what stands before the names in layer {}
    names: dict     # our names -> theirs
    fields: dict    # our configuration's fields -> theirs
    switches: dict  # fields of ours that the architecture fixes
    demands: dict   # fields of theirs that must have this value for our block to compute the same


_LLAMA = Family(
    'LlamaForCausalLM', 'model.layers.{}.',
    {'wte': 'model.embed_tokens', 'norm': 'model.norm', 'lm_head': 'lm_head', 'norm1': 'input_layernorm',
     'norm2': 'post_attention_layernorm', **{f'attn.{x}': f'self_attn.{x}_proj' for x in 'qkvo'},
     **{f'mlp.{x}': f'mlp.{x}_proj' for x in ('gate', 'up', 'down')}},
    {'n_embd': 'hidden_size', 'n_mlp': 'intermediate_size', 'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
     'n_kv_head': 'num_key_value_heads', 'head_dim': 'head_dim', 'block_size': 'max_position_embeddings',
     'norm_eps': 'rms_norm_eps', 'bias': 'attention_bias'},
    dict(norm='rms', act='swiglu', pos='rope', rotary_fraction=1.0, qk_norm=False, parallel=False, attn_scale_by_layer=False),
    dict(hidden_act='silu'))

FAMILIES = {
    'llama': _LLAMA,
    'qwen3': _LLAMA._replace(
        architecture='Qwen3ForCausalLM', switches=_LLAMA.switches | dict(qk_norm=True, bias=False),
        names=_LLAMA.names | {'attn.q_norm': 'self_attn.q_norm', 'attn.k_norm': 'self_attn.k_norm'},
        demands=dict(hidden_act='silu', use_sliding_window=False)),
    'gpt2': Family(
        'GPT2LMHeadModel', 'transformer.h.{}.',
        {'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'norm': 'transformer.ln_f', 'lm_head': 'lm_head',
         'norm1': 'ln_1', 'norm2': 'ln_2', **{f'attn.{x}': 'attn.c_attn' for x in 'qkv'}, 'attn.o': 'attn.c_proj',
         'mlp.up': 'mlp.c_fc', 'mlp.down': 'mlp.c_proj'},
        {'n_embd': 'n_embd', 'n_mlp': 'n_inner', 'n_layer': 'n_layer', 'n_head': 'n_head', 'block_size': 'n_positions',
         'norm_eps': 'layer_norm_epsilon', 'attn_scale_by_layer': 'scale_attn_by_inverse_layer_idx',
         'act': 'activation_function'},
        dict(norm='layer', pos='learned', qk_norm=False, parallel=False), dict(scale_attn_weights=True)),
    'gpt_neox': Family(
        'GPTNeoXForCausalLM', 'gpt_neox.layers.{}.',
        {'wte': 'gpt_neox.embed_in', 'norm': 'gpt_neox.final_layer_norm', 'lm_head': 'embed_out', 'norm1': 'input_layernorm',
         'norm2': 'post_attention_layernorm', **{f'attn.{x}': 'attention.query_key_value' for x in 'qkv'},
         'attn.o': 'attention.dense', 'mlp.up': 'mlp.dense_h_to_4h', 'mlp.down': 'mlp.dense_4h_to_h'},
        {'n_embd': 'hidden_size', 'n_mlp': 'intermediate_size', 'n_layer': 'num_hidden_layers',
         'n_head': 'num_attention_heads', 'block_size': 'max_position_embeddings', 'norm_eps': 'layer_norm_eps',
         'parallel': 'use_parallel_residual', 'act': 'hidden_act'},
        dict(norm='layer', pos='rope', qk_norm=False, bias=True, attn_scale_by_layer=False), dict(attention_bias=True)),
    'opt': Family(
        'OPTForCausalLM', 'model.decoder.layers.{}.',
        {'wte': 'model.decoder.embed_tokens', 'wpe': 'model.decoder.embed_positions',
         'norm': 'model.decoder.final_layer_norm', 'lm_head': 'lm_head', 'norm1': 'self_attn_layer_norm',
         'norm2': 'final_layer_norm', **{f'attn.{x}': f'self_attn.{x}_proj' for x in 'qkv'}, 'attn.o': 'self_attn.out_proj',
         'mlp.up': 'fc1', 'mlp.down': 'fc2'},
        {'n_embd': 'hidden_size', 'n_mlp': 'ffn_dim', 'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
         'block_size': 'max_position_embeddings', 'act': 'activation_function'},
        dict(norm='layer', norm_eps=1e-5, pos='learned', qk_norm=False, parallel=False, bias=True, attn_scale_by_layer=False),
        dict(do_layer_norm_before=True, enable_bias=True, layer_norm_elementwise_affine=True)),
}
ACTIVATIONS = {'gelu': 'gelu_new', 'gelu_exact': 'gelu', 'relu': 'relu'}   # ours -> transformers'
TIED_BY_DEFAULT = {'llama': False, 'qwen3': False, 'gpt2': True, 'gpt_neox': False, 'opt': True}
BUFFERS = re.compile(r'\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$')   # masks and tables, not weights


def family_of(config):
    """The model type of the architecture in transformers that computes the same function as ours, or None."""
    if config.channels:
        return None
    heads_fill_width = config.n_kv_head == config.n_head and config.n_head * config.head_dim == config.n_embd
    for model_type in ('llama', 'qwen3', 'opt' if config.act == 'relu' and config.bias else 'gpt2', 'gpt2', 'gpt_neox'):
        same = all(getattr(config, field) == value for field, value in FAMILIES[model_type].switches.items())
        if same and (model_type in ('llama', 'qwen3') or heads_fill_width and config.act in ACTIVATIONS):
            return model_type
    return None


def layout(config, names):
    """
    How transformers stores our tensors `names`: {its tensor's name: (the names of ours in it, how they are packed)}, where
    packed is '' (rows one below the other), 'transposed', 'by head' or 'offset'. No names: zeros, where we have no biases.
    What no architecture of transformers equals is stored as it is.
    """
    model_type = family_of(config)
    if model_type is None:
        return {name: ([name], '') for name in names}
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
        theirs = (family.layer.format(layer) if layer else '') + f'{family.names[stem]}.{kind}'
        stored.setdefault(theirs, ([], packed))[0].append(name)
    if model_type == 'gpt2' and not config.bias:
        for theirs in [t for t in stored if t.startswith(('transformer.h.', 'transformer.ln_f.'))]:
            stored[theirs.replace('.weight', '.bias')] = [], ''
    return stored


def pack(parts, packed, config):
    """Our tensors as the one that transformers stores."""
    if packed == 'by head':   # GPT-NeoX: q, k and v of a head stand together
        return torch.cat([part.view(config.n_head, 1, config.head_dim, *part.shape[1:]) for part in parts], 1).flatten(0, 2)
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if packed == 'offset':    # OPT's positions begin at row 2
        return torch.cat((tensor.new_zeros(2, tensor.shape[1]), tensor))
    return tensor.T if packed == 'transposed' else tensor


def unpack(tensor, packed, config, sizes):
    """The tensor that transformers stores as ours, of `sizes` rows each."""
    if packed == 'by head':
        parts = tensor.view(config.n_head, 3, config.head_dim, *tensor.shape[1:]).unbind(1)
        return [part.flatten(0, 1) for part in parts]
    if packed == 'offset':
        return [tensor[2:]]
    return list((tensor.T if packed == 'transposed' else tensor).split(sizes))


def stored_shape(ours, packed, shapes):
    """The shape of the tensor that transformers stores for ours, whose `shapes` are {name: shape}."""
    shape = (sum(shapes[name][0] for name in ours) + 2 * (packed == 'offset'), *shapes[ours[0]][1:])
    return shape[::-1] if packed == 'transposed' else shape


def find_tensors(config, found, template):
    """
    {the name in our layout table: the name in a folder} of the folder's tensor names `found`, for a model whose tensors are
    `template`. Raises UserError that lists what is missing and what is left over.
    """
    known = {name: name for name in found if not BUFFERS.search(name)}
    if family_of(config) == 'gpt2' and not any(name.startswith('transformer.') for name in known):
        known = {name if name.startswith('lm_head') else f'transformer.{name}': name for name in known}   # OpenAI's files
    if config.tied:   # some save the head too
        known = {name: other for name, other in known.items() if not name.startswith(('lm_head.', 'embed_out.'))}
    stored = layout(config, template)
    missing = [theirs for theirs, (ours, _) in stored.items() if ours and theirs not in known]
    surplus = [theirs for theirs in known if theirs not in stored]
    if missing or surplus:
        raise UserError('; '.join(f'tensors {what}: ' + ', '.join(sorted(names)[:6]) + ', ...' * (len(names) > 6)
                                  for what, names in (('missing', missing), ('surplus', surplus)) if names))
    return {theirs: known[theirs] for theirs in stored if theirs in known}


def tensors_to_hugging_face(config, state):
    """Our tensors, {name: tensor}, as transformers stores them."""
    tensors = {}
    for theirs, (ours, packed) in layout(config, state).items():
        if ours:
            tensors[theirs] = pack([state[name] for name in ours], packed, config).contiguous()
        else:
            weight = tensors[theirs.replace('.bias', '.weight')]
            tensors[theirs] = weight.new_zeros(weight.shape[-1])
    return tensors


def tensors_from_hugging_face(config, tensors, template, contiguous=True):
    """
    Our tensors, by the names and shapes of `template`, from a folder's; contiguous=False: views of those where they are packed
    or transposed. Raises UserError for what does not fit.
    """
    names, shapes, state = find_tensors(config, tensors, template), {n: tuple(t.shape) for n, t in template.items()}, {}
    for theirs, (ours, packed) in layout(config, template).items():
        if ours:
            tensor, expected = tensors[names[theirs]], stored_shape(ours, packed, shapes)
            if tuple(tensor.shape) != expected:
                raise UserError(f'{theirs} has shape {tuple(tensor.shape)}, the configuration says {expected}')
            parts = unpack(tensor, packed, config, [shapes[name][0] for name in ours])
            state |= {name: part.contiguous() if contiguous else part for name, part in zip(ours, parts)}
    return state


# ---------------------------------------------------------------------------------------------------------------------
# config.json

def config_to_hugging_face(config, dtype='float32'):
    """The content of config.json. `nanofamily` holds our configuration, so that reading it back is exact."""
    common = dict(nanofamily=asdict(config), vocab_size=config.vocab_size, tie_word_embeddings=config.tied, torch_dtype=dtype,
                  bos_token_id=None, eos_token_id=None)
    model_type = family_of(config)
    if model_type is None:
        return common | dict(architectures=['GPT'], model_type='nanofamily')
    family = FAMILIES[model_type]
    theirs = {their_field: getattr(config, field) for field, their_field in family.fields.items()}
    if 'act' in family.fields:
        theirs[family.fields['act']] = ACTIVATIONS[config.act]
    if config.pos == 'rope':
        theirs['rope_theta'], theirs['rope_scaling'] = config.rope_theta, None
        if config.rope_scaling:
            factor, low, high, original = config.rope_scaling
            theirs['rope_scaling'] = dict(rope_type='llama3', factor=factor, low_freq_factor=low, high_freq_factor=high,
                                          original_max_position_embeddings=int(original))
    extra = dict(llama=dict(mlp_bias=config.bias),
                 opt=dict(word_embed_proj_dim=config.n_embd, dropout=0.0, pad_token_id=None),
                 gpt_neox=dict(rotary_pct=config.rotary_fraction, rotary_emb_base=config.rope_theta),
                 gpt2=dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).get(model_type, {})
    return common | dict(architectures=[family.architecture], model_type=model_type) | family.demands | theirs | extra


def config_from_hugging_face(hf_config):
    """The fields of GPTConfig, a dict, that a config.json's content describes. UserError: what our block does not compute."""
    if not isinstance(hf_config, dict):
        raise UserError('config.json is damaged: it holds no configuration')
    if 'nanofamily' in hf_config:
        ours = hf_config['nanofamily']
        return ours | dict(rope_scaling=tuple(ours.get('rope_scaling', ())))
    model_type = hf_config.get('model_type')
    if model_type not in FAMILIES:
        raise unknown('model type that is read here', str(model_type), FAMILIES)
    family = FAMILIES[model_type]
    for field, value in family.demands.items():
        if hf_config.get(field, value) != value:
            raise UserError(f'{model_type} with {field}={hf_config[field]!r} is not read here, only with {value!r}')
    fields = dict(family.switches, vocab_size=hf_config['vocab_size'],
                  tied=hf_config.get('tie_word_embeddings', TIED_BY_DEFAULT[model_type]))
    fields |= {field: hf_config[theirs] for field, theirs in family.fields.items() if hf_config.get(theirs) is not None}
    if model_type == 'gpt2':
        fields['bias'] = True
    if model_type == 'opt' and hf_config.get('word_embed_proj_dim', fields['n_embd']) != fields['n_embd']:
        raise UserError('opt with a word_embed_proj_dim other than its width is not read here')
    if hf_config.get('mlp_bias', False) != hf_config.get('attention_bias', False) and model_type == 'llama':
        raise UserError('llama with biases in attention or MLP alone is not read here')
    if 'act' in fields and 'act' in family.fields:
        named = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {'gelu_pytorch_tanh': 'gelu', 'gelu_fast': 'gelu'}
        if fields['act'] not in named:
            raise UserError(f'{model_type} with the activation {fields["act"]!r} is not read here')
        fields['act'] = named[fields['act']]
    if fields['pos'] == 'rope':
        fields |= _rope_from_hugging_face(hf_config)
        if model_type != 'gpt_neox':
            fields.pop('rotary_fraction', None)
    return fields


def _rope_from_hugging_face(hf_config):
    """RoPE's fields, which config.json has held in three ways over the years."""
    rope = {**(hf_config.get('rope_scaling') or {}), **(hf_config.get('rope_parameters') or {})}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    theta = rope.get('rope_theta', hf_config.get('rope_theta', hf_config.get('rotary_emb_base', 1e4)))
    fields = dict(rope_theta=float(theta),
                  rotary_fraction=float(rope.get('partial_rotary_factor', hf_config.get('rotary_pct', 0.25))))
    if kind == 'llama3':
        fields['rope_scaling'] = tuple(float(rope[key]) for key in (
            'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'))
    elif kind != 'default':
        raise UserError(f'RoPE of the type {kind!r} is not read here, only default and llama3')
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# the hub

WAY_OUT = 'without a network use pydocs or pycode, or files of your own: python data/prepare.py "texts/*.txt"'


def within(seconds, function, what, way_out=WAY_OUT):
    """function() in a thread of its own; UserError when it raises an OSError or has not come back after `seconds`."""
    outcome = {}

    def call():
        try:
            outcome['value'] = function()
        except OSError as error:
            outcome['error'] = error
    thread = threading.Thread(target=call, daemon=True)   # daemon: a call that never returns must not keep the program
    thread.start()
    thread.join(seconds)
    if 'value' in outcome:
        return outcome['value']
    reason = type(outcome['error']).__name__ if 'error' in outcome else f'no answer within {seconds} s'
    raise UserError(f'{what} cannot be reached ({reason}); {way_out}')


def reach_hub(what, way_out=WAY_OUT):
    """
    Raise UserError within seconds if the hub does not answer at all: its own client retries for minutes where packets vanish
    silently. Nothing is asked in offline mode (HF_HUB_OFFLINE), where the client knows what it has.
    """
    import huggingface_hub

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(huggingface_hub.constants.ENDPOINT, method='HEAD'), timeout=8)
        except urllib.error.HTTPError:
            pass   # it answered, which is all that was asked
        return True
    if not os.environ.get('HF_HUB_OFFLINE'):
        within(10, ask, f'the Hugging Face hub, where {what} is,', way_out)


@functools.cache
def model_folder(name):
    """The folder of a model: `name` itself, or where the hub's model of that name is downloaded to. Raises UserError."""
    if Path(name).exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+', str(name)):
        return Path(name)
    import huggingface_hub
    way_out = 'give the path of a folder that holds it'
    reach_hub(name, way_out)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=['*.json', '*.safetensors']))
    except OSError as error:
        raise UserError(f'{name} is no folder here, and not to be had from the hub ({type(error).__name__}); '
                        f'{way_out}') from error
