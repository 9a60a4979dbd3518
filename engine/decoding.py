"""Text token by token: what was read is kept as keys and values, a token costs one position."""

import torch


class Decoding:
    """
    A model reading on, with the keys and values of up to `room` positions. Setting `length` back
    forgets the last ones.
    """

    def __init__(self, model, batch, room):
        config, weight = model.config, model.wte.weight
        dtype, kind = weight.dtype, weight.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        shape = (config.n_layer, batch, config.n_kv_head, room, config.head_dim)
        self.model, self.k = model, torch.zeros(shape, dtype=dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # positions filled
        self.seen = 0  # tokens, of those that following() is given
        self.mask = None  # which positions the added ones (T) see, where not the usual ones

    def begin(self, count):
        """The positions of the next `count` tokens, (count,), which every layer then adds."""
        device, start, self.mask = self.k.device, self.length, None
        if 1 < count and start:  # SDPA's is_causal aligns top left; these need bottom right
            shape = (count, start + count)
            self.mask = torch.ones(shape, dtype=torch.bool, device=device).tril(start)
        return torch.arange(start, start + count, device=device)

    def extend(self, layer, k, v):
        """Add (B, K, T, D) to a layer; returns views (B, K, S, D) of all that was added."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    @torch.no_grad()
    def read(self, idx):
        """The logits (B, T, V) of the tokens idx (B, T), which follow what was read."""
        logits = self.model(idx, cache=self).logits
        self.length += idx.shape[1]
        return logits

    def following(self, idx):
        """
        The logits (B, V) of what follows idx (B, T), of which all but the end was read before. Of
        more than the context holds, its later half is read anew.
        """
        longest = self.model.config.block_size
        if self.length + idx.shape[1] - self.seen > longest:
            self.length, self.seen = 0, max(0, idx.shape[1] - max(1, longest // 2))
        logits = self.read(idx[:, self.seen :])[:, -1]
        self.seen = idx.shape[1]
        return logits
