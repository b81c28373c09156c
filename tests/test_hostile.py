"Files from anywhere: whatever they hold, they run no code, lead nowhere, and end in a sentence"
import os,pickle,pytest,random,time,zipfile
from collections import OrderedDict
from utils import *
from fastsparse_create.all import *
from fastsparse_create.create.api import initialize
from fastsparse_create.experiment.models import create_model,load_model
from fastsparse_create.export.checkpoint import load_sparse
from fastsparse_create.quantization.convert import quantized_from_file
from fastsparse_create.recipe.expression import RecipeError

class Boom:
    "A pickle of it leaves a trace where it is opened"
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return os.mkdir,(str(self.trace),)

def sparse_model():
    model = mlp()
    sparsify_model(model, .8)
    return model

# A reader of files, and what it opens
readers = dict(
    masks_from_file=lambda f: masks_from_file(mlp(), f), quantized_from_file=lambda f: quantized_from_file(mlp(), f), thin_like=lambda f: thin_like(mlp(), f), find_teacher=lambda f: find_teacher(f, mlp()),
    load_sparse=lambda f: load_sparse(mlp(), f), create_model=lambda f: create_model(str(f), 2, arch='resnet18'), load_model=load_model)

@pytest.mark.parametrize('reader', readers)
def test_files_of_weights_run_no_code(reader, tmp_path):
    file,trace = tmp_path/'model.pth',tmp_path/'trace'
    for content in Boom(trace),{'model':Boom(trace)},{**mlp().state_dict(), 'extra':Boom(trace)}:
        torch.save(content, file)
        with pytest.raises(ValueError): readers[reader](file)
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError): readers[reader](file)
    assert not trace.exists()

def damages(content):
    "A file cut off anywhere, or with a bit changed"
    yield from (content[:n] for n in (0, 1, 4, 100, len(content)//3, len(content)//2, len(content)-100, len(content)-1))
    g = random.Random(0)
    for _ in range(40):
        i = g.randrange(len(content))
        yield content[:i]+bytes([content[i]^1<<g.randrange(8)])+content[i+1:]

@pytest.mark.parametrize('reader', readers)
def test_damaged_files_end_in_a_sentence(reader, tmp_path):
    file = tmp_path/'model.pth'
    torch.save(sparse_model().state_dict(), file)
    for content in damages(file.read_bytes()):
        file.write_bytes(content)
        try: readers[reader](file)
        except ValueError as e: assert str(file) in str(e) or 'model.pth' in str(e), str(e)

@pytest.mark.parametrize('content', [3, 'a', [1], None, {}, {1:torch.ones(1)}, {'a':3}, {'model':3,'opt':4}, {'model':{'0.weight':'x'},'opt':{}}, torch.ones(2)], ids=repr)
@pytest.mark.parametrize('reader', readers)
def test_other_content(reader, content, tmp_path):
    file = tmp_path/'model.pth'
    torch.save(content, file)
    with pytest.raises(ValueError, match='model.pth'): readers[reader](file)

def test_small_files_stay_small(tmp_path):
    "A kilobyte that stands for a gigabyte"
    file = tmp_path/'model.pth'
    torch.save({'a':torch.zeros(10**6)}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        for o in old.namelist(): new.writestr(o, old.read(o))
    with pytest.raises(ValueError, match='is compressed'): masks_from_file(mlp(), tmp_path/'bomb.pth')

def recipe(teacher): return f'modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n    end_epoch: 1\n  - !DistillationModifier\n    teacher: {teacher}\n'

def test_recipes_open_no_pickles(tmp_path):
    file,trace = tmp_path/'teacher.pkl',tmp_path/'trace'
    file.write_bytes(pickle.dumps(Boom(trace)))
    for path in file,f'{file}/',f'{tmp_path}/./teacher.pkl':
        with pytest.raises(RecipeError, match='line 6, DistillationModifier: teacher: '): Recipe.from_string(recipe(path))
    with pytest.raises(RecipeError, match="can't name a pickle"): Recipe.from_string(recipe(file))
    with pytest.raises(RecipeError, match='no file'): Recipe.from_string(recipe('/dev/zero'))
    with pytest.raises(RecipeError, match='no file'): Recipe.from_string(recipe('"\\0"'))
    with pytest.raises(RecipeError, match='no file'): Recipe.from_string(recipe('a'*50_000))
    assert not trace.exists()

def test_users_do(tmp_path):
    "What somebody names in code is opened"
    tiny_learner(path=tmp_path).export(tmp_path/'teacher.pkl')
    learn = tiny_learner(d_out=2)
    learn.fit_recipe(recipe('given'), distillation_teacher=tmp_path/'teacher.pkl')
    assert learn.recorder.metric_names[-2]=='distillation'
    model = mlp()
    manager,_ = initialize(model, torch.optim.SGD(model.parameters(), .1), 4, distillation=True, distillation_teacher=str(tmp_path/'teacher.pkl'))
    assert any(m.teacher==str(tmp_path/'teacher.pkl') for m in manager.modifiers if hasattr(m, 'teacher'))
    with pytest.raises(ValueError, match='no file'): initialize(mlp(), torch.optim.SGD(mlp().parameters(), .1), 4, distillation=True, distillation_teacher=str(tmp_path/'none.pkl'))

@pytest.mark.parametrize('pattern', ['re:(a|a)*[bc]$', 're:(.?){99}{0}', 're:(?:(?:.?){99}){99}[!]', 're:(.*)*!', 're:'+'('*200+'.'+')*'*150, 're:'+'.*'*200+'!', 're:(?=(.|.)*$)!'])
def test_patterns_take_no_time(pattern):
    names = [f'{"a"*60}.{i}.weight' for i in range(500)]
    start = time.process_time()
    try: matching(pattern, names)
    except ValueError as e: assert pattern[3:10] in str(e)
    assert time.process_time()-start<2

@pytest.mark.parametrize('pattern,said', [('re:(a|a)*[bc]$','takes too long'), ('re:(a{99}){99}','no regular expression'), ('re:'+'a'*600,'longer than'), ('re:(','no regular expression')])
def test_patterns_of_layers_take_no_time(pattern, said):
    learn = tiny_learner(nn.Sequential(OrderedDict({'a'*60:nn.Linear(4, 4), 'out':nn.Linear(4, 2)})))
    start = time.process_time()
    with pytest.raises(ValueError, match=said): learn.fit(1, cbs=LayerPruningModifier(pattern, 0.))
    assert time.process_time()-start<2
