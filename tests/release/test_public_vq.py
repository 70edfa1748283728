"""Published VQGANs: names, settings and numbers against PyTorch's (tools/make_vq_golden.py), and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from flax import nnx
from public_weights import picture, weights
from safetensors.numpy import load_file, save_file

from muse.config import PublicVQConfig
from muse.errors import UserError
from muse.models.public_vqgan import PublicVQGAN
from muse.models.vqgan import to_float
from muse.release import public_vq
from muse.release.format import graphdef_and_template, load_part, save_part
from muse.release.public_vq import load_public

GOLDEN = Path(__file__).parents[1] / 'golden' / 'public_vq'
MODELS = json.loads((GOLDEN / 'models.json').read_text())
MADE = load_file(GOLDEN / 'made.safetensors')
OLD_ATTENTION = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}


def published(folder: Path, name: str, change=lambda tensors: None, **settings) -> Path:
    """Writes a model as its publisher would; returns what `load_public` takes."""
    folder.mkdir(exist_ok=True)
    tensors = weights(MODELS[name]['shapes'])
    change(tensors)
    if name == 'taming':
        return torch_files.write_new(folder / 'last.ckpt', {'state_dict': tensors, 'epoch': 4})
    save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
    (folder / 'config.json').write_text(json.dumps(MODELS[name]['settings'] | settings))
    return folder


def merged(config, params) -> PublicVQGAN:
    return nnx.merge(graphdef_and_template('tokenizer', config)[0], params)


@pytest.mark.parametrize('name', MODELS)
def test_numbers_are_pytorchs(name, tmp_path):
    config, params = load_public(published(tmp_path, name))
    golden = {key.split('.')[1]: array for key, array in MADE.items() if key.startswith(f'{name}.')}

    @jax.jit
    def run(params, img_BHWC, ids_Bhw):
        model = merged(config, params)
        latents = model.latents(to_float(img_BHWC))
        soft = jax.nn.one_hot(ids_Bhw, config.codebook_size)
        return latents, model.encode(to_float(img_BHWC)), model.decode(ids_Bhw), model.decode(soft)

    latents, ids, made, soft = run(params, jnp.asarray(picture()), jnp.asarray(golden['ids']))
    np.testing.assert_allclose(latents, golden['latents'], atol=1e-4)
    np.testing.assert_allclose(made, golden['made'], atol=1e-4)
    np.testing.assert_allclose(soft, golden['made'], atol=1e-4)
    codes = weights(MODELS[name]['shapes'])['quantize.embedding.weight'].astype(np.float64)
    distances = np.sort(np.linalg.norm(golden['latents'][..., None, :] - codes, axis=-1), axis=-1)
    clear = distances[..., 1] - distances[..., 0] > 1e-4 * distances[..., 0]
    np.testing.assert_array_equal(np.asarray(ids)[clear], golden['ids'][clear])
    assert clear.mean() > 0.99 and len(np.unique(golden['ids'])) > 10
    assert ids.shape[1] * config.factor == picture().shape[1]


def test_names_of_attention_of_before(tmp_path):
    def age(tensors):
        for name in [n for n in tensors if '.attentions.' in n]:
            new = next((name.replace(f'.{a}.', f'.{b}.') for a, b in OLD_ATTENTION.items() if f'.{a}.' in name), name)
            tensors[new] = tensors.pop(name)

    old, new = published(tmp_path / 'old', 'attention', age), published(tmp_path / 'new', 'attention')
    jax.tree.map(np.testing.assert_array_equal, load_public(old)[1], load_public(new)[1])


def test_older_settings_say_less(tmp_path):
    """As latent diffusion's own first models were published."""
    settings = {k: v for k, v in MODELS['attention']['settings'].items() if v is not None}
    for name in ('mid_block_add_attention', 'lookup_from_codebook', 'norm_type', 'force_upcast'):
        settings.pop(name, None)
    folder = published(tmp_path, 'attention')
    (folder / 'config.json').write_text(json.dumps(settings))
    assert load_public(folder)[0].middle_attention


def test_half_precision_and_latent_diffusions_prefix(tmp_path):
    half = {
        f'first_stage_model.{name}': tensor.astype(np.float16)
        for name, tensor in weights(MODELS['taming']['shapes']).items()
    }
    half |= dict.fromkeys(('model.diffusion_model.out', 'first_stage_model.loss.logvar'), np.ones(3, np.float16))
    config, params = load_public(torch_files.write_new(tmp_path / 'a.ckpt', half))
    reference = load_public(published(tmp_path, 'taming'))
    assert config == reference[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, reference[1])


def test_becomes_a_tokenizer_part_of_a_release(tmp_path):
    config, params = load_public(published(tmp_path, 'movq'))
    with pytest.raises(UserError, match=r'a model of diffusers \(VQModel\): .* tools/import_tokenizer.py'):
        load_part(tmp_path, 'tokenizer')  # as it was published
    save_part(tmp_path / 'release', 'tokenizer', config=config, params=params, storage='float32')
    part = load_part(tmp_path / 'release', 'tokenizer')
    assert part.config == config and part.config.factor == 2
    jax.tree.map(np.testing.assert_array_equal, part.params, params)


