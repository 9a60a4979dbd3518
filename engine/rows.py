"""
Model folders read and written by rows: safetensors files much larger than memory, a piece at a
time. The library's own writer needs all tensors at once; its format is simple enough to write:
8 bytes with the header's length, the header (name -> dtype, shape, offsets, in JSON), the data.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from engine.errors import UserError
from engine.hugging_face import find_tensors, layout, pack, stored_shape, unpack

DTYPES = {torch.float64: 'F64', torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}


class Rows:
    """A tensor in an open safetensors file that is read by slices of its rows."""

    def __init__(self, file, name):
        self.slice = file.get_slice(name)
        self.shape = tuple(self.slice.get_shape())

    def __getitem__(self, key):
        return self.slice[key]


class FolderReader:
    """The tensors of a model folder under our names, read when asked for. A context manager."""

    def __init__(self, folder, config, shapes):
        """shapes: {our name: shape} of a model of this configuration. Raises UserError."""
        self.config, self.shapes, self.stack = config, shapes, ExitStack()
        self.files, self.where = {}, {}  # {name in the folder: open file}, {our name: theirs}
        try:
            for path in sorted(Path(folder).glob('model*.safetensors')):
                file = self.stack.enter_context(safe_open(path, 'pt'))
                self.files |= dict.fromkeys(file.keys(), file)
            self.stored = layout(config, shapes)
            self.found = find_tensors(config, self.files, shapes)
        except (OSError, SafetensorError, UserError) as error:
            self.stack.close()
            raise UserError(f'{folder} cannot be read: {error}') from error
        for theirs, stored in self.stored.items():
            self.where |= dict.fromkeys(stored.names, theirs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.close()

    def __getitem__(self, name):
        """Our tensor `name`: Rows, or a whole tensor where transformers packs it with others."""
        theirs = self.where[name]
        stored, found = self.stored[theirs], self.found[theirs]
        file = self.files[found]
        if not stored.packed and len(stored.names) == 1:
            return Rows(file, found)
        sizes = [self.shapes[one][0] for one in stored.names]
        parts = unpack(file.get_tensor(found), stored.packed, self.config, sizes)
        return parts[stored.names.index(name)]


def write_model(path, config, shapes, dtype, pieces):
    """
    Write a model of our tensors `shapes` to one safetensors file in transformers' layout, as
    they are made: pieces(name) yields the rows of a tensor, in order.
    """
    stored = layout(config, shapes)
    header = {'__metadata__': {'format': 'pt'}}
    offset = 0
    for theirs, entry in stored.items():
        if entry.names:
            shape = stored_shape(entry, shapes)
        else:  # a bias of zeros, as long as its weight has outputs
            shape = tuple(header[theirs.replace('.bias', '.weight')]['shape'][-1:])
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        header[theirs] = dict(dtype=DTYPES[dtype], shape=shape, data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # the data are aligned
    bar = tqdm(desc=f'writing {path.parent}', total=offset, unit='B', unit_scale=True)
    with open(path, 'wb') as file, bar:
        file.write(len(text).to_bytes(8, 'little') + text)
        for theirs, entry in stored.items():
            for piece in stored_pieces(entry, config, header[theirs]['shape'], pieces):
                data = piece.to(dtype).contiguous().view(torch.uint8).numpy()
                bar.update(file.write(data))


def stored_pieces(stored, config, shape, pieces):
    """The rows of one tensor of transformers, in order."""
    if not stored.names:
        yield torch.zeros(shape)
    elif stored.packed:
        parts = [torch.cat(list(pieces(name))) for name in stored.names]
        yield pack(parts, stored.packed, config)
    else:
        for name in stored.names:
            yield from pieces(name)
