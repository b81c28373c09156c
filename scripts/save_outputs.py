"Run notebooks and save their outputs, without the trail that progress bars leave: python scripts/save_outputs.py nbs/index.ipynb ..."
import json, re, sys, warnings
from pathlib import Path
from nbdev.test import test_nb

def _shown(text):
    "What a terminal shows of `text` in the end"
    lines = [line.rpartition('\r')[2].rstrip(' █') for line in text.split('\n')]
    return '\n'.join(line for line in lines if line and not re.match(r'Epoch \d+/\d+ :', line))

def tidy(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type']!='code': continue
        for out in cell['outputs']:
            if 'text' in out: out['text'] = _shown(''.join(out['text'])).splitlines(True)
        cell['outputs'] = [o for o in cell['outputs'] if o.get('text', True)]
        cell['execution_count'],cell['metadata'] = None,{}
        for out in cell['outputs']: out.pop('execution_count', None) if out['output_type']!='execute_result' else out.update(execution_count=None)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n', encoding='utf-8')

if __name__=='__main__':
    warnings.simplefilter('ignore')
    for path in map(Path, sys.argv[1:]):
        ok,_ = test_nb(str(path.resolve()), skip_flags=['slow'], save=True)
        if not ok: sys.exit(f'{path} fails')
        tidy(path)