@pytest.mark.parametrize(
    'name, change, message',
    [
        ('amused', lambda t: t.pop('quant_conv.bias'), "lacks tensor 'quant_conv.bias': "),
        ('amused', lambda t: t['quant_conv.bias'].__setitem__(2, np.nan), "'quant_conv.bias' holds NaN or infinity"),
        ('taming', lambda t: t['quantize.embedding.weight'].__setitem__(2, np.inf), "embedding.weight' holds NaN or"),
        ('amused', lambda t: t.update(new=np.ones(2, np.float32)), "holds tensor 'new', which"),
        ('amused', lambda t: [t.pop(n) for n in list(t) if 'mid_block' in n], r"lacks tensor 'decoder.* and 31 more"),
        ('amused', lambda t: t.update({'quant_conv.bias': np.ones(7, np.float32)}), r"'quant_conv.bias' as \[7\]"),
        ('taming', lambda t: t.pop('decoder.up.0.block.1.conv2.weight'), "lacks tensor 'decoder.up.0.block.1.conv2.we"),
        ('taming', lambda t: t.pop('quantize.embedding.weight'), "lacks tensor 'quantize.embedding.weight'"),
        ('taming', lambda t: t.update({'quantize.proj.weight': np.ones(2, np.float32)}), 'Gumbel'),
        ('taming', lambda t: t.update({'model_ema.decay': np.ones(2, np.float32)}), "holds tensor 'model_ema.decay'"),
    ],
)
def test_other_tensors_are_named(name, change, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load_public(published(tmp_path, name, change))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'_class_name': 'AutoencoderKL'}, "describes 'AutoencoderKL': only diffusers' VQModel"),
        ({'act_fn': 'relu'}, "act_fn is 'relu'"),
        ({'norm_type': 'ada'}, "norm_type is 'ada'"),
        ({'down_block_types': ['DownEncoderBlock2D', 'Fir', 'DownEncoderBlock2D']}, "has 'Fir', only"),
        ({'block_out_channels': [32, 96, 64]}, 'lacks tensor .*conv_shortcut'),
        ({'block_out_channels': [32]}, 'of different lengths'),
        ({'layers_per_block': 'two'}, "'num_res_blocks' must be int"),
        ({'norm_num_groups': 7}, '7 groups do not divide its widths'),
    ],
)
def test_other_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_public(published(tmp_path, 'amused', **settings))


def test_places_without_a_model(tmp_path):
    with pytest.raises(UserError, match='holds no diffusion_pytorch_model.safetensors: give the folder of a VQModel'):
        load_public(tmp_path)
    published(tmp_path / 'vqvae', 'amused')
    with pytest.raises(UserError, match="give its folder '.*vqvae'"):
        load_public(tmp_path)
    with pytest.raises(UserError, match="has diffusers' names: give its folder"):
        load_public(tmp_path / 'vqvae' / 'diffusion_pytorch_model.safetensors')
    with pytest.raises(UserError, match='cannot read weights'):
        load_public(tmp_path / 'nowhere.ckpt')
    with pytest.raises(UserError, match='nowhere.safetensors. does not exist'):
        load_public(tmp_path / 'nowhere.safetensors')
    (tmp_path / 'vqvae' / 'config.json').unlink()
    with pytest.raises(UserError, match='must lie beside the weights'):
        load_public(tmp_path / 'vqvae')


@pytest.mark.parametrize('keep', [4, 100, 5_000, -4])
def test_damaged_safetensors(keep, tmp_path):
    file = published(tmp_path, 'amused') / 'diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match='truncated or corrupted, or no safetensors file'):
        load_public(tmp_path)


MEASURE = """
import sys, time
import jax, jax.numpy as jnp
jax.config.update('jax_platforms', 'cpu')
jnp.zeros(3).block_until_ready()
from muse.release.format import load_part
from muse.release import public_vq
from muse.release.public_vq import load_public
def peak():  # ru_maxrss would count the memory of the parent
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM'))
before, start = peak(), time.process_time()  # of this process: others may share the cores
loaded = load_public(sys.argv[1])[1]
size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(loaded)))
print(time.process_time() - start, (peak() - before) / size, size)
"""


@pytest.mark.slow
def test_amused_size_loads_fast_and_in_little_memory(tmp_path):
    """146M: at most 5 s, and 1.5 times the model's size of memory."""
    settings = {
        '_class_name': 'VQModel', 'block_out_channels': [128, 256, 256, 512, 768], 'latent_channels': 64,
        'down_block_types': ['DownEncoderBlock2D'] * 5, 'up_block_types': ['UpDecoderBlock2D'] * 5,
        'layers_per_block': 2, 'num_vq_embeddings': 8192, 'mid_block_add_attention': False, 'vq_embed_dim': None,
    }  # fmt: skip
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    config = PublicVQConfig(kind='public')
    tensors = {}
    for route, variable in nnx.to_flat_state(graphdef_and_template('tokenizer', config)[1]):
        shape = variable.shape
        shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
        name = public_vq._diffusers_name('.'.join(map(str, route)), config)
        tensors[name] = np.broadcast_to(np.float32(0.01), shape).copy()
    assert 140e6 < sum(tensor.size for tensor in tensors.values()) < 150e6
    save_file(tensors, tmp_path / 'diffusion_pytorch_model.safetensors')
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=600,
        cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    seconds, share, size = map(float, done.stdout.split())
    print(f'{size / 1e6:.0f} MB in {seconds:.1f} s and {share:.2f} times its size')
    assert seconds < 5 and share < 1.5
