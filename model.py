"""
The model: GPT-2, Llama and their close kin in one file, told apart by the switches of `GPTConfig`.

Shapes: B sequences, T positions, C = n_embd, H query heads, K key/value heads, D = head_dim, F = n_mlp, V vocabulary.
On disk a model is a Hugging Face folder (`config.json`, `model.safetensors`) under the architecture its configuration
equals, so transformers opens what we save.
"""
import json
import math
import re
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from configurator import UserError, move_into_place, read_json, unknown, write_atomically
from head import head_loss
from hugging_face import (config_from_hugging_face, config_to_hugging_face, model_folder, tensors_from_hugging_face,
                          tensors_to_hugging_face)
from sizes import SIZES, llama


@dataclass
class GPTConfig:
    """The shape of a decoder. Raises UserError when the numbers do not fit together."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0                  # 0: as many as query heads
    head_dim: int = 0                   # 0: n_embd / n_head
    n_mlp: int = 0                      # 0: 4 n_embd
    vocab_size: int = 50257
    block_size: int = 1024              # longest context; the table of learned positions, or what RoPE is trained for
    norm: str = 'rms'                   # rms or layer
    norm_eps: float = 1e-5
    act: str = 'swiglu'                 # swiglu, gelu (tanh approximation), gelu_exact or relu
    pos: str = 'rope'                   # rope or learned
    rope_theta: float = 1e4
    rope_scaling: tuple = ()            # Llama 3: (factor, low and high frequency factor, context before it was stretched)
    rotary_fraction: float = 1.0        # share of each head that RoPE turns (GPT-NeoX: 0.25)
    qk_norm: bool = False               # RMSNorm on each head's queries and keys (Qwen3)
    parallel: bool = False              # attention and MLP read the same input (GPT-NeoX)
    bias: bool = False                  # biases in linear layers and LayerNorm
    tied: bool = False                  # the head is the token embedding
    attn_scale_by_layer: bool = False   # attention logits divided by the layer's number, 1 at the bottom (Inheritune)
    init_std: float = 0.0               # 0: sqrt(2 / (5 n_embd)), paper 001
    channels: int = 0                   # inputs are vectors of so many numbers (a time series) in place of tokens; 0: tokens

    def __post_init__(self):
        for field in fields(self):   # it may come from a file
            value, kind = getattr(self, field.name), field.type
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f'{field.name} is {value!r}, not {kind.__name__}')
        numbers = self.rope_scaling
        if numbers and (len(numbers) != 4 or not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in numbers)):
            raise UserError(f'rope_scaling is four positive numbers or none, not {str(numbers)[:80]}')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // max(1, self.n_head)
        self.n_mlp = self.n_mlp or 4 * self.n_embd
        for name in ('n_layer', 'n_head', 'n_embd', 'n_kv_head', 'head_dim', 'n_mlp', 'vocab_size', 'block_size'):
            if not 1 <= getattr(self, name) < 2 ** 31:
                raise UserError(f'{name} must be at least 1 and below 2^31, not {getattr(self, name)}')
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        if self.pos == 'rope' and self.rotary_dim % 2:
            raise UserError(f'RoPE turns pairs of dimensions, but {self.rotary_dim} of each head are an odd number')
        legal = dict(norm=('rms', 'layer'), act=('swiglu', 'gelu', 'gelu_exact', 'relu'), pos=('rope', 'learned'))
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise UserError(f'{name} is one of {", ".join(values)}, not {getattr(self, name)!r}')

    def num_params(self, **which):
        """GPT.num_params of a model of this shape, without allocating it."""
        return _count_params(astuple(self), **which)

    @property
    def rotary_dim(self):
        """Dimensions of each head that RoPE turns."""
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def named(cls, name, **changes):
        """
        The configuration of a size of the papers or of GPT-2, with fields overridden by `changes`; or `WIDTHxLAYERS`,
        any small Llama with heads of 16 (`64x4`). Raises UserError with the nearest name for an unknown one.
        """
        if match := re.fullmatch(r'(\d+)x(\d+)', name):
            width, layers = map(int, match.groups())
            if width % 16 or not width:
                raise UserError(f'{name}: the width must be a multiple of 16, the head dimension')
            shape = llama(width, 8 * round(width / 3), layers, width // 16)   # an MLP of 8/3 the width, in eights
        elif name in SIZES:
            shape = SIZES[name]
        else:
            raise unknown('size', name, [*SIZES, 'WIDTHxLAYERS'])
        return cls(**{**shape, **changes})


@cache
def _count_params(fields, **which):
    with torch.device('meta'):
        return GPT(GPTConfig(*fields)).num_params(**which)


# ---------------------------------------------------------------------------------------------------------------------
# the layers

def _norm(config, dim):
    if config.norm == 'rms':
        return nn.RMSNorm(dim, eps=config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


def stretch(frequency, factor, low, high, original):
    """
    Llama 3's frequencies for a context stretched by `factor`: what turns less than `low` times over the `original` context
    is slowed down by the factor, what turns more than `high` times is kept, between them it goes over smoothly.
    """
    turns = original * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate(x, cos, sin):
    """Turn 2n dimensions of each head by position, in Llama's pairs (i, i+n): x (B, heads, T, D), cos and sin (T, n)."""
    n = cos.shape[-1]
    first, second, rest = x[..., :n], x[..., n:2 * n], x[..., 2 * n:]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Causal self-attention, grouped queries where n_kv_head < n_head: (B, T, C) -> (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.o = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.scale = config.head_dim ** -0.5 / (layer + 1 if config.attn_scale_by_layer else 1)

    def forward(self, x, rope, cache):
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.config.head_dim).transpose(1, 2) for project in (self.q, self.k, self.v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            if 1 < T < k.shape[2]:   # new positions after old ones: SDPA's is_causal aligns top left, we need bottom right
                mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == k.shape[2] and T > 1, scale=self.scale,
                                           enable_gqa=self.config.n_kv_head < self.config.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C) through F hidden units: down(silu(gate x) * up x), or down(act(up x))."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_mlp, bias=config.bias)
        if config.act == 'swiglu':
            self.gate = nn.Linear(config.n_embd, config.n_mlp, bias=config.bias)
        self.down = nn.Linear(config.n_mlp, config.n_embd, bias=config.bias)
        self.act = config.act

    def forward(self, x):
        if self.act == 'swiglu':
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.act == 'relu':
            return self.down(F.relu(self.up(x)))
        return self.down(F.gelu(self.up(x), approximate='tanh' if self.act == 'gelu' else 'none'))


