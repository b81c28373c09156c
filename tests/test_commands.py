"Runs that are interrupted, run out of memory, learn from a teacher, take sparse models over or never train"
import json,logging,os,signal,subprocess,sys,time
import pytest
from fastai.vision.all import Callback,Learner,Path,load_learner,nn,torch
from commands import *
from fastsparse_create.cli import main
from fastsparse_create.experiment import core,training_aware as aware
from fastsparse_create.experiment.models import *
from fastsparse_create.experiment.one_shot import *
from fastsparse_create.experiment.sparse_transfer import *
from fastsparse_create.experiment.training_aware import *
from fastsparse_create.masking import measured_sparsity
from fastsparse_create.quantization.convert import is_quantized
from fastsparse_create.selection import prunable
from test_checkpoint import full_disk

small = '--use-case ic --model squeezenet1_1 --data digits --train-samples 40 --val-samples 20 --train-kwargs {"bs":8}'.split()
kwargs = dict(use_case='ic', model='squeezenet1_1', data='digits', train_samples=40, val_samples=20, train_kwargs={'bs':8})

def same_results(a, b):
    x,y = (load_model(f/'model.pth').state_dict() for f in (a,b))
    return all(torch.equal(x[k], y[k]) for k in x) and [{k:v for k,v in r.items() if k!='seconds'} for r in rows(a)]==[{k:v for k,v in r.items() if k!='seconds'} for r in rows(b)]

class Stopped(Exception): pass

def stop_at(monkeypatch, run, epoch, error=Stopped('stopped')):
    "The training number `run` is interrupted in its epoch `epoch`"
    fit,fits = Learner.fit_recipe,[]
    class Stop(Callback):
        def before_batch(self):
            if self.training and len(fits)==run and self.learn.epoch==epoch and self.iter==2: raise error
    def fit_recipe(self, *args, cbs=(), **kwargs):
        fits.append(1)
        fit(self, *args, cbs=[*cbs, Stop()], **kwargs)
    monkeypatch.setattr(Learner, 'fit_recipe', fit_recipe)

# interruptions

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setattr('fastsparse_create.experiment.core.experiment_page', lambda exp: '')
        m.setattr('fastsparse_create.experiment.core.Experiment._deploy', lambda self, out: (__import__('pandas').DataFrame([{'what':'nothing'}]),None))
        return TrainingAware(**kwargs, epochs=3, working_dir=tmp_path_factory.mktemp('whole')).run(show_bar=False).folder

@pytest.mark.parametrize('at', [(1,1),(2,1),(2,2)])
def test_resume_ends_as_the_whole(at, whole, tmp_path, monkeypatch, quick, capsys):
    with monkeypatch.context() as m:
        stop_at(m, *at)
        with pytest.raises(Stopped): TrainingAware(**kwargs, epochs=3, working_dir=tmp_path).run(show_bar=False)
    folder, = tmp_path.iterdir()
    assert folder.name.endswith('_incomplete') and {'arguments.json','checkpoints'}<={f.name for f in folder.iterdir()}
    assert main(['training-aware', '--resume', str(folder)])==0
    done, = tmp_path.iterdir()
    assert done.name==folder.name.removesuffix('_incomplete') and same_results(done, whole)
    assert not {'arguments.json','checkpoints'}&{f.name for f in done.iterdir()}
    assert 'went on from a checkpoint' in capsys.readouterr().out

def test_nothing_is_left_of_what_had_no_checkpoint(tmp_path, monkeypatch):
    stop_at(monkeypatch, 1, 0)
    with pytest.raises(Stopped): TrainingAware(**kwargs, epochs=2, working_dir=tmp_path).run(show_bar=False)
    assert not list(tmp_path.iterdir())

