"""edit.py: edits from flags and from rows are those of the Python API; wrong input is one line and exit code 2."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from shell import contents, run_all

from muse.config import FreeEditConfig


def load(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder with a picture of noise, larger than the model's, and a mask of its right half."""
    folder = tmp_path_factory.mktemp('pictures')
    noise_HWC = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    Image.fromarray(noise_HWC).save(folder / 'photo.png')
    Image.fromarray(noise_HWC[:12, :16]).save(folder / 'small.png')
    mask_HW = np.zeros((32, 40), np.uint8)
    mask_HW[:, 20:] = 255
    Image.fromarray(mask_HW).save(folder / 'mask.png')
    Image.new('L', (8, 8)).save(folder / 'small_mask.png')
    Image.new('RGBA', (40, 32), (255, 255, 255, 40)).save(folder / 'clear_mask.png')
    (folder / 'cut.png').write_bytes((folder / 'photo.png').read_bytes()[:500])
    return folder


ROWS = [
    {'image': 'photo.png', 'box': '20,0,40,32', 'prompt': 'a red apple', 'id': 'box', 'seed': 2},
    {'image': 'photo.png', 'mask': 'mask.png', 'prompt': 'a red apple', 'id': 'mask', 'seed': 3},
    {'image': 'photo.png', 'outpaint': {'left': 8, 'bottom': 4}, 'prompt': 'a dog', 'guidance_scale': 0.5},
    {'image': 'photo.png', 'variation': 0.4},
    {'image': 'photo.png', 'free': True, 'prompt': 'a star', 'steps': 6, 'upscale': False},
    {'image': 'photo.png', 'upscale': True},
    {'image': 'none.png', 'variation': 1},
    {'image': 'cut.png', 'variation': 1},
    {'image': 'photo.png', 'prompt': 'x'},
    {'image': 'photo.png', 'prompt': 'x', 'box': '1,2,3,4', 'mask': 'mask.png'},
    {'image': 'photo.png', 'prompt': 'x', 'box': '0,0,41,32'},
    {'image': 'photo.png', 'prompt': 'x', 'mask': 'small_mask.png'},
    {'image': 'photo.png', 'prompt': 'x', 'mask': 'clear_mask.png'},
    {'image': 'photo.png', 'outpaint': 'left=20000', 'prompt': 'x'},
    {'image': 'photo.png', 'outpaint': 'up=2', 'prompt': 'x'},
    {'image': 'photo.png', 'variation': 1.5},
    {'image': 'photo.png', 'box': '0,0,4,4'},
    {'image': 'photo.png', 'free': 'maybe', 'prompt': 'x'},
    {'variation': 1},
    {'image': 'x' * 300, 'variation': 1},
    {'image': 'photo.png', 'box': [0, 0, 10**50, 4], 'prompt': 'x'},
    {'image': 'photo.png', 'upscale': True, 'steps': 4},
]
SAID = [
    'holds no super-res',
    'does not exist',
    'cannot be used',
    'no edit',
    'several edits are named (mask, box)',
    'within 40×32',
    '8×8, the picture',
]
SAID += [
    'transparent',
    'would be 20040',
    'sides: left',
    'variation is 1.5',
    'no prompt',
    'free is',
    'no image is named',
    'does not exist',
]
SAID += ['within 40×32', 'an upscale reads no steps']


