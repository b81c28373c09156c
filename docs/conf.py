"How Sphinx shows the pages that scripts/docs.py writes"
from configparser import ConfigParser
from pathlib import Path
from latex2mathml.converter import convert

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent.parent/'settings.ini')
project,author,release = (cfg['DEFAULT'][k] for k in ('lib_name','author','version'))

extensions = ['myst_nb', 'sphinx.ext.viewcode']
exclude_patterns = []
add_module_names = False
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
myst_enable_extensions = ['colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 4
viewcode_line_numbers = True

html_theme = 'furo'
html_title = project
html_static_path = ['static']
html_css_files = ['site.css']
html_copy_source = html_show_sphinx = False
html_math_renderer = 'mathml'

def _inline(self, node):
    self.body.append(convert(node.astext()))
    raise __import__('docutils').nodes.SkipNode

def setup(app): app.add_html_math_renderer('mathml', (_inline, None), (_inline, None))
toc_object_entries = False
