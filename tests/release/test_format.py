"""The release folder: what is saved comes back; what does not belong together is refused in one line."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import BASE, DECODE, T5, VQ, random_params

from muse.config import MeshConfig
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.release.format import graphdef_and_template, load_part, load_release, save_part


@pytest.fixture
def folder(release_folder, tmp_path):
    """A copy of the tiny release that a test may damage."""
    return shutil.copytree(release_folder, tmp_path / 'release')


def refused(call, *parts):
    """Asserts a UserError of one line that holds all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message
    for part in parts:
        assert part in message, message


def times(params, factor):
    return jax.tree.map(lambda x: x * factor, params)


def edit_config(folder, change):
    index = json.loads((folder / 'config.json').read_text())
    change(index)
    (folder / 'config.json').write_text(json.dumps(index))


def edit_tensors(folder, part, change):
    """Rewrites a part's tensors."""
    path = folder / f'{part}.safetensors'
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(('storage', 'bound'), [('float32', 0.0), ('bfloat16', 2**-8), ('int8', 0.5001 / 127)])
def test_round_trip(tmp_path, storage, bound):
    params = random_params('base', BASE)
    digest = save_part(tmp_path, 'base', config=BASE, params=params, storage=storage, extra={'note': [1, 'a']})
    part = load_part(tmp_path, 'base')
    assert part.config == BASE and part.hash == digest and part.extra == {'note': [1, 'a']}
    assert jax.tree.structure(part.params) == jax.tree.structure(params)
    entry = json.loads((tmp_path / 'config.json').read_text())['parts']['base']
    assert entry['storage'] == storage and entry['parameters'] == sum(x.size for x in jax.tree.leaves(params))
    changed = 0
    for true, loaded in zip(jax.tree.leaves(params), jax.tree.leaves(part.params), strict=True):
        assert loaded.dtype == np.float32
        assert np.abs(loaded - true).max() <= bound * np.abs(true).max()
        changed += int((loaded != true).any())
    assert changed == 0 if storage == 'float32' else changed > 5
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')]
    small = load_part(tmp_path, 'base', dtype='bfloat16').params
    for loaded, rounded in zip(jax.tree.leaves(part.params), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(loaded.astype('bfloat16'), rounded)


@pytest.mark.parametrize('storage', ['float32', 'bfloat16', 'int8'])
def test_the_file_is_one_that_safetensors_reads(tmp_path, storage):
    save_part(tmp_path, 'base', config=BASE, params=random_params('base', BASE), storage=storage)
    part, tensors = load_part(tmp_path, 'base'), load_file(tmp_path / 'base.safetensors')
    for route, variable in nnx.to_flat_state(part.params):
        name = '.'.join(map(str, route))
        values = tensors.pop(name).astype(np.float32) * tensors.pop(f'{name}.scale', np.float32(1))
        np.testing.assert_array_equal(variable[...], values)
    assert not tensors


@pytest.mark.parametrize('storage', ['bfloat16', 'int8'])
def test_loaded_onto_a_mesh_it_is_the_same(tmp_path, storage):
    save_part(tmp_path, 'base', config=BASE, params=random_params('base', BASE), storage=storage)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    parts = load_part(tmp_path, 'base'), load_part(tmp_path, 'base', mesh=mesh)
    whole, split = (jax.tree.leaves(part.params) for part in parts)
    for ours, theirs in zip(whole, split, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(x.addressable_shards[0].data.size == x.size // 4 for x in split)


def test_loaded_parameters_run_in_the_model(tmp_path):
    params = random_params('tokenizer', VQ)
    save_part(tmp_path, 'tokenizer', config=VQ, params=params, storage='float32')
    graph = graphdef_and_template('tokenizer', VQ)[0]
    ids = jax.random.randint(jax.random.key(0), (1, 4, 4), 0, 64)
    loaded = nnx.merge(graph, load_part(tmp_path, 'tokenizer').params).decode(ids)
    np.testing.assert_array_equal(loaded, nnx.merge(graph, params).decode(ids))


def test_release_loads_and_survives_a_copy(release_folder, folder):
    release, copied = load_release(release_folder), load_release(folder)
    assert (release.tokenizer.config, release.text_encoder.config, release.base.config) == (VQ, T5, BASE)
    assert release.decode == DECODE and release.vocabulary.is_file()
    assert copied.base.hash == release.base.hash and copied.name == release.name


def test_a_tokenizer_of_other_weights_is_refused(folder):
    params = times(load_part(folder, 'tokenizer').params, 1.01)
    digest = save_part(folder, 'tokenizer', config=VQ, params=params, storage='float32')
    refused(lambda: load_release(folder), 'was trained on tokenizer', digest[:12])


def test_a_text_encoder_of_other_weights_is_refused(folder):
    params = times(load_part(folder, 'text_encoder').params, 1.01)
    save_part(folder, 'text_encoder', config=T5, params=params, storage='float32')
    refused(lambda: load_release(folder), 'was trained on text_encoder')


def test_a_base_of_another_codebook_is_refused(folder):
    other = dataclasses.replace(BASE, codebook_size=32)
    params = random_params('base', other)
    extra = load_part(folder, 'base').extra
    save_part(folder, 'base', config=other, params=params, storage='float32', extra=extra)
    refused(lambda: load_release(folder), 'codebook_size 32', '64')


@pytest.mark.parametrize('share', [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(folder, share):
    path = folder / 'base.safetensors'
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(lambda: load_release(folder), 'base.safetensors', 'truncated or corrupted', 'copy it again')


def test_one_flipped_bit_is_found(folder):
    path = folder / 'tokenizer.safetensors'
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    refused(lambda: load_part(folder, 'tokenizer'), 'hash')


def test_missing_surplus_and_misshapen_tensors_are_named(folder):
    name = 'blocks.mlp.up.kernel'
    edit_tensors(folder, 'base', lambda tensors: tensors.pop(name))
    refused(lambda: load_part(folder, 'base'), f"lacks tensor '{name}'")
    edit_tensors(folder, 'base', lambda tensors: tensors.update({name: np.zeros((2, 3), np.float32)}))
    refused(lambda: load_part(folder, 'base'), f"'{name}' as (2, 3)", '(2, 32, 64)')
    edit_tensors(folder, 'base', lambda t: t.update({name: np.zeros((2, 32, 64), np.float32), 'x.y': np.zeros(1)}))
    refused(lambda: load_part(folder, 'base'), "'x.y'", 'no place')


def test_a_surplus_tensor_of_any_type_is_named(folder):
    edit_tensors(folder, 'base', lambda tensors: tensors.update(count=np.arange(3)))
    refused(lambda: load_part(folder, 'base'), "'count'", 'no place')


def test_int8_without_its_scale_is_named(tmp_path):
    save_part(tmp_path, 'base', config=BASE, params=random_params('base', BASE), storage='int8')
    edit_tensors(tmp_path, 'base', lambda tensors: tensors.pop('tokens.table.scale'))
    refused(lambda: load_part(tmp_path, 'base'), "lacks tensor 'tokens.table.scale'")


def test_a_config_that_the_weights_do_not_fit_is_refused(folder):
    edit_config(folder, lambda index: index['parts']['base']['config'].update(width=48))
    refused(lambda: load_part(folder, 'base'), 'base.safetensors', 'another config')


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda i: i.update(format=7), 'format 7'),
        (lambda i: i.pop('parts'), 'no parts'),
        (lambda i: i['parts'].pop('base'), "'base'"),
        (lambda i: i['parts']['base'].pop('sha256'), "'base'"),
        (lambda i: i['parts']['base']['config'].update(widht=3), "did you mean 'width'"),
        (lambda i: i['parts']['base']['decode'].update(steps='many'), 'decode.steps'),
    ],
)
def test_wrong_config(folder, change, said):
    edit_config(folder, change)
    refused(lambda: load_release(folder), 'config.json', said)


def test_missing_and_broken_files(folder, tmp_path):
    refused(lambda: load_release(tmp_path / 'nowhere'), 'nowhere', 'does not exist')
    (tmp_path / 'empty').mkdir()
    refused(lambda: load_release(tmp_path / 'empty'), 'no config.json')
    (folder / 'spiece.model').unlink()
    refused(lambda: load_release(folder), 'spiece.model')
    (folder / 'text_encoder.safetensors').unlink()
    refused(lambda: load_release(folder), 'text_encoder.safetensors', 'does not exist')
    text = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(text[:100])
    refused(lambda: load_release(folder), 'config.json', 'cannot be read')


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    refused(
        lambda: save_part(
            tmp_path / 'file' / 'x', 'base', config=BASE, params=random_params('base', BASE), storage='int8'
        ),
        'cannot write the release folder',
    )


def test_a_failed_save_leaves_the_old_part(folder):
    before = load_part(folder, 'base').hash
    params = times(random_params('base', BASE), np.inf)
    refused(lambda: save_part(folder, 'base', config=BASE, params=params, storage='int8'), 'NaN or infinity')
    assert not [name for name in os.listdir(folder) if name.endswith('.tmp')]
    assert load_part(folder, 'base').hash == before
