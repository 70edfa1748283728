"""Muse: masked generative transformers for text-to-image (Chang et al. 2023, arXiv 2301.00704) in JAX and Flax NNX.

>>> import muse
>>> model = muse.load()
>>> images = model.generate(['a red apple, noto style'], seed=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muse.pipeline import Muse, load

__version__ = '0.1.0'
__all__ = ['Muse', '__version__', 'load']


def __getattr__(name: str):
    """Brings in the pipeline, and JAX with it, at the first use: `import muse` alone stays instant."""
    if name in ('Muse', 'load'):
        import muse.pipeline

        return getattr(muse.pipeline, name)
    raise AttributeError(f"module 'muse' has no attribute '{name}'")
