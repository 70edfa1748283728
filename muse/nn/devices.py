"""What a program is compiled for: its mesh and its chip."""

from __future__ import annotations

import math
import os

import jax
from jax.sharding import AxisType

ROWS = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split


def mesh_split(size: int, *axes: str) -> tuple[str, ...] | None:
    """`axes`, where the mesh of `jax.set_mesh` has them and they split a dimension of `size` evenly; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = all(axis in mesh.axis_names for axis in axes) and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return axes if ours and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def platform() -> str:
    """'cpu', 'tpu' …: of the mesh of `jax.set_mesh`, which may be of chips that are not there; else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device is not None else None) or jax.default_backend()


def gpu_kernels() -> bool:
    """Whether this project's own kernels for norms and for drawing may be used: a GPU, and MUSE_GPU_KERNELS=1.

    They equal the plain ways in Pallas' interpreter and compile for an H100, but have not been timed on one.
    """
    return platform() in ('gpu', 'cuda') and os.environ.get('MUSE_GPU_KERNELS') == '1'
