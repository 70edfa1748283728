"""What a program is compiled for: its mesh and its chip, and which of this project's kernels are for it."""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from muse.errors import UserError, warn

ROWS = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split
_NO_TRITON = f'jax {jax.__version__} has no jax.experimental.pallas.triton'
GPUS = ('gpu', 'cuda')  # `platform` of one: as jax's default, and as a mesh's
AMPERE, _HOPPER = 8, 9  # the first number of their compute capability


def mesh_split(size: int, *axes: str) -> tuple[str, ...] | None:
    """`axes`, where the mesh of `jax.set_mesh` has them and they split a dimension of `size` evenly; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = all(axis in mesh.axis_names for axis in axes) and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return axes if ours and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def platform() -> str:
    """'cpu', 'tpu' …: of the mesh of `jax.set_mesh`, which may be of chips that are not there; else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device is not None else None) or jax.default_backend()


def capability() -> int:
    """The first number of an NVIDIA GPU's compute capability: 8 of 8.6; 0 of everything else."""
    found = re.fullmatch(r'(\d+)\.\d+', str(getattr(jax.local_devices()[0], 'compute_capability', '')))
    return int(found[1]) if found else 0


def is_hopper() -> bool:
    """Whether this is the chip that the kernels of drawing were measured on."""
    return capability() == _HOPPER


@functools.cache
def has_triton() -> bool:
    """Whether this jax has the part of Pallas that the kernels are written in, which is to go."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            importlib.import_module('jax.experimental.pallas.triton')
    except ImportError:
        return False
    return True


def _asked() -> bool | None:
    """What MUSE_GPU_KERNELS says: 1 is yes, 0 no, nothing neither.

    Raises:
        UserError: it says something else.
    """
    said = os.environ.get('MUSE_GPU_KERNELS', '')
    if said not in ('', '0', '1'):
        raise UserError(
            f"MUSE_GPU_KERNELS is '{said}': give 1 for this project's GPU kernels, 0 for none, or leave it out"
        )
    return None if said == '' else said == '1'


def gpu_kernels() -> bool:
    """Whether training uses this project's kernels for norms: on a GPU with MUSE_GPU_KERNELS=1."""
    if not _asked() or platform() not in GPUS:
        return False
    if not has_triton():
        warn_if_asked(f'norms go without own kernels: {_NO_TRITON}')
    return has_triton()


def drawing_kernels(dtype: Any) -> bool:
    """Whether drawing in `dtype` uses this project's kernels for products and attention (`muse.models.fused`).

    They are for bfloat16 on one NVIDIA GPU, and used on a Hopper, which they were measured on, or with
    MUSE_GPU_KERNELS=1; with MUSE_GPU_KERNELS=0 never. Where they were asked for and cannot be used a warning says why.

    Raises:
        UserError: MUSE_GPU_KERNELS is something else.
    """
    asked = _asked()
    if asked is False or (asked is None and not is_hopper()):
        return False
    reason = _reason_against(dtype)
    if reason is not None:
        warn_if_asked(f'drawing goes without own kernels: {reason}')
    return reason is None


def warn_if_asked(message: str) -> None:
    """Says what own kernels do not take, where they were asked for by MUSE_GPU_KERNELS=1."""
    if _asked():
        warn(f'MUSE_GPU_KERNELS=1, but {message}')


def _reason_against(dtype: Any) -> str | None:
    """Why drawing cannot use the kernels, if it cannot."""
    if platform() not in GPUS:
        return f'they are for GPUs, and this program is for a {platform()}'
    if capability() < AMPERE:
        return 'they want an NVIDIA GPU of compute capability 8.0 or more'
    if (devices := jax.sharding.get_abstract_mesh().size) > 1:
        return f'they are for one device, and this mesh has {devices}'
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"they are for dtype 'bfloat16', and this model's is '{jnp.dtype(dtype)}'"
    return None if has_triton() else _NO_TRITON
