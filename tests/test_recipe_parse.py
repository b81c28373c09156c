"Recipes as text: what people write, what they get wrong, and what nobody should be able to do with one"
import json,math,string,time,tracemalloc
import pytest
from hypothesis import HealthCheck,given,settings,strategies as st
from fastsparse_create.recipe.expression import RecipeError,evaluate,resolve,resolve_variables
from fastsparse_create.recipe.loader import MAX_CHARS
from fastsparse_create.recipe.parse import *

quick = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))

def args_of(text, **kwargs): return [m.args for m in parse_recipe(text, **kwargs).modifiers]
def tags_of(text): return [m.tag for m in parse_recipe(text).modifiers]

def error_of(f, *args, **kwargs):
    with pytest.raises(RecipeError) as e: f(*args, **kwargs)
    msg = str(e.value)
    assert '\n' not in msg and len(msg)<600
    return msg

# Expressions

@pytest.mark.parametrize('expr,expected', [
    ('1', 1), ('1.5', 1.5), ('.5', .5), ('1e-3', 1e-3), ('2 + 3*4', 14), ('(2+3)*4', 20), ('7/2', 3.5), ('7//2', 3), ('7%4', 3), ('2**10', 1024),
    ('2**-1', .5), ('-3', -3), ('+3', 3), ('--3', 3), ('-x', -10), ('abs(-3)', 3), ('abs(-x)', 10), ('min(3, x)', 3), ('max(3, x, 4.5)', 10),
    ('round(2.567, 2)', 2.57), ('round(2.5)', 2), ('int(9.99)', 9), ('float(3)', 3.), ('x*0.8', 8.), ('x - y', 9.9), ('flag + 1', 2), ('flag', 1),
    ('10**100', 10**100), ('1 +\n  2', 3), ('(-1)**(10**50)', 1), ('0.5**(10**9)', 0.)])
def test_arithmetic(expr, expected):
    got = evaluate(expr, dict(x=10, y=.1, flag=True))
    assert got==expected and type(got)==type(expected)

@pytest.mark.parametrize('expr', [
    '', ' ', '1 2', 'x +', 'import os', '__import__("os").system("ls")', '().__class__', 'x.real', '"a"', 'b"a"', 'f"{x}"', 'None', 'True', '...', '1j',
    '[1,2]', '(1,2)', '{1}', '{}', 'lambda: 1', 'x if x else 1', 'x and y', 'x < 3', 'not x', '~3', '3 & 1', '1 << 9', '3 @ 3', 'x := 3', 'x = 3',
    '[i for i in x]', 'min(*x)', 'round(1.5, ndigits=1)', 'sum(1, 2)', 'eval(1)', 'exec(1)', 'min', 'min()', 'min(3)', 'int(3, 2)', 'abs(1, 2)',
    'round(1.5, 0.5)', 'names', 'names + 1', 'names * 10**9', 'nothing', 'text', 'text*1000000000', 'none', 'nan', 'nan + 1', 'inf', 'x/0', 'x//0', 'x%0', '0**-1',
    '(-8)**0.5', '1e999', '1e400*0', '10**101', '9**9**9', '9**9**9**9', '2.0**5000', '10**100*10', 'round(5, -10**9)', 'round(5.5, 10**9)',
    'x'*1001, '1+'*600+'1', '('*999, '-'*999+'1', '\x00', '\ud800', '1if 1else 2'])
@pytest.mark.filterwarnings('ignore')
def test_refused_expressions(expr):
    names = dict(x=10, y=.1, names=[1,2], text='abc', none=None, nan=math.nan, inf=math.inf)
    start = time.process_time()
    error_of(evaluate, expr, names)
    assert time.process_time()-start<.5

def trees(leaves):
    unary = st.tuples(st.sampled_from(['-','+']), leaves).map(lambda o: f'({o[0]}{o[1]})')
    binary = st.tuples(leaves, st.sampled_from(['+','-','*','/','//','%','**']), leaves).map(lambda o: f'({o[0]} {o[1]} {o[2]})')
    calls = st.tuples(st.sampled_from(['abs({0})','min({0}, {1})','max({0}, {1})','int({0})','float({1})','round({0})']), leaves, leaves).map(lambda o: o[0].format(*o[1:]))
    return unary|binary|calls

numbers = st.integers(-20, 20).map(lambda o: f'({o})') | st.floats(-9, 9, allow_nan=False).map(lambda o: f'({round(o,3)})') | st.sampled_from('xy')

@quick
@given(st.recursive(numbers, trees, max_leaves=8))
def test_evaluates_like_python(expr):
    names = dict(x=3, y=.25)
    try: got = evaluate(expr, names)
    except RecipeError: got = None
    if got is None and '**' in expr: return  # Python would calculate for hours
    try: expected = eval(expr, {}, names)
    except (ArithmeticError,TypeError,ValueError): expected = None
    if got is None: assert expected is None or not math.isfinite(expected) or abs(expected)>1e90
    else: assert got==expected and type(got)==type(expected)

