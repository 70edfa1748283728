"""Ten thousand prompts run at constant memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMPTS, EVERY = 10_000, 1_000

# Samples this process's memory as pictures are finished.
DRIVER = """
import json, sys
import muse
from muse.text.encode import PromptCache
from muse.jobs import sampling
from muse.jobs.sampling import Knobs, SampleJob, read_prompts, sample

model = muse.load(sys.argv[1])
model.cascade._prompts = PromptCache(2**20)  # else it fills up to its 256 MB first, which these small states never do
page, sampled, packed = 4096, [], 0
original = sampling.picture_files

def counted(*args):
    global packed
    packed += 1
    if packed % int(sys.argv[4]) == 0:
        sampled.append(int(open('/proc/self/statm').read().split()[1]) * page / 2**20)
    return original(*args)

sampling.picture_files = counted
knobs = Knobs(decoding=model.release.decode, superres=None, seed=0, negative_prompt=None, size=None)
job = SampleJob(out=sys.argv[3], rows_file=sys.argv[2], form='webdataset', shard_size=500)
sample(model, job, knobs, read_prompts([], sys.argv[2]))
print(json.dumps(sampled))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
def test_memory_stays_where_it_was_after_the_first_thousand(release_folder, tmp_path):
    prompts = tmp_path / 'prompts.txt'
    prompts.write_text('\n'.join(f'{n} red dogs and {n % 97} cats' for n in range(PROMPTS)))
    command = [sys.executable, '-W', 'ignore', '-c', DRIVER, str(release_folder), str(prompts), str(tmp_path / 'out')]
    done = subprocess.run([*command, str(EVERY)], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    megabytes = json.loads(done.stdout)
    print('MB after each thousand:', megabytes)
    assert len(megabytes) == PROMPTS // EVERY
    assert max(megabytes) - megabytes[0] < 25, megabytes
    assert len((tmp_path / 'out/manifest.jsonl').read_text().splitlines()) == PROMPTS