def wrong_cases(pictures, release_folder, folder):
    """(command line, what must be said of it)"""
    (folder / 'bad.jsonl').write_text('{}\n')
    (folder / 'jobs.txt').write_text('photo.png\n')
    model, out, image = f'--model={release_folder}', f'--out={folder / "none"}', f'--image={pictures / "photo.png"}'
    prompt = '--prompt=a cat'
    cases = [
        ([], 'no image is named'),
        ([image], 'no edit is named'),
        ([image, '--box=0,0,4,4'], 'no prompt'),
        ([image, prompt, '--box=0,0,4'], 'x0,y0,x1,y1'),
        ([image, prompt, '--box=4,0,4,4'], 'x0 < x1'),
        ([image, prompt, '--box=0,0,4,4', '--free'], 'several edits are named (box, free)'),
        ([image, prompt, '--outpaint=left'], 'left=128,right=64'),
        ([image, prompt, '--outpaint=left=-3'], 'left is -3'),
        ([image, prompt, '--outpaint=left=1,left=2'], 'twice'),
        ([image, '--variation=-0.1'], 'variation is -0.1'),
        ([image, '--upscale'], 'holds no super-res'),
        ([image, prompt, '--free', '--iterations=0'], 'iterations is 0'),
        ([image, prompt, '--free', '--share=2'], 'share is 2'),
        ([image, prompt, '--free', '--strip', '--frames=200'], 'a frame is 200'),
        ([image, prompt, '--free', '--frames=last'], '25,50,75'),
        ([image, prompt, '--free', '--frames=20'], 'add --strip'),
        ([image, prompt, '--box=0,0,4,4', '--context=-1'], 'context is -1'),
        ([image, prompt, '--box=0,0,4,4', '--context=0.5'], 'at least 1'),
        ([image, prompt, f'--mask={pictures / "small_mask.png"}'], '8×8, the picture 40×32'),
        ([image, prompt, f'--mask={folder}'], 'does not exist'),
        ([f'--image={folder / "none.png"}', '--variation=1'], 'none.png'),
        ([f'--jobs={folder / "bad.jsonl"}'], 'line 1: no image is named'),
        ([f'--jobs={folder / "jobs.txt"}'], "ends in '.txt'"),
        ([f'--jobs={folder / "bad.jsonl"}', image], '--image is given beside --jobs'),
        ([image, '--variation=1', '--steps=0'], 'steps is 0'),
        ([image, '--variation=1', 'photo.png'], "argument 'photo.png'"),
    ]
    return [([model, out, *args], said) for args, said in cases]