def test_resolve():
    names = dict(n=10, params=['a'], table={'k':[1]}, none=None, flag=True, text='linear')
    value = {'a':'eval(n*2)', 'b':['eval(params)', {'c':'eval(table)'}], 'eval(n)':'key', 'd':'x eval(n)', 'e':'eval(none)', 'f':'eval(flag)', 'g':'eval(text)', 'h':2.5}
    assert resolve(value, names)=={'a':20, 'b':[['a'], {'c':{'k':[1]}}], 'eval(n)':'key', 'd':'x eval(n)', 'e':None, 'f':True, 'g':'linear', 'h':2.5}
    assert value['a']=='eval(n*2)'

@given(st.permutations(['num_epochs','end','start','length','copy','nested']))
def test_variables_in_any_order(order):
    variables = dict(num_epochs=10., end='eval(start+length)', start='eval(num_epochs*0.2)', length=6, copy='eval(nested)', nested=[{'a':'eval(-end)'}])
    got = resolve_variables({k:variables[k] for k in order})
    assert got==dict(num_epochs=10., end=8., start=2., length=6, copy=[{'a':-8.}], nested=[{'a':-8.}])
    assert list(got)==list(order)

def test_undefined_and_cyclic_variables():
    assert 'a -> b -> c -> a' in error_of(resolve_variables, dict(a='eval(b)', b=['eval(c+1)'], c={'k':'eval(a)'}, d=1))
    assert 'a -> a' in error_of(resolve_variables, dict(a='eval(a+1)'))
    assert "variable 'a': 'eval(bb+1)' uses the unknown variable 'bb'; did you mean 'b'?" in error_of(resolve_variables, dict(a='eval(bb+1)', b=1))

# What people write

seed = """
version: 0.1.0
modifiers:
    - !EpochRangeModifier
        start_epoch: 0.0
        end_epoch: 70.0

    - !LearningRateModifier
        start_epoch: 0
        end_epoch: -1.0
        lr_class: MultiStepLR
        lr_kwargs: {'milestones': [43, 60], 'gamma': 0.1}

    - !GMPruningModifier
        final_sparsity: 0.85
        params: ['sections.0.0.conv1.weight', 'sections.0.0.conv2.weight']
"""

def test_sample_recipe():
    data = parse_recipe(seed)
    assert [(m.tag,m.line,m.group) for m in data.modifiers]==[('EpochRangeModifier',4,'modifiers'), ('LearningRateModifier',8,'modifiers'), ('GMPruningModifier',14,'modifiers')]
    assert data.modifiers[1].args==dict(start_epoch=0, end_epoch=-1., lr_class='MultiStepLR', lr_kwargs=dict(milestones=[43,60], gamma=.1))
    assert data.modifiers[1].arg_lines==dict(start_epoch=9, end_epoch=10, lr_class=11, lr_kwargs=12)
    assert data.variables=={'version':'0.1.0'} and data.metadata=={} and not data.is_staged and data.source=='<string>'

layouts = ["modifiers:\n- !A\n  a: 1\n- !B\n  b: [x]\n", "modifiers:\n    - !A\n        a: 1\n    - !B\n      b: [x]\n", "  - !A\n      a: 1\n\n  - !B\n     b:\n     - x\n",
           "modifiers:\n  # first\n  - !A   # the A\n\n    # its argument\n    a:     1\n\n\n  -    !B\n       b: [ x, ]\n", "modifiers: [!A {a: 1}, !B {b: [x]}]",
           "first_modifiers:\n  - !A {a: 1}\nmy_modifiers_x:\n  - !B {b: ['x']}", "modifiers:\n  - !pytorch.A {a: 1}\n  - !B {\n      b: [x]\n    }\n", "\ufeffmodifiers:\r\n  - !A\r\n    a: 1\r\n  - !B\r\n    b: [x]\r\n",
           "modifiers:\n  - A: {a: 1}\n  - B:\n      b: [x]\n", "pruning_modifiers:\n  A:\n    a: 1\n  B:\n    b: [x]\n", '{"modifiers": [{"A": {"a": 1}}, {"B": {"b": ["x"]}}]}',
           "---\nmodifiers:\n  - !A {a: 1}\n  - !B {b: [x]}\n---\n# Card", "+++\nmodifiers:\n  - !A {a: 1}\n  - !B {b: [x]}\n+++\n", "<!-- (c) -->\n\n---\nmodifiers:\n  - !A {a: 1}\n  - !B {b: [x]}\n---\n",
           "---\nmodifiers:\n  - !A {a: 1}\n  - !B {b: [x]}\n", "one: &one 1\nxs: &xs [x]\nmodifiers:\n  - !A {a: *one}\n  - !B {b: *xs}", "base: &base {b: [x]}\nmodifiers:\n  - !A {a: 1}\n  - !B\n    <<: *base\n",
           "modifiers:\n  - !A\n    <<: [{a: 1}, {a: 2}]\n  - !B {b: [x], <<: {b: 3}}", "training_modifiers:\n  # all out\npruning_modifiers:\n  - !A {a: 1}\n  - !B {b: [x]}", "x: 1\nmodifiers:\n  - !A {a: eval(x)}\n  - !B {b: ['x']}",
           {'modifiers':[{'A':{'a':1}}, {'B':{'b':('x',)}}]}, [{'A':{'a':1}}, {'B':{'b':['x']}}], {'modifiers':{'A':{'a':1}, 'B':{'b':['x']}}}]

