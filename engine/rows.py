"""
The weights in a model folder: one file or several with an index, read whole or by rows, and
written as they are made, models much larger than memory a piece at a time. For that the library's
own writer needs all tensors at once; its format is simple enough to write: 8 bytes with the
header's length, the header (name -> dtype, shape, offsets, in JSON), the data.
"""

import json
import os
import shutil
import zipfile
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from engine.errors import UserError, first_line
from engine.files import commit_file, read_json, verify_model, write_json
from engine.hugging_face import find_tensors, layout, pack, stored_shape, unpack

SHARD_BYTES = 5e9  # weights in one file, as on the hub
INDEX = 'model.safetensors.index.json'
DTYPES = {torch.float64: 'F64', torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}


# ----------------------------------------------------------------------------------------------
# files


def weight_files(folder):
    """
    The files with a model's weights: safetensors, or pickles where there is nothing else. Raises
    UserError where they are missing, some of those that the index names, or changed since they
    were written.
    """
    folder = Path(folder)
    verify_model(folder)
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


def check_numbers(name, dtype):
    """Raise UserError for a dtype that is not one of weights: quantised ones cannot be read."""
    if dtype not in DTYPES:
        kind = str(dtype).removeprefix('torch.')
        raise UserError(f'{name} is {kind}, not one of float64, float32, bfloat16 and float16')


def check_finite(name, tensor):
    """Raise UserError for a tensor with numbers that are not finite."""
    if tensor.sum().isfinite():  # only if all terms are; fifteen times faster than to ask each
        return
    if not tensor.isfinite().all():  # or the sum alone is too large
        raise UserError(f'{name} has values that are not finite in {tensor.dtype}')


def split_in_files(sizes):
    """{file name: names of its tensors}, at most SHARD_BYTES in each; sizes: {name: bytes}."""
    groups, filled = [[]], 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {'model.safetensors': groups[0]}
    n = len(groups)
    return {f'model-{i:05d}-of-{n:05d}.safetensors': names for i, names in enumerate(groups, 1)}


def write_tensors(folder, tensors):
    """Write {name: tensor} as the weights of a model folder, in place of those it had."""
    files = split_in_files({name: tensor.nbytes for name, tensor in tensors.items()})
    for file, names in files.items():
        path = Path(folder) / file
        chosen = {name: tensors[name] for name in names}
        save_file(chosen, f'{path}.tmp', metadata={'format': 'pt'})
        commit_file(f'{path}.tmp', path)
    finish_weights(folder, files, sum(tensor.nbytes for tensor in tensors.values()))


def finish_weights(folder, files, total_size):
    """Write the index of several files, and remove weights that an earlier model left."""
    kept = set(files)
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        content = dict(metadata=dict(total_size=total_size), weight_map=where)
        write_json(Path(folder) / INDEX, content)
        kept.add(INDEX)
    for path in Path(folder).glob('model*.safetensors*'):
        if path.name not in kept:
            path.unlink()


# ----------------------------------------------------------------------------------------------
# rows


class Rows:
    """A tensor in a safetensors file that is read by slices of its rows."""

    def __init__(self, path, file, name):
        """file: `path`, opened; it need not stay open."""
        self.path, self.status, self.name = path, path.stat(), name
        self.slice = file.get_slice(name)
        self.shape = tuple(self.slice.get_shape())

    def __getitem__(self, key):
        return self.slice[key]

    def mapped_anew(self):
        """
        The same with a mapping of its own, which ends with it: what is read through the first one
        stays in memory as long as that. Raises UserError for a file that was replaced.
        """
        if not os.path.samestat(self.status, self.path.stat()):
            raise UserError(f'{self.path} was exchanged while it was read')
        with safe_open(self.path, 'pt') as file:
            return Rows(self.path, file, self.name)


