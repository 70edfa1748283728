"""When this project's GPU kernels are used: by chip, type, mesh, what jax holds and what was asked for."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from muse.errors import InputWarning, UserError
from muse.nn import attention, devices
from muse.nn.devices import drawing_kernels, gpu_kernels


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one of another platform and chip, with MUSE_GPU_KERNELS as said."""

    def become(capability: str | None, said: str | None, *, platform: str = 'gpu', triton: bool = True) -> None:
        device: Any = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, 'local_devices', lambda: [device])
        monkeypatch.setattr(devices, 'platform', lambda: platform)
        monkeypatch.setattr(devices, 'has_triton', lambda: triton)
        monkeypatch.delenv('MUSE_GPU_KERNELS', raising=False)
        if said is not None:
            monkeypatch.setenv('MUSE_GPU_KERNELS', said)

    return become


@pytest.mark.parametrize(
    ('capability', 'said', 'used'),
    [
        ('9.0', None, True),
        ('9.0', '', True),
        ('9.0', '1', True),
        ('9.0', '0', False),
        ('8.0', None, False),  # not measured there
        ('8.9', None, False),
        ('10.0', None, False),
        ('12.0', None, False),
        ('8.0', '1', True),
        ('8.9', '1', True),
        ('10.0', '1', True),
        ('8.0', '0', False),
        ('7.5', None, False),
        ('gfx90a', None, False),  # an AMD GPU
    ],
)
def test_drawing_uses_the_kernels_where_they_were_measured_or_are_asked_for(machine, capability, said, used):
    machine(capability, said)
    assert drawing_kernels('bfloat16') is used
    assert gpu_kernels() is (said == '1')  # training's norms are only asked for


@pytest.mark.parametrize(
    ('setting', 'dtype', 'reason'),
    [
        ({'capability': '9.0'}, 'float32', "dtype 'bfloat16', and this model's is 'float32'"),
        ({'capability': '7.5'}, 'bfloat16', 'compute capability 8.0'),
        ({'capability': 'gfx90a'}, 'bfloat16', 'compute capability 8.0'),
        ({'capability': None, 'platform': 'cpu'}, 'bfloat16', 'for a cpu'),
        ({'capability': '9.0', 'platform': 'tpu'}, 'bfloat16', 'for a tpu'),
        ({'capability': '9.0', 'triton': False}, 'bfloat16', 'has no jax.experimental.pallas.triton'),
    ],
)
def test_what_cannot_be_is_the_plain_way_and_said_where_it_was_asked_for(machine, setting, dtype, reason):
    machine(said='1', **setting)
    with pytest.warns(InputWarning, match=reason):
        assert drawing_kernels(dtype) is False
    for said in (None, '0'):
        machine(said=said, **setting)
        assert drawing_kernels(dtype) is False  # a warning would be an error


def test_it_is_said_once(machine):
    machine('9.0', '1', triton=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            drawing_kernels('bfloat16')
    assert len(caught) == 1


def test_not_on_a_mesh_of_several_devices(machine):
    """The compiler cannot split a kernel over them."""
    for sizes, used in (((1, 1), True), ((2, 1), False)):
        machine('9.0', None)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, ('data', 'fsdp'))):
            assert drawing_kernels('bfloat16') is used
    machine('9.0', '1')
    mesh = jax.sharding.AbstractMesh((4,), ('data',))
    with jax.sharding.use_abstract_mesh(mesh), pytest.warns(InputWarning, match='this mesh has 4'):
        assert not drawing_kernels('bfloat16')


@pytest.mark.parametrize('said', ['yes', 'true', '2', ' 1'])
def test_another_value_is_refused(machine, said):
    machine('9.0', said)
    for call in (gpu_kernels, lambda: drawing_kernels('bfloat16')):
        with pytest.raises(UserError, match=f"MUSE_GPU_KERNELS is '{said}': give 1"):
            call()


def test_training_without_the_deprecated_part_of_pallas(machine, monkeypatch):
    """Norms and attention are the plain ones, and say so where own ones were asked for by name."""
    machine('9.0', '1', triton=False)
    with pytest.warns(InputWarning, match='norms go without own kernels: jax .* has no'):
        assert not gpu_kernels()
    monkeypatch.setattr(attention, 'has_triton', lambda: False)
    monkeypatch.setattr(attention, 'platform', lambda: 'gpu')
    q_BTNH = jnp.zeros((2, 256, 4, 64), 'bfloat16')
    with pytest.warns(InputWarning, match="'fused' is as 'auto'"):
        assert not attention._fused('fused', q_BTNH, q_BTNH)
    assert not attention._fused('auto', q_BTNH, q_BTNH)
    monkeypatch.setattr(attention, 'has_triton', lambda: True)
    assert attention._fused('fused', q_BTNH, q_BTNH)


def test_whether_the_deprecated_part_is_there(monkeypatch):
    devices.has_triton.cache_clear()
    assert devices.has_triton()
    devices.has_triton.cache_clear()

    def gone(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(devices.importlib, 'import_module', gone)
    assert not devices.has_triton()
    devices.has_triton.cache_clear()
