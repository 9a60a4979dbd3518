"""The named sizes of the papers, GPT-2, Pythia and Qwen3, from sizes.toml."""

import tomllib
from pathlib import Path


def read_sizes():
    """({family: the fields of model.GPTConfig that it sets}, {size: its own and its family's})."""
    content = (Path(__file__).parent / 'sizes.toml').read_text(encoding='utf-8')
    tables, sizes = tomllib.loads(content), {}
    for name, fields in tables['size'].items():
        sizes[name] = tables['family'][fields.pop('family')] | fields
    return tables['family'], sizes


FAMILIES, SIZES = read_sizes()
