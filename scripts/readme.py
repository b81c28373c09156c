"""Render nbs/index.ipynb, with its saved outputs, to README.md. `--check`: only say whether README.md is up to date."""
import json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def _text(source): return source if isinstance(source, str) else ''.join(source)

def _output(out):
    "Markdown of one output of a cell"
    data = out.get('data', {})
    if 'text/markdown' in data: return _text(data['text/markdown']).rstrip()
    text = _text(data.get('text/plain', out.get('text', ''))).rstrip()
    return '\n'.join('    '+line if line else '' for line in text.splitlines())

def _cell(cell):
    source = _text(cell['source']).strip()
    if cell['cell_type']=='markdown': return source
    directives = [l.strip() for l in source.splitlines() if l.startswith('#|')]
    if any(d in ('#| hide', '#|hide') for d in directives): return ''
    code = '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip()
    shown = [] if '#| echo: false' in directives else [f'```python\n{code}\n```']
    return '\n\n'.join([*shown, *filter(None, map(_output, cell['outputs']))])

def render(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '<!-- Rendered from nbs/index.ipynb by scripts/readme.py: edit there. -->\n\n' + '\n\n'.join(filter(None, map(_cell, cells))) + '\n'

if __name__=='__main__':
    text,readme = render(ROOT/'nbs'/'index.ipynb'),ROOT/'README.md'
    if '--check' not in sys.argv: readme.write_text(text, encoding='utf-8')
    elif not readme.exists() or readme.read_text(encoding='utf-8')!=text: sys.exit('README.md is not what nbs/index.ipynb renders to: run python scripts/readme.py')
