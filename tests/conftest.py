"""Set-up of every test: CPU, eight virtual devices, annotations of `muse` enforced, absl flags parsed."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before anything imports jax.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # JAX_PLATFORMS=cuda: those that need a GPU
# Optimising machine code takes a third of the tests' time and changes none of their outcomes.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_ENABLE_COMPILATION_CACHE', 'false')  # tests leave nothing in the home folder

from jaxtyping import install_import_hook

# Shapes and types are enforced where the numerics live. The outer modules check their input themselves.
NUMERICS = ['nn', 'models', 'masking', 'guidance', 'decode', 'train', 'evals']
install_import_hook([f'muse.{name}' for name in NUMERICS], 'beartype.beartype')

import jax  # noqa: E402
import pytest  # noqa: E402
from _pytest import runner  # noqa: E402
from absl import flags  # noqa: E402
from roomy import roomy  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags

# Begun first, so that at the end no worker waits long for another: a worker takes a module at a time.
LONGEST = [
    'train/test_tokenizer_step.py',
    'train/test_loop.py',
    'train/test_learning.py',
    'train/test_decoder.py',
    'train/test_superres_training.py',
    'train/test_base.py',
    'test_sample_cli.py',
    'test_edit_cli.py',
    'test_wheel.py',
]
MOST_BYTES = 2 * 2**30  # of a test process, beyond which it forgets its compiled programs between modules


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    return roomy(lambda: runner.pytest_runtest_protocol(item, nextitem))


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
    """Compiled programs are never freed otherwise, and few modules share any."""
    yield
    statm = Path('/proc/self/statm')
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') > MOST_BYTES:
        jax.clear_caches()
        gc.collect()


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
