"The site of the documentation: all is in it, and no link leads nowhere"
import json, re, subprocess, sys
from pathlib import Path
from urllib.parse import unquote,urldefrag
import pytest
import fastsparse_create.all as everything

pytest.importorskip('furo')
ROOT = Path(__file__).resolve().parent.parent

def build(*args): return subprocess.run([sys.executable, '-W', 'ignore', str(ROOT/'scripts'/'docs.py'), *args], cwd=ROOT, capture_output=True, text=True)

def broken_links(site):
    "Links of `site` to files that it doesn't have, or to places that these don't have"
    pages = {p:p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    anchors = {p:set(re.findall(r'\bid="([^"]+)"', text)) for p,text in pages.items()}
    for page,text in pages.items():
        for link in set(re.findall(r'\b(?:href|src)="([^"]*)"', text)):
            if re.match(r'[a-z]+:', link): continue
            file,anchor = (unquote(part) for part in urldefrag(link))
            target = (page.parent/file.partition('?')[0]).resolve() if file else page
            if not target.is_file() or (anchor and anchor not in anchors.get(target, {anchor})): yield f'{page.relative_to(site)}: {link}'

@pytest.mark.slow
def test_site_has_every_public_name_and_no_broken_link():
    done = build()
    assert done.returncode==0, done.stderr
    site = ROOT/'_site'
    anchors = {i for p in site.glob('*.html') for i in re.findall(r'id="(fastsparse_create\.[\w.]+)"', p.read_text(encoding='utf-8'))}
    modules = [m for n,m in sys.modules.items() if n.startswith('fastsparse_create.') and hasattr(m, '__all__')]
    for name in (n for n in vars(everything) if n[0]!='_'): assert any(f'{m.__name__}.{name}' in anchors for m in modules if name in m.__all__), name
    assert 'sparsify_model' in (site/'searchindex.js').read_text(encoding='utf-8')
    assert list(broken_links(site))==[]

def test_a_broken_link_is_an_error(tmp_path):
    for folder in ('nbs','tests'): (tmp_path/folder).mkdir()
    (tmp_path/'tests'/'test_it.py').write_text('def test_it(): assert True')
    def links(*targets):
        text = '# It\n\n## Part\n\n' + ' '.join(f'[this]({t})' for t in targets)
        page = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[dict(cell_type='markdown', id='a', metadata={}, source=text)])
        (tmp_path/'nbs'/'index.ipynb').write_text(json.dumps(page))
        return build('--root', str(tmp_path))
    assert not (done := links('#part', 'index.html#part', '../tests/test_it.py', '../tests/test_it.py#test_it')).returncode, done.stderr
    broken = links('nowhere.html', '#nothing', 'index.html#nothing', '../nbs/nothing.ipynb', '../tests/test_it.py#test_nothing')
    assert broken.returncode and broken.stderr.count('xref_missing')==5, broken.stderr
