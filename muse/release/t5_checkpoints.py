"""Published T5 checkpoints, straight into sharded arrays: Hugging Face's folders and T5X's.

Whatever the format, a reader gives each tensor under our name and shape as something that still lies in its file
(`muse.release.stored`); shapes then say the config, and parameters are brought one at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from muse.config import Dtype, T5Config
from muse.errors import UserError
from muse.release.format import graphdef_and_template
from muse.release.huggingface import is_huggingface, open_huggingface
from muse.release.stored import Stored, load_params, stored_hash
from muse.release.t5x import is_t5x, open_t5x

MAX_LENGTH = 512  # tokens of a text that published T5s were trained on; a run's own text_length is 127 by default


@dataclass(frozen=True)
class T5Checkpoint:
    """A loaded encoder. `hash` is over the tensors as they are stored, whatever they were loaded as."""

    config: T5Config
    params: nnx.State
    hash: str


def load_t5(folder: str | Path, *, dtype: Dtype = 'float32', mesh: Mesh | None = None) -> T5Checkpoint:
    """Reads the encoder of a T5 checkpoint: 1.0, 1.1 or flan, of any size.

    Host memory holds one parameter's shards at a time beside what is loaded.

    Args:
        folder: Hugging Face's (config.json and model.safetensors, or its index and shards; bf16, fp16 or fp32; encoder
            alone or with the decoder, which is left out) or T5X's (a file `checkpoint` and zarr arrays).
        dtype: of the parameters and of the config's compute type.
        mesh: what the parameters are split over, as `muse.mesh` says; None: all on the default device.

    Raises:
        UserError: no checkpoint of a T5 encoder, or an incomplete or damaged one; a tensor with NaN or infinity in it
            (named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"text encoder '{folder}' is no folder or does not exist: give the folder of a T5 checkpoint")
    if is_t5x(folder):
        tensors, settings = open_t5x(folder), {}
    elif is_huggingface(folder):
        tensors, settings = open_huggingface(folder)
    else:
        raise UserError(
            f"'{folder}' is no T5 checkpoint: it needs config.json and model.safetensors (Hugging Face), or a file "
            "'checkpoint' and zarr folders (T5X)"
        )
    config = _config(folder, tensors, settings, dtype)
    _check_names(folder, config, tensors)
    try:
        content = stored_hash(tensors)
    except UserError as error:
        raise UserError(f"'{folder}': {error}") from None
    digest = hashlib.sha256(f'{content}|{config.relative_max_distance}'.encode())
    params = load_params(tensors, graphdef_and_template('text_encoder', config)[1], config.dtype, mesh)
    return T5Checkpoint(config, params, digest.hexdigest())


def _config(folder: Path, tensors: dict[str, Stored], settings: dict[str, Any], dtype: Dtype) -> T5Config:
    """The config that the shapes tell, checked against what the checkpoint says of itself."""
    try:
        rows, width = tensors['token_embedder.embedding'].shape
        heads, buckets = tensors['encoder.relpos_bias.rel_embedding'].shape
        layers, _, inner = tensors['encoder.layers.attention.query.kernel'].shape
        gated = 'encoder.layers.mlp.wi_0.kernel' in tensors
        _, mlp_dim, _ = tensors['encoder.layers.mlp.wo.kernel'].shape
    except KeyError as error:
        raise UserError(f"'{folder}' lacks tensor {error}: the checkpoint is incomplete; copy it again") from None
    except ValueError:
        raise UserError(f"'{folder}' has tensors of another number of axes than a T5 encoder's: it is no T5") from None
    if inner % heads:
        raise UserError(f"'{folder}' has {heads} heads in its position bias and queries of {inner}: it is no T5")
    told = {
        'vocab_size': rows,
        'width': width,
        'mlp_dim': mlp_dim,
        'head_dim': inner // heads,
        'heads': heads,
        'layers': layers,
        'gated': gated,
        'relative_buckets': buckets,
    }
    for name, value in told.items():
        if settings.get(name, value) != value:
            raise UserError(
                f"'{folder}': config.json says {name} {settings[name]}, the weights have {value}: one of them is of "
                'another model; copy both again'
            )
    distance = settings.get('relative_max_distance', T5Config.relative_max_distance)
    return T5Config(**told, relative_max_distance=distance, max_length=MAX_LENGTH, dtype=dtype)


def _check_names(folder: Path, config: T5Config, tensors: dict[str, Stored]) -> None:
    _, template = graphdef_and_template('text_encoder', config)
    shapes = {'.'.join(map(str, route)): variable.shape for route, variable in nnx.to_flat_state(template)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"'{folder}' lacks what becomes '{name}': the checkpoint is incomplete; copy it again")
        if tensors[name].shape != shape:
            raise UserError(
                f"'{folder}': '{name}' is {tensors[name].shape}, the other tensors want {shape}: it is damaged"
            )
    if surplus := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"'{folder}' holds '{surplus[0]}', for which a T5 encoder has no place")
