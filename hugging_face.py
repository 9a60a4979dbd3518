"""
Our models as Hugging Face folders and back: which architecture of transformers computes the same function, under which
names it stores our tensors, and what its config.json says.
"""
import re
from dataclasses import asdict

import torch

from configurator import UserError

LLAMA_NAMES = {   # ours -> transformers', within a layer
    'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm',
    **{f'attn.{x}': f'self_attn.{x}_proj' for x in 'qkvo'}, **{f'mlp.{x}': f'mlp.{x}_proj' for x in ('gate', 'up', 'down')},
}
GPT2_NAMES = {
    'norm1': 'ln_1', 'norm2': 'ln_2', 'attn.o': 'attn.c_proj', 'mlp.up': 'mlp.c_fc', 'mlp.down': 'mlp.c_proj',
    **{f'attn.{x}': 'attn.c_attn' for x in 'qkv'},
}


def is_llama(config):
    """Whether transformers' LlamaForCausalLM computes the same function."""
    return (config.norm, config.act, config.pos, config.rotary_fraction) == ('rms', 'swiglu', 'rope', 1.0) and not (
        config.qk_norm or config.parallel or config.attn_scale_by_layer)


def is_gpt2(config):
    """Whether transformers' GPT2LMHeadModel computes the same function (it always has biases: zero where we have none)."""
    return (config.norm, config.act, config.pos) == ('layer', 'gelu', 'learned') and config.n_kv_head == config.n_head and (
        config.n_head * config.head_dim == config.n_embd) and not (config.qk_norm or config.parallel)


def _llama_name(name):
    """transformers' name in Llama for one of our tensors."""
    if match := re.match(r'blocks\.(\d+)\.(.+)\.(weight|bias)$', name):
        return f'model.layers.{match[1]}.{LLAMA_NAMES[match[2]]}.{match[3]}'
    return name.replace('wte.', 'model.embed_tokens.').replace('norm.', 'model.norm.')


def _gpt2_name(name):
    """transformers' name in GPT-2 for one of our tensors; q, k and v share one."""
    if match := re.match(r'blocks\.(\d+)\.(.+)\.(weight|bias)$', name):
        return f'transformer.h.{match[1]}.{GPT2_NAMES[match[2]]}.{match[3]}'
    return name if name.startswith('lm_head') else 'transformer.' + name.replace('norm.', 'ln_f.')


def layout(config, names):
    """
    How transformers stores a model: {its tensor's name: (the names of ours in it, side by side; whether it is transposed)}.
    names: all of our tensors' names. An empty list stands for zeros that we do not have. What no architecture of
    transformers equals is stored as it is.
    """
    if not is_llama(config) and not is_gpt2(config):
        return {name: ([name], False) for name in names}
    stored = {}
    for name in names:
        theirs = _llama_name(name) if is_llama(config) else _gpt2_name(name)
        linear = is_gpt2(config) and name.startswith('blocks.') and name.endswith('.weight') and 'norm' not in name
        stored.setdefault(theirs, ([], linear))[0].append(name)   # GPT-2: q, k, v in this order, weights (in, out)
    if is_gpt2(config) and not config.bias:
        for theirs in [t for t in stored if t.startswith('transformer.h.') or t.startswith('transformer.ln_f.')]:
            stored[theirs.replace('.weight', '.bias')] = [], False
    return stored


def config_to_hugging_face(config, dtype='float32'):
    """The content of config.json. `nanofamily` holds our configuration, so that reading it back is exact."""
    common = dict(nanofamily=asdict(config), vocab_size=config.vocab_size, tie_word_embeddings=config.tied, torch_dtype=dtype)
    if is_llama(config):
        return common | dict(
            architectures=['LlamaForCausalLM'], model_type='llama', hidden_act='silu', hidden_size=config.n_embd,
            intermediate_size=config.n_mlp, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta, attention_bias=config.bias, mlp_bias=config.bias)
    if is_gpt2(config):
        return common | dict(
            architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, n_inner=config.n_mlp, n_positions=config.block_size,
            layer_norm_epsilon=config.norm_eps, scale_attn_by_inverse_layer_idx=config.attn_scale_by_layer)
    return common | dict(architectures=['GPT'], model_type='nanofamily')


def config_from_hugging_face(hf_config):
    """The fields of GPTConfig, a dict, that a config.json's content describes. Raises UserError for an unknown model type."""
    if not isinstance(hf_config, dict) or 'nanofamily' not in hf_config:
        model_type = hf_config.get('model_type') if isinstance(hf_config, dict) else None
        raise UserError(f'no reader for model type {model_type!r} yet: only folders written by model.save')
    return hf_config['nanofamily']


def tensors_to_hugging_face(config, state):
    """Our tensors, {name: tensor}, as transformers stores them."""
    tensors = {}
    for theirs, (ours, transposed) in layout(config, state).items():
        if ours:
            tensor = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
            tensors[theirs] = tensor.T.contiguous() if transposed else tensor.contiguous()
        else:
            weight = tensors[theirs.replace('.bias', '.weight')]
            tensors[theirs] = weight.new_zeros(weight.shape[-1])
    return tensors


def tensors_from_hugging_face(config, tensors, template):
    """
    Our tensors, by the names and shapes of `template`, from those of a Hugging Face folder. Raises UserError that lists what
    is missing, surplus or of another shape.
    """
    stored = layout(config, template)
    required = {theirs for theirs, (ours, _) in stored.items() if ours}
    if wrong := (required - tensors.keys()) | (tensors.keys() - stored.keys()):
        raise UserError('tensors missing or surplus: ' + ', '.join(sorted(wrong)[:8]) + (', ...' if len(wrong) > 8 else ''))
    state = {}
    for theirs in required:
        ours, transposed = stored[theirs]
        tensor, shapes = tensors[theirs].T if transposed else tensors[theirs], [template[name].shape for name in ours]
        if tensor.shape != (sum(shape[0] for shape in shapes), *shapes[0][1:]):
            raise UserError(f'{theirs} has shape {tuple(tensors[theirs].shape)}, which the configuration does not have')
        parts = tensor.split([shape[0] for shape in shapes])
        state |= {name: part.contiguous() for name, part in zip(ours, parts)}
    return state