@pytest.mark.parametrize('recipe', layouts)
def test_layouts(recipe): assert [(m.tag,m.args) for m in parse_recipe(recipe).modifiers]==[('A',dict(a=1)), ('B',dict(b=['x']))]

@pytest.mark.parametrize('recipe', ['!A', '!A {}', '- !A', '- !A {}', '- !A ~', 'modifiers:\n  - !A', 'modifiers:\n  - !A\n  # nothing\n', 'modifiers: !A {}', 'modifiers:\n  - A:\n', [{'A':None}], {'modifiers':[{'A':{}}]}])
def test_no_arguments(recipe): assert [(m.tag,m.args) for m in parse_recipe(recipe).modifiers]==[('A',{})]

@pytest.mark.parametrize('text,value', [
    ('1e-3', 1e-3), ('1E-3', 1e-3), ('1e5', 1e5), ('1.0e-3', 1e-3), ('-2.5e+3', -2500.), ('.5', .5), ('-.5', -.5), ('3.', 3.), ('5', 5), ('-5', -5), ('+5', 5), ('010', 10), ('0x10', 16), ('0o10', 8),
    ('2:4', '2:4'), ('1:4', '1:4'), ('8:16', '8:16'), ('1:30:00', '1:30:00'), ('"2:4"', '2:4'), ('1_000', '1_000'), ('2024-01-31', '2024-01-31'), ('2024-01-31 10:00:00', '2024-01-31 10:00:00'),
    ('yes', True), ('No', False), ('on', True), ('OFF', False), ('True', True), ('false', False), ('null', None), ('~', None), ('', None), ("''", ''), ('"1e-3"', '1e-3'), ("'true'", 'true'),
    ('.inf', math.inf), ('-.Inf', -math.inf), ('re:.*conv*', 're:.*conv*'), ('__ALL__', '__ALL__'), ('1.1.0', '1.1.0'), ('e5', 'e5'), ('1e', '1e'), ('.', '.'), ('-', [None]), ('=', '='),
    ('!!str 5', '5'), ('!!int "5"', 5), ('!!float 5', 5.), ('[2:4, 1e-3, off]', ['2:4', 1e-3, False]), ('{0.8: [a], b: 2:4}', {.8:['a'], 'b':'2:4'}), ('"\\ud83d"', '\ud83d'), ('>\n  a\n  b', 'a b\n')])
def test_scalars(text, value):
    got = parse_recipe(f'v: {text}\nmodifiers:\n  - !A').variables['v'] if text!='-' else parse_recipe('v:\n  -\nmodifiers:\n  - !A').variables['v']
    assert got==value and type(got)==type(value)

def test_not_a_number(): assert math.isnan(args_of('- !A {a: .nan}')[0]['a'])

simple = """
num_epochs: 10.0
pruning_start_epoch: eval(num_epochs * 0.2)
pruning_end_epoch: eval(num_epochs * 0.8)
init_sparsity: 0.2
pruning_mask_type: [1, 4]

modifiers:
    - !GMPruningModifier
        end_epoch: eval(pruning_end_epoch)
        final_sparsity: eval(init_sparsity + 0.7)
        init_sparsity: eval(init_sparsity)
        mask_type: eval(pruning_mask_type)
        start_epoch: eval(pruning_start_epoch)
"""

def test_expressions_of_a_recipe():
    assert args_of(simple)==[dict(end_epoch=8., final_sparsity=.8999999999999999, init_sparsity=.2, mask_type=[1,4], start_epoch=2.)]

complex_stages = """
sparsity: 0.9
lr_func: cosine
init_lr: 0.05
end_epoch: 100
start_epoch: 0.0

ac_dc_phase:
  end_epoch_global: eval(end_epoch)
  end_epoch: 75
  warm_up: 5.0
  final_lr: 0.256
  sparsity: 0.5
  middle: eval((end_epoch + start_epoch) / 2)

  training_modifiers:
  - !EpochRangeModifier
    start_epoch: eval(start_epoch)
    end_epoch: eval(end_epoch_global)

  - !LearningRateFunctionModifier
    start_epoch: eval(warm_up)
    end_epoch: eval(end_epoch_global)
    lr_func: eval(lr_func)
    init_lr: eval(final_lr)

  pruning_modifiers:

  - !ACDCPruningModifier
     compression_sparsity: eval(sparsity)
     end_epoch: eval(end_epoch)
     params: ['re:.*conv*', 're:.*fc.weight*']

next_stage:
  new_num_epochs: 15

  modifiers:
    - !EpochRangeModifier
        end_epoch: eval(end_epoch)
        start_epoch: eval(start_epoch + new_num_epochs)
"""

