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


def to_hugging_face(config, state):
    """
    Our configuration and tensors as transformers' (config.json's content, tensors). What no architecture there equals is
    written in our own layout. `nanofamily` holds our configuration, so that reading it back is exact.
    """
    common = dict(nanofamily=asdict(config), vocab_size=config.vocab_size, tie_word_embeddings=config.tied,
                  torch_dtype='float32')
    if is_llama(config):
        hf_config = dict(
            architectures=['LlamaForCausalLM'], model_type='llama', hidden_act='silu', hidden_size=config.n_embd,
            intermediate_size=config.n_mlp, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta, attention_bias=config.bias, mlp_bias=config.bias)
        return hf_config | common, {_llama_name(name): tensor for name, tensor in state.items()}
    if not is_gpt2(config):
        return dict(architectures=['GPT'], model_type='nanofamily', **common), dict(state)
    tensors = {}
    for name, tensor in state.items():
        # GPT-2 stores linear weights (in, out), and always has biases: ours are zero there when absent
        pieces = {_gpt2_name(name): tensor.T if tensor.ndim == 2 and name.startswith('blocks.') else tensor}
        if not config.bias and name.startswith(('blocks.', 'norm.')):
            pieces[_gpt2_name(name).replace('.weight', '.bias')] = tensor.new_zeros(len(tensor))
        for theirs, piece in pieces.items():   # q, k, v in this order, side by side
            tensors[theirs] = torch.cat((tensors[theirs], piece), -1) if theirs in tensors else piece
    hf_config = dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, n_inner=config.n_mlp, n_positions=config.block_size,
        layer_norm_epsilon=config.norm_eps, scale_attn_by_inverse_layer_idx=config.attn_scale_by_layer)
    return hf_config | common, tensors


def config_from_hugging_face(hf_config):
    """The fields of GPTConfig, a dict, that a config.json's content describes. Raises UserError for an unknown model type."""
    if 'nanofamily' not in hf_config:
        raise UserError(f'no reader for model type {hf_config.get("model_type")!r} yet: only folders written by model.save')
    return hf_config['nanofamily']


def tensors_from_hugging_face(config, model_type, tensors, template):
    """
    Our tensors, by the names and shapes of `template`, from those of a Hugging Face folder. Raises UserError that lists what
    is missing, surplus or of another shape.
    """
    rename = {'llama': _llama_name, 'gpt2': _gpt2_name}.get(model_type, str)
    expected = {rename(name) for name in template}
    optional = set()
    if rename is _gpt2_name and not config.bias:
        optional = {name.replace('.weight', '.bias') for name in expected}
    if wrong := (expected - tensors.keys()) | (tensors.keys() - expected - optional):
        raise UserError('tensors missing or surplus: ' + ', '.join(sorted(wrong)[:8]) + (', ...' if len(wrong) > 8 else ''))
    state = {}
    for name, like in template.items():
        tensor = tensors[rename(name)]
        if rename is _gpt2_name and (part := re.search(r'attn\.([qkv])\.', name)):
            tensor = tensor.chunk(3, -1)['qkv'.index(part[1])]
        if rename is _gpt2_name and name.startswith('blocks.') and tensor.ndim == 2:
            tensor = tensor.T
        if tensor.shape != like.shape:
            raise UserError(f'{rename(name)} has shape {tuple(tensor.shape)}, the configuration says {tuple(like.shape)}')
        state[name] = tensor.contiguous()
    return state
