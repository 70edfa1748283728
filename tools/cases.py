"""What the benches of sampling and training measure: models of the paper's sizes, by name, and tiny ones for a CPU."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

from muse.config import SuperresConfig, TransformerConfig, VQConfig, read_run
from muse.release.format import describe_part, shipped

ROOT = Path(__file__).resolve().parent.parent
_TINY_NET = {'codebook_size': 64, 'width': 32, 'mlp_dim': 64, 'heads': 2, 'layers': 2, 'text_width': 24}
TINY: dict[str, dict[str, Any]] = {
    'base': {**_TINY_NET, 'grid': (4, 4), 'text_length': 7},
    'superres': {
        **_TINY_NET,
        'grid': (8, 8),
        'low_grid': (4, 4),
        'low_codebook_size': 64,
        'block': 4,
        'low_layers': 1,
        'text_length': 7,
    },
    'tokenizer': {'channels': 8, 'num_res_blocks': 1, 'codebook_size': 64, 'code_dim': 8},
}


def values_of(config: str, *, tiny: bool) -> dict[str, Any]:
    """The values of a file of configs/paper/, with a model for a CPU in it where `tiny`."""
    values = runpy.run_path(str(ROOT / 'configs' / 'paper' / f'{config}.py'))['get_config']().to_dict()
    if tiny:
        values['model'] |= TINY[values['task']]
    return values


def net(config: str, *, tiny: bool, **changes: Any) -> Any:
    """The model of a file of configs/paper/, with some of its settings changed."""
    return dataclasses.replace(read_run(values_of(config, tiny=tiny)).model, **changes)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is drawn: the base, and the super-res over it where there is one; guided steps of each; the last decoder."""

    base: TransformerConfig
    base_steps: int
    superres: SuperresConfig | None
    superres_steps: int
    decoder: VQConfig


DRAWINGS = ('base_632m', 'cascade_3b', 'shipped')


def drawing(name: str, *, tiny: bool, **changes: Any) -> Drawing:
    """One of `DRAWINGS`: pictures of 256 pixels a side from the base alone in 12 steps, of 512 from both in 24 + 8; and
    what comes with the package, in its own number of steps."""
    if name == 'shipped':
        folder = shipped()
        base, decoder = describe_part(folder, 'base'), describe_part(folder, 'tokenizer').config
        config = dataclasses.replace(base.config, attention='auto', **changes)
        dtypes = {'dtype': config.dtype}
        return Drawing(config, base.extra['decode']['steps'], None, 0, dataclasses.replace(decoder, **dtypes))
    if name == 'base_632m':
        base, decoder = net('base_632m', tiny=tiny, **changes), net('tokenizer_f16', tiny=tiny)
        return Drawing(base, 12, None, 0, decoder)
    base, superres = net('base_3b', tiny=tiny, **changes), net('superres_770m', tiny=tiny, **changes)
    return Drawing(base, 24, superres, 8, net('tokenizer_f8', tiny=tiny))
