"""Compilation is most of the time here: programs are kept for the session, and compiled quickly rather than well."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('jax')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
    yield
    jax.config.update('jax_compilation_cache_dir', None)


@pytest.fixture(scope='module')
def quick_compiles():
    """For tests of a few steps on tiny models."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)
