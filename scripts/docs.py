"""Build the documentation, a site of static pages in `_site`, from the notebooks: python scripts/docs.py

Notebooks show the outputs that they were saved with. `--run` runs copies of them before, all or those that are named, and shows what comes out.
"""
import argparse, ast, json, re, shutil, sys, tempfile
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from posixpath import dirname, join, normpath
from fastcore.docments import DocmentTbl, DocmentText, docstring, empty
from fastcore.parallel import parallel
from nbdev.doclinks import NbdevLookup, nbglob, nbpath2html, patch_name
from nbdev.test import test_nb
from sphinx.cmd.build import main as sphinx
from save_outputs import tidy

ROOT = Path(__file__).resolve().parent.parent

# Parts of the site: title, what it is about, and pages in their order; a page is in the first part that it fits
PARTS = [
    ('Tutorials', 'From a first sparse network to one that is smaller and faster.',
     'tutorials/fixed_sparsity tutorials/recipe tutorials/any_loop tutorials/dynamic_sparse_training tutorials/*'),
    ('Masks', 'Which weights of a model are zero, and what keeps them so.', 'sparsify masks.* selection distribution criteria masking effective'),
    ('Training', 'Callbacks that say when: the modifiers of recipes, which go with any `fit`.', 'schedule callback.core callback.pruning callback.*'),
    ('Recipes', 'Text that says what happens when.', 'recipe.compile recipe.generate recipe.*'),
    ('Any PyTorch loop', 'The same callbacks, for a loop that somebody else wrote.', 'create.api create.*'),
    ('N:M patterns', 'Two of every four weights, as hardware wants them.', 'asp permutation.apply permutation.* export.semi_structured'),
    ('Quantization', 'Integers in place of floats.', 'quantization.convert quantization.*'),
    ('Channels', 'Channels that leave a model for good.', 'thinning channels attention compact'),
    ('Without training', 'A trained network is pruned by a few hundred inputs.', 'one_shot least_squares fisher forward_cache'),
    ('Looking at models', 'Tables, pictures and times.', 'report plots mask_plots flops benchmark'),
    ('Files and runtimes', 'What a model is on disk, and what runs it.', 'export.onnx export.checkpoint export.* sparse.* files'),
    ('Command line', '`fastsparse.run`, its tasks and their data.', 'cli experiment.training_aware experiment.one_shot experiment.sparse_transfer experiment.*'),
    ('Several processes', 'One model that they train together.', 'distributed'),
    ('Project', 'What it promises, how it changes, and how to take part.', 'docs/promises docs/* CHANGELOG CONTRIBUTING')]

def _text(source): return source if isinstance(source, str) else ''.join(source)

def _fenced(info, body, mark='`'):
    "`body` in a fence that is longer than those in it"
    fence = mark*max([3, *(len(m)+1 for m in re.findall(f'^{mark}{{3,}}', body, re.M))])
    return f'{fence}{info}\n{body}\n{fence}'

# What a module exports

def _public(node, module):
    "Names that the statement `node` of `module` makes public"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names = patch_name(node)
    else: names = [n.id for t in getattr(node, 'targets', []) for n in ast.walk(t) if isinstance(n, ast.Name)]
    return [n for n in ([names] if isinstance(names, str) else names) if n in module.__all__ or re.search(r'\.[^_]', n)]

def _attr(o, name):
    for n in name.split('.'): o = getattr(o, n)
    return o

def _methods(cls):
    "Names of the documented methods and properties that `cls` itself has"
    for name,o in vars(cls).items():
        f = getattr(o, 'fget', None) or getattr(o, '__func__', o)
        if name[0]!='_' and f.__doc__ and hasattr(f, '__code__') and f.__module__==cls.__module__: yield name

def _code(o): return f"`{getattr(o, '__name__', None) or repr(o)}`"
def _type(anno): return getattr(anno, '__name__', None) or str(anno).replace('typing.', '').strip("'")

def _signature(o):
    sig = DocmentText(o)
    returns = sig.dm.get('return', {}).get('anno', empty)
    for p in sig.dm.values(): p['anno'] = empty
    return f"({', '.join(p for p,_ in sig.params)})" + ('' if isinstance(o, type) or returns is empty else f' -> {_type(returns)}')

def _table(o):
    "Arguments of `o` and what it returns, as a table"
    table = DocmentTbl(o)
    for p in table.dm.values():
        p['anno'] = empty if p['anno'] in (empty,type(None)) else f"`{_type(p['anno'])}`"
        if p.get('default', empty) is not empty: p['default'] = _code(p['default'])
    return str(table)

def _described(kind, name, o, *more):
    "Signature, docstring and arguments of `o`, and what is below it"
    if isinstance(o, property): o,signature = o.fget,''
    else: signature = _signature(o)
    return _fenced(f'{{py:{kind}}} {name}{signature}', '\n\n'.join(filter(None, [docstring(o), _table(o), *more])), ':')

