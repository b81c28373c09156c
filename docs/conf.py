"How Sphinx shows the pages that scripts/docs.py writes"
import ast
from configparser import ConfigParser
from pathlib import Path
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from nbdev.doclinks import patch_name
from sphinx.pycode import ModuleAnalyzer

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent.parent/'settings.ini')
project,author,copyright,release = (cfg['DEFAULT'][k] for k in ('lib_name','author','copyright','version'))

extensions = ['myst_nb', 'sphinx.ext.viewcode']
add_module_names = toc_object_entries = False
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 4
viewcode_follow_imported_members,viewcode_line_numbers = False,True

html_theme = 'furo'
html_title = project
html_static_path = ['static']
html_css_files = ['site.css']
html_copy_source = html_show_sphinx = False
html_math_renderer = 'mathml'

def _mathml(display):
    def visit(self, node):
        self.body.append(convert(node.astext().replace(r'\\', r'\\ '), display=display)) # it reads `\\0` as a command
        raise SkipNode
    return visit,None

def _source(app, module):
    "Code of `module` and the lines of what it defines, in other classes as well"
    analyzer = ModuleAnalyzer.for_module(module)
    tags = analyzer.find_tags()
    functions = [n for n in ast.parse(analyzer.code).body if isinstance(n, ast.FunctionDef)]
    return analyzer.code,tags | {patch_name(n):tags[n.name] for n in functions if isinstance(patch_name(n), str)}

def setup(app):
    app.add_html_math_renderer('mathml', _mathml('inline'), _mathml('block'))
    app.connect('viewcode-find-source', _source)
