"""The documentation names only what exists: paths, links, make targets, flags and config keys of every command."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from test_configs import config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
PATH = re.compile(r'(?<![\w./-])((?:muse|tools|configs|tests|docs)/[\w./*-]*[\w/*]|(?:train|sample|edit)\.py)')
COMMANDS = re.compile(r'^\s*(?:\.venv/bin/)?python (?:-m pytest [^\n]*|((?:tools/)?\w+\.py)(.*))$', re.MULTILINE)
SHARED_FLAGS = {'help', 'helpfull'}


def text(path: Path) -> str:
    """A file with the lines joined that end in a backslash."""
    return re.sub(r' *\\+\n *', ' ', path.read_text(encoding='utf-8'))


def commands() -> list[tuple[str, str, list[str]]]:
    """(document, script, arguments) of each python command in a document or at the top of a script or config."""
    sources = {str(path.relative_to(ROOT)): text(path) for path in DOCUMENTS}
    for path in [*ROOT.glob('tools/*.py'), *ROOT.glob('configs/**/*.py')]:
        sources[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(text(path))) or ''
    found = []
    for name, words in sources.items():
        for script, arguments in COMMANDS.findall(words):
            if script:
                line = re.sub(r'[\[\]]|  +#.*|  +[A-Za-z][^-]*$', ' ', arguments)
                found.append((name, script, shlex.split(line.split('   ')[0], comments=True)))
    return found


def defined_flags(script: str) -> set[str]:
    """The flags that a script defines, read from its source."""
    names, source = set(), (ROOT / script).read_text()
    if 'define_knobs()' in source:  # shared by sample.py and edit.py
        source += (ROOT / 'muse/jobs/command_line.py').read_text().split('from __future__ import annotations')[1]
    for node in ast.walk(ast.parse(source)):
        call = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ''
        if isinstance(node, ast.Call) and (call.startswith('DEFINE_') or call == 'add_argument'):
            names.add(ast.literal_eval(node.args[0]).removeprefix('--'))
    return names


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_named_paths_exist(document):
    missing = [name for name in sorted(set(PATH.findall(text(document)))) if not list(ROOT.glob(name.rstrip('/')))]
    assert not missing


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r'\]\((?!https?://)([^)#]+)', text(document))
    assert not [target for target in targets if not (document.parent / target).exists()]


def test_flags_of_commands_exist():
    found = commands()
    assert len(found) > 20 and {'train.py', 'sample.py', 'tools/precompute.py'} <= {script for _, script, _ in found}
    wrong = []
    for document, script, arguments in found:
        known = defined_flags(script) | SHARED_FLAGS
        if script == 'tools/bench.py':  # each bench defines its own
            known |= defined_flags(f'tools/bench_{arguments[0]}.py')
        names = [argument[2:].split('=')[0] for argument in arguments if argument.startswith('--')]
        wrong += [f'{document}: {script} --{name}' for name in names if name.split('.')[0] not in known]
    assert not wrong


def test_config_keys_of_commands_exist():
    wrong, checked = [], 0
    for document, _, arguments in commands():
        file = next((argument.split('=')[1] for argument in arguments if argument.startswith('--config=')), '')
        for argument in arguments:
            if argument.startswith('--config.') and file.startswith('configs/'):
                keys, value = argument.removeprefix('--config.').split('=')[0].split('.'), config(file[8:-3])
                for key in keys:
                    value = value.get(key, None) if isinstance(value, ConfigDict) else None
                checked += 1
                wrong += [f'{document}: {argument}'] if value is None else []
    assert checked > 5 and not wrong


def test_python_examples_compile_and_name_what_exists():
    blocks = re.findall(r'```python\n(.*?)```', text(ROOT / 'README.md'), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, 'README.md', 'exec')
    from muse.pipeline import Muse

    methods = set(re.findall(r'(?:model|muse\.load\(\))\.(\w+)\(', ''.join(blocks)))
    assert methods and all(hasattr(Muse, name) for name in methods)


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
    named = {name for document in DOCUMENTS for name in re.findall(r'(?:^ *|`)make ([a-z-]+)', text(document), re.M)}
    assert {'demo', 'test'} <= named
    assert not [name for name in named if not re.search(rf'^{name}:', makefile, re.M)]


def test_help_of_the_scripts_works():
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    shared = ['--out', '--seed', '--order', '--[no]overwrite', '--superres_steps']  # of muse/jobs/command_line.py
    said = {
        'sample.py': ['--batch_size', *shared],
        'edit.py': ['--mask', *shared],
        'tools/precompute.py': ['--batch_size'],
    }
    for script, names in said.items():
        done = subprocess.run(
            [sys.executable, script, '--help'], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert all(f'\n  {name}: ' in done.stdout for name in names), done.stdout + done.stderr