def test_stages():
    data = parse_recipe(complex_stages)
    assert {s:[m.args for m in ms] for s,ms in data.stages.items()}==dict(
        ac_dc_phase=[dict(start_epoch=0., end_epoch=100), dict(start_epoch=5., end_epoch=100, lr_func='cosine', init_lr=.256),
                     dict(compression_sparsity=.5, end_epoch=75, params=['re:.*conv*', 're:.*fc.weight*'])],
        next_stage=[dict(end_epoch=100, start_epoch=15.)])
    assert data.is_staged and data.variables['ac_dc_phase']['middle']==37.5 and data.variables['end_epoch']==100
    assert [m.group for m in data.modifiers]==['training_modifiers','training_modifiers','pruning_modifiers','modifiers']

# Overrides

@pytest.mark.parametrize('variables', [dict(num_epochs=20, init_sparsity=.1), '{"num_epochs": 20, "init_sparsity": 0.1}', 'num_epochs=20,init_sparsity=0.1', 'num_epochs: 20, init_sparsity = 1e-1', dict(num_epochs='eval(200/10)', init_sparsity=.1)])
def test_overrides(variables):
    args, = args_of(simple, variables=variables)
    assert args['end_epoch']==16. and args['init_sparsity']==.1

def test_overrides_of_stages():
    data = parse_recipe(complex_stages, variables='end_epoch=50,sparsity=0.7')
    assert [m.args.get('end_epoch') for m in data.modifiers]==[50,50,50,50] and data.modifiers[2].args['compression_sparsity']==.7

@pytest.mark.parametrize('given,value', [('2:4','2:4'), ('1e-3',1e-3), ('[a','error'), ('yes',True), ('re:.*conv','re:.*conv'), ('x','x'), ('"a"','a'), ('!A','error'), ('','error')])
def test_override_values(given, value):
    recipe = 'v: 1\nmodifiers:\n  - !A {a: eval(v)}'
    if value=='error': error_of(parse_recipe, recipe, variables=f'v={given}')
    else: assert args_of(recipe, variables=f'v={given}')==[dict(a=value)]==args_of(recipe, variables=dict(v=value))==args_of(recipe, variables=json.dumps(dict(v=value)))

@pytest.mark.parametrize('variables,words', [
    (dict(num_epoch=1), ["did you mean 'num_epochs'?"]), ('epochs=3', ["no variable 'epochs'", 'num_epochs']), ({1:2}, ['no variable 1']), ('num_epochs', ['name=value']), ('{"num_epochs": }', ['JSON']), ('{'*9, ['JSON']),
    ('{"num_epochs":'+'['*99_000, ['JSON']), (dict(num_epochs=object()), ['type object']), ('num_epochs=1'*99999, ['name=value','variables']), ('a=1,'*1000, ['100']), (dict(num_epochs=10**200), ['digits'])])
def test_wrong_overrides(variables, words):
    msg = error_of(parse_recipe, simple, variables=variables)
    assert any(w in msg for w in words)

# Errors name the place

@pytest.mark.parametrize('text,words', [
    ('', 'r.yaml: the recipe is empty'), ('# nothing', 'the recipe is empty'), ('recipe.yaml', "`read_recipe`"), ('[]', 'no modifiers found'), ('modifiers: []', 'no modifiers found'), ('version: 1.1.0\nlr: 3', "holds ['version', 'lr']"),
    ('Modifiers:\n  - !A', "r.yaml, line 1: 'Modifiers' must be written 'modifiers'"), ('x: 1\nmodifers:\n  - !A', "r.yaml, line 2: 'modifers' holds modifiers, whose list needs a name that contains 'modifiers'; did you mean 'modifiers'?"),
    ('pruning:\n  - !A', "'pruning' holds modifiers, whose list needs a name that contains 'modifiers', like pruning_modifiers"), ('pruning:\n - GMPruningModifier: {}', "'pruning' holds modifiers"), ('modifiers:\n  - !A\npruning:\n  - !B', "line 3: 'pruning' holds"),
    ('stage:\n  Modifiers:\n  - !A', "r.yaml, line 2, stage: 'Modifiers' must be written 'modifiers'"), ('stage:\n  mods:\n  - !A', "r.yaml, line 2, stage: 'mods' holds modifiers"), ('modifiers: 3', "must be a list of modifiers, got 3"), ('modifiers:\n - A', "must list modifiers such as '!GMPruningModifier', got 'A'"),
    ('modifiers:\n - {a: 1, b: 2}', 'must list modifiers'), ('modifiers:\n - 3: {}', 'must list modifiers'), ('modifiers:\n - a-b: {}', 'no class name'), ('modifiers:\n - Aé: {}', 'no class name'), ('modifiers:\n - A: 3', 'line 1, A: expected arguments'), ('modifiers:\n - !A 3', 'line 2, A: expected arguments'),
    ('modifiers:\n - !A\n   3: 4', 'line 2, A: the argument name 3'), ('modifiers:\n - !A\n   b: !B {}', 'line 2, A, b: !B'.replace('line 2','line 3')), ('3: 4\nmodifiers: []', 'the name 3 must be a text'), ("'': {modifiers: [!A {}]}", "the name '' must be a text"),
    ('modifiers: [!A {}]\ns: {modifiers: [!B {}]}', 'move them all into stages'), ('s: {modifiers: [!A {}], t: {modifiers: [!B {}]}}', "'t' is a stage inside of the stage 's'"), ('__metadata__: 3\nmodifiers: [!A {}]', 'must be a mapping'),
    ('lr: 1\nx: 2\nlr: 3', "r.yaml, line 3: 'lr' is given twice, first on line 1"), ('modifiers:\n - !A\n   b: 1\n   c: 2\n   b: 3', "line 5: 'b' is given twice, first on line 3"), ('a: {1: 2, 1.0: 3}', 'given twice'),
    ('modifiers:\n - !A\n a: 1', 'r.yaml, line 3: no valid YAML'), ('a: "b', 'r.yaml, line 1: no valid YAML'), ('a: 1\n\tb: 2', 'line 2: no valid YAML'), ('a: *b', "undefined alias 'b'"), ('a: 1\n---\nb: 2', 'single document'), ('a: b\0', 'line 1: a character that no text holds'),
    ('a: &a [*a]', "the anchor 'a' contains itself"), ('a: &a {b: *a}', "the anchor 'a' contains itself"), ('- &a !A {b: *a}', "the anchor 'a' contains itself"), ('a: {<<: 3}', "'<<' can only merge mappings"), ('? [a]\n: 1', 'a name must be a text or a number'), ('? !A {}\n: 1', 'a name must be a text or a number'),
    ('x: 1\nmodifiers:\n - !A\n   b: eval(xx)', "r.yaml, line 4, A, b: 'eval(xx)' uses the unknown variable 'xx'; did you mean 'x'?"), ('x: eval(y)\ny: eval(x)\nmodifiers:\n - !A', 'variables that need each other'), ('x: eval(1/0)\nmodifiers:\n - !A', 'line 1, x: '), ('x: 0x'+'f'*200, 'no int'), ('x: '+'9'*9999, 'no int')])
