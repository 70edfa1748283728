"""Published VQGAN weights, in the names of diffusers' VQModel or of taming-transformers, to our model.

A diffusers model is a folder of `config.json` and safetensors (aMUSEd, Kandinsky, latent diffusion); a taming model is
one `.ckpt`/`.pth` (latent diffusion's 'first_stage_model.' too, and safetensors with the same names), whose shapes say
all that the reader needs. Weights are brought one tensor at a time, so that little more than the model is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from muse.config import PublicVQConfig, read
from muse.errors import UserError
from muse.release.format import Part, graphdef_and_template, load_part
from muse.release.pickles import StoredTensor, read_torch
from muse.release.stored import all_finite, floats, open_safetensors, whole

# Of a training checkpoint: the losses' nets, and no part of the tokenizer.
_TRAINING_ONLY = ('loss.',)
_FIRST_STAGE = 'first_stage_model.'


@dataclass(frozen=True)
class _Stored:
    """A tensor that still lies in its file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def load_public(path: str | Path, dtype: str = 'float32') -> tuple[PublicVQConfig, nnx.State]:
    """Reads a published VQGAN.

    Args:
        path: a diffusers folder (or its `vqvae`/`movq` subfolder's files), or one file of taming's names.
        dtype: compute type of the config, 'float32' or 'bfloat16'.

    Returns:
        The config and the float32 parameters of `muse.models.public_vqgan.PublicVQGAN`.

    Raises:
        UserError: no such model, a damaged file, a setting or kind of model that is not read here, or tensors that
            are missing, superfluous, of another shape or not finite (named).
    """
    path = Path(path)
    if path.is_dir():
        tensors, settings = _open(_weights_of(path)), _read_settings(path / 'config.json')
        config, rename = _diffusers_config(path, settings, dtype), _diffusers_name
        tensors = {_modern(name): stored for name, stored in tensors.items()}
    else:
        tensors = _open(path)
        if any(name.startswith('encoder.down_blocks.') for name in tensors):
            raise UserError(f"'{path}' has diffusers' names: give its folder, which holds config.json too")
        config, rename = _taming_config(path, tensors, dtype), _taming_name
    return config, _fill(path, config, tensors, lambda name: rename(name, config))


def load_tokenizer(path: str | Path) -> Part:
    """A tokenizer in any form: a folder of ours with that part, or a published one (whose hash is '').

    Raises:
        UserError: as `load_part` or `load_public`.
    """
    path = Path(path)
    if path.is_dir() and not any(path.glob('diffusion_pytorch_model.*')):
        return load_part(path, 'tokenizer')
    config, params = load_public(path)
    return Part(config, params, '', {})


def _fill(
    path: Path, config: PublicVQConfig, tensors: Mapping[str, _Stored], rename: Callable[[str], str]
) -> nnx.State:
    """The parameters of the model of `config`, each brought from where `rename` says it lies."""
    try:
        flat = nnx.to_flat_state(graphdef_and_template('tokenizer', config)[1])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"'{path}': its settings make no model ({error}): get it again") from None
    theirs = {route: rename('.'.join(map(str, route))) for route, _ in flat}
    if missing := sorted(set(theirs.values()) - tensors.keys()):
        raise UserError(f"'{path}' lacks tensor '{missing[0]}'{_more(missing)}: it is of another kind, or incomplete")
    if surplus := sorted(tensors.keys() - set(theirs.values())):
        raise UserError(
            f"'{path}' holds tensor '{surplus[0]}'{_more(surplus)}, which such a model has no place for: "
            'it is of a kind that is not read here'
        )
    filled = []
    for route, variable in flat:
        stored = tensors[theirs[route]]
        if not _fits(stored.shape, variable.shape):
            raise UserError(
                f"'{path}' holds '{theirs[route]}' as {list(stored.shape)}, which does not make "
                f'{list(variable.shape)}: it is of another kind'
            )
        values = stored.read()
        if not all_finite(values):
            raise UserError(f"'{path}': tensor '{theirs[route]}' holds NaN or infinity: get the weights again")
        filled.append((route, variable.replace(jnp.asarray(_turn(values, variable.shape)))))
    return nnx.from_flat_state(filled)


def _more(names: list[str]) -> str:
    return f' and {len(names) - 1} more' if len(names) > 1 else ''