@pytest.fixture(scope='module')
def job(pictures, release_folder, tmp_path_factory):
    """(the folder of a job, what the command said, first, again and from flags, what it said to wrong input)"""
    out = tmp_path_factory.mktemp('edits')
    (pictures / 'rows.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
    shared = [f'--model={release_folder}', '--strip', '--iterations=9', '--share=0.3', '--frames=3', '--context=1.5']
    rows = [f'--jobs={pictures / "rows.jsonl"}', f'--out={out / "rows"}', *shared]
    flags = [f'--image={pictures / "photo.png"}', '--box=20,0,40,32', '--prompt=a red apple', '--seed=2', *shared]
    lines = [rows, rows, [*flags, f'--out={out / "flags"}']]
    wrong = wrong_cases(pictures, release_folder, out)
    results = run_all('edit', [*lines, *(args for args, _ in wrong)])
    return out, results[: len(lines)], list(zip(wrong, results[len(lines) :], strict=True))


def test_rows_come_out_as_files_and_restart(job):
    out, (first, again, flags), _ = job
    assert (first[0], again[0], flags[0]) == (1, 1, 0)
    assert flags[2].startswith('warning: not read by --box: --frames, --iterations, --share\n')
    assert first[1].startswith('5 pictures in') and '5 of them there already' in again[1]
    stems = ['box', 'mask', '0002_a-dog', '0003_photo', '0004_a-star']
    names = [f'{stem}{end}' for stem in stems for end in ('.json', '.png', '.strip.png')]
    assert sorted(contents(out / 'rows')) == sorted([*names, 'manifest.jsonl', 'rejects.jsonl'])
    rejects = [json.loads(line) for line in (out / 'rows/rejects.jsonl').read_text().splitlines()]
    assert [reject['line'] for reject in rejects] == list(range(6, 23))
    assert [json.loads(reject['row']) for reject in rejects] == ROWS[5:]
    for reject, said in zip(rejects, SAID, strict=True):
        assert said in reject['error'] and '\n' not in reject['error'], reject
    manifest = [json.loads(line) for line in (out / 'rows/manifest.jsonl').read_text().splitlines()]
    assert [line['file'] for line in manifest] == [f'{stem}.png' for stem in stems]
    assert manifest[1]['mask_sha256'] != manifest[1]['image_sha256'] and manifest[1]['seed'] == 3
    assert manifest[4]['free']['iterations'] == 6 and manifest[4]['free']['share'] == 0.3


def test_flags_do_what_a_row_does(job):
    out = job[0]
    np.testing.assert_array_equal(load(out / 'flags/0000_a-red-apple.png'), load(out / 'rows/box.png'))


def test_what_lies_outside_the_mask_is_the_photo(job, pictures):
    before, after = load(pictures / 'photo.png'), load(job[0] / 'rows/mask.png')
    np.testing.assert_array_equal(after[:, :20], before[:, :20])
    assert (after[:, 20:] != before[:, 20:]).mean() > 0.6


@pytest.mark.slow
def test_results_are_those_of_the_api(job, pictures, tiny_model):
    out, model, photo = job[0] / 'rows', tiny_model, pictures / 'photo.png'
    mask = pictures / 'mask.png'
    free = FreeEditConfig(iterations=6, share=0.3)
    expected = {
        'mask': model.inpaint(photo, mask, 'a red apple', seed=3, context=1.5),
        '0002_a-dog': model.outpaint(photo, 'a dog', left=8, bottom=4, guidance_scale=0.5),
        '0003_photo': model.variation(photo, strength=0.4),
        '0004_a-star': model.edit(photo, 'a star', free=free),
    }
    for stem, image in expected.items():
        # This process compiles with other options, which may round a pixel otherwise.
        assert np.abs(load(out / f'{stem}.png').astype(int) - np.asarray(image)).max() <= 1, stem


def test_strips_show_before_and_after(job, pictures):
    photo, strip = load(pictures / 'photo.png'), load(job[0] / 'rows/mask.strip.png')
    assert strip.shape == (32, 3 * 40 + 2 * 8, 3)
    np.testing.assert_array_equal(strip[:, :40], photo)
    np.testing.assert_array_equal(strip[:, 48:68], photo[:, :20])
    assert (strip[:, 68:88] == 128).all()
    np.testing.assert_array_equal(strip[:, 96:], load(job[0] / 'rows/mask.png'))
    wide = load(job[0] / 'rows/0002_a-dog.strip.png')
    assert wide.shape == (36, 2 * 48 + 8, 3) and (wide[:, :8] == 128).all()
    assert load(job[0] / 'rows/0004_a-star.strip.png').shape == (32, 3 * 40 + 2 * 8, 3)  # before, iteration 3, after


@pytest.mark.slow
def test_upscaling_from_the_shell(pictures, cascade_folder, tmp_path):
    shared = [f'--model={cascade_folder}', '--upscale', '--superres_steps=2', f'--out={tmp_path}']
    images = [f'--image={pictures / name}' for name in ('small.png', 'photo.png')]
    done, refused = run_all('edit', [[*shared, image] for image in images])
    assert done[0] == 0 and refused[0] == 2 and 'make it smaller first' in refused[2]
    assert load(tmp_path / '0000_small.png').shape == (24, 32, 3)
    assert json.loads((tmp_path / '0000_small.json').read_text())['superres']['steps'] == 2


def test_wrong_input_is_one_line_and_exit_code_2(job):
    for (args, said), (code, stdout, stderr) in job[2]:
        assert code == 2, (args, code, stderr)
        assert stderr.startswith('error: ') and stderr.count('\n') == 1, (args, stderr)
        assert said in stderr and stdout == '', (args, stderr)
    assert not (job[0] / 'none').exists()