class Block(nn.Module):
    """One layer: (B, T, C) -> (B, T, C), normalised before each part, added to the residual stream after it."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1, self.attn = _norm(config, config.n_embd), Attention(config, layer)
        self.norm2, self.mlp = _norm(config, config.n_embd), MLP(config)
        self.parallel = config.parallel
        self.recompute = None   # stands in for the call while training, to keep less for the backward pass (parallel.py)

    def forward(self, x, rope, cache):
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self.compute, x, rope, cache)
        return self.compute(x, rope, cache)

    def compute(self, x, rope, cache):
        """What the layer computes."""
        if self.parallel:
            return x + self.attn(self.norm1(x), rope, cache) + self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x), rope, cache)
        return x + self.mlp(self.norm2(x))


class Cache:
    """Keys and values of the positions already seen. Setting `length` back forgets the last positions."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.n_layer, batch, config.n_kv_head, length, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0   # positions filled

    def extend(self, layer, k, v):
        """Store (B, K, T, D) behind the filled positions; returns all keys and values up to there, views (B, K, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


# ---------------------------------------------------------------------------------------------------------------------
# the model

class Output(NamedTuple):
    """
    logits (B, T, V), None when targets were given; loss, a scalar, None without targets; hidden (B, T, C) if asked for; what
    the loss function returned besides the loss: cross entropy and divergence from a teacher.
    """
    logits: torch.Tensor | None
    loss: torch.Tensor | None
    hidden: torch.Tensor | None
    parts: tuple = ()


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    The distribution to sample from, float32 (..., V), given logits (..., V). temperature 0: all on the largest (greedy).
    top_k: only the k most likely tokens, 0 for all; top_p: only the fewest that hold this much probability together.
    """
    logits = logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p   # what stands before it is enough already
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0)
    return p / p.sum(-1, keepdim=True)


