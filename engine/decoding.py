"""Incremental decoding with a key/value cache, so that a new token costs one position."""

import torch


class Decoding:
    """
    A model with a key/value cache of `room` positions for `batch` sequences. Decreasing `length`
    drops the last positions.
    """

    def __init__(self, model, batch, room):
        config, weight = model.config, model.wte.weight
        dtype, kind = weight.dtype, weight.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)  # that of the projected keys and values
        shape = (config.n_layer, batch, config.n_kv_head, room, config.head_dim)
        self.model, self.k = model, torch.zeros(shape, dtype=dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # positions filled
        self.seen = 0  # tokens of the idx passed to following() that have been read
        self.mask = None  # (T, S) bool: which keys the new tokens see; None: plain causal

    def begin(self, count):
        """
        Prepare the mask for the next `count` tokens, which each layer then stores by `extend`;
        returns their positions (count,) int64.
        """
        device, start, self.mask = self.k.device, self.length, None
        if 1 < count and start:  # is_causal aligns at the top left, new tokens at the bottom right
            shape = (count, start + count)
            self.mask = torch.ones(shape, dtype=torch.bool, device=device).tril(start)
        return torch.arange(start, start + count, device=device)

    def extend(self, layer, k, v):
        """Store k, v (B, K, T, D) of a layer; returns views (B, K, S, D) of all stored so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    @torch.no_grad()
    def read(self, idx):
        """Read tokens idx (B, T) int64 after those in the cache; returns their logits (B, T, V)."""
        logits = self.model(idx, cache=self).logits
        self.length += idx.shape[1]  # only now, as every layer stores at the same positions
        return logits

    def following(self, idx):
        """
        The logits (B, V) of the token after idx (B, T) int64, which must extend the idx of the
        previous call: only its new tokens are read. When the context is full, the cache is cleared
        and the last block_size / 2 tokens are read again.
        """
        longest = self.model.config.block_size
        if self.length + idx.shape[1] - self.seen > longest:
            self.length, self.seen = 0, max(0, idx.shape[1] - max(1, longest // 2))
        logits = self.read(idx[:, self.seen :])[:, -1]
        self.seen = idx.shape[1]
        return logits