def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    code = 'import sys,signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fastsparse_create.cli import main; sys.exit(main())'
    p = subprocess.Popen([sys.executable, '-u', '-W', 'ignore', '-c', code, 'training-aware', *small, '--epochs', '50', '--working-dir', str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    before = []
    for line in p.stderr:
        before.append(line)
        if line.startswith('epoch 0'): break
    p.send_signal(signal.SIGINT)
    said = p.stderr.read()
    assert p.wait()==1 and 'Stopping after this batch' in said and '--resume' in said and 'Traceback' not in said, ''.join(before)+said
    folder, = tmp_path.iterdir()
    assert len(list(folder.glob('checkpoints/dense/*.pth')))==1

@pytest.mark.parametrize('spoil,said', [(lambda f: (f/'arguments.json').unlink(), 'is no folder of an interrupted'), (lambda f: (f/'arguments.json').write_text('{'), 'is damaged'), (lambda f: (f/'arguments.json').write_text('{"a": 1}'), 'is damaged')])
def test_resume_of_something_else(spoil, said, tmp_path, capsys):
    (tmp_path/'arguments.json').write_text('{}')
    spoil(tmp_path)
    assert said in refused(capsys, '--resume', tmp_path)

@pytest.mark.parametrize('text', ['[]','{"use_case": 5, "model": "squeezenet1_1", "data": "digits"}','['*100_000,json.dumps({**kwargs, 'seed':'x'}),json.dumps({**kwargs, 'recipe':5}),json.dumps({**kwargs, 'kind':True}),json.dumps({**kwargs, 'kind':'a; b'}),json.dumps({**kwargs, 'teacher':['x.pkl']})])
def test_resume_of_damaged_arguments(text, tmp_path, capsys):
    (tmp_path/'arguments.json').write_text(text)
    assert 'is damaged' in refused(capsys, '--resume', tmp_path)

@pytest.mark.parametrize('made,other', [(TrainingAware,SparseTransfer),(SparseTransfer,TrainingAware)])
def test_resume_by_another_command(made, other, tmp_path, capsys, monkeypatch, whole):
    "Before anything is read or written, in a sentence with the command that goes on"
    monkeypatch.setattr('fastsparse_create.callback.checkpoint.CheckpointCallback._check', lambda *args: pytest.fail('a training began'))
    exp = made(**{**kwargs, 'model':str(whole/'model.pth')}, working_dir=tmp_path)
    exp.folder = exp._begin()
    exp._note_arguments()
    before = {f:f.read_bytes() for f in exp.folder.rglob('*')}
    mine,its = (c.kind.replace('_', '-') for c in (other,made))
    assert refused(capsys, '--resume', exp.folder, command=mine)==f'fastsparse.run {mine}: {exp.folder}: was made by {its}, go on by: fastsparse.run {its} --resume {exp.folder}'
    with pytest.raises(ValueError, match=f'was made by {its}'): other.resumed(exp.folder)
    assert {f:f.read_bytes() for f in exp.folder.rglob('*')}==before and list(tmp_path.iterdir())==[exp.folder]
    assert type(made.resumed(exp.folder)) is made

def test_one_shot_resumes_nothing(tmp_path, capsys):
    assert refused(capsys, '--resume', tmp_path, command='one-shot')=='fastsparse.run one-shot: --resume goes on with a training, and one-shot has none; give the folder to the command that made it'

class Trace:
    "A pickle of it makes a file when it is opened"
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch,(self.file,)

@pytest.fixture
def from_elsewhere(tmp_path):
    "A folder that says it was interrupted, whose files leave a trace when they are opened as pickles"
    folder,trace = tmp_path/'got_incomplete',tmp_path/'trace'
    folder.mkdir()
    for name in ('evil.pkl','learner.pkl','model.pth'): torch.save(Trace(trace), folder/name)
    def _made(**given):
        (folder/'arguments.json').write_text(json.dumps({**kwargs, 'epochs':1, 'optim_level':0, **given}))
        return folder,trace
    return _made

@pytest.mark.parametrize('role', ['model','teacher'])
@pytest.mark.parametrize('command', ['training-aware','sparse-transfer'])
def test_resume_opens_no_pickle_that_only_the_folder_names(role, command, from_elsewhere, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = str(tmp_path/'got_incomplete'/'evil.pkl')
    for name in (evil,'got_incomplete/evil.pkl'):
        folder,trace = from_elsewhere(**{role:name})
        assert f'the {role} is a pickle, which may run any code' in refused(capsys, '--resume', folder, command=command)
        assert f"the {role} is '{name}', not 'other.pkl'" in refused(capsys, '--resume', folder, f'--{role}', 'other.pkl', command=command)
        assert not trace.exists()
    with pytest.raises(SystemExit): main([command, '--resume', str(folder), f'--{role}', evil])
    assert trace.exists(), "the pickle leaves no trace, so that this test shows nothing"

def test_resume_opens_no_other_pickle_of_the_folder(from_elsewhere, capsys, quick):
    folder,trace = from_elsewhere(teacher=None)
    assert 'teacher is None' in refused(capsys, '--resume', folder, '--teacher', 'evil.pkl')
    assert 'holds more than tensors' in refused(capsys, '--resume', from_elsewhere(model=str(folder/'model.pth'))[0])
    from_elsewhere()
    (folder/'checkpoints'/'dense').mkdir(parents=True)
    torch.save(Trace(trace), folder/'checkpoints'/'dense'/'fit_00_epoch_00001.0000000.pth')
    with pytest.raises(ValueError, match='none of its 1 checkpoints can be read'): main(['training-aware', '--resume', str(folder)])
    assert not trace.exists() and (folder/'evil.pkl').exists()

@pytest.mark.parametrize('use_case', [None,'image_classification','segmentation','object_detection'])
def test_weights_name_no_pickle_as_their_network(use_case, from_elsewhere, whole, tmp_path):
    folder,trace = from_elsewhere()
    saved = torch.load(whole/'model.pth', weights_only=True)
    torch.save({**saved, 'use_case':use_case, 'arch':str(folder/'evil.pkl')}, tmp_path/'w.pth')
    for f in (load_model,lambda file: create_model(str(file), 10)):
        with pytest.raises(ValueError, match='w.pth: .*evil.pkl'): f(tmp_path/'w.pth')
    assert not trace.exists()

def test_resume_leaves_a_given_folder_to_its_owner(from_elsewhere, monkeypatch):
    folder,_ = from_elsewhere(model='squeezenet1_1')
    (folder/'model.pth').unlink()
    stop_at(monkeypatch, 1, 0)
    with pytest.raises(Stopped): TrainingAware.resumed(folder).run(show_bar=False)
    assert (folder/'evil.pkl').exists()

@pytest.mark.parametrize('args,said', [
    (('--epochs','9','--optim-level','0.9','--seed','7'), '--optim-level, --seed, --epochs'), (('--seed','42'), '--seed'), (('--optim-level','0.5'), '--optim-level'), (('--working-dir','.'), '--working-dir'),
    (('--data','digits'), '--data'), (('--target','any'), '--target'), (('--recipe','r.yaml','--quiet'), '--recipe')])
def test_resume_takes_no_other_arguments(args, said, tmp_path, capsys):
    assert refused(capsys, '--resume', tmp_path, *args)==f'fastsparse.run training-aware: --resume goes on with what its folder says; leave out {said}'

def test_resume_from_another_folder(whole, tmp_path, monkeypatch, quick, caplog):
    from test_cli import make_images
    here,there = tmp_path/'here',tmp_path/'there'
    there.mkdir()
    for i,c in enumerate('abcdefghij'): make_images(here/'data'/c, 4, 25*i)
    aware.shutil.copy(whole/'model.pth', here/'start.pth')
    aware.shutil.copy(whole/'learner.pkl', here/'my teacher.pkl')
    monkeypatch.chdir(here)
    with monkeypatch.context() as m:
        stop_at(m, 2, 1)
        with pytest.raises(Stopped): SparseTransfer('ic', 'start.pth', 'data', epochs=2, teacher='my teacher.pkl', train_kwargs={'bs':8}, working_dir='out').run(show_bar=False)
    folder, = (here/'out').iterdir()
    assert f"--resume {folder.relative_to(here)} --teacher '{here}/my teacher.pkl'" in caplog.text
    monkeypatch.chdir(there)
    assert main(['sparse-transfer', '--resume', '../here/out/'+folder.name, '--teacher', '../here/my teacher.pkl', '--quiet'])==0
    done, = (here/'out').iterdir()
    assert done.name==folder.name.removesuffix('_incomplete') and (done/'report.html').exists() and not list(there.iterdir())

def test_resume_keeps_options_that_are_as_usual(tmp_path):
    exp = TrainingAware(**{**kwargs, 'train_kwargs':{'bs':64,'augment':False}}, working_dir=tmp_path)
    exp.folder = tmp_path
    exp._note_arguments()
    assert TrainingAware.resumed(tmp_path).options==exp.options

def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, quick, caplog):
    def fail(*args, **kwargs): raise OSError(28, 'No space left on device', str(tmp_path/'x'))
    monkeypatch.setattr('fastsparse_create.experiment.core.save_model', fail)
    assert main(['training-aware', *small, '--epochs', '1', '--working-dir', str(tmp_path)])==1
    assert f'No space left on device: {tmp_path}' in caplog.text
    folder, = tmp_path.iterdir()
    assert folder.name.endswith('_incomplete') and (folder/'checkpoints').exists()

@pytest.mark.parametrize('size', [100,1_000_000])
def test_a_disk_that_is_full_from_the_beginning(size, tmp_path, quick, caplog):
    "For the arguments, or for the first checkpoint"
    with full_disk(size): assert main(['training-aware', *small, '--epochs', '1', '--working-dir', str(tmp_path)])==1
    assert f'fastsparse.run training-aware: File too large: {tmp_path}' in caplog.text and 'is kept' not in caplog.text
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('quiet', [[],['--quiet']])
def test_a_disk_that_is_full_at_the_end(quiet, whole, tmp_path, monkeypatch, quick, caplog):
    write = core.Experiment.write
    def full(self, out):
        with full_disk(100_000): write(self, out)
    with monkeypatch.context() as m:
        m.setattr(core.Experiment, 'write', full)
        assert main(['training-aware', *small, '--epochs', '3', *quiet, '--working-dir', str(tmp_path)])==1
    folder, = tmp_path.iterdir()
    assert f'File too large: {folder}/model.pth' in caplog.text and f'--resume {folder}' in caplog.text
    assert {f.name for f in folder.iterdir()}=={'arguments.json','checkpoints','logs','recipe.yaml'}
    assert main(['training-aware', '--resume', str(folder)])==0
    done, = tmp_path.iterdir()
    assert same_results(done, whole)

def test_an_exported_learner_is_whole_or_not_there(tmp_path):
    learn = TrainingAware(**kwargs, working_dir=tmp_path/'out')
    learn = learn.learner(learn.case.dls(learn.data, learn.options), learn.network())
    dls = learn.dls
    with full_disk(100_000), pytest.raises(OSError, match='File too large'): core._export(learn, tmp_path/'learner.pkl')
    assert learn.dls is dls and [f.name for f in tmp_path.iterdir()]==['out']
    core._export(learn, tmp_path/'learner.pkl')
    assert learn.dls is dls and not load_learner(tmp_path/'learner.pkl').dls.train_ds.items

# memory

def test_batches_that_are_too_large_are_halved(tmp_path, monkeypatch, quick, caplog):
    forward = nn.CrossEntropyLoss.forward
    def heavy(self, pred, target):
        if pred.requires_grad and len(pred)>4: raise RuntimeError('[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes')
        return forward(self, pred, target)
    monkeypatch.setattr(nn.CrossEntropyLoss, 'forward', heavy)
    exp = TrainingAware(**kwargs, epochs=1, working_dir=tmp_path).run(show_bar=False)
    assert exp.options.bs==4 and 'batch size of 4' in caplog.text and 'bs 4' in exp.facts['Options'] and len(exp.metrics)==2

def test_other_errors_are_not_about_memory(tmp_path, monkeypatch):
    stop_at(monkeypatch, 1, 0, RuntimeError('something else'))
    with pytest.raises(RuntimeError, match='something else'): TrainingAware(**kwargs, epochs=1, working_dir=tmp_path).run(show_bar=False)

# teachers

def test_teachers(tmp_path, quick, capsys):
    own = run(tmp_path/'own', *small, '--epochs', '2', '--teacher', 'self')
    assert 'DistillationModifier' in (own/'recipe.yaml').read_text()
    none = run(tmp_path/'none', *small, '--epochs', '2')
    assert rows(own)[0]['loss']==rows(none)[0]['loss'] and rows(own)[1]['loss']!=rows(none)[1]['loss']
    other = run(tmp_path/'other', *small, '--epochs', '2', '--teacher', none/'model.pth')
    assert rows(other)[1]['loss'] not in (rows(own)[1]['loss'],rows(none)[1]['loss'])
    assert '/nowhere.pth: no such file' in refused(capsys, *small, '--teacher', '/nowhere.pth')
    recipe = tmp_path/'r.yaml'
    recipe.write_text('modifiers:\n  - !ConstantPruningModifier\n      end_epoch: 2\n')
    assert 'add a DistillationModifier' in refused(capsys, *small, '--recipe', recipe, '--teacher', 'self')

# other commands

def test_sparse_transfer_holds_the_zeros(whole, tmp_path, quick, capsys):
    folder = run(tmp_path, *small, '--model', whole/'model.pth', '--epochs', '1', command='sparse-transfer')
    before,after = (load_model(f/'model.pth') for f in (whole,folder))
    zeros = {n:p.param==0 for n,p in prunable(before).items()}
    assert folder.name.startswith('sparse_transfer_') and is_quantized(after)
    assert all((p.param[zeros[n]]==0).all() for n,p in prunable(after).items())
    assert 'there is nothing to hold' in refused(capsys, *small, command='sparse-transfer')

def test_sparse_transfer_to_other_classes(whole, tmp_path, quick):
    data = tmp_path/'data'
    from test_cli import make_images
    for i,c in enumerate('abc'): make_images(data/c, 10, 100*i)
    folder = run(tmp_path/'out', *small, '--model', whole/'model.pth', '--data', data, '--epochs', '1', command='sparse-transfer')
    model = load_model(folder/'model.pth')
    assert torch.load(folder/'model.pth', weights_only=True)['classes']==['a','b','c'] and model(torch.zeros(1,3,32,32)).shape==(1,3)
    assert measured_sparsity(model, ['re:features'])==pytest.approx(.7, abs=.01)

def test_one_shot_prunes_without_training(whole, tmp_path, capsys):
    folder = run(tmp_path, *small, '--model', whole/'model.pth', '--optim-level', '1', command='one-shot')
    dense,sparse = rows(folder)
    assert folder.name.startswith('one_shot_') and sparse['epochs']=='0' and float(sparse['sparsity'])==pytest.approx(.8, abs=1e-3)
    assert {'model.onnx','model.pth','report.html','metrics.json','command.json'}<={f.name for f in folder.iterdir()} and not (folder/'history.csv').exists()
    assert 'Training</h2>' not in (folder/'report.html').read_text()
    assert 'is not trained' in refused(capsys, *small, command='one-shot')
    assert 'takes training' in refused(capsys, *small, '--model', whole/'model.pth', '--target', 'onnxruntime', command='one-shot')
    assert 'unrecognized arguments: --epochs' in refused(capsys, *small, '--epochs', '1', command='one-shot')

def test_one_shot_makes_no_model_denser(whole, tmp_path, quick, capsys):
    text = refused(capsys, *small, '--model', whole/'model.pth', '--working-dir', tmp_path/'out', command='one-shot')
    assert 'the model has 70.0% zeros already, optim_level 0.5 asks for 51.4%: choose one that asks for more' in text and not (tmp_path/'out').exists()
    for name,args in (('int8',['--optim-level','0.2']),('gpu',['--target','gpu']),('more',['--optim-level','0.9'])):
        folder = run(tmp_path/name, *small, '--model', whole/'model.pth', *args, command='one-shot')
        before,after = ({n:p.param for n,p in prunable(load_model(f/'model.pth')).items()} for f in (whole,folder))
        assert all((after[n][p==0]==0).all() for n,p in before.items()) and measured_sparsity(load_model(folder/'model.pth'), '__ALL_PRUNABLE__')>=.699
        assert float(rows(folder)[1]['sparsity'])>=float(rows(folder)[0]['sparsity'])-1e-6

def test_one_shot_of_layers_that_are_sparser_than_asked(whole, tmp_path, quick):
    saved = torch.load(whole/'model.pth', weights_only=True)
    w = saved['model']['features.3.squeeze.weight']
    w[torch.rand(w.shape)<.95] = 0
    torch.save(saved, tmp_path/'uneven.pth')
    folder = run(tmp_path/'out', *small, '--model', tmp_path/'uneven.pth', '--optim-level', '0.9', command='one-shot')
    assert (load_model(folder/'model.pth').state_dict()['features.3.squeeze.weight'][w==0]==0).all()

def test_flops_that_cannot_be_reached_are_told_before_training(capsys):
    assert "15.5% are needed by channels that have to stay; try a lower optim level" in refused(capsys, *small, '--target', 'onnxruntime', '--optim-level', '0.8')

def test_two_of_four_for_gpus(tmp_path, quick):
    folder = run(tmp_path, *small, '--epochs', '1', '--target', 'gpu')
    model = load_model(folder/'model.pth')
    fitting = [p.param for p in prunable(model).values() if p.param.shape[1]%4==0]
    assert fitting and all(((w.movedim(1,-1).unflatten(-1, (-1,4))!=0).sum(-1)<=2).all() for w in fitting) and float(rows(folder)[1]['sparsity'])==pytest.approx(.5, abs=1e-3)

def test_quiet_says_where_the_results_are(tmp_path, quick, capsys, monkeypatch):
    before = logging.getLogger().level
    experiment = TrainingAware.run
    def chatty(self, **kwargs):
        print('a bar')
        return experiment(self, **kwargs)
    monkeypatch.setattr(TrainingAware, 'run', chatty)
    folder = run(tmp_path, *small, '--epochs', '1', '--quiet')
    assert capsys.readouterr().out.strip()==str(folder/'report.html')
    assert logging.getLogger().level==before, "who configured logging before keeps it"

def test_help_is_quick_and_complete(capsys):
    for command in ('training-aware','one-shot','sparse-transfer'):
        with pytest.raises(SystemExit) as e: main([command, '--help'])
        text = capsys.readouterr().out
        assert e.value.code==0 and all(o in text for o in ('--use-case','--optim-level','--quiet','Exit codes: 0'))
        assert ('--target' in text,'onnxruntime: whole' in text)=={'training-aware':(True,True), 'one-shot':(True,False), 'sparse-transfer':(False,False)}[command]
    code = "import sys\nfrom fastsparse_create.cli import main\ntry: main(['training-aware','--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'fastai' not in sys.modules"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode==0