def documented(source, module):
    "Markdown of each public thing that an exported cell defines, by its name"
    for node in ast.parse(source).body:
        names = _public(node, module)
        for name in names:
            o = _attr(module, name)
            if isinstance(node, ast.Assign): yield name,_fenced(f'{{py:data}} {name}', _fenced('python', ast.get_source_segment(source, node)) if name==names[-1] else '', ':')
            elif isinstance(node, ast.ClassDef):
                methods = [_described('property' if isinstance(vars(o)[m], property) else 'method', f'{name}.{m}', getattr(o, m)) for m in _methods(o)]
                yield name,_described('class', name, o, *methods)
            else: yield name,_described('method' if '.' in name else 'function', name, o)

# Pages

def _directives(source): return re.findall(r'^#\| *(.+)', source, re.M)

def _retext(cell, source):
    "Make `cell` one of text"
    for k in ('outputs','execution_count'): cell.pop(k)
    cell.update(cell_type='markdown', source=source)

class Site:
    "The pages of notebooks, Markdown and the files that they link to, as Sphinx reads them"
    def __init__(self, root, copies={}):
        self.root,self.lookup,self.anchors,self.linked = root,NbdevLookup(strip_libs='fastai'),{},set()
        self.lookup.syms = {k:v for k,v in self.lookup.syms.items() if k[0].isupper()}
        paths = sorted([*nbglob(root/'nbs', as_path=True), *root.glob('docs/*.md'), *root.glob('C*.md')])
        self.names = {p:self._name(p.relative_to(root)) for p in paths}
        self.texts = {p:copies.get(p, p).read_text(encoding='utf-8') for p in paths}
        self.notebooks = {p:json.loads(text) for p,text in self.texts.items() if p.suffix=='.ipynb'}
        for p,nb in self.notebooks.items(): self._describe(nb, self.names[p])

    def _name(self, path): return (nbpath2html(path.relative_to('nbs')) if path.suffix=='.ipynb' else path).with_suffix('').as_posix()

    def _describe(self, nb, page):
        "Put Markdown in the place of exported cells"
        for cell in nb['cells']:
            source = cell['source'] = _text(cell['source'])
            directive,_,value = (_directives(source) or [''])[0].partition(' ') if cell['cell_type']=='code' else ('',)*3
            if directive=='default_exp':
                module = import_module(f'fastsparse_create.{value}')
                _retext(cell, _fenced(f'{{py:module}} {module.__name__}', '', ':'))
            elif directive=='export':
                found = dict(documented(source, module))
                self.lookup.syms.update({n:f'#{module.__name__}.{n}' for n in found})
                self.anchors.update({f'{page}#{n.lower()}':f'#{module.__name__}.{n}' for n in found})
                _retext(cell, '\n\n'.join(found.values()))

    def _target(self, path, target):
        "What `target`, as the file `path` has it, is in the site"
        file,_,part = target.partition('#')
        if ':' in target: return target
        if not file: return f'#{part.lower()}'
        at = next((p for p in ((folder/file).resolve() for folder in (path.parent,self.root)) if p.is_file() and self.root in p.parents), None)
        page = self.names.get(at) or normpath(join(dirname(self.names[path]), file.removesuffix('.html')))
        source = next((p for p,n in self.names.items() if n==page), None)
        if source: return self.anchors.get(f'{page}#{part}', f'/{page}{source.suffix}' + (f'#{part.lower()}' if part else ''))
        if not at: return target
        self.linked.add(at)
        name = at.relative_to(self.root).as_posix()
        return f'#{name}::{part}' if part else f'/files/{name}.md'

    def markdown(self, path, text):
        "`text` of the file `path`, its links those of the site, with more to what stands in backticks, and from the names of tests to their lines"
        text = re.sub(r'\[(test_\w+)\]\(([^)#\s]+\.py)\)', r'[\1](\2#\1)', text)
        text = re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({self._target(path, m[1])})', text)
        text = self.lookup.linkify(text) or ''
        text = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\]', r'[\1]', text)
        return re.sub(r'(?m)^#+ .*', lambda m: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', m[0]), text)

    def _cells(self, path, nb):
        for cell in nb['cells']:
            if cell['cell_type']=='markdown': cell['source'] = self.markdown(path, cell['source'])
            else:
                directives = _directives(cell['source'])
                if any(d in ('hide','exporti') for d in directives): continue
                if 'output: false' in directives: cell['outputs'] = []
                if 'echo: false' in directives: cell['metadata'] = dict(tags=['remove-input'])
                cell['source'] = re.sub(r'^#\|.*\n', '', cell['source'], flags=re.M)
            if cell['source'].strip(): yield cell

    def _headline(self, path):
        "Title and subtitle"
        text = self.notebooks[path]['cells'][0]['source'] if path in self.notebooks else self.texts[path]
        title,subtitle = re.match(r'(?:<!--.*-->\s*)?# *(.+)(?:\s+> (.+))?', text).groups()
        return title.removeprefix('Tutorial: '),subtitle or ''

    def _parts(self):
        "A page for each part, with what is in it"
        left = {n:p for p,n in self.names.items() if n!='index'}
        for title,about,patterns in PARTS:
            pages = [n for pattern in patterns.split() for n in left if fnmatch(n, pattern)]
            pages = {n:left.pop(n) for n in dict.fromkeys(pages)}
            if not pages: continue
            name = 'parts/'+re.sub(r'\W+', '_', title.lower())
            titles = {n:self._headline(p) for n,p in pages.items()}
            rows = [f'[{t}](/{n}{pages[n].suffix})\n: {self.lookup.linkify(sub)}' for n,(t,sub) in titles.items()]
            tree = [f'{t[0].upper()+t[1:]} </{n}>'.replace('`', '') for n,(t,_) in titles.items()]
            yield name,f'# {title}\n\n{about}\n\n'+'\n\n'.join(rows)+'\n\n'+_toctree(tree)

    def write(self, folder):
        pages = dict(self._parts())
        for path,nb in self.notebooks.items():
            cells = list(self._cells(path, nb))
            if self.names[path]=='index': cells.append(dict(cell_type='markdown', id='pages', metadata={}, source=_toctree(pages)))
            nb.update(cells=cells, metadata=dict(language_info=dict(name='python', pygments_lexer='ipython3')))
            _write(folder/f'{self.names[path]}.ipynb', json.dumps(nb))
        for path in self.texts.keys()-self.notebooks.keys(): pages[self.names[path]] = self.markdown(path, self.texts[path])
        for path in self.linked: pages[f'files/{path.relative_to(self.root).as_posix()}'] = _file_page(path, path.relative_to(self.root).as_posix())
        for name,text in pages.items(): _write(folder/f'{name}.md', text)

def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def _toctree(entries): return _fenced('{toctree}\n:hidden:\n', '\n'.join(entries))

def _file_page(path, name):
    "A file as it is, with an anchor for each function of it"
    text = path.read_text(encoding='utf-8')
    nodes = [n for n in ast.parse(text).body if getattr(n, 'name', '').startswith('test_')] if path.suffix=='.py' else []
    lines,starts = text.splitlines(),{min([n.lineno, *(d.lineno for d in n.decorator_list)])-1:n.name for n in nodes}
    bounds = sorted({0, *starts, len(lines)})
    blocks = [(f'({name}::{starts[a]})=\n' if a in starts else '') + _fenced('{code-block} '+('python' if nodes else 'text')+f'\n:lineno-start: {a+1}\n', '\n'.join(lines[a:b])) for a,b in zip(bounds, bounds[1:])]
    return f'---\norphan: true\nnosearch: true\n---\n# {name}\n\n'+'\n\n'.join(blocks)

def run(root, names, folder):
    "Copies of notebooks, with outputs: path of the original -> path of the copy"
    shutil.copytree(root, folder, ignore=lambda at,found: [f for f in found if f[0]=='.' or f in ('_site','_docs','build')])
    paths = [p for p in nbglob(root/'nbs', as_path=True) if not names or p.stem in names or p.name in names]
    copies = {p:folder/p.relative_to(root) for p in paths}
    ran = parallel(test_nb, list(copies.values()), skip_flags=['slow'], basepath=root, save=True)
    failed = [p.name for p,(ok,_) in zip(paths, ran) if not ok]
    if failed: sys.exit(f"notebooks that fail: {', '.join(failed)}")
    for copy in copies.values(): tidy(copy)
    return copies

def build(root, names=None):
    "Make `_site` in `root`, anew; ends with the number of Sphinx's errors, a broken link being one"
    with tempfile.TemporaryDirectory() as tmp:
        pages,built,site = Path(tmp)/'pages',Path(tmp)/'site',root/'_site'
        Site(root, {} if names is None else run(root, names, Path(tmp)/'run')).write(pages)
        status = sphinx(['-q', '-W', '--keep-going', '-j', '2', '-c', str(ROOT/'docs'), '-d', f'{tmp}/doctrees', str(pages), str(built)])
        if site.exists(): shutil.rmtree(site)
        shutil.move(built, site)
    return status

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', nargs='*', metavar='NAME', help='run notebooks before: all, or those of these names')
    parser.add_argument('--root', type=Path, default=ROOT, help='folder that has `nbs`')
    args = parser.parse_args()
    sys.exit(build(args.root.resolve(), args.run))