class GPT(nn.Module):
    """A decoder-only language model of the given configuration, freshly initialised from torch's random state."""

    def __init__(self, config):
        super().__init__()
        self.config, device = config, torch.get_default_device()
        with torch.device('meta'):   # no memory, and no initialisation by nn.Linear that ours would overwrite
            self.wte = (nn.Linear(config.channels, config.n_embd, bias=False) if config.channels
                        else nn.Embedding(config.vocab_size, config.n_embd))
            self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.pos == 'learned' else None
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
            self.norm = _norm(config, config.n_embd)
            self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.to_empty(device=device)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """
        Matrices and embeddings ~ N(0, std), std = init_std or sqrt(2 / (5 C)); the two that write to the residual stream
        (attn.o, mlp.down) smaller by sqrt(2 n_layer), as in GPT-2; norm gains 1, biases 0. RoPE's tables are built here too.
        """
        std = self.config.init_std or math.sqrt(2 / (5 * self.config.n_embd))
        for name, p in self.named_parameters():
            if name.endswith(('attn.o.weight', 'mlp.down.weight')):
                nn.init.normal_(p, 0.0, std / math.sqrt(2 * self.config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, 0.0, std)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)
            else:
                assert 'norm' in name, f'no initialisation for {name}'
                nn.init.ones_(p)
        self.build_rope(self.wte.weight.device)

    def build_rope(self, device):
        """Tables cos, sin (block_size, rotary_dim / 2), computed in float32 as everyone does, not saved."""
        if self.config.pos == 'rope':
            pair = torch.arange(0, self.config.rotary_dim, 2, device=device).float() / self.config.rotary_dim
            position = torch.arange(self.config.block_size, device=device).float()
            frequency = 1 / self.config.rope_theta ** pair
            if self.config.rope_scaling:
                frequency = stretch(frequency, *self.config.rope_scaling)
            angle = torch.outer(position, frequency)
            self.register_buffer('cos', angle.cos(), persistent=False)
            self.register_buffer('sin', angle.sin(), persistent=False)

    def forward(self, idx, targets=None, hidden_at=None, cache=None, loss=head_loss):
        """
        idx (B, T) int64, or with `channels` a float (B, T, channels) -> Output. With `targets` (B, T), -100 where nothing is
        asked: the mean cross entropy in nats, and no logits. `hidden_at=k`: the residual stream after layer k too, k from 1 to
        n_layer. With a `cache` the T positions come after those it holds, and it is filled with them. `loss`: head_loss, or what
        takes its place (same arguments).
        """
        x, hidden = self.residual_stream(idx, hidden_at=hidden_at, cache=cache)
        x = self.norm(x)
        if targets is None:
            return Output(F.linear(x, self.head_weight), None, hidden)
        total, *parts = loss(x, self.head_weight, targets)
        return Output(None, total, hidden, tuple(parts))

    def residual_stream(self, idx, layers=None, hidden_at=None, cache=None):
        """(the residual stream (B, T, C) after the first `layers` layers, None: all of them; that after layer `hidden_at`)."""
        start = cache.length if cache is not None else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f'{end} positions, but block_size is {self.config.block_size}')
        x, rope, hidden = self.wte(idx), None, None
        if self.wpe is not None:
            x = x + self.wpe.weight[start:end]
        else:
            rope = self.cos[start:end], self.sin[start:end]
        for i, block in enumerate(self.blocks[:layers], 1):
            x = block(x, rope, cache)
            if i == hidden_at:
                hidden = x
        if cache is not None:
            cache.length = end
        return x, hidden

    @property
    def head_weight(self):
        """The (V, C) matrix that turns the last hidden state into logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def num_params(self, embedding=False, head=False):
        """Parameters N of layers and final norm (paper 001's N); embeddings and head where asked for, once if tied."""
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        embeddings = sum(n for name, n in sizes.items() if name.startswith(('wte.', 'wpe.')))
        untied_head = sizes.get('lm_head.weight', 0)
        total = sum(sizes.values()) - embeddings - untied_head
        if embedding:
            total += embeddings
        if head:
            total += untied_head if self.lm_head is not None else (0 if embedding else self.wte.weight.numel())
        return total

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None, generator=None):
        """
        Continue idx (B, T) by up to `max_new_tokens` tokens; returns (B, T + new). Sampling as in `probabilities`. Ends early
        when every sequence has produced the token `stop`. Keys and values are cached; when the context is full, generation
        goes on from its later half.
        """
        cache, seen = self.new_cache(len(idx)), 0
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache.length + idx.shape[1] - seen > self.config.block_size:
                cache.length, seen = 0, max(0, idx.shape[1] - max(1, self.config.block_size // 2))
            logits = self(idx[:, seen:], cache=cache).logits[:, -1]
            seen = idx.shape[1]
            token = torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)
            idx = torch.cat((idx, token), 1)
            done |= token[:, 0] == (-1 if stop is None else stop)
            if stop is not None and done.all():
                break
        return idx

    def new_cache(self, batch):
        """An empty cache for `batch` sequences of up to block_size, of the device and dtype that attention's keys have."""
        device, dtype = self.wte.weight.device, self.wte.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return Cache(self.config, batch, self.config.block_size, device, dtype)

    def save(self, folder, tokenizer='', state=None):
        """
        Write config.json and model.safetensors as the Hugging Face architecture that the configuration equals. `tokenizer`:
        the name of the one it was trained with, kept for sample.py. state: the whole tensors, where this model has shards of them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state is None else state
        tensors = tensors_to_hugging_face(self.config, {name: tensor.detach() for name, tensor in state.items()})
        save_file(tensors, folder / 'model.safetensors.tmp', metadata={'format': 'pt'})
        move_into_place(folder / 'model.safetensors.tmp', folder / 'model.safetensors')
        dtype = str(self.wte.weight.dtype).removeprefix('torch.')
        hf_config = config_to_hugging_face(self.config, dtype) | (dict(nanofamily_tokenizer=tokenizer) if tokenizer else {})
        write_atomically(folder / 'config.json', json.dumps(hf_config, indent=1) + '\n')


def shape_of(folder):
    """The GPTConfig of the model in a folder, by its config.json. Raises UserError for none, a damaged or a strange one."""
    try:
        return GPTConfig(**config_from_hugging_face(read_json(Path(folder) / 'config.json')))
    except FileNotFoundError:
        raise UserError(f'{folder} is not a model folder (it has no config.json)') from None
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f'{folder} is damaged: {type(error).__name__} {error} in its config.json') from None


def load(name, device='cpu', contiguous=True):
    """
    The model in a Hugging Face folder, or of that name on the hub, in the dtype its tensors have; one file or several.
    contiguous=False spares a copy of GPT-2's transposed tensors, for a model that is only read once. Raises
    UserError when there is none, when a file is damaged, or when tensors and configuration do not match.
    """
    folder = model_folder(name)
    config = shape_of(folder)
    files = sorted(folder.glob('model*.safetensors'))
    if not files:
        pickled = [path.name for path in (*folder.glob('*.bin'), *folder.glob('*.pt'), *folder.glob('*.pth'))]
        reason = f': {pickled[0]} is a pickle, and unpickling runs what its maker wrote into it' if pickled else ''
        raise UserError(f'{folder} has no weights in safetensors' + reason)
    try:
        tensors = {name: tensor for file in files for name, tensor in load_file(file, device=str(device)).items()}
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise UserError(f'{folder} is damaged: {type(error).__name__} {error}') from error
    with torch.device('meta'):
        model = GPT(config)
    try:
        state = tensors_from_hugging_face(model.config, tensors, template=model.state_dict(), contiguous=contiguous)
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    model.load_state_dict(state, assign=True)
    model.build_rope(device)
    return model
