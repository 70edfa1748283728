"""The dataset builder, on a handful of drawings; and the names that art goes by."""

import dataclasses
import json
import pickle
import tarfile

import numpy as np
import pytest

from muse.config import DataConfig
from muse.data import art, emoji, sprites
from muse.data.pipeline import make_loader
from muse.data.raster import draw_svg, draw_webp
from muse.data.sources import open_source
from muse.data.splits import SPLITS, assign_splits
from muse.errors import InputWarning, UserError

COLOURS = ('#ff0000', '#00ff00', '#0000ff', '#ffff00')
STYLES = ('noto', 'twemoji', 'fluent flat', 'fluent')


def svg(colour: str) -> bytes:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
    return f'{head}<rect x="2" y="2" width="4" height="4" fill="{colour}"/></svg>'.encode()


def some_art(labels: int = 25, first: int = 85) -> list[art.Art]:
    return [
        art.Art(f'{s}/thing-{i}', f'thing {i}', s, ('tag', 'other'), 'objects', '1F34E', 'MIT', s, 'Me', svg(colour))
        for i in range(first, first + labels)
        for s, colour in zip(STYLES, COLOURS, strict=True)
    ]


def test_svg_is_drawn_with_transparency():
    pixels = np.asarray(draw_svg(svg('#ff0000'), 64))
    assert pixels.shape == (64, 64, 4)
    assert (pixels[17:47, 17:47] == (255, 0, 0, 255)).all() and (pixels[:15, :, 3] == 0).all()


@pytest.mark.parametrize('data', [b'<svg', b'RIFFbroken', b'', svg('none')])
def test_what_cannot_be_drawn_gives_nothing(data):
    assert draw_webp(data) == b''


def test_bundle_round_trip(tmp_path):
    pieces = some_art(3)
    webp = draw_webp(pieces[0].data)
    pieces.append(art.Art('fluent-emoji-3d/1', 'x', 'fluent 3d', (), 'o', '1', 'MIT', 'f', 'Me', webp))
    art.write_bundle(pieces, tmp_path / 'b.tar.xz')
    assert art.load_art(tmp_path / 'b.tar.xz') == pieces
    with pytest.raises(UserError, match='share-alike'):
        art.load_art(tmp_path / 'b.tar.xz', include_share_alike=True)
    (tmp_path / 'cut.tar.xz').write_bytes((tmp_path / 'b.tar.xz').read_bytes()[:100])
    with pytest.raises(UserError, match='not a whole bundle'):
        art.load_art(tmp_path / 'cut.tar.xz')


def test_altered_or_missing_tarballs_are_refused(tmp_path):
    with pytest.raises(UserError, match='npm pack'):
        art.load_art(tmp_path)
    for name in ('iconify-json-2.2.535.tgz', 'lobehub-fluent-emoji-3d-1.1.0.tgz', 'emojibase-data-17.0.0.tgz'):
        tarfile.open(tmp_path / name, 'w:gz').close()
    with pytest.raises(UserError, match='sha256'):
        art.load_art(tmp_path)


@pytest.mark.parametrize(
    'label, clean',
    [
        ('Red Apple', 'red apple'),
        ('man: red hair', 'man with red hair'),
        ('Japanese “here” button', 'japanese here button'),
        ('woman’s hat', "woman's hat"),
        ('kiss: woman, man', 'kiss woman man'),
    ],
)
def test_labels(label, clean):
    assert art.clean_label(label) == clean


def test_build_cache_and_read(tmp_path):
    pieces = some_art()
    pieces.append(art.Art('noto/bad', 'thing 85', 'noto', (), 'o', '', 'MIT', 'noto', 'Me', b'<svg'))
    bundle = tmp_path / 'b.tar.xz'
    art.write_bundle(pieces, bundle)
    builder = emoji.EmojiArt(data_dir=tmp_path / 'out', tarballs=bundle, workers=1)
    with pytest.warns(InputWarning, match='1 pictures could not be drawn and were skipped: noto/bad'):
        builder.download_and_prepare(file_format='array_record')
    expected = assign_splits((p.label, p.style) for p in pieces)
    folder = sprites.find_dataset(tmp_path / 'out')
    seen = {}
    for split in SPLITS:
        records = sprites.open_records(folder, split)
        words = [sprites.record_words(records[i]) for i in range(len(records))]
        seen |= {(word.label, word.style): split for word in words}
        assert records[0]['licence'] == b'MIT' and words[0].tags == ('tag', 'other')
        sprites.write_cache(folder, split, 32, (sprites.cache_row(r['image'], 32) for r in records), words)
    assert seen == expected
    check_sprites(tmp_path / 'out')
    check_tfds(tmp_path / 'out')


def check_sprites(out):
    cached = pickle.loads(pickle.dumps(sprites.load_sprites(str(out), 'train', 32)))
    with pytest.warns(InputWarning, match='no sprite cache of 64 px'):
        decoded = sprites.load_sprites(str(out), 'train', 64)
    assert cached.words == decoded.words
    for index in range(0, len(cached), 17):
        colour = COLOURS[STYLES.index(cached.words[index].style)]
        for picture in (cached.picture(index, 24), decoded.picture(index, 24)):
            assert picture.getpixel((12, 12)) == (*bytes.fromhex(colour[1:]), 255)
            assert picture.getpixel((1, 1))[3] == 0


def check_tfds(out):
    """The same folder through the general TFDS source."""
    data = DataConfig(kind='tfds', path=str(out), name='emoji_art', caption_key='label', image_size=16)
    batch = next(make_loader(data, batch_size=4, seed=0))
    assert all(caption.startswith('thing ') for caption in batch['caption'])
    assert (batch['img'][:, 0] == 255).all()
    assert {tuple(img[8, 8]) for img in batch['img']} <= {tuple(bytes.fromhex(c[1:])) for c in COLOURS}
    with pytest.raises(UserError, match="'label/text' leads to no text in emoji_art, .*'label': Text"):
        open_source(dataclasses.replace(data, caption_key='label/text'))
    with pytest.raises(UserError, match="did you mean 'label'"):
        next(
            make_loader(
                DataConfig(kind='tfds', path=str(out), name='emoji_art', caption_key='labels'),
                batch_size=4,
                seed=0,
            )
        )


def test_a_cache_without_its_index_is_not_used(tmp_path):
    cache = tmp_path / 'emoji_art' / 'permissive' / '1.0.0' / 'sprites_32'
    cache.mkdir(parents=True)
    (cache.parent / 'dataset_info.json').write_text(json.dumps({}))
    words = [sprites.Words('k', 'l', 's', (), 'g')] * 2
    with pytest.raises(ValueError):  # one picture is missing
        sprites.write_cache(cache.parent, 'train', 32, [np.zeros((32, 32, 4), np.uint8)], words)
    assert not (cache / 'train.jsonl').exists()
