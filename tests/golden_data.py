"""What the authors' code computes, recorded: NAME.json beside NAME.safetensors in the folder GOLDEN_DIR or, by default, in tests/golden.

Ours are packed (`xz -9e`), to keep the repository small; a folder from elsewhere need not be.
"""
import json
import lzma
import os
from functools import cache
from pathlib import Path

from safetensors.torch import load

KEPT = Path(__file__).parent/'golden'
GOLDEN = Path(os.environ.get('GOLDEN_DIR', KEPT))


def names(source=''):
    "The sets that were recorded from this source file of the authors."
    return sorted(p.stem for p in GOLDEN.glob('*.json') if source in describe(p.stem)['source'])


def shapes(pattern): return sorted(p.stem for p in (GOLDEN/'shapes').glob(pattern))


@cache
def describe(name): return json.loads((GOLDEN/f'{name}.json').read_text())


@cache
def full_size(name): return json.loads((GOLDEN/'shapes'/f'{name}.json').read_text())


@cache
def recorded(name):
    plain, packed = (GOLDEN/f'{name}.safetensors{end}' for end in ('', '.xz'))
    return load(lzma.decompress(packed.read_bytes()) if packed.exists() and not plain.exists() else plain.read_bytes())


@cache
def network(name):
    "What the JSON says, the tensors in float32, and the official state dict among them."
    floats = {k: v.float() if v.is_floating_point() else v for k, v in recorded(name).items()}
    return describe(name), floats, {k.removeprefix('sd.'): v for k, v in floats.items() if k.startswith('sd.')}
