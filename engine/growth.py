"""
How a tensor grows, a piece of rows at a time: units of an axis are copied, what writes them is
multiplied by a factor w, what reads them by a factor r. Which factors, an operator of expand.py
decides; the function of the model is kept if over the copies of each unit  sum w r = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

PIECE = 2**20  # elements grown at once: they fit a CPU's cache, and bound the memory


class Axis(NamedTuple):
    """How one dimension of a tensor grows from `old` units."""

    old: int
    source: torch.Tensor  # (new,) int64: the old unit that each new one copies
    copies: torch.Tensor  # (new,) float64: how many copies of that unit there are
    factor: torch.Tensor  # (new,) float64: what each copy is multiplied by
    covered: int  # units from here on copy none ...
    fill: str = 'zero'  # ... they are zero, one, the mean of the old ones, or random
    reads: bool = False  # columns that read copied units, which zero-sum noise may tell apart

    def dual(self, fill):
        """
        The map of gradients: f becomes 1 / (c f), since a unit's gradient is the sum over its c
        copies of f times theirs.
        """
        return self._replace(factor=1 / (self.copies * self.factor), fill=fill)

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


class Copying(NamedTuple):
    """What happens to rows and columns as they are copied."""

    power: int  # of the factors w: 1 for weights and first moments, 2 for second moments
    noise: float  # zero-sum noise, relative to the rows
    generator_of: Callable  # row at which a piece starts -> its random Generator
    piece: int  # elements that are in memory at a time


def grow_tensor(old, donor, axes, copying):
    """
    Yield the new tensor in pieces of rows, of the old one's dtype; what is equal to old rows may
    be a view of them. old, donor (rows for new units, or None): tensors, or what gives rows by
    slicing; axes: an Axis or None for each dimension.
    """
    power, noise, generator_of, size = copying
    rows_axis = axes[0]
    n_rows = len(rows_axis.source) if rows_axis else old.shape[0]
    n_columns = len(axes[1].source) if len(axes) == 2 and axes[1] else 1
    mean = None
    if rows_axis and rows_axis.fill == 'mean' and rows_axis.covered < n_rows:
        mean = old[:].contiguous().mean(0, keepdim=True)  # summed in one order in any layout
    step = max(1, size // n_columns)
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        rows = old[start:stop]
        if rows_axis:
            rows = gather_rows((old, donor, mean), rows_axis, start, stop)
        dtype = rows.dtype
        rows = rows.to(torch.promote_types(dtype, torch.float32))  # rounded once, at the end
        if rows_axis:
            rows = grow_rows(rows, rows_axis, start, power)
        if len(axes) == 2 and axes[1]:
            generator = generator_of(start)
            rows = grow_columns(rows, axes[1], power, generator)
            if axes[1].reads and noise:
                add_noise(rows, axes[1], noise, generator)
        yield rows.to(dtype)


def gather_rows(tensors, axis, start, stop):
    """The rows that rows `start` to `stop` copy; new units take theirs from the donor, if any."""
    old, donor, mean = tensors
    own = axis.covered if donor is None else axis.old
    parts = []
    if start < own:
        parts.append(take(old, axis.source[start : min(stop, own)]))
    if stop > own and donor is not None:
        parts.append(take(donor, axis.source[max(start, own) : stop]))
    elif stop > own:  # units that copy none: the mean of all, or a place to be filled
        like = old[:1] if mean is None else mean
        parts.append(like.expand(stop - max(start, own), *like.shape[1:]))
    return join(parts)


def take(tensor, index):
    """tensor[index] by rows, in slices of consecutive ones: a file is read in large pieces."""
    breaks = (torch.nonzero(index.diff() != 1).flatten() + 1).tolist()
    ends = zip([0, *breaks], [*breaks, len(index)])
    parts = [tensor[int(index[a]) : int(index[b - 1]) + 1] for a, b in ends]
    return join(parts)


def join(parts, dim=0):
    """torch.cat that keeps the layout of transposed matrices, where torch's own transposes them."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim == 2 and parts[0].stride(0) < parts[0].stride(1):
        return torch.cat([part.T for part in parts], 1 - dim).T
    return torch.cat(parts, dim)


def grow_rows(rows, axis, start, power):
    """The rows, those that copy none filled, times factors ** power."""
    free = max(0, axis.covered - start)  # the first row that copies none
    factor = axis.factor[start : start + len(rows)].clone()
    if axis.fill == 'one':
        factor[free:] = 1
    if free >= len(rows) and (factor == 1).all():
        return rows
    rows = rows.clone()  # they may be the old model's
    if axis.fill != 'mean':
        rows[free:] = float(axis.fill == 'one')
    scale(rows, factor**power, 0)
    return rows


def grow_columns(rows, axis, power, generator):
    """Copy the columns of `rows` by the axis, times factors ** power; those that copy none fill."""
    new, covered = len(axis.source), axis.covered
    in_order = torch.equal(axis.source, torch.arange(new) % axis.old)
    if in_order and new == axis.old and (axis.factor == 1).all():
        return rows  # as they were
    if in_order:  # slices are several times faster
        whole, rest = divmod(covered, axis.old)
        free = rows.new_zeros(len(rows), new - covered)
        grown = join([rows] * whole + [rows[:, :rest], free], 1)
    else:
        grown = rows.index_select(1, axis.source.to(rows.device))
    if covered < new and axis.fill == 'mean':
        grown[:, covered:] = rows.contiguous().mean(1, keepdim=True)
    scale(grown, axis.factor**power, 1)
    if covered < new and axis.fill == 'random':  # they read what is always zero
        drawn = torch.randn(len(rows), new - covered, generator=generator)
        grown[:, covered:] = 0.02 * drawn.to(rows)
    return grown


def scale(tensor, factor, dim):
    """Multiply by a factor for each index of `dim`, in place; no work where all are 1."""
    if not (factor == 1).all():
        shape = [1] * tensor.ndim
        shape[dim] = -1
        tensor.mul_(factor.to(tensor).view(shape))


def add_noise(rows, axis, noise, generator):
    """
    Tell copies apart, in place: columns that read the c > 1 copies of a unit get normal noise
    whose sum over the copies is zero, `noise` times the root mean square of its row.
    """
    copied = torch.nonzero(axis.copies[: axis.covered] > 1).flatten()
    if not len(copied):
        return
    amplitude = noise * rows.contiguous().square().mean(1, keepdim=True).sqrt()
    drawn = torch.randn(len(rows), len(copied), generator=generator, dtype=torch.float64)
    drawn = amplitude * drawn.to(rows)
    units = axis.source[copied].to(rows.device)
    copies = axis.copies[copied].to(rows)
    sums = rows.new_zeros(len(rows), axis.old).index_add_(1, units, drawn)
    rows[:, copied] += drawn - sums[:, units] / copies
