"The project keeps its own promises: one version, documented commands, no stray output"
import ast, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
import fastsparse_create

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT/'fastsparse_create').rglob('*.py'))

def settings():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    return cfg['DEFAULT']

def test_version_has_one_value(): assert settings()['version']==fastsparse_create.__version__

def test_torch_has_no_upper_bound():
    requirements = re.findall(r'(torch\S*)', settings()['requirements'])
    assert requirements and not any('<' in r or '==' in r for r in requirements)

def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install -e '.[dev]' && bash scripts/test.sh"
    assert command in (ROOT/'README.md').read_text() and command in (ROOT/'.ci'/'run').read_text().splitlines()

@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_does_not_print(path):
    if path.name=='cli.py': return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and getattr(n.func, 'id', '')=='print']
    assert not calls

def test_imports_leave_global_random_state_and_backends_alone():
    code = '''
import random, numpy as np, torch, fastai.vision.all
def state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
def flags(): return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.get_default_dtype(), torch.get_num_threads()
before = state(), flags()
import fastsparse_create.all
assert before==(state(), flags())
'''
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)
