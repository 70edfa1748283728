"""TFDS builder of the emoji art: one picture of one subject in one style, with its words and its licence.

`tools/make_emoji.py` runs it. It needs no TensorFlow: features are given already encoded and records go to ArrayRecord.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from muse.data import splits
from muse.data.art import Art, load_art, warn_skipped
from muse.data.raster import default_workers, draw_webp, parallel_map

PERMISSIVE, WITH_SHARE_ALIKE = 'permissive', 'with_share_alike'
TEXT_FEATURES = ('key', 'label', 'style', 'tags', 'group', 'codepoint', 'licence', 'author', 'set_name')


class EmojiArt(tfds.core.GeneratorBasedBuilder):
    """Emoji in eight styles (ten with the share-alike sets), 512 px, RGBA."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS reads this class attribute
        tfds.core.BuilderConfig(name=PERMISSIVE, description='Apache-2.0, MIT and CC-BY-4.0 sets'),
        tfds.core.BuilderConfig(name=WITH_SHARE_ALIKE, description='also the CC-BY-SA-4.0 sets'),
    ]

    def __init__(
        self,
        *,
        data_dir: str | Path,
        config: str = PERMISSIVE,
        tarballs: Path | None = None,
        workers: int | None = None,
        version: str | None = None,
    ):
        """Args:
        data_dir: folder that receives emoji_art/<config>/<version>/.
        config: 'permissive' or 'with_share_alike'.
        tarballs: folder of npm tarballs, or a bundle; None brings them with npm into <data_dir>/npm.
        workers: processes that draw; None is one for each core.
        version: TFDS's own; only '1.0.0' exists.
        """
        self._tarballs = tarballs
        self._workers = workers or default_workers()
        super().__init__(data_dir=str(data_dir), config=config, version=version)
        self._npm_cache = Path(data_dir) / 'npm'

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {name: tfds.features.Text() for name in TEXT_FEATURES}
        features['image'] = tfds.features.Image(shape=(None, None, 4), encoding_format='png')
        return self.dataset_info_from_configs(
            description=self.__doc__, features=tfds.features.FeaturesDict(features), supervised_keys=None
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # the tarballs come by npm, whose registry it does not know
        share_alike = self.builder_config is not None and self.builder_config.name == WITH_SHARE_ALIKE
        art = load_art(self._tarballs, include_share_alike=share_alike, cache=self._npm_cache)
        split_by_pair = splits.assign_splits((a.label, a.style) for a in art)
        art_by_split = {s: [a for a in art if split_by_pair[a.label, a.style] == s] for s in splits.SPLITS}
        return {split: self._generate_examples(split, chosen) for split, chosen in art_by_split.items() if chosen}

    def _generate_examples(self, split: str, art: list[Art]) -> Iterator[tuple[str, dict[str, Any]]]:
        drawn = parallel_map(
            draw_webp, (a.data for a in art), total=len(art), workers=self._workers, what=f'drawing {split}'
        )
        skipped = []
        for piece, image in zip(art, drawn, strict=True):
            if image:
                yield piece.key, example(piece, image)
            else:
                skipped.append(piece.key)
        warn_skipped(skipped)


def example(piece: Art, image: bytes) -> dict[str, Any]:
    """The features of one record: the picture's file and its words (tags joined by commas)."""
    words = {name: getattr(piece, name) for name in TEXT_FEATURES if name != 'tags'}
    return {'image': image, 'tags': ','.join(piece.tags), **words}