def test_errors(text, words): assert words in error_of(parse_recipe, text, 'r.yaml')

@pytest.mark.parametrize('tag', ['!!python/object/apply:os.system', '!!python/name:os.system', '!!python/module:os', '!!python/tuple', '!!set', '!!omap', '!!binary', '!!timestamp', '!foo-bar', '!tensorflow.A', '!<tag:a,2000:b>', '!!int', '!!seq', '!!unknown'])
@pytest.mark.parametrize('node', ['[a]', '{a: 1}', 'a', '[[a]]'])
def test_foreign_tags(tag, node):
    for text in f'a: {tag} {node}', f'{tag} {node}', f'modifiers:\n - !A {{a: {tag} {node}}}', f'{tag} {node}: 1':
        if tag!='!!seq' or node[0]!='[': error_of(parse_recipe, text)

def test_wrong_types():
    for bad in 3, None, b'modifiers: []', object(): pytest.raises(TypeError, parse_recipe, bad)
    pytest.raises(TypeError, parse_recipe, simple, variables=3)
    for bad in {'modifiers':[{'A':{'a':object()}}]}, {('a',):1}, {'modifiers':[{'A':{'a':{1,2}}}]}, {'a':10**200}: error_of(parse_recipe, bad)

def test_cyclic_data():
    loop = {'modifiers':[]}
    loop['modifiers'].append(loop)
    error_of(parse_recipe, loop)

# Files

def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

@pytest.mark.parametrize('name', ['a.yaml','a.yml','a.YAML'])
def test_yaml_files(tmp_path, name):
    data = read_recipe(write(tmp_path/name, simple), 'num_epochs=20')
    assert data.source==name and data.modifiers[0].args['end_epoch']==16. and data.modifiers[0].line==9
    assert read_recipe(str(tmp_path/name)).stages==parse_recipe(simple).stages

def test_markdown_files(tmp_path):
    card = write(tmp_path/'card.md', f'<!--\nLicence\n-->\n---{simple}---\n# Card\n---\nnot: [this\n---\n')
    assert read_recipe(card).modifiers[0].line==12 and read_recipe(card).stages==parse_recipe(simple).stages
    assert 'card.md, line 5' in error_of(read_recipe, write(card, 'x\n\n---\na: 1\na: 2\n---\n'))
    assert 'no front matter' in error_of(read_recipe, write(card, f'# Card\n```yaml\n{simple}\n```\n'))
    assert 'only the front matter is read' in error_of(read_recipe, write(card, f'---\nlayout: post\n---\n{simple}'))

def test_unreadable_files(tmp_path):
    assert '.yaml, .yml or .md' in error_of(read_recipe, write(tmp_path/'a.json', '{}'))
    assert 'a.yaml, line 2: not UTF-8' in error_of(read_recipe, write(tmp_path/'a.yaml', b'a: 1\nb: \xff'))
    assert 'larger than 1,000,000' in error_of(read_recipe, write(tmp_path/'a.yaml', '#'*1_000_001))
    with pytest.raises(FileNotFoundError): read_recipe(tmp_path/'none.yaml')

