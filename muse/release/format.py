"""The release folder: what training exports and sampling loads.

    config.json                 {'format': 1, 'parts': {part: {config, sha256, storage, parameters, ...}}}
    <part>.safetensors          for the parts 'tokenizer', 'text_encoder' and 'base'; dotted tensor names
                                and, where the release draws large pictures, 'superres' and 'superres_tokenizer'
    spiece.model                the vocabulary of the text encoder

A transformer names the tokenizers and the text encoder it was trained on by hash: with another tokenizer its token ids
mean other pictures, so such a folder is refused. Files are written beside their place and then moved.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from muse.config import (
    DecodeConfig,
    Dtype,
    PublicVQConfig,
    SuperresConfig,
    T5Config,
    TransformerConfig,
    VQConfig,
    read,
    to_dict,
)
from muse.errors import UserError
from muse.release.storage import SCALE, Kind, Storage, kinds, pack_tensor
from muse.release.stored import FileTensor, Scaled, load_params, open_safetensors, stored_hash, write_safetensors

FORMAT = 1
VOCABULARY = 'spiece.model'
CONFIGS: dict[str, type[VQConfig] | type[T5Config] | type[TransformerConfig] | type[SuperresConfig]] = {
    'tokenizer': VQConfig,
    'text_encoder': T5Config,
    'base': TransformerConfig,
    'superres': SuperresConfig,
    'superres_tokenizer': VQConfig,
}
_OWN_KEYS = ('config', 'sha256', 'storage', 'parameters')


@dataclass(frozen=True)
class Part:
    """One loaded model: `params` are float32 unless asked otherwise; `extra` is what the exporter wrote beside."""

    config: Any
    params: nnx.State
    hash: str
    extra: dict[str, Any]

    @property
    def ids_hash(self) -> str:
        """Hash of the tokenizer whose ids this one reads and writes: its own, unless only its decoder was trained."""
        return self.extra.get('ids_sha256', self.hash)


@dataclass(frozen=True)
class Release:
    """A whole, consistent release. The parts of the super-res are None where it draws at the base's size alone."""

    tokenizer: Part
    text_encoder: Part
    base: Part
    decode: DecodeConfig
    vocabulary: Path
    superres: Part | None = None
    superres_tokenizer: Part | None = None
    superres_decode: DecodeConfig | None = None

    @property
    def name(self) -> str:
        """Short name of the weights, as written beside the pictures: the first digits of the base's hash."""
        return f'muse-{self.base.hash[:12]}'


def shipped() -> Path:
    """The release that comes with the package."""
    return Path(str(files('muse') / 'assets'))


