"""Compiled programs are kept for the session: many of these tests compile the same ones."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('jax')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
    yield
    jax.config.update('jax_compilation_cache_dir', None)
