"""Set-up of every test: CPU, eight virtual devices, annotations of `muse` enforced, absl flags parsed."""

from __future__ import annotations

import os

# Before anything imports jax.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Optimising machine code takes a third of the tests' time and changes none of their outcomes.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_ENABLE_COMPILATION_CACHE', 'false')  # tests leave nothing in the home folder

from jaxtyping import install_import_hook

# Shapes and types are enforced where the numerics live. The outer modules check their input themselves.
NUMERICS = ['nn', 'models', 'masking', 'guidance', 'decode', 'train', 'evals']
install_import_hook([f'muse.{name}' for name in NUMERICS], 'beartype.beartype')

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


@pytest.fixture(scope='session')
def release_folder(tmp_path_factory):
    """A tiny release with random weights (tests/tiny.py). Read only: a test that changes files copies it."""
    from tiny import write_release

    return write_release(tmp_path_factory.mktemp('release'))


@pytest.fixture(scope='session')
def tiny_model(release_folder):
    """The loaded tiny release."""
    import muse

    return muse.load(release_folder)


@pytest.fixture(scope='session')
def cascade_folder(tmp_path_factory):
    """A tiny release with a super-res. Read only."""
    from tiny import write_cascade

    return write_cascade(tmp_path_factory.mktemp('cascade'))


@pytest.fixture(scope='session')
def cascade_model(cascade_folder):
    """The loaded tiny release with a super-res."""
    import muse

    return muse.load(cascade_folder)