def graphdef_and_template(part: str, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The model class of `part` split into its graph and a state of shapes; allocates nothing."""
    from muse.models.public_vqgan import PublicVQGAN
    from muse.models.superres import Superres
    from muse.models.t5 import T5Encoder
    from muse.models.transformer import Transformer
    from muse.models.vqgan import VQGAN

    models = {'tokenizer': VQGAN, 'text_encoder': T5Encoder, 'base': Transformer, 'superres': Superres}
    model_class = PublicVQGAN if isinstance(config, PublicVQConfig) else models[part.removeprefix('superres_')]
    return nnx.split(nnx.eval_shape(lambda: model_class(config, rngs=_OneKey())), nnx.Param)


class _OneKey(nnx.Rngs):
    """Keys for a model of which only shapes are wanted: counting them would take most of the time of a start."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def save_part(
    folder: str | Path,
    part: str,
    *,
    config: Any,
    params: nnx.State,
    storage: Storage,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Writes `<part>.safetensors` and its entry in `config.json`, keeping the folder's other parts.

    Args:
        folder: the release folder; made when missing.
        part: a key of `CONFIGS`.
        config: the part's dataclass.
        params: float32 parameters of the model of that config.
        storage: type of the large tensors on disk.
        extra: JSON-ready notes. A transformer needs 'decode' and '<part>_sha256' of the frozen parts under
            it: 'tokenizer', 'text_encoder', and the super-res 'superres_tokenizer' too.

    Returns:
        The part's hash.

    Raises:
        UserError: the folder cannot be written, or a parameter is not finite.
    """
    folder = Path(folder)
    variables = {'.'.join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    entry = {
        'config': to_dict(config),
        'sha256': '',
        'storage': storage,
        'parameters': sum(math.prod(variable.shape) for variable in variables.values()),
        **(extra or {}),
    }
    tmp = folder / f'.{part}.{os.getpid()}.tmp'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = _read_index(folder) if (folder / 'config.json').exists() else {'format': FORMAT, 'parts': {}}
        entry['sha256'] = _write_tensors(tmp, variables, storage)
        index['parts'][part] = entry
        os.replace(tmp, folder / f'{part}.safetensors')
        _write_text(folder / 'config.json', json.dumps(index, indent=2) + '\n')
    except OSError as error:
        raise UserError(f"cannot write the release folder '{folder}' ({error}): choose another folder") from None
    finally:
        if tmp.parent.is_dir():
            tmp.unlink(missing_ok=True)
    return entry['sha256']


def _write_tensors(path: Path, variables: Mapping[str, nnx.Variable], storage: Storage) -> str:
    """Writes a part's tensors, one at a time on the host, and returns their hash, read back from the file."""
    layer_axes = {name: int((v.get_metadata().get('axes') or (None,))[0] == 'layers') for name, v in variables.items()}
    written: dict[str, Kind] = {}
    for name, variable in variables.items():
        written |= kinds(name, tuple(variable.shape), layer_axes[name], storage)
    packed = (
        item
        for name, variable in variables.items()
        for item in pack_tensor(name, np.asarray(variable[...]), layer_axes[name], storage).items()
    )
    write_safetensors(path, written, packed)
    return stored_hash(open_safetensors(path))


def _write_text(path: Path, text: str) -> None:
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    tmp.write_text(text, encoding='utf-8')
    os.replace(tmp, path)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / 'config.json'
    if not folder.is_dir():
        raise UserError(f"model folder '{folder}' does not exist: give a folder that holds config.json")
    if not path.is_file():
        raise UserError(f"model folder '{folder}' has no config.json: give a folder written by the export tool")
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({_first_line(error)}): copy the release again") from None
    if isinstance(index, dict) and '_class_name' in index:
        raise UserError(
            f"'{folder}' holds a model of diffusers ({index['_class_name']}): make a release folder of a VQModel with "
            'tools/import_tokenizer.py and give that'
        )
    if not isinstance(index, dict) or index.get('format') != FORMAT:
        found = index.get('format') if isinstance(index, dict) else index
        raise UserError(f"'{path}' has format {found!r}, this version reads format {FORMAT}: use a matching muse")
    if not isinstance(index.get('parts'), dict):
        raise UserError(f"'{path}' names no parts: copy the release again")
    return index


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_config(folder: Path, part: str) -> tuple[Any, dict[str, Any]]:
    entry = _read_index(folder)['parts'].get(part)
    if not isinstance(entry, dict) or not isinstance(entry.get('config'), dict) or 'sha256' not in entry:
        raise UserError(f"'{folder / 'config.json'}' has no whole entry for '{part}': export that part into the folder")
    try:
        public = part.endswith('tokenizer') and entry['config'].get('kind') == 'public'
        return read(PublicVQConfig if public else CONFIGS[part], entry['config']), entry
    except UserError as error:
        raise UserError(f"'{folder / 'config.json'}', part '{part}': {error}") from None


def has_part(folder: str | Path, part: str) -> bool:
    """Whether a release names a part. Raises UserError when the folder is no release."""
    return part in _read_index(Path(folder))['parts']


def load_part(folder: str | Path, part: str, *, dtype: Dtype = 'float32', mesh: Mesh | None = None) -> Part:
    """Reads one part of a release. The host holds one parameter at a time beside what is loaded.

    Args:
        folder: the release folder.
        part: a key of `CONFIGS`.
        dtype: of the parameters; the config says what is computed in.
        mesh: what the parameters are split over, as `muse.mesh` says; None: all on the default device.

    Raises:
        UserError: a missing, truncated or corrupted file, a wrong format number, tensors that do not belong to the
            config (named), or content that does not have the hash of `config.json`.
    """
    folder = Path(folder)
    config, entry = _read_config(folder, part)
    path = folder / f'{part}.safetensors'
    stored = open_safetensors(path)
    try:
        _, template = graphdef_and_template(part, config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        where = f"'{folder / 'config.json'}', part '{part}'"
        raise UserError(f'{where}: its values make no model ({_first_line(error)}): copy the release again') from None
    shapes = {'.'.join(map(str, route)): tuple(v.shape) for route, v in nnx.to_flat_state(template)}
    _check_tensors(path, stored, shapes)
    found = stored_hash(stored)
    if found != entry['sha256']:
        raise UserError(
            f"'{path}' is corrupted or of another export (its hash is not the one config.json names): copy the release "
            'again'
        )
    tensors = {n: Scaled(stored[n], stored[n + SCALE]) if n + SCALE in stored else stored[n] for n in shapes}
    params = load_params(tensors, template, dtype, mesh)
    return Part(config, params, found, {key: value for key, value in entry.items() if key not in _OWN_KEYS})


def describe_part(folder: str | Path, part: str) -> Part:
    """A part without its weights: `params` are shapes, and there is no hash.

    Raises:
        UserError: the folder is no release, or its config.json has no such part or a damaged one.
    """
    config, entry = _read_config(Path(folder), part)
    extra = {key: value for key, value in entry.items() if key not in _OWN_KEYS}
    return Part(config, graphdef_and_template(part, config)[1], '', extra)


def describe_release(folder: str | Path) -> Release:
    """A release without its weights, of which only config.json is read. Raises UserError as `describe_part`."""
    folder = Path(folder)
    parts = {part: describe_part(folder, part) for part in ('base', 'tokenizer', 'text_encoder')}
    release = Release(
        tokenizer=parts['tokenizer'],
        text_encoder=parts['text_encoder'],
        base=parts['base'],
        decode=_read_decode(folder, 'base', parts['base']),
        vocabulary=folder / VOCABULARY,
    )
    if not has_part(folder, 'superres'):
        return release
    superres, tokenizer = (describe_part(folder, part) for part in ('superres', 'superres_tokenizer'))
    decode = _read_decode(folder, 'superres', superres)
    return replace(release, superres=superres, superres_tokenizer=tokenizer, superres_decode=decode)


def load_superres_tokenizer(folder: str | Path) -> Part:
    """The tokenizer of the high-res tokens: a release's part 'superres_tokenizer', or a training's 'tokenizer'."""
    return load_part(folder, 'superres_tokenizer' if has_part(folder, 'superres_tokenizer') else 'tokenizer')


def _check_tensors(path: Path, packed: Mapping[str, FileTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    way_out = 'the file is of another config; copy the release again'
    for name, shape in shapes.items():
        if name not in packed:
            raise UserError(f"'{path}' lacks tensor '{name}': {way_out}")
        if packed[name].shape != shape:
            raise UserError(f"'{path}' holds '{name}' as {packed[name].shape}, its config says {shape}: {way_out}")
        if packed[name].dtype == np.int8 and name + SCALE not in packed:
            raise UserError(f"'{path}' lacks tensor '{name + SCALE}': {way_out}")
    scales = {name + SCALE for name in shapes if packed[name].dtype == np.int8}
    if surplus := sorted(packed.keys() - shapes.keys() - scales):
        raise UserError(f"'{path}' holds tensor '{surplus[0]}', which its config has no place for: {way_out}")


def load_release(folder: str | Path) -> Release:
    """Reads a whole release and checks that its parts belong together.

    Raises:
        UserError: as `load_part`; a missing vocabulary; a base or super-res trained on another tokenizer or text
            encoder.
    """
    folder = Path(folder)
    base = load_part(folder, 'base')
    parts = {part: load_part(folder, part) for part in ('tokenizer', 'text_encoder')}
    _check_hashes(folder, 'base', base, parts)
    decode = _read_decode(folder, 'base', base)
    _check_shapes(folder, base.config, parts['tokenizer'].config, parts['text_encoder'].config)
    vocabulary = folder / VOCABULARY
    if not vocabulary.is_file():
        raise UserError(f"vocabulary '{vocabulary}' does not exist: copy the release again")
    wanted = parts['text_encoder'].extra.get('vocabulary_sha256')
    if wanted is not None and file_hash(vocabulary) != wanted:
        raise UserError(f"vocabulary '{vocabulary}' is not the one the text encoder learned: copy the release again")
    release = Release(parts['tokenizer'], parts['text_encoder'], base, decode, vocabulary)
    return _with_superres(folder, release) if has_part(folder, 'superres') else release


def _with_superres(folder: Path, release: Release) -> Release:
    superres, tokenizer = load_part(folder, 'superres'), load_part(folder, 'superres_tokenizer')
    below = {'tokenizer': release.tokenizer, 'superres_tokenizer': tokenizer, 'text_encoder': release.text_encoder}
    _check_hashes(folder, 'superres', superres, below)
    config = superres.config
    for what, theirs, needed in (
        ('codebook_size', tokenizer.config.codebook_size, config.codebook_size),
        ('low_codebook_size', release.tokenizer.config.codebook_size, config.low_codebook_size),
        ('low_grid', release.base.config.grid, config.low_grid),
        ('text_width', release.text_encoder.config.width, config.text_width),
        ('text_length', release.base.config.text_length, config.text_length),
    ):
        if theirs != needed:
            raise UserError(f"'{folder}': the superres has {what} {needed}, its parts have {theirs}: export them again")
    decode = _read_decode(folder, 'superres', superres)
    return replace(release, superres=superres, superres_tokenizer=tokenizer, superres_decode=decode)


def _check_hashes(folder: Path, name: str, model: Part, below: Mapping[str, Part]) -> None:
    """Checks that a transformer was trained on the frozen parts beside it."""
    for part, loaded in below.items():
        wanted = model.extra.get(f'{part}_sha256')
        if wanted != loaded.ids_hash:
            raise UserError(
                f"'{folder}': the {name} was trained on {part} {str(wanted)[:12]}, the folder holds "
                f'{loaded.ids_hash[:12]}: put the {part} it was trained on into the folder'
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_decode(folder: Path, name: str, model: Part) -> DecodeConfig:
    where, values = f"'{folder / 'config.json'}', part '{name}'", model.extra.get('decode') or {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: 'decode' must be a group of keys, not {values!r}")
    try:
        decode = read(DecodeConfig, values, 'decode.')
    except UserError as error:
        raise UserError(f'{where}: {error}') from None
    numbers = (decode.guidance_scale, decode.temperature, decode.choice_temperature)
    if decode.steps < 1 or not all(0 <= x < math.inf for x in numbers):
        raise UserError(f'{where}: decode.steps must be at least 1, its scale and temperatures at least 0')
    return decode


def _check_shapes(folder: Path, base: TransformerConfig, tokenizer: VQConfig, text_encoder: T5Config) -> None:
    for what, theirs, needed in (
        ('codebook_size', tokenizer.codebook_size, base.codebook_size),
        ('text_width', text_encoder.width, base.text_width),
    ):
        if theirs != needed:
            raise UserError(f"'{folder}': the base has {what} {needed}, its parts have {theirs}: export them again")
    if base.text_length > text_encoder.max_length:
        raise UserError(
            f"'{folder}': the base reads {base.text_length} text tokens, the text encoder makes at most "
            f'{text_encoder.max_length}: export them again'
        )