# Saving

def test_saved_text():
    data = parse_recipe("""
init_sparsity: 0.2
__metadata__: {metadata: null, level: 0}
modifiers:
    - !EpochRangeModifier
        end_epoch: 3.0
        start_epoch: 0.0
    - !GMPruningModifier
        init_sparsity: eval(init_sparsity)
        final_sparsity: 0.8
        params: ["re:.*weight"]
        leave_enabled: True
        mask_type: unstructured
        score_type: null
""")
    assert dump_recipe(data)=="""version: 1.1.0

__metadata__:
  metadata: null
  level: 0

modifiers:
    - !EpochRangeModifier
        end_epoch: 3.0
        start_epoch: 0.0

    - !GMPruningModifier
        final_sparsity: 0.8
        init_sparsity: 0.2
        leave_enabled: True
        mask_type: unstructured
        params: ['re:.*weight']
"""

def test_saved_stages():
    text = """version: 1.1.0

stage_0:
  __metadata__:
    level: 0

  pruning_modifiers:
      - !GMPruningModifier
          mask_type: '2:4'

stage_1:
  modifiers:
      - !EpochRangeModifier
          end_epoch: 9.0
"""
    data = parse_recipe(text)
    assert data.metadata=={'stage_0':{'level':0}} and dump_recipe(data)==text

texts = st.text(st.characters(blacklist_categories=()), max_size=12) | st.sampled_from(['2:4','1e-3','1e5','010','0x1','yes','No','on','null','~','','-','- a','a: b','a #b','#','&a','*a','!A','|','>','%','@','`',"'",'"','\\','{','[','a,b','=','<<','.inf','.nan',
                              '1_0','2024-01-31','é','\u2028','\x85','\ufeff','\x00','\ud800','\U0001F600',' a ','a\nb','\ta','---','...','__ALL__','re:.*weight','True','y','1:2:3','+1','-.5','?','? a',':'])
texts = texts.filter(lambda s: not s.startswith('eval('))
floats = st.floats(allow_nan=False) | st.sampled_from([1e-7,1e16,1e22,-0.,.1,1/3,5e-324,1.7e308,math.inf])
scalars = st.none() | st.booleans() | st.integers(-10**30, 10**30) | floats | texts
keys = texts | st.integers(-5, 5) | st.floats(0, 1, exclude_min=True, exclude_max=True)
values = st.recursive(scalars, lambda o: st.lists(o, max_size=3) | st.dictionaries(keys, o, max_size=3), max_leaves=6)
tags = st.text(string.ascii_letters, min_size=1, max_size=5)
modifiers = st.lists(st.builds(ModifierData, tags, st.dictionaries(texts, values, max_size=4)), min_size=1, max_size=3)
names = texts.filter(lambda s: s and 'modifiers' not in s.lower() and s not in ('__metadata__','version'))
metadata = st.dictionaries(texts, values, max_size=3)

def without_none(data): return {s:[ModifierData(m.tag, {k:v for k,v in m.args.items() if v is not None}, group=m.group) for m in ms] for s,ms in data.stages.items()}

@quick
@given(st.one_of(modifiers.map(lambda ms: {'':ms}), st.dictionaries(names, modifiers, min_size=1, max_size=3)), metadata)
def test_round_trip(stages, meta):
    data = RecipeData(stages, metadata=meta)
    text = dump_recipe(data)
    again = parse_recipe(text)
    assert again.stages==without_none(data) and again.metadata==meta
    assert [repr(m.args) for m in again.modifiers]==[repr({k:m.args[k] for k in sorted(m.args)}) for ms in without_none(data).values() for m in ms]
    assert dump_recipe(again)==text

@quick
@given(values)
def test_dicts_equal_text(value):
    assert parse_recipe({'modifiers':[{'A':{'a':value}}]}).modifiers[0].args=={'a':value}

def test_yaml_1_1_reads_what_is_saved():
    import yaml
    text = dump_recipe(parse_recipe('- !A {a: 1e-7, b: 1e22, c: 2:4, d: "1e-3", e: [on, "on", 010, "010", 1_0, 2024-01-31], f: -.inf}'))
    class Loader(yaml.SafeLoader): pass
    Loader.add_constructor('!A', lambda loader,node: loader.construct_mapping(node, deep=True))
    assert yaml.load(text, Loader)['modifiers']==[dict(a=1e-7, b=1e22, c='2:4', d='1e-3', e=[True,'on',10,'010','1_0','2024-01-31'], f=-math.inf)]

# Epochs, shifting, composing

def recipe(*args, **stages): return RecipeData(stages or {'':[ModifierData('A', a) for a in args]}, source='r')

@pytest.mark.parametrize('args,low,high', [([dict(start_epoch=1, end_epoch=2), dict(start_epoch=5, end_epoch=10)], 1, 10), ([dict(start_epoch=2.5)], 2, 3), ([dict(start_epoch=-1, end_epoch=-1.)], -1, -1), ([{}], -1, -1),
                                           ([dict(start_epoch=0., end_epoch=9.2), dict(start_epoch=-1, end_epoch=40)], 0, 40), ([dict(end_epoch='x', start_epoch=True)], -1, -1), ([dict(end_epoch=math.inf, start_epoch=math.nan)], -1, -1)])
