"""T5 encoders as T5X stores them: a msgpack file `checkpoint`, and a folder of zarr chunks for each large tensor.

The msgpack file holds a tree of parameters under 'optimizer' → 'target' (or 'target' alone); a leaf is an array or says
where its zarr folder lies. Layers are apart (`layers_0`, `layers_1`, …) or stacked along axis 1 (scanned); names are
ours. Kernels of more than two axes (heads apart) and a position bias for each layer are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muse.errors import UserError
from muse.release.stored import BLOCK_BYTES, FLOATS, Index, InMemory, Named, Stacked, Stored

CHECKPOINT = 'checkpoint'
_PLACEHOLDER = 'PLACEHOLDER://'  # how checkpoints written through Orbax name a zarr folder
_SCANNED = ('layers', 'encoder')  # what the scanned stack of layers is called inside 'encoder'
_LAYER_AXIS = 1


@dataclass(frozen=True)
class ZarrTensor:
    """A zarr array; with `scanned`, one of all layers, whose layer axis is brought to the front."""

    folder: Path
    store: Any  # tensorstore.TensorStore
    scanned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.store.shape)
        return (shape[_LAYER_AXIS], shape[0], *shape[2:]) if self.scanned else shape

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    def _rows(self, start: int, stop: int, rest: Index) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of the stored array, so that no chunk is decoded twice."""
        chunk = _chunk(self.store)[0]
        width = int(np.prod(self.store.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        step = chunk * max(1, BLOCK_BYTES // max(1, chunk * width))
        row = start
        while row < stop:
            end = min(stop, (row // step + 1) * step)
            try:
                yield row, self.store[(slice(row, end), *rest)].read().result()
            except (ValueError, OSError) as error:
                raise UserError(f"'{self.folder}' is damaged ({_first_line(error)}): copy it again") from None
            row = end

    def copy_into(self, out: np.ndarray, index: Index) -> None:
        if self.scanned:
            out, index = out.swapaxes(0, 1), (index[1], index[0], *index[2:])
        for row, block in self._rows(index[0].start, index[0].stop, index[1:]):
            out[row - index[0].start : row - index[0].start + len(block)] = block

    def blocks(self) -> Iterator[np.ndarray]:
        return (block for _, block in self._rows(0, self.store.shape[0], ()))


def is_t5x(folder: Path) -> bool:
    """Whether the folder looks like a checkpoint of T5X's."""
    return (folder / CHECKPOINT).is_file()


def open_t5x(folder: Path) -> dict[str, Stored]:
    """The encoder's tensors under our names and in our shapes.

    Raises:
        UserError: a damaged file, a missing zarr folder or chunk, or no encoder in it.
    """
    tree = _target(folder)
    encoder = tree.get('encoder')
    if not isinstance(encoder, Mapping) or 'token_embedder' not in tree:
        kind = 'holds a decoder alone' if 'decoder' in tree else 'holds no T5'
        raise UserError(f"'{folder}' {kind} (no parameters 'encoder' and 'token_embedder'): give a T5 with its encoder")
    outside = {name: branch for name, branch in encoder.items() if not _is_layer(name)}
    places = _flat({'token_embedder': tree['token_embedder'], 'encoder': outside})
    tensors = {name: _open(folder, name, leaf) for name, leaf in places.items()}
    scanned = next((encoder[name] for name in _SCANNED if name in encoder), None)
    if scanned is not None:
        leaves = _flat(scanned)
        if any(name.startswith(('relpos_bias', 'relative_posemb')) for name in leaves):
            raise UserError(f"'{folder}' has a position bias in each layer: only one shared by all, as T5's, is read")
        tensors |= {f'encoder.layers.{name}': _open(folder, name, leaf, scanned=True) for name, leaf in leaves.items()}
        return tensors
    names = [f'layers_{i}' for i in range(sum(map(_is_layer, encoder)))]
    if lost := [name for name in names if name not in encoder]:
        raise UserError(f"'{folder}' lacks 'encoder.{lost[0]}': copy the checkpoint again")
    layers = [_flat(encoder[name]) for name in names]
    for name in {name: None for layer in layers for name in layer}:
        missing = [i for i, layer in enumerate(layers) if name not in layer]
        if missing:
            raise UserError(f"'{folder}' lacks 'encoder.layers_{missing[0]}.{name}': copy the checkpoint again")
        parts = [_open(folder, f'encoder.layers_{i}.{name}', layer[name]) for i, layer in enumerate(layers)]
        tensors[f'encoder.layers.{name}'] = Stacked(parts)
    return tensors


def _is_layer(name: str) -> bool:
    return name in _SCANNED or name.startswith('layers_')


def _target(folder: Path) -> Mapping[str, Any]:
    from flax.serialization import msgpack_restore

    path = folder / CHECKPOINT
    try:
        content: Any = msgpack_restore(path.read_bytes())
        target = content.get('optimizer', content)['target']
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): copy it again") from None
    except Exception as error:  # msgpack has an exception for each way in which bytes are no msgpack
        raise UserError(f"'{path}' is truncated or no T5X checkpoint ({_first_line(error)}): copy it again") from None
    if not isinstance(target, Mapping):
        raise UserError(f"'{path}' is no T5X checkpoint (its 'target' is a {type(target).__name__}): copy it again")
    return target


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Dotted name → leaf: an array, a spec of a zarr array, or a placeholder's text."""
    if not isinstance(tree, Mapping):
        raise UserError(f'a T5X checkpoint has {type(tree).__name__} in place of a layer: copy it again')
    found = {}
    for name, branch in tree.items():
        if isinstance(branch, Mapping) and 'kvstore' not in branch:
            found |= _flat(branch, f'{prefix}{name}.')
        else:
            found[prefix + name] = branch
    return found


def _open(folder: Path, name: str, leaf: Any, scanned: bool = False) -> Stored:
    if isinstance(leaf, np.ndarray):
        if scanned and leaf.ndim < 2:
            raise UserError(f"'{folder / CHECKPOINT}' has '{name}' without an axis of layers: copy it again")
        return Named(InMemory(leaf.swapaxes(0, _LAYER_AXIS) if scanned else leaf), name)
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        place = leaf.removeprefix(_PLACEHOLDER)
    elif isinstance(leaf, Mapping):
        store = leaf['kvstore']
        place = str((isinstance(store, Mapping) and store.get('path')) or leaf.get('path', ''))
    else:
        raise UserError(f"'{folder / CHECKPOINT}' has {type(leaf).__name__} where '{name}' should be: copy it again")
    return Named(_open_zarr(folder / Path(place).name, scanned), name)


def _open_zarr(folder: Path, scanned: bool) -> ZarrTensor:
    import tensorstore

    if not (folder / '.zarray').is_file():
        raise UserError(f"'{folder.parent}' lacks '{folder.name}' (a folder with .zarray): copy the checkpoint again")
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': str(folder.resolve())}}
    try:
        store = tensorstore.open(spec, read=True).result()
    except ValueError as error:
        raise UserError(f"'{folder}' is damaged ({_first_line(error)}): copy it again") from None
    if scanned and store.rank < 2:
        raise UserError(f"'{folder}' has no axis of layers: copy the checkpoint again")
    if store.dtype.numpy_dtype not in FLOATS.values():
        raise UserError(f"'{folder}' holds {store.dtype.name}: only float32, float16 and bfloat16 are read")
    # A missing chunk would be read as zeros.
    chunks = int(np.prod([-(-size // chunk) for size, chunk in zip(store.shape, _chunk(store), strict=True)]))
    there = sum(path.is_file() and not path.name.startswith('.') for path in folder.rglob('*'))
    if there < chunks:
        raise UserError(f"'{folder}' holds {there} of its {chunks} chunks: copy it again")
    return ZarrTensor(folder, store, scanned)


def _chunk(store: Any) -> tuple[int, ...]:
    return store.chunk_layout.read_chunk.shape


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
