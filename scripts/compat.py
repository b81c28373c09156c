"""The tests with the oldest versions that settings.ini allows, and with the newest that can be had, each in a fresh environment; `newest_tested` there says which the latter were.

    python scripts/compat.py oldest newest                        # a part of the tests that touches all of the library
    python scripts/compat.py oldest -- tests/test_manager.py -x   # or others, as pytest takes them
"""
import argparse, re, subprocess, sys, tempfile, venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f'tests/test_{n}.py' for n in ('masks','nm','modifiers','invariant','manager','recipe_parse','sparse_layers')]

def requirements(oldest):
    "What settings.ini asks for; `oldest`: at its lower bounds"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    names = cfg['DEFAULT']['requirements'].split()
    return [re.sub('>=', '==', n) for n in names] if oldest else names

def run(which, args):
    "Are the tests fine with these versions?"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder)/('Scripts' if sys.platform=='win32' else 'bin')/'python'
        subprocess.run([python, '-m', 'pip', 'install', '-q', *requirements(which=='oldest'), 'pytest', 'pytest-xdist', 'hypothesis', 'timm'], check=True)
        subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', '-e', ROOT], check=True)
        subprocess.run([python, '-m', 'pip', 'list'], check=True)
        return subprocess.run([python, '-m', 'pytest', '-q', '-n', '2', *args], cwd=ROOT).returncode==0

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('which', nargs='+', choices=['oldest','newest'])
    own = sys.argv[1:sys.argv.index('--')] if '--' in sys.argv else sys.argv[1:]
    args = sys.argv[sys.argv.index('--')+1:] if '--' in sys.argv else TESTS
    failed = [w for w in p.parse_args(own).which if not run(w, args)]
    if failed: sys.exit(f"fails with the {' and the '.join(failed)} versions")