def _fits(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Kernels are [out, in, h, w] there and [h, w, in, out] here; attention's may lack the last two."""
    if len(ours) != 4:
        return theirs == ours
    return theirs == (ours[3], ours[2], ours[0], ours[1]) or (ours[:2] == (1, 1) and theirs == (ours[3], ours[2]))


def _turn(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 4:
        tensor = tensor.reshape(*tensor.shape[:2], *shape[:2]).transpose(2, 3, 1, 0)
    return np.ascontiguousarray(tensor, np.float32)


def _open(path: Path) -> dict[str, _Stored]:
    """Name → stored tensor of a safetensors or PyTorch file, without what only training needs."""
    if path.suffix == '.safetensors':
        found = {name: _Stored(x.shape, partial(whole, x)) for name, x in floats(open_safetensors(path)).items()}
    else:
        loaded = read_torch(path)
        loaded = loaded.get('state_dict', loaded) if isinstance(loaded, Mapping) else loaded
        if not isinstance(loaded, Mapping) or not all(isinstance(x, StoredTensor) for x in loaded.values()):
            raise UserError(f"'{path}' holds no dict of tensors, nor one under 'state_dict': give a model's weights")
        found = {str(name): _Stored(tensor.shape, tensor.read) for name, tensor in loaded.items()}
    if any(name.startswith(_FIRST_STAGE) for name in found):
        found = {n.removeprefix(_FIRST_STAGE): x for n, x in found.items() if n.startswith(_FIRST_STAGE)}
    return {name: stored for name, stored in found.items() if not name.startswith(_TRAINING_ONLY)}


def _weights_of(folder: Path) -> Path:
    names = ('diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.fp16.safetensors')
    for name in (*names, 'diffusion_pytorch_model.bin'):
        if (folder / name).is_file():
            return folder / name
    inside = [name for name in ('vqvae', 'movq') if (folder / name).is_dir()]
    hint = f"give its folder '{folder / inside[0]}'" if inside else 'give the folder of a VQModel'
    raise UserError(f"'{folder}' holds no {names[0]}: {hint}")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}' ({error}): it must lie beside the weights") from None
    if not isinstance(settings, dict) or settings.get('_class_name', 'VQModel') != 'VQModel':
        found = settings.get('_class_name') if isinstance(settings, dict) else settings
        raise UserError(f"'{path}' describes {found!r}: only diffusers' VQModel is read")
    return settings


def _diffusers_config(folder: Path, settings: dict[str, Any], dtype: str) -> PublicVQConfig:
    """Settings that are absent have diffusers' defaults."""
    fixed = {'in_channels': 3, 'out_channels': 3, 'act_fn': 'silu'}
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise UserError(f"'{folder}': {name} is {settings[name]!r}, only {value!r} is read")
    attention = {}
    for side, plain in (('down', 'DownEncoderBlock2D'), ('up', 'UpDecoderBlock2D')):
        kinds = settings.get(f'{side}_block_types', [plain])
        if wrong := set(kinds) - {plain, f'Attn{plain}'}:
            raise UserError(f"'{folder}': {side}_block_types has {min(wrong)!r}, only (Attn){plain} is read")
        attention[side] = tuple(kind != plain for kind in kinds)
    if settings.get('norm_type', 'group') not in ('group', 'spatial'):
        raise UserError(f"'{folder}': norm_type is {settings['norm_type']!r}, only 'group' and 'spatial' are read")
    latent_dim = settings.get('latent_channels', 3)
    return _checked(
        folder,
        level_channels=settings.get('block_out_channels', [64]),
        num_res_blocks=settings.get('layers_per_block', 1),
        encoder_attention=attention['down'],
        decoder_attention=attention['up'][::-1],
        # Models of before this setting all have it; later files say so.
        middle_attention=settings.get('mid_block_add_attention', True),
        latent_dim=latent_dim,
        codebook_size=settings.get('num_vq_embeddings', 256),
        code_dim=settings.get('vq_embed_dim') or latent_dim,
        norm_groups=settings.get('norm_num_groups', 32),
        spatial_norm=settings.get('norm_type', 'group') == 'spatial',
        dtype=dtype,
    )


def _taming_config(path: Path, tensors: Mapping[str, _Stored], dtype: str) -> PublicVQConfig:
    """All from names and shapes: taming's norms always have 32 groups."""
    if 'quantize.embed.weight' in tensors or 'quantize.proj.weight' in tensors:
        raise UserError(f"'{path}' has a Gumbel quantizer: only nearest-code quantizers are read")
    codes, dim = _shape(path, tensors, 'quantize.embedding.weight')
    levels = _count(tensors, r'encoder\.down\.(\d+)\.block\.')
    return _checked(
        path,
        level_channels=tuple(_shape(path, tensors, f'encoder.down.{i}.block.0.conv1.weight')[0] for i in range(levels)),
        num_res_blocks=_count(tensors, r'encoder\.down\.0\.block\.(\d+)\.'),
        encoder_attention=tuple(f'encoder.down.{i}.attn.0.q.weight' in tensors for i in range(levels)),
        decoder_attention=tuple(f'decoder.up.{i}.attn.0.q.weight' in tensors for i in range(levels)),
        middle_attention='encoder.mid.attn_1.q.weight' in tensors,
        latent_dim=_shape(path, tensors, 'encoder.conv_out.weight')[0],
        codebook_size=codes,
        code_dim=dim,
        spatial_norm='decoder.norm_out.conv_y.weight' in tensors,
        dtype=dtype,
    )


def _checked(path: Path, **values: Any) -> PublicVQConfig:
    try:
        config = read(PublicVQConfig, {'kind': 'public', **values})
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    levels = {len(config.level_channels), len(config.encoder_attention), len(config.decoder_attention)}
    if len(levels) > 1 or levels == {0}:
        raise UserError(f"'{path}': its lists of levels are of different lengths: get its config.json again")
    if config.norm_groups < 1 or any(width % config.norm_groups for width in config.level_channels):
        raise UserError(f"'{path}': {config.norm_groups} groups do not divide its widths {config.level_channels}")
    return config


def _shape(path: Path, tensors: Mapping[str, _Stored], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"'{path}' lacks tensor '{name}': it is no VQGAN in the names of diffusers or taming")
    return tensors[name].shape


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def _modern(name: str) -> str:
    """Names of attention as diffusers has had them since 0.15, from those of before."""
    if '.attentions.' not in name:
        return name
    for old, new in (('query', 'to_q'), ('key', 'to_k'), ('value', 'to_v'), ('proj_attn', 'to_out.0')):
        name = name.replace(f'.{old}.', f'.{new}.')
    return name


def _end(name: str, spatial: bool) -> str:
    """The last parts of a name, which both have alike: PyTorch's weight and bias, and MoVQ's norms."""
    if name == 'codebook':
        return 'quantize.embedding.weight'
    name = re.sub(r'norm(\w*)\.gain\.', r'norm\1.conv_y.', re.sub(r'norm(\w*)\.shift\.', r'norm\1.conv_b.', name))
    if spatial and name.startswith('decoder.'):
        name = re.sub(r'norm(\w*)\.(scale|bias)$', r'norm\1.norm_layer.\2', name)
    return re.sub(r'\.(kernel|scale)$', '.weight', name)


def _diffusers_name(name: str, config: PublicVQConfig) -> str:
    name = re.sub(r'^encoder\.levels\.(\d+)', r'encoder.down_blocks.\1', _end(name, config.spatial_norm))
    name = re.sub(r'^decoder\.levels\.(\d+)', r'decoder.up_blocks.\1', name)
    name = re.sub(r'(down|up)(_blocks\.\d+)\.resize', r'\1\2.\1samplers.0.conv', name)
    name = name.replace('.blocks.', '.resnets.').replace('.shortcut.', '.conv_shortcut.')
    name = name.replace('.norm_out.', '.conv_norm_out.').replace('.middle.', '.mid_block.')
    name = re.sub(r'mid_block\.block(\d)', lambda found: f'mid_block.resnets.{int(found[1]) - 1}', name)
    name = name.replace('mid_block.attention.', 'mid_block.attentions.0.')
    norm = 'spatial_norm' if config.spatial_norm and name.startswith('decoder.') else 'group_norm'
    name = re.sub(r'(attentions\.\d+)\.norm\.', rf'\1.{norm}.', name)
    return _modern(re.sub(r'(attentions\.\d+)\.out\.', r'\1.to_out.0.', name))


def _taming_name(name: str, config: PublicVQConfig) -> str:
    last = len(config.level_channels) - 1
    name = re.sub(r'^encoder\.levels\.(\d+)', r'encoder.down.\1', _end(name, config.spatial_norm))
    # The decoder counts its levels from full resolution there.
    name = re.sub(r'^decoder\.levels\.(\d+)', lambda found: f'decoder.up.{last - int(found[1])}', name)
    name = re.sub(r'(down|up)(\.\d+)\.resize', r'\1\2.\1sample.conv', name)
    name = re.sub(r'(\.\d+)\.blocks\.', r'\1.block.', name).replace('.shortcut.', '.nin_shortcut.')
    name = re.sub(r'middle\.block(\d)', r'mid.block_\1', name).replace('middle.attention.', 'mid.attn_1.')
    name = re.sub(r'\.attentions\.', '.attn.', name)
    for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'proj_out')):
        name = re.sub(rf'(attn(?:_1|\.\d+))\.{ours}\.', rf'\1.{theirs}.', name)
    return name