def test_epochs(args, low, high): assert (min_epochs(recipe(*args)), max_epochs(recipe(*args)))==(low, high)

def test_shift():
    args = dict(start_epoch=2, end_epoch=5., freeze_bn_stats_epoch=4, disable_quantization_observer_epoch=-1, update_frequency=1, num_epochs=3, lr_kwargs=dict(milestones=[2,4.5], cycle_epochs=2, last_epoch=-1), update_epochs=[1,2], x='start_epoch')
    got, = [m.args for m in shift(recipe(args), 3).modifiers]
    assert got==dict(args, start_epoch=5, end_epoch=8., freeze_bn_stats_epoch=7, lr_kwargs=dict(milestones=[5,7.5], cycle_epochs=2, last_epoch=-1), update_epochs=[4,5])
    assert args['start_epoch']==2 and args['lr_kwargs']['milestones']==[2,4.5]
    for begin in {}, dict(start_epoch=-1), dict(start_epoch=None), dict(start_epoch=0): assert shift(recipe(begin), 3).modifiers[0].args==dict(start_epoch=3)
    for bad in -1, math.nan, 'x', True: error_of(shift, recipe({}), bad)

epochs = st.integers(-1, 20) | st.none()

@quick
@given(st.lists(st.fixed_dictionaries({}, optional=dict(start_epoch=epochs, end_epoch=epochs, freeze_epoch=epochs, lr_kwargs=st.builds(dict, milestones=st.lists(st.integers(0, 9))))), min_size=1), st.integers(0, 9), st.integers(0, 9))
def test_shifts_add_up(args, a, b):
    data = recipe(*args)
    assert shift(shift(data, a), b)==shift(data, a+b)
    if max_epochs(data)>=0: assert max_epochs(shift(data, a))==max_epochs(data)+a or max_epochs(shift(data, a))==a

def test_compose_names():
    a,staged = recipe(dict(start_epoch=0., end_epoch=3.)),recipe(stage_0=[ModifierData('A', dict(end_epoch=3))], stage_1=[ModifierData('A', dict(start_epoch=5, end_epoch=9))])
    later = RecipeData({'stage_3':staged.stages['stage_0'], 'stage_4':staged.stages['stage_1']})
    assert {s:[m.args for m in ms] for s,ms in compose(a, a).stages.items()}==dict(stage_0=[dict(start_epoch=0., end_epoch=3.)], stage_1=[dict(start_epoch=3., end_epoch=6.)])
    assert list(compose(staged, a).stages)==['stage_0','stage_1','stage_3'] and list(compose(a, staged).stages)==['pre_stage_0','stage_0','stage_1']
    assert list(compose(staged, later).stages)==['stage_0','stage_1','stage_3','stage_4'] and compose(staged, later).stages['stage_4'][0].args==dict(start_epoch=14, end_epoch=18)
    assert "both have the stage 'stage_0'" in error_of(compose, staged, staged)

def test_compose_epochs():
    base = recipe(dict(start_epoch=0., end_epoch=52.), dict(start_epoch=0., end_epoch=-1.), dict(start_epoch=50., end_epoch=-1.0, disable_quantization_observer_epoch=51.), dict(learning_rate=2e-6, start_epoch=50.))
    first,second = ([m.args for m in ms] for ms in compose(base, base).stages.values())
    assert [a.get('end_epoch') for a in first]==[52.,52,52,None] and [a['start_epoch'] for a in first]==[0.,0.,50.,50.]
    assert [a.get('end_epoch') for a in second]==[104.,-1.,-1.,None] and [a['start_epoch'] for a in second]==[52.,52.,102.,102.]
    assert second[2]['disable_quantization_observer_epoch']==103.
    endless = recipe(dict(end_epoch=-1))
    assert [m.args for m in compose(endless, endless).modifiers]==[dict(end_epoch=-1), dict(start_epoch=0, end_epoch=-1)]

def test_compose_keeps_metadata():
    a,b = parse_recipe('__metadata__: {level: 0}\nlr: 1\nmodifiers: [!A {}]'),parse_recipe('s: {__metadata__: {level: 1}, lr: 2, modifiers: [!A {}]}')
    both = compose(a, b)
    assert both.metadata=={'pre_s':{'level':0}, 's':{'level':1}} and both.variables=={'s':{'lr':2}}
    assert parse_recipe(dump_recipe(both)).metadata==both.metadata and parse_recipe(dump_recipe(both)).stages==both.stages

# Hostile input

