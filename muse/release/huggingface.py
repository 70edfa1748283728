"""T5 encoders as Hugging Face stores them: config.json beside model.safetensors, whole or in shards.

Only the encoder is read, whether the decoder is in the files or not. Kernels lie there as [out, in].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muse.config import T5Config
from muse.errors import UserError
from muse.release.stored import FileTensor, Named, Stacked, Stored, Transposed, floats, open_safetensors

WEIGHTS, INDEX, SETTINGS = 'model.safetensors', 'model.safetensors.index.json', 'config.json'
_TABLES = ('shared.weight', 'encoder.embed_tokens.weight')  # one tensor under either name or both
BIAS = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
# What the layers' tensors are called, behind 'encoder.block.<layer>.' there and 'encoder.layers.' here.
LAYER_NAMES = {
    'layer.0.layer_norm.weight': 'pre_attention_layer_norm.scale',
    'layer.0.SelfAttention.q.weight': 'attention.query.kernel',
    'layer.0.SelfAttention.k.weight': 'attention.key.kernel',
    'layer.0.SelfAttention.v.weight': 'attention.value.kernel',
    'layer.0.SelfAttention.o.weight': 'attention.out.kernel',
    'layer.1.layer_norm.weight': 'pre_mlp_layer_norm.scale',
    'layer.1.DenseReluDense.wi.weight': 'mlp.wi.kernel',
    'layer.1.DenseReluDense.wi_0.weight': 'mlp.wi_0.kernel',
    'layer.1.DenseReluDense.wi_1.weight': 'mlp.wi_1.kernel',
    'layer.1.DenseReluDense.wo.weight': 'mlp.wo.kernel',
}
_KINDS = ('t5', 'mt5')
_ACTIVATIONS = {'relu': False, 'gated-gelu': True}


def is_huggingface(folder: Path) -> bool:
    """Whether the folder looks like a model of Hugging Face's, readable or not."""
    return any((folder / name).exists() for name in (WEIGHTS, INDEX)) or any(folder.glob('pytorch_model*.bin'))


def open_huggingface(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The encoder's tensors under our names and in our shapes, and what of T5Config no shape says.

    Raises:
        UserError: a missing or truncated file, a pickle, no T5, or no encoder in it.
    """
    settings = _settings(folder / SETTINGS)
    files = _files(folder)
    table = next((name for name in _TABLES if name in files), None)
    layers = {name.split('.')[2] for name in files if name.startswith('encoder.block.')}
    if table is None or not layers:
        kind = 'holds a decoder alone' if any(n.startswith('decoder.') for n in files) else 'holds no T5 encoder'
        raise UserError(f"'{folder}' {kind} (no encoder.block.* tensors): give a T5 with its encoder")
    tensors: dict[str, Stored] = {
        'token_embedder.embedding': _one(folder, files, table),
        'encoder.relpos_bias.rel_embedding': Transposed(_one(folder, files, BIAS)),
        'encoder.encoder_norm.scale': _one(folder, files, 'encoder.final_layer_norm.weight'),
    }
    for theirs, ours in LAYER_NAMES.items():
        names = [f'encoder.block.{layer}.{theirs}' for layer in range(len(layers))]
        if any(name in files for name in names):
            wrap: Callable[[Stored], Stored] = Transposed if ours.endswith('kernel') else lambda stored: stored
            tensors[f'encoder.layers.{ours}'] = Stacked([wrap(_one(folder, files, name)) for name in names])
    return tensors, settings


def _one(folder: Path, files: dict[str, FileTensor], name: str) -> Stored:
    if name not in files:
        raise UserError(f"'{folder}' lacks tensor '{name}': the checkpoint is incomplete; copy it again")
    return Named(files[name], name)


def _settings(path: Path) -> dict[str, Any]:
    """T5Config fields of a config.json that shapes do not tell, once it is known that it describes a T5."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): copy it from where the weights came from") from None
    kind = found.get('model_type') if isinstance(found, dict) else None
    if kind not in _KINDS:
        raise UserError(f"'{path}' describes a model of type {kind!r}: only {' and '.join(_KINDS)} are read")
    activation = found.get('feed_forward_proj', 'relu')
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(f"'{path}': feed_forward_proj is {activation!r}; only {' and '.join(_ACTIVATIONS)} are read")
    if (epsilon := found.get('layer_norm_epsilon', 1e-6)) != 1e-6:
        raise UserError(f"'{path}': layer_norm_epsilon is {epsilon!r}; only 1e-06 is read")
    return {'gated': _ACTIVATIONS[activation]} | _sizes(path, found)


def _sizes(path: Path, found: dict[str, Any]) -> dict[str, int]:
    names = {
        'vocab_size': 'vocab_size',
        'd_model': 'width',
        'd_ff': 'mlp_dim',
        'd_kv': 'head_dim',
        'num_heads': 'heads',
        'num_layers': 'layers',
        'relative_attention_num_buckets': 'relative_buckets',
        'relative_attention_max_distance': 'relative_max_distance',
    }
    sizes = {name: found[name] for name in names if name in found}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"'{path}': {name} is {size!r}; it must be a number of at least 1: copy the file again")
    buckets = sizes.get('relative_attention_num_buckets', T5Config.relative_buckets)
    distance = sizes.get('relative_attention_max_distance', T5Config.relative_max_distance)
    if distance <= buckets // 4:
        raise UserError(
            f"'{path}': relative_attention_max_distance is {distance}, and {buckets} buckets need more than "
            f'{buckets // 4}: copy the file again'
        )
    return {names[name]: size for name, size in sizes.items()}


def _files(folder: Path) -> dict[str, FileTensor]:
    """All float tensors of the folder's one file or shards."""
    if (folder / INDEX).exists():
        return _shards(folder)
    if (folder / WEIGHTS).exists():
        return floats(open_safetensors(folder / WEIGHTS))
    pickles = sorted(path.name for path in folder.glob('*.bin'))
    if pickles:
        raise UserError(
            f"'{folder}' holds '{pickles[0]}', a pickle, which may run any code: convert it where transformers is "
            f"installed, with T5EncoderModel.from_pretrained('{folder}').save_pretrained(NEW_FOLDER), and give that"
        )
    raise UserError(f"'{folder}' holds neither {WEIGHTS} nor {INDEX}: copy the weights there")


def _shards(folder: Path) -> dict[str, FileTensor]:
    try:
        places = json.loads((folder / INDEX).read_text(encoding='utf-8'))['weight_map']
        needed = {
            name: Path(file).name for name, file in places.items() if not name.startswith(('decoder.', 'lm_head.'))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{folder / INDEX}' cannot be read ({type(error).__name__}): copy it again") from None
    tensors: dict[str, FileTensor] = {}
    shards = sorted(set(needed.values()))
    for number, shard in enumerate(shards, 1):
        if not (folder / shard).is_file():
            raise UserError(f"'{folder}' lacks shard '{shard}' ({number} of {len(shards)} needed): copy it there")
        tensors |= floats(open_safetensors(folder / shard))
    return tensors
