"The command line and the experiment behind it: arguments to exit codes, images to artifacts."
import base64,re,subprocess,sys
from dataclasses import replace
import pytest
from fastai.vision.all import Callback,Image,Learner,Path,get_image_files,get_random_states,load_learner,np,random,shutil,torch
from fastsparse_create.cli import main
from fastsparse_create.experiment import core as module
from fastsparse_create.experiment.data import load_images
from fastsparse_create.experiment.models import *
from fastsparse_create.experiment.training_aware import TrainingAware,training_aware
from fastsparse_create.export.onnx import OnnxModel,export_onnx,onnx_ops
from fastsparse_create.masking import measured_sparsity
from fastsparse_create.quantization.convert import is_quantized
from fastsparse_create.recipe.generate import generate_recipe
from fastsparse_create.selection import prunable
from commands import *

def make_images(folder, n, shade=128):
    folder.mkdir(parents=True)
    for i in range(n): Image.effect_noise((32,32), 40).point(lambda v: (v+shade)//2).convert('RGB').save(folder/f'{i}.png')

classes = ['<b>bold & $cat','dog']

@pytest.fixture(scope='session')
def images(tmp_path_factory):
    "Two classes, split, whose names are no valid HTML"
    root = tmp_path_factory.mktemp('images')
    for i,c in enumerate(classes):
        for part,n in (('train',12),('valid',4)): make_images(root/part/c, n, 255*i)
    return root

small = '--model squeezenet1_1 --use-case image_classification --epochs 1'.split()
digits = '--data digits --train-samples 40 --val-samples 20'.split()

@pytest.fixture(scope='session')
def made(images, tmp_path_factory):
    "A whole experiment on images in folders"
    return run(tmp_path_factory.mktemp('made'), *small, '--data', images, '--optim-level', '0.5', '--train-kwargs', '{"bs": 8}')

# artifacts

def test_the_command_prints_both_models_and_writes_everything(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'fastsparse_create.cli', 'training-aware', *small, *digits, '--optim-level', '0.5', '--working-dir', tmp_path],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode==0, done.stderr
    assert 'Traceback' not in done.stderr and 'Warning' not in done.stderr
    assert re.search(r'dense\s+sparse\naccuracy +[\d.]+ +[\d.]+', done.stdout) and 'model.onnx' in done.stdout
    folder, = tmp_path.iterdir()
    assert re.fullmatch(r'training_aware_image_classification_\d{4}(_\d\d){5}', folder.name)
    assert sorted(o.name for o in folder.iterdir())==['command.json','deployed.csv','history.csv','learner.pkl','logs','metrics.csv','metrics.json','model.onnx','model.pth','recipe.yaml','report.html']

def test_the_saved_weights_have_the_promised_zeros(made):
    saved = torch.load(made/'model.pth', weights_only=True)
    assert saved['classes']==classes and saved['arch']=='squeezenet1_1' and saved['size']==32
    assert not [k for k in saved['model'] if k.endswith('_mask')]
    model = load_model(made/'model.pth')
    assert {n:p.param.numel()-int(p.param.count_nonzero()) for n,p in prunable(model).items()}=={n:round(p.param.numel()*.7) for n,p in prunable(model).items()}
    dense,sparse = rows(made)
    assert float(sparse['sparsity'])==pytest.approx(measured_sparsity(model, '__ALL_PRUNABLE__'), abs=1e-9)
    assert float(dense['sparsity'])<.01 and dense['epochs']==sparse['epochs']=='1' and int(sparse['nonzeros'])<int(dense['nonzeros'])
    assert set(dense)=={'model','accuracy','loss','flops','sparsity','parameters','nonzeros','epochs','seconds'}
    assert [r['model'] for r in rows(made, 'history.csv')]==['dense','sparse']

def test_a_learner_without_quantization_loads_without_this_library(images, tmp_path, quick):
    recipe = tmp_path/'r.yaml'
    recipe.write_text(generate_recipe(.7, 1))
    made = run(tmp_path/'out', *small, '--data', images, '--recipe', recipe, '--train-kwargs', '{"bs": 8}')
    code = f'''
import sys, torch
sys.modules['fastsparse_create'] = None
from fastai.vision.all import load_learner
learn = load_learner({str(made/'learner.pkl')!r})
label,_,probs = learn.predict({str(next((images/'valid'/'dog').iterdir()))!r})
assert label in learn.dls.vocab and len(probs)==2
assert 'fastsparse_create' not in {{type(cb).__module__.split('.')[0] for cb in learn.cbs}}
assert 0.6<sum((p==0).sum() for p in learn.model.parameters())/sum(p.numel() for p in learn.model.parameters())<0.71'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode==0, done.stderr

def test_both_files_give_the_same_predictions(made, images):
    learn,model = load_learner(made/'learner.pkl'),load_model(made/'model.pth')
    dl = learn.dls.test_dl(get_image_files(images/'valid').sorted())
    with torch.no_grad(): assert torch.allclose(learn.model.eval()(dl.one_batch()[0]), model(dl.one_batch()[0]), atol=1e-5)

def test_the_report_escapes_and_needs_nothing_else(made):
    page = (made/'report.html').read_text()
    assert '<b>bold' not in page and '&lt;b&gt;bold &amp; $cat' in page
    assert '<script' not in page and not re.findall(r'(?:src|href)="(?!data:)', page) and 'url(' not in page
    pictures = re.findall(r'src="data:image/(svg\+xml|png);base64,([^"]+)"', page)
    assert len(pictures)==6 and all(base64.b64decode(data) for _,data in pictures)
    for text in ('8-bit','70.00%','load_model','load_learner','fastsparse.run training-aware','Seed','PyTorch '+torch.__version__): assert text in page

def test_the_recipe_is_readable_and_can_be_used_again(made, images, tmp_path, quick):
    assert '# ' in (made/'recipe.yaml').read_text()
    again = run(tmp_path, '--use-case', 'ic', '--model', 'squeezenet1_1', '--data', images, '--train-kwargs', '{"bs": 8}', '--recipe', made/'recipe.yaml')
    assert rows(again)[1]['accuracy']==rows(made)[1]['accuracy'] and rows(again)[1]['loss']==rows(made)[1]['loss']

# the comparison

def test_runs_repeat_and_leave_the_random_state_alone(tmp_path, quick):
    torch.manual_seed(7); random.seed(7); np.random.seed(7)
    before = get_random_states()
    a,b = (training_aware('ic', 'squeezenet1_1', 'digits', epochs=2, train_samples=40, val_samples=20, working_dir=tmp_path, train_kwargs={'bs':8}) for _ in range(2))
    after = get_random_states()
    assert before['random_state']==after['random_state'] and torch.equal(before['torch_state'], after['torch_state'])
    assert (before['numpy_state'][1]==after['numpy_state'][1]).all()
    assert a.folder!=b.folder and a.metrics.drop(columns='seconds').equals(b.metrics.drop(columns='seconds'))
    assert all(torch.equal(x, y) for x,y in zip(a.learn.model.state_dict().values(), b.learn.model.state_dict().values()))
    other = training_aware('ic', 'squeezenet1_1', 'digits', epochs=2, train_samples=40, val_samples=20, working_dir=tmp_path, train_kwargs={'bs':8}, seed=1)
    assert not other.metrics.loss.equals(a.metrics.loss)

def test_both_models_start_from_the_same_weights_and_see_the_same_batches(tmp_path, quick, monkeypatch):
    starts,seen = [],[]
    class Watch(Callback):
        def before_fit(self): starts.append([p.detach().clone() for p in self.model.parameters()]); seen.append([])
        def before_batch(self): seen[-1].append(self.yb[0].tolist())
    train = Learner.fit_recipe
    monkeypatch.setattr(Learner, 'fit_recipe', lambda self, *args, cbs=(), **kwargs: train(self, *args, cbs=[*cbs, Watch()], **kwargs))
    run(tmp_path, *small, *digits, '--train-kwargs', '{"bs": 8}')
    assert len(starts)==2 and all(torch.equal(a, b) for a,b in zip(*starts))
    assert seen[0]==seen[1]

@pytest.mark.parametrize('level,models,said', [('0',['dense'],'nothing was pruned'),('0.2',['dense','quantized'],'rounded to 8-bit integers')])
def test_low_optim_levels_prune_nothing(level, models, said, tmp_path):
    folder = run(tmp_path, *small, *digits, '--optim-level', level)
    assert [r['model'] for r in rows(folder)]==models and float(rows(folder)[-1]['sparsity'])<.01
    assert said in (folder/'report.html').read_text()
    assert 'EpochRangeModifier' in (folder/'recipe.yaml').read_text()
    assert is_quantized(load_model(folder/'model.pth'))==(level=='0.2')
    assert ('QLinearConv' in onnx_ops(folder/'model.onnx', optimized=True))==(level=='0.2')

@pytest.mark.parametrize('saturates', [True,False])
def test_results_of_a_processor_whose_sums_saturate_are_explained(saturates, tmp_path, monkeypatch, capsys):
    made = []
    def exported(*args, **kwargs):
        made.append(replace(export_onnx(*args, **kwargs), saturates=saturates and kwargs['int8']))
        return made[-1]
    monkeypatch.setattr(module, 'export_onnx', exported)
    folder = run(tmp_path, *small, *digits, '--optim-level', '0.2')
    for text in ((folder/'report.html').read_text(),capsys.readouterr().out): assert ('saturate on this processor' in text and 'where they are exact' in text)==saturates
    assert [m.int8 for m in made]==[False,True]

def test_for_onnxruntime_channels_are_removed(images, tmp_path):
    folder = run(tmp_path, '--use-case', 'ic', '--model', 'resnet18', '--data', images, '--target', 'onnxruntime', '--epochs', '2', '--train-kwargs', '{"bs": 8}')
    dense,thinned = rows(folder)
    assert thinned['model']=='thinned' and .3<int(thinned['flops'])/int(dense['flops'])<=.4 and int(thinned['parameters'])<.5*int(dense['parameters'])
    model,learn = load_model(folder/'model.pth'),load_learner(folder/'learner.pkl')
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad(): expected = learn.model.eval()(x)
    assert torch.allclose(model(x), expected, atol=1e-5) and is_quantized(model)
    got = OnnxModel(folder/'model.onnx')(x)
    assert (got-expected).norm()<.2*expected.norm()
    deployed = rows(folder, 'deployed.csv')
    assert [r['what'] for r in deployed]==['dense, PyTorch','dense, ONNX Runtime','model.onnx'] and float(deployed[2]['MB'])<.25*float(deployed[0]['MB'])
    assert 'of the FLOPs are left' in (folder/'report.html').read_text()

def test_a_quantized_start_is_trained_in_floats(tmp_path, quick):
    first = run(tmp_path/'a', *small, *digits, '--optim-level', '0.2')
    for file in ('model.pth','learner.pkl'): assert not is_quantized(create_model(str(first/file), 10))
    second = run(tmp_path/'b', '--use-case', 'ic', '--model', first/'model.pth', '--epochs', '1', *digits, '--optim-level', '0.2')
    assert [r['model'] for r in rows(second)]==['dense','quantized']

def test_int8_without_onnx_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(module, 'find_spec', lambda n: None)
    assert 'pip install fastsparse_create[onnx]' in refused(capsys, *small, *digits)
    folder = run(tmp_path, *small, *digits, '--optim-level', '0')
    assert not (folder/'model.onnx').exists() and 'No ONNX file was written' in (folder/'report.html').read_text()

def test_a_recipe_decides_sparsity_and_epochs(tmp_path, quick):
    recipe = tmp_path/'my.yaml'
    recipe.write_text('''
level: 0.5
modifiers:
  - !SetLearningRateModifier {start_epoch: 0, learning_rate: 0.01}
  - !GMPruningModifier {params: ['re:features'], init_sparsity: 0, final_sparsity: eval(level), start_epoch: 0, end_epoch: 2, update_frequency: 0.5}
''')
    folder = run(tmp_path/'out', *small[:-2], *digits, '--recipe', recipe, '--recipe-args', 'level=0.8')
    assert [r['epochs'] for r in rows(folder)]==['2','2']
    model = load_model(folder/'model.pth')
    assert measured_sparsity(model, ['re:features'])==pytest.approx(.8, abs=1e-3) and measured_sparsity(model, ['classifier.1.weight'])<.01
    assert float(rows(folder)[1]['sparsity'])==pytest.approx(.8, abs=1e-3)

def test_recipe_args_change_the_generated_recipe(tmp_path, quick):
    folder = run(tmp_path, *small, *digits, '--recipe-args', '{"sparsity": 0.9}', '--eval-metric', 'f1')
    sparse = rows(folder)[1]
    assert float(sparse['sparsity'])==pytest.approx(.9, abs=1e-3) and list(sparse)[1:3]==['f1','accuracy']

def test_a_trained_model_is_a_start(made, images, tmp_path, quick):
    for kind in ('pth','pkl'):
        exp = TrainingAware('ic', str(made/('model.pth' if kind=='pth' else 'learner.pkl')), str(images), working_dir=tmp_path/kind)
        state = load_model(made/'model.pth').state_dict()
        assert all(torch.equal(v, state[k]) for k,v in exp.network().state_dict().items()) and not is_quantized(exp.network())
        assert exp.arch==('squeezenet1_1' if kind=='pth' else None)

def test_what_is_incomplete_says_so(tmp_path, monkeypatch):
    def fail(*args): raise RuntimeError('no zeros')
    monkeypatch.setattr(module, 'check_promise', fail)
    with pytest.raises(RuntimeError, match='no zeros'): main(['training-aware', *small, *digits, '--working-dir', str(tmp_path)])
    folder, = tmp_path.iterdir()
    assert folder.name.endswith('_incomplete') and (folder/'model.pth').exists()

def test_a_loss_that_is_no_number_is_no_result(tmp_path):
    with pytest.raises((RuntimeError,ValueError), match='diverged|NaN'):
        main(['training-aware', *small, *digits, '--optim-level', '0', '--train-kwargs', '{"lr": 1e30, "bs": 8}', '--working-dir', str(tmp_path)])
    assert not list(tmp_path.iterdir())

# usage errors

@pytest.mark.parametrize('args,said', [
    (['--model','squeezenet1_1','--data','digits'], 'required: --use-case'),
    ([*small,'--data','digits','--epochs','many'], "invalid int value: 'many'"),
    ([*small,'--data','digits','--project-id','1'], 'unrecognized arguments: --project-id'),
    ([*small,'--data','digits','--optim-level','1.5'], "from 0 to 1, or a whole percentage from 2 to 100, got '1.5'"),
    ([*small,'--data','digits','--optim-level','101'], 'from 0 to 1'),
    ([*small,'--data','digits','--optim-level','-0.1'], 'from 0 to 1'),
    ([*small,'--data','digits','--optim-level','nan'], 'from 0 to 1'),
    ([*small,'--data','digits','--optim-level','high'], "got 'high'"),
    ([*small,*digits,'--target','tpu'], "target 'tpu' is not known, accepted: any, onnxruntime, gpu"),
    ([*small,'--data','digitz'], "did you mean 'digits'?"),
    ([*small,'--data','/no/such/folder'], '/no/such/folder: no such folder'),
    ([*small,'--data',__file__], 'this is a file'),
    ([*small,*digits,'--model','squeezenet1_2'], "did you mean 'squeezenet1_1'"),
    ([*small,*digits,'--model','/nowhere.pth'], '/nowhere.pth: no such file'),
    ([*small,*digits,'--train-kwargs','{"size": 8}'], "can't take images of 3x8x8"),
    ([*small,*digits,'--eval-metric','acuracy'], "did you mean 'accuracy'?"),
    ([*small,*digits,'--recipe','/nowhere.yaml'], '/nowhere.yaml'),
    ([*small,*digits,'--recipe-args','sparsty=0.5'], "did you mean 'sparsity'?"),
    ([*small,*digits,'--recipe-args','sparsity=2'], 'final_sparsity'),
    ([*small,*digits,'--train-kwargs','{"leraning_rate": 1}'], 'lr, wd'),
    ([*small,*digits,'--train-kwargs','{"sizes": 1}'], "did you mean 'size'?"),
    ([*small,*digits,'--train-kwargs','{"bs": "8"}'], 'bs must be of type int'),
    ([*small,*digits,'--train-kwargs','lr=1'], 'expected a dict'),
    ([*small,*digits,'--epochs','0'], 'epochs must be at least 1'),
    ([*small,*digits,'--train-samples','0'], 'train_samples must be at least 1'),
    ([*small,*digits,'--seed','-1'], 'seed must be from 0'),
    ([*small,*digits,'--working-dir',__file__], 'test_cli.py'),
])
def test_usage_errors_are_one_sentence(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *args)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name,aliases', [
    ('image_classification', ['image_classification','image-classification','Image Classification','IC','classification','cv-classification','cv_classification']),
    ('object_detection', ['object_detection','OD','detection','cv-detection','yolo']),
    ('segmentation', ['segmentation','image_segmentation','cv-segmentation']),
    ('question_answering', ['question_answering','QA','nlp-question_answering','Question Answering','nlp_qa']),
    ('text_classification', ['text_classification','glue','nlp-text_classification','document_classification']),
    ('sentiment_analysis', ['sentiment_analysis','Sentiment','nlp-sentiment_analysis']),
    ('token_classification', ['token_classification','nlp-token_classification']),
    ('named_entity_recognition', ['named_entity_recognition','NER','nlp-named_entity_recognition']),
])
def test_aliases(name, aliases): assert {module.find_use_case(a).name for a in aliases}=={name}

def test_unknown_use_cases(capsys):
    assert "'nlp-question_answerng' is not known, did you mean 'question_answering'?" in refused(capsys, '--use-case', 'nlp-question_answerng', *small[:2], *digits)
    text = refused(capsys, '--use-case', 'translation', *small[:2], *digits)
    assert all(n in text for n in ('image_classification','object_detection','segmentation','question_answering','text_classification','sentiment_analysis','token_classification','named_entity_recognition'))

def test_a_recipe_that_does_not_fit_is_refused_before_training(capsys, tmp_path):
    recipe = tmp_path/'r.yaml'
    recipe.write_text('modifiers:\n  - !ConstantPruningModifier\n      params: [sections.weight]\n      end_epoch: 2\n')
    assert "'sections.weight' matches no parameter" in refused(capsys, *small[:-2], *digits, '--recipe', recipe)
    recipe.write_text('modifiers:\n  - !ConstantPruningModifier\n      params: __ALL__\n')
    assert 'nothing about its length' in refused(capsys, *small[:-2], *digits, '--recipe', recipe)
    recipe.write_text('modifiers:\n  - !ConstantPruningModifier\n      end_epoch: 2\n')
    assert 'epochs 5: the recipe trains for 2' in refused(capsys, *small[:-1], '5', *digits, '--recipe', recipe)

# data

def test_layouts(images, tmp_path):
    a = load_images(images)
    assert [len(a.train), len(a.valid)]==[24,8] and a.is_photo and {a.labels[f] for f in a.valid}==set(a.classes)
    flat = load_images(images/'train')
    assert [len(flat.train), len(flat.valid)]==[20,4] and flat.classes==a.classes
    assert not set(flat.train)&set(flat.valid) and load_images(images/'train').valid==flat.valid and load_images(images/'train', seed=1).valid!=flat.valid
    shutil.copytree(images/'train', tmp_path/'x'/'train')
    assert [len(o) for o in (load_images(tmp_path/'x').train, load_images(tmp_path/'x').valid)]==[20,4]
    shutil.copytree(images/'valid', tmp_path/'x'/'test')
    assert 'test/' in load_images(tmp_path/'x').split and len(load_images(tmp_path/'x').valid)==8

def test_labels_of_nested_images_are_the_classes(images, tmp_path):
    shutil.copytree(images/'train', tmp_path/'x')
    make_images(tmp_path/'x'/'dog'/'more'/'train', 2)
    data = load_images(tmp_path/'x')
    assert {data.labels[f] for f in data.train+data.valid if 'more' in f.parts}=={'dog'}

@pytest.mark.parametrize('spoil,said', [
    (lambda root: [(root/'train'/'dog'/f'{i}.png').write_bytes(b'') for i in range(2)], '0.png: not a readable image'),
    (lambda root: [(root/'train'/'dog'/f'{i}.png').write_bytes((root/'train'/'dog'/'9.png').read_bytes()[:300]) for i in range(3)], "(and 2 more of 32); repair or remove what is broken, up to 5% of the images"),
    (lambda root: (root/'train'/'empty').mkdir(), 'empty: the class folder holds no images'),
    (lambda root: make_images(root/'valid'/'cow', 2), 'the training images have no class of this name'),
    (lambda root: shutil.rmtree(root/'train'), 'no train/'),
    (lambda root: [shutil.rmtree(o) for o in (root/'train').iterdir() if o.name!='dog'], "one class only, 'dog'"),
    (lambda root: [shutil.rmtree(o) for o in root.iterdir()], 'no class folders'),
])
def test_images_that_cannot_be_trained_with(spoil, said, images, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(images, root)
    spoil(root)
    text = refused(capsys, *small, '--data', root)
    assert said in text and str(root) in text

@pytest.mark.parametrize('use_case,name', [('ic','x.csv'),('text_classification','x.jsonl'),('qa','x.json'),('ner','x.tsv')])
def test_a_file_that_is_too_large(use_case, name, tmp_path, capsys):
    with (tmp_path/name).open('wb') as f: f.truncate(6_000_000_000)
    assert f'{tmp_path/name}: has more than 1,000,000,000 bytes' in refused(capsys, '--use-case', use_case, '--model', 'squeezenet1_1', '--data', tmp_path/name)

def test_an_empty_class_folder_is_no_place_for_others(images, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(images, root)
    (root/'train'/'empty').mkdir()
    for n in 'ab': (root/'train'/'dog'/n).mkdir()
    assert refused(capsys, *small, '--data', root).endswith('empty: the class folder holds no images')

def test_a_data_set_that_cannot_be_downloaded(capsys, monkeypatch):
    def fail(url): raise OSError('no route to host')
    monkeypatch.setattr('fastsparse_create.experiment.data.untar_data', fail)
    assert "mnist_tiny: can't be downloaded" in refused(capsys, *small, '--data', 'mnist_tiny')
