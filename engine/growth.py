"""
How a tensor grows: units of an axis are copied, what writes them is multiplied by a factor w, what
reads them by a factor r. Which factors, an operator of expand.py decides; the function of the model
is kept if over the copies of each unit  sum w r = 1.
"""

from typing import NamedTuple

import torch


class Axis(NamedTuple):
    """How one dimension of a tensor grows from `old` units."""

    old: int
    source: torch.Tensor  # (new,) int64: the old unit that each new one copies
    copies: torch.Tensor  # (new,) float64: how many copies of that unit there are
    factor: torch.Tensor  # (new,) float64: what each copy is multiplied by
    covered: int  # units from here on copy none ...
    fill: str = 'zero'  # ... they are zero, one, the mean of the old ones, or random
    reads: bool = False  # columns that read copied units, which zero-sum noise may tell apart

    def scaled(self, factor, **changes):
        """The same map with another factor for each unit."""
        return self._replace(factor=torch.ones_like(self.copies) * factor, **changes)


def copy_of(old, source, covered=None):
    """The Axis of new units that copy the old ones in `source`, all factors 1."""
    copies = torch.bincount(source[:covered], minlength=old)[source].double()
    return Axis(old, source, copies, torch.ones_like(copies), covered or len(source))


def round_robin(old, new, covered=None):
    """Whole copies of the old units, then again from the first one, until `new`."""
    return copy_of(old, torch.arange(new) % old, covered)


def by_head(heads, head_dim):
    """An axis of heads as the axis of their dimensions: RoPE and softmax scale stay right."""
    source = (heads.source[:, None] * head_dim + torch.arange(head_dim)).flatten()
    return copy_of(heads.old * head_dim, source)


def grow_tensor(old, donor, axes, noise, generator):
    """
    The new tensor, of the old one's dtype. donor: the tensor that rows of new units are copied
    from, None: the old one; axes: an Axis or None for each dimension; noise: zero-sum, relative to
    the rows, on columns that read copied units.
    """
    new = old.to(torch.promote_types(old.dtype, torch.float32))  # rounded once, at the end
    for dim, axis in enumerate(axes):
        if axis:
            new = copy_along(new, axis, dim, None if dim else donor)
            if axis.fill == 'random':  # columns that read what is always zero
                drawn = torch.randn(len(new), len(axis.source) - axis.covered, generator=generator)
                new[:, axis.covered :] = 0.02 * drawn.to(new)
            if axis.reads and noise:
                add_noise(new, axis, noise, generator)
    return new.to(old.dtype)


def copy_along(tensor, axis, dim, donor=None):
    """Copy the units of one dimension, each times its factor; those that copy none are filled."""
    source = axis.source.to(tensor.device)
    new = tensor.index_select(dim, source)
    if donor is not None:
        new[axis.old :] = donor[source[axis.old :]].to(new)
    factor = axis.factor.to(new)
    if axis.covered < len(source):
        free = new.movedim(dim, 0)[axis.covered :]
        if axis.fill == 'mean':
            free.copy_(tensor.mean(dim))
        elif axis.fill == 'one':
            free.fill_(1)
            factor[axis.covered :] = 1
        else:
            free.zero_()
    return new.mul_(factor.view(-1, *[1] * (tensor.ndim - 1 - dim)))


def add_noise(rows, axis, noise, generator):
    """
    Tell copies apart, in place: columns that read the c > 1 copies of a unit get normal noise
    whose sum over the copies is zero, `noise` times the root mean square of its row.
    """
    copied = torch.nonzero(axis.copies[: axis.covered] > 1).flatten()
    amplitude = noise * rows.square().mean(1, keepdim=True).sqrt()
    drawn = torch.randn(len(rows), len(copied), generator=generator, dtype=torch.float64)
    drawn = amplitude * drawn.to(rows)
    units = axis.source[copied].to(rows.device)
    copies = axis.copies[copied].to(rows)
    sums = rows.new_zeros(len(rows), axis.old).index_add_(1, units, drawn)
    rows[:, copied] += drawn - sums[:, units] / copies