n = MAX_CHARS-100
tail = '\nmodifiers:\n  - !A {a: eval(k0)}'
hostile = dict(
    word='a'*n, words='a '*(n//2), spaces=' '*n, lines='a\n'*(n//2), empty='\n'*n, comments='#\n'*(n//2), items='- a\n'*(n//4), keys=''.join(f'k{i}: {i}\n' for i in range(n//13)), brackets='['*n, braces='{'*n, spaced='[ '*(n//2),
    dashes='- '*(n//2), questions='? '*(n//2), indents=''.join(' '*i+'a:\n' for i in range(440)), escapes='"'+'\\x41'*(n//4)+'"', literal='|\n'+' a\n'*(n//3-2), aliases='- &a a\n'+'- *a\n'*(n//5-5), anchors=''.join(f'- &a{i} a\n' for i in range(8000)),
    laughs='a0: &a0 [x]\n'+''.join(f'a{i+1}: &a{i+1} [{",".join([f"*a{i}"]*9)}]\n' for i in range(30)), merges='b0: &b0 {x: 1}\n'+''.join(f'b{i+1}: &b{i+1} {{<<: [*b{i},*b{i}]}}\n' for i in range(30)),
    text_laughs=f'a: &a {"x"*9000}\nb: ['+'*a,'*9000+']', chain=''.join(f'k{i}: eval(k{i+1})\n' for i in range(3000))+'k3000: 1'+tail, variable_laughs=''.join(f'k{i}: [{",".join([f"eval(k{i+1})"]*9)}]\n' for i in range(30))+'k30: 1'+tail,
    text_variables='k0: '+'x'*50_000+'\nmodifiers:\n  - !A ['.replace('[','{')+','.join(f'a{i}: eval(k0)' for i in range(2000))+'}', ring=''.join(f'k{i}: eval(k{(i+1)%2000})\n' for i in range(2000))+tail, powers='k0: eval(9**9**9**9**9)'+tail,
    sums=''.join(f'k{i}: eval({i}{"+1"*45})\n' for i in range(900))+tail, parentheses='k0: eval('+'('*90_000+')'+tail, typo=''.join(f'{"a"*33}{i}: 1\n' for i in range(2300))+'modifiers:\n  - !A {x: eval('+'a'*39+')}', digits='k0: '+'9'*90_000+tail, hexadecimal='k0: 0x'+'f'*90_000+tail,
    version='%YAML '+'9'*5000+'.1\n---\na', escape='a: "\\UFFFFFFFF"', tag='!'+'a'*n, key='? '+'a'*n+'\n: 1', markdown='\n'*900_000+'---\na: 1\n---\n', fences='---\n'*250_000, fences2='+++\n---\n'*100_000, large='a'*2_000_000)

@pytest.mark.parametrize('name', hostile)
def test_hostile_text_takes_no_time(name):
    start = time.process_time()
    try: parse_recipe(hostile[name])
    except RecipeError as e: assert len(str(e))<600
    assert time.process_time()-start<2  # seconds of the processor, as others may use it too

@pytest.mark.parametrize('name', ['brackets','indents','laughs','merges','text_laughs','variable_laughs','text_variables','powers','fences','large'])
def test_hostile_text_takes_no_memory(name):
    tracemalloc.start()
    try: parse_recipe(hostile[name])
    except RecipeError: pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak<50e6

pieces = st.sampled_from([*'[]{}:,-?!&*|>%@`#"\'~=<.\\ \n\t01aAée', '\n', '\n', '  ', '    ', ': ', '- ', 'modifiers:', 'modifiers:\n  - !A', '!A', '!!python/object:os.x', '!!set ', '!!int ', 'eval(', ')', 'a', 'b', '&a ', '*a', '<<: ', '---', '+++', '...', '\r', '\ufeff', '\x00',
                          '"\\x4', '\\uD800', '1e', '2:4', '__metadata__:', '? ', '{', '}', '[', ']', '**', '9', 'null', '%TAG ! x', '%YAML 1.1', '\x85', '\u2028', 'stage:\n ', '!<', '|\n', '>-\n'])

@quick
@given(st.lists(pieces, max_size=40).map(''.join) | st.text(max_size=60), st.sampled_from([None, 'a=1', '{"a": 2}']))
@pytest.mark.filterwarnings('ignore')
def test_any_text_parses_or_says_why(text, variables):
    for t in text, 'modifiers:\n  - !A\n    x: '+text, f'a: {text}\nmodifiers:\n  - !A {{x: eval(a)}}':
        try: data = parse_recipe(t, variables=variables)
        except RecipeError as e:
            assert str(e)
            continue
        assert parse_recipe(dump_recipe(data)).metadata==data.metadata or data.metadata!=data.metadata or 'nan' in repr(data)
        assert 'nan' in repr(data) or parse_recipe(dump_recipe(data)).stages==without_none(data)
        compose(data, shift(RecipeData({'later':data.modifiers}), 1)) if 'later' not in data.stages else None

@quick
@given(st.lists(pieces, max_size=30).map(''.join), st.text(max_size=30))
@pytest.mark.filterwarnings('ignore')
def test_any_override_works_or_says_why(a, b):
    for variables in a, b, 'v='+a, '{"v":'+a+'}':
        try: parse_recipe('v: 1\nmodifiers:\n  - !A {x: eval(v)}', variables=variables)
        except RecipeError as e: assert str(e)
