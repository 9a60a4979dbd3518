"""The named sizes of the papers, GPT-2, Pythia and Qwen3, from sizes.toml."""

import tomllib
from pathlib import Path

FIELDS = ('n_embd', 'n_mlp', 'n_layer', 'n_head')


def read_sizes():
    """({family: the fields of model.GPTConfig that it sets}, {size: its own and its family's})."""
    content = (Path(__file__).parent / 'sizes.toml').read_text(encoding='utf-8')
    tables, sizes = tomllib.loads(content), {}
    for name, (family, *numbers) in tables['size'].items():
        more = numbers[4] if len(numbers) > 4 else {}
        sizes[name] = tables['family'][family] | dict(zip(FIELDS, numbers)) | more
    return tables['family'], sizes


FAMILIES, SIZES = read_sizes()