class FolderReader:
    """The tensors of a model folder under our names, read when asked for."""

    def __init__(self, folder, config, shapes):
        """shapes: {our name: shape} of a model of this configuration. Raises UserError."""
        self.config, self.shapes = config, shapes
        self.tensors, self.where = {}, {}  # by name in the folder; {our name: transformers'}
        self.unpacked = '', []  # transformers' name and our tensors, of the last one it packs
        try:
            for path in weight_files(folder):
                self.tensors |= self.open(path)
            self.stored = layout(config, shapes)
            self.found = find_tensors(config, self.tensors, shapes)
            self.check_shapes()
        except (OSError, SafetensorError, UserError) as error:
            raise UserError(f'{folder} cannot be read: {error}') from error
        for theirs, stored in self.stored.items():
            self.where |= dict.fromkeys(stored.names, theirs)

    def open(self, path):
        """{name: Rows} of a file; of a pickle, its tensors, which the system reads when asked."""
        if path.suffix == '.bin':
            return load_pickle(path)
        with safe_open(path, 'pt') as file:
            return {name: Rows(path, file, name) for name in file.keys()}

    def check_shapes(self):
        """Raise UserError for a tensor that is not what the configuration says."""
        for theirs, stored in self.stored.items():
            if stored.names:
                tensor = self.tensors[self.found[theirs]]
                check_numbers(theirs, tensor[:1].dtype)
                found, expected = tuple(tensor.shape), tuple(stored_shape(stored, self.shapes))
                if found != expected:
                    raise UserError(
                        f'{theirs} has shape {found}, the configuration says {expected}'
                    )

    def __getitem__(self, name):
        """Our tensor `name`: Rows, or a whole tensor where transformers packs it with others."""
        theirs = self.where[name]
        stored, tensor = self.stored[theirs], self.tensors[self.found[theirs]]
        if self.unpacked[0] == theirs:
            return self.unpacked[1][stored.names.index(name)]
        if isinstance(tensor, Rows):
            tensor = tensor.mapped_anew()
        if not stored.packed and len(stored.names) == 1:
            return tensor
        sizes = [self.shapes[one][0] for one in stored.names]
        self.unpacked = theirs, unpack(tensor[:], stored.packed, self.config, sizes)
        return self[name]


def write_model(folder, config, shapes, dtype, pieces):
    """
    Write the weights of a model of our tensors `shapes` in transformers' layout, as they are
    made: pieces(name) yields the rows of a tensor, in order.
    """
    stored, sizes, theirs_shapes = layout(config, shapes), {}, {}
    for theirs, entry in stored.items():
        if entry.names:
            shape = stored_shape(entry, shapes)
        else:  # a bias of zeros, as long as its weight has outputs
            shape = theirs_shapes[theirs.replace('.bias', '.weight')][-1:]
        theirs_shapes[theirs] = shape
        sizes[theirs] = dtype.itemsize * torch.Size(shape).numel()
    files, total = split_in_files(sizes), sum(sizes.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f'the weights take {total / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free'
        )
    bar = tqdm(desc=f'writing {folder}', total=total, unit='B', unit_scale=True, disable=None)
    with bar:
        for file, names in files.items():
            with open(Path(folder) / file, 'wb') as out:
                out.write(header({name: theirs_shapes[name] for name in names}, dtype))
                for name in names:
                    shape = theirs_shapes[name]
                    for piece in stored_pieces(stored[name], config, shape, dtype, pieces):
                        piece = piece.to(dtype)
                        check_finite(name, piece)
                        data = piece.contiguous().view(torch.uint8).numpy()
                        bar.update(out.write(data))
    finish_weights(folder, files, total)


def header(shapes, dtype):
    """The beginning of a safetensors file of tensors {name: shape}, one after the other."""
    entries, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape in shapes.items():
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = dict(dtype=DTYPES[dtype], shape=shape, data_offsets=[offset, end])
        offset = end
    text = json.dumps(entries).encode()
    text += b' ' * (-len(text) % 8)  # the data are aligned
    return len(text).to_bytes(8, 'little') + text


def stored_pieces(stored, config, shape, dtype, pieces):
    """The rows of one tensor of transformers, in order, not necessarily of `dtype` yet."""
    if not stored.names:
        yield torch.zeros(shape)
    elif stored.packed == 'transposed':  # in place: a list of pieces would take as much again
        tensor, start = torch.empty(shape, dtype=dtype), 0
        for piece in chain.from_iterable(map(pieces, stored.names)):
            tensor[:, start : start + len(piece)] = piece.T
            start += len(piece)
        yield tensor
    elif stored.packed:
        parts = [torch.cat(list(pieces(name))) for name in stored.names]
        yield pack(parts, stored.packed, config)
    else:
        for name in stored.names:
            yield from pieces(name)
