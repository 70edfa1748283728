"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard, PNG grids, a bar or plain lines; wandb."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from muse.errors import UserError


def tile(img_BHWC: np.ndarray, gap: int = 2) -> Image.Image:
    """Pictures side by side on a near-square sheet with white gaps."""
    count, height, width, _ = img_BHWC.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = Image.new('RGB', (columns * (width + gap) - gap, rows * (height + gap) - gap), 'white')
    for i, img_HWC in enumerate(img_BHWC):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(Image.fromarray(img_HWC), place)
    return sheet


def _has_width() -> bool:
    """Whether stderr is a terminal with room for a bar; some (containers, recorders) are of 0 columns."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False


def cut_after(path: Path, step: int) -> None:
    """Drops the lines of a JSONL file that come after `step`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            if json.loads(line)['step'] <= step:
                kept.append(line + '\n')
        except (ValueError, KeyError):
            continue
    tmp = path.with_name(f'.{path.name}.tmp')
    tmp.write_text(''.join(kept), encoding='utf-8')
    os.replace(tmp, path)


def check_wandb(project: str) -> None:
    """Raises UserError when Weights & Biases is asked for and not installed."""
    if project and find_spec('wandb') is None:
        raise UserError(
            f"train.wandb is '{project}', but wandb is not installed: pip install wandb, or set train.wandb=''"
        )


def _open_wandb(project: str, workdir: Path) -> Any:
    """The wandb run of a workdir: the same one after a restart. WANDB_MODE=offline keeps it on the machine."""
    import wandb  # pyright: ignore[reportMissingImports]

    name = workdir / 'wandb_id'
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12], encoding='utf-8')
    config = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
    try:
        run = wandb.init(
            project=project, id=name.read_text(), name=workdir.name, dir=workdir, config=config, resume='allow'
        )
    except wandb.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"wandb cannot be used ({reason}): log in, set WANDB_MODE=offline or train.wandb=''") from None
    # A resumed run writes some steps again, which wandb's own counter would refuse.
    run.define_metric('step')
    run.define_metric('*', step_metric='step')
    return run


class Writer:
    """Writes the numbers of one run; does nothing on hosts other than the first.

    Args:
        workdir: gets metrics.jsonl, log.txt, grids/ and tensorboard/.
        start_step: steps done before; lines beyond it are dropped, so that steps stay unique.
        steps: length of the run, for the ETA.
        batch_size: global, for pictures a second.
        active: True on the first host.
        wandb: project to log to as well; '': none.
    """

    def __init__(self, workdir: Path, *, start_step: int, steps: int, batch_size: int, active: bool, wandb: str = ''):
        self.active, self._batch_size, self._workdir, self._steps = active, batch_size, workdir, steps
        if not active:
            return
        cut_after(workdir / 'metrics.jsonl', start_step)
        self._jsonl = open(workdir / 'metrics.jsonl', 'a', encoding='utf-8', buffering=1)  # noqa: SIM115
        self._log = open(workdir / 'log.txt', 'a', encoding='utf-8', buffering=1)  # noqa: SIM115
        purge = start_step + 1 if start_step else None
        # A queue without end: where the disk is full its thread dies, and a full queue would wait for it for ever.
        self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=purge, max_queue=0)
        self._wandb = _open_wandb(wandb, workdir) if wandb else None
        self._bar = tqdm(
            total=steps,
            initial=start_step,
            unit='step',
            disable=not _has_width(),
            dynamic_ncols=True,
            bar_format='{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]',
        )

    def advance(self) -> None:
        """One more step is done."""
        if self.active:
            self._bar.update(1)

    def line(self, text: str) -> None:
        """One plain line for the person watching and for log.txt."""
        if not self.active:
            return
        print(text, file=self._log)
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl. `values` hold 'loss'; 'images_per_s' and 'eta_s' are for people."""
        if not self.active:
            return
        print(json.dumps({'step': step, **values}), file=self._jsonl)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({'step': step, **values})
        speed = values.get('images_per_s')
        self._bar.set_postfix_str(f'loss {values["loss"]:.4f}' + (f', {speed:.1f} images/s' if speed else ''))
        # Those by mask ratio (muse.train.masked) are for curves: with them a line would be three times as long.
        shown = ' '.join(f'{name}={value:.4g}' for name, value in values.items() if '_mask_' not in name)
        print(f'step {step}/{self._steps} {shown}', file=self._log)
        if self._bar.disable:
            eta = f' eta={(self._steps - step) * self._batch_size / speed:.0f}s' if speed else ''
            print(f'step {step}/{self._steps} {shown}{eta}', flush=True)
        elif evaluated := ' '.join(word for word in shown.split() if word.startswith('eval_')):
            self._bar.write(
                f'step {step}/{self._steps} {evaluated}', file=sys.stderr
            )  # a bar shows the last line alone

    def pictures(self, step: int, img_BHWC: np.ndarray) -> None:
        """A sheet of pictures as grids/<step>.png and in TensorBoard."""
        if not self.active:
            return
        sheet = tile(img_BHWC)
        folder = self._workdir / 'grids'
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f'{step:08d}.png')
        self._board.add_image('grid', np.asarray(sheet).transpose(2, 0, 1), step)
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({'step': step, 'grid': wandb.Image(sheet)})

    def close(self) -> None:
        """Flushes and closes all."""
        if self.active:
            self._bar.close()
            self._board.close()
            self._jsonl.close()
            self._log.close()
            if self._wandb is not None:
                self._wandb.finish()
