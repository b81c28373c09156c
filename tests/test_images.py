"Images listed in a CSV, of one label each and of several, and images that are broken."
import csv,io,shutil
from types import SimpleNamespace
import pytest
from fastai.vision.all import Image,Path,load_learner,np,torch
from PIL import ImageDraw
from fastsparse_create.experiment.data import load_images
from fastsparse_create.experiment.images import *
from fastsparse_create.experiment.models import *
from fastsparse_create.experiment.tables import *
from fastsparse_create.experiment.training_aware import TrainingAware
from fastsparse_create.experiment.use_case import find_use_case
from fastsparse_create.export.onnx import OnnxModel,onnx_ops
from fastsparse_create.quantization.convert import is_quantized
from commands import *

def draw(file, shapes=(), seed=0):
    rng = np.random.default_rng(seed)
    im = Image.fromarray(rng.integers(0, 90, (32,32,3), dtype='uint8'))
    for s in shapes: getattr(ImageDraw.Draw(im), 'ellipse' if s=='disc' else 'rectangle')([4,4,16,16] if s=='disc' else [16,16,28,28], fill=(220,60,60) if s=='disc' else (60,220,220))
    file.parent.mkdir(parents=True, exist_ok=True)
    im.save(file)

def write(file, rows, delimiter=','):
    "A CSV of lists"
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator='\n').writerows(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(out.getvalue(), encoding='utf-8')
    return file

kinds = [('disc',),('square',),('disc','square'),()]

def shapes(i): return kinds[i%4]
def shape(i): return ('disc','square')[i%2]

@pytest.fixture(scope='session')
def root(tmp_path_factory):
    "Images, and tables of one label each, of several, and of columns for the classes"
    folder = tmp_path_factory.mktemp('images')
    for i in range(32): draw(folder/'images'/f'{i}.png', shapes(i), i)
    for i in range(32): draw(folder/'single'/f'{i}.png', [shape(i)], i)
    write(folder/'single.csv', [['image','label'], *([f'single/{i}.png', shape(i)] for i in range(32))])
    write(folder/'tags.csv', [['fname','labels','is_valid'], *([f'{i}.png', ' '.join(shapes(i)), i>=24] for i in range(32))])
    write(folder/'bits.csv', [['filename','disc','square','split'], *([f'{i}.png', int('disc' in shapes(i)), int('square' in shapes(i)), 'test' if i>=24 else 'train'] for i in range(32))])
    return folder

small = '--model squeezenet1_1 --epochs 1'.split()
single,multi = [*small, '--use-case', 'ic'],[*small, '--use-case', 'multilabel-classification']
kwargs = ['--train-kwargs', '{"bs": 8}']

def loaded(name, path, train_kwargs=None, **kw):
    case = find_use_case(name)
    return case.prepare(case.load(path, **kw), 'squeezenet1_1', case.options(**train_kwargs or {}))

# the command

@pytest.fixture(scope='session')
def made(root, tmp_path_factory):
    "A whole experiment with several labels"
    return run(tmp_path_factory.mktemp('made'), *multi, *kwargs, '--data', root/'tags.csv', '--eval-metric', 'f1')

def test_a_multi_label_model_becomes_sparse_and_int8(made):
    dense,sparse = rows(made)
    assert made.name.startswith('training_aware_multilabel_classification_')
    assert list(dense)[1:4]==['f1','accuracy_multi','loss'] and float(sparse['sparsity'])==pytest.approx(.7, abs=1e-3)
    assert [list(r)[1:3] for r in rows(made, 'deployed.csv')]==[['f1','accuracy_multi']]*3
    assert 'QLinearConv' in onnx_ops(made/'model.onnx', optimized=True)

def test_the_files_of_a_multi_label_model_agree(made, root):
    saved = torch.load(made/'model.pth', weights_only=True)
    assert saved['classes']==['disc','square'] and saved['multi_label'] is True and saved['use_case']=='multilabel_classification'
    model,learn = load_model(made/'model.pth'),load_learner(made/'learner.pkl')
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad(): expected = learn.model.eval()(x)
    assert is_quantized(model) and torch.allclose(model(x), expected, atol=1e-5)
    got = OnnxModel(made/'model.onnx')(x)
    assert got.shape==(3,2) and (got-expected).norm()<.2*expected.norm()+1e-3
    with learn.no_bar(): labels,found,probs = learn.predict(str(root/'images'/'2.png'))
    assert list(labels)==[c for c,f in zip(saved['classes'], found) if f] and (found==(probs>.5)).all()

def test_the_report_of_several_labels(made):
    page = (made/'report.html').read_text()
    for text in ('found = logits&gt;0', '# 0: disc, 1: square', 'labels,found,probabilities', "the column &#x27;labels&#x27;, parted by spaces", '8 images have none', "the column &#x27;is_valid&#x27;"): assert text in page

def test_learner_and_weights_hold_no_files_of_the_data(made, root):
    for name in ('learner.pkl','model.pth'): assert str(root).encode() not in (made/name).read_bytes()

def test_a_multi_label_model_is_a_start(made, root, tmp_path):
    for name in ('model.pth','learner.pkl'):
        exp = TrainingAware('multilabel_classification', str(made/name), str(root/'bits.csv'), working_dir=tmp_path, train_kwargs={'bs':8})
        state = load_model(made/'model.pth').state_dict()
        assert all(torch.equal(v, state[k]) for k,v in exp.network().state_dict().items())

@pytest.mark.parametrize('metric', ['recall','precision'])
def test_metrics_of_several_labels(metric, root, tmp_path, quick):
    folder = run(tmp_path, *multi, *kwargs, '--data', root/'bits.csv', '--optim-level', '0', '--eval-metric', metric)
    assert 0<=float(rows(folder)[0][metric])<=1

def test_one_label_each(root, tmp_path, quick):
    folder = run(tmp_path, *single, *kwargs, '--data', root/'single.csv')
    saved = torch.load(folder/'model.pth', weights_only=True)
    assert saved['classes']==['disc','square'] and saved['multi_label'] is False and list(rows(folder)[0])[1]=='accuracy'
    assert load_learner(folder/'learner.pkl').predict(root/'single'/'0.png')[0] in ('disc','square')

def test_aliases(): assert {find_use_case(n).name for n in ('multilabel_classification','Multi-label classification','multilabel-image-classification','cv multilabel classification')}=={'multilabel_classification'}

# where files are

def two_classes(n=10): return [[f'{i}.png', shape(i)] for i in range(n)]

def draw_all(folder, n=10):
    for i in range(n): draw(folder/f'{i}.png', [shape(i)], i)

@pytest.mark.parametrize('place', ['.','images','train','labels','imgs'])
def test_folders_of_images_are_found(place, tmp_path):
    file = write(tmp_path/'labels.csv', [['image','label'], *two_classes()])
    draw_all(tmp_path/place)
    for path in (file, tmp_path): assert {f.parent for f in loaded('ic', path).train}=={tmp_path/place}

def test_another_folder(tmp_path):
    file = write(tmp_path/'tables'/'labels.csv', [['image','label'], *two_classes()])
    draw_all(tmp_path/'photos')
    for given in ('../photos', str(tmp_path/'photos')): assert {f.parent for f in loaded('ic', file, {'folder':given}).train}=={tmp_path/'photos'}

def test_absolute_names_inside(tmp_path):
    draw_all(tmp_path/'photos')
    file = write(tmp_path/'labels.csv', [['path','class'], *([str(tmp_path/'photos'/n), c] for n,c in two_classes())])
    assert len(loaded('ic', file).train)==8

def test_names_of_windows_and_names_without_ending(tmp_path):
    draw_all(tmp_path/'images')
    a = write(tmp_path/'a.csv', [['image','label'], *([f'images\\{n}', c] for n,c in two_classes())])
    b = write(tmp_path/'b.csv', [['id','breed'], *([n.removesuffix('.png'), c] for n,c in two_classes())])
    assert loaded('ic', a).train==loaded('ic', b).train==[tmp_path/'images'/f.name for f in loaded('ic', a).train]

def test_two_files(tmp_path):
    for part,n in (('train',10),('val',4)):
        write(tmp_path/f'{part}.csv', [['image','label'], *two_classes(n)])
        draw_all(tmp_path/part, n)
    data = loaded('ic', tmp_path)
    assert [len(data.train), len(data.valid), data.split]==[10,4,'the files train.csv and val.csv']
    assert {f.parent.name for f in data.train}=={'train'} and {f.parent.name for f in data.valid}=={'val'}

def test_a_file_in_each_folder(tmp_path):
    for part,n in (('train',10),('valid',4)):
        write(tmp_path/part/'_classes.csv', [['filename',' disc',' square'], *([f, int(c=='disc'), int(c=='square')] for f,c in two_classes(n))])
        draw_all(tmp_path/part, n)
    for name in ('ic','multilabel_classification'):
        data = loaded(name, tmp_path)
        assert [len(data.train), len(data.valid), data.split, data.classes]==[10,4,'the folders train/ and valid/',['disc','square']]
    assert data.labels[tmp_path/'train'/'0.png']==['disc'] and loaded('ic', tmp_path).labels[tmp_path/'train'/'0.png']=='disc'

def test_class_folders_go_before_a_table(tmp_path):
    for part in ('train','valid'):
        for c in ('cat','dog'): draw_all(tmp_path/part/c, 4)
    file = write(tmp_path/'noisy.csv', [['path','label'], *([f'train/{c}/{i}.png', f'noisy {c}'] for c in ('cat','dog') for i in range(4))])
    assert loaded('ic', tmp_path).classes==['cat','dog'] and loaded('ic', file).classes==['noisy cat','noisy dog']

@pytest.mark.parametrize('delimiter,ending', [(';','csv'),('\t','tsv'),(',','CSV')])
def test_delimiters_of_columns(delimiter, ending, tmp_path):
    draw_all(tmp_path)
    assert len(loaded('ic', write(tmp_path/f'x.{ending}', [['image','label'], *two_classes()], delimiter)).train)==8

# splits

def test_a_split_by_the_seed_keeps_proportions_and_repeats(tmp_path):
    draw_all(tmp_path/'images', 40)
    tags = lambda i: ['common']*(i%2)+['rare']*(i%8==0)
    file = write(tmp_path/'x.csv', [['image','tags'], *([f'{i}.png', ';'.join(tags(i))] for i in range(40))])
    a,b = (loaded('multilabel_classification', file, seed=s) for s in (0,1))
    assert a.valid!=b.valid and a==loaded('multilabel_classification', file, seed=0) and not set(a.train)&set(a.valid)
    for d in (a,b): assert [sum(c in d.labels[f] for f in d.valid) for c in ('common','rare')]==[4,1] and len(d.valid)==8

@pytest.mark.parametrize('column,values', [('is_valid',('False','True')),('is_valid',('0','1')),('Split',('train','VAL')),('subset',('training','test'))])
def test_a_column_splits(column, values, tmp_path):
    draw_all(tmp_path)
    data = loaded('ic', write(tmp_path/'x.csv', [['image','label',column], *([*r, values[i>=6]] for i,r in enumerate(two_classes()))]))
    assert [len(data.train), len(data.valid), data.split]==[6,4,f'the column {column!r}']

def test_images_for_a_test_are_left_out(tmp_path):
    draw_all(tmp_path)
    data = loaded('ic', write(tmp_path/'x.csv', [['image','label','split'], *([*r, ('train','train','valid','test')[i%4] if i<8 else 'train'] for i,r in enumerate(two_classes()))]))
    assert [len(data.train), len(data.valid)]==[6,2] and 'leaves out 2 for a test' in data.split

def test_captions_are_no_labels(tmp_path, capsys):
    draw_all(tmp_path, 30)
    write(tmp_path/'x.csv', [['image','tag'], *([f'{i}.png', f'a photo of the number {i}'] for i in range(30))])
    assert "'tag' has 30 different labels for 30 images; is it the column of labels?" in refused(capsys, *single, '--data', tmp_path)

def test_samples(root):
    data = loaded('multilabel_classification', root/'tags.csv', train_samples=8, val_samples=4)
    assert [len(data.train), len(data.valid)]==[8,4] and data.classes==['disc','square']

# labels

@pytest.mark.parametrize('delim', [';','|',', ',' '])
def test_labels_are_parted_by_what_is_found(delim, tmp_path):
    draw_all(tmp_path)
    cells = ['cat','dog',f'cat{delim}dog',f'dog{delim}cat{delim}dog','']*2
    file = write(tmp_path/'x.csv', [['image','tags'], *([f'{i}.png', c] for i,c in enumerate(cells))])
    data = loaded('multilabel_classification', file)
    assert data.classes==['cat','dog'] and sorted(map(sorted, data.labels.values()))==sorted([['cat'],['dog'],['cat','dog'],['cat','dog'],[]]*2)

def test_labels_are_parted_by_what_the_user_says(tmp_path):
    draw_all(tmp_path)
    file = write(tmp_path/'x.csv', [['image','tags'], *([f'{i}.png', ('red, light/blue','blue')[i%2]] for i in range(10))])
    assert loaded('multilabel_classification', file).classes==['blue','light/blue','red']
    assert loaded('multilabel_classification', file, {'label_delim':'/'}).classes==['blue','red, light']

def test_names_with_spaces_are_one_label(tmp_path):
    draw_all(tmp_path, 12)
    names = ['golden retriever','golden eagle','bald eagle']
    file = write(tmp_path/'x.csv', [['image','label'], *([f'{i}.png', names[i%3]] for i in range(12))])
    assert loaded('ic', file).classes==sorted(names)

def test_what_looks_like_several_labels_may_be_one(tmp_path):
    draw_all(tmp_path, 12)
    names = ['red','car','red car']
    file = write(tmp_path/'x.csv', [['image','label'], *([f'{i}.png', names[i%3]] for i in range(12))])
    with pytest.raises(ValueError, match="x.csv:4: 'red car' looks like several labels, .* multilabel_classification"): loaded('ic', file)
    assert loaded('ic', file, {'single_label':True}).classes==sorted(names) and loaded('multilabel_classification', file).classes==['car','red']

def test_names_of_classes_stay_in_their_comment(tmp_path):
    draw_all(tmp_path)
    file = write(tmp_path/'x.csv', [['image','tags'], *([f'{i}.png', ('cat','cat;dog\nimport os')[i%2]] for i in range(10))])
    data = loaded('multilabel_classification', file)
    code = multilabel_classification.use(SimpleNamespace(data=data, deployed=1, arch=None))[0]
    assert data.classes==['cat','dog\nimport os'] and code.endswith('\n# 0: cat, 1: dog import os')

# broken images

def spoil(*files):
    for f in files: Path(f).write_bytes(b'no image')

def test_few_broken_images_are_skipped_and_told(tmp_path):
    for c in ('cat','dog'): draw_all(tmp_path/'x'/c, 20)
    write(tmp_path/'x.csv', [['image','label'], *([f'x/{c}/{i}.png', c] for c in ('cat','dog') for i in range(20))])
    spoil(tmp_path/'x'/'cat'/'3.png', tmp_path/'x'/'dog'/'7.png')
    for path in (tmp_path/'x', tmp_path/'x.csv'):
        data = loaded('ic', path)
        assert len(data.train)+len(data.valid)==38 and {f.name for f in data.skipped}=={'3.png','7.png'}
        said = image_classification.facts(data, SingleLabelOptions())['Left out']
        assert said.startswith("2 that can't be read: ") and '3.png' in said and '7.png' in said
    spoil(tmp_path/'x'/'cat'/'4.png')
    for path in (tmp_path/'x', tmp_path/'x.csv'):
        with pytest.raises(ValueError, match=r'not a readable image.*\(and 2 more of 40\)'): loaded('ic', path)

def test_a_class_without_images_that_can_be_read(tmp_path):
    for c,n in (('cat',40),('dog',1),('cow',2)): draw_all(tmp_path/'train'/c, n)
    draw_all(tmp_path/'valid'/'cat', 4)
    spoil(tmp_path/'train'/'dog'/'0.png')
    with pytest.raises(ValueError, match="dog/0.png: not a readable image.*; none of the images to train with is left of the class 'dog'"): load_images(tmp_path)

def test_broken_images_do_not_stop_the_command(root, tmp_path, quick):
    folder = tmp_path/'x'
    shutil.copytree(root, folder)
    spoil(folder/'images'/'5.png')
    made = run(tmp_path/'out', *multi, *kwargs, '--data', folder/'tags.csv', '--optim-level', '0')
    assert [r['model'] for r in rows(made)]==['dense']

# what is refused

head = 'image,label\n'
lines = ''.join(f'{i}.png,{shape(i)}\n' for i in range(10))

@pytest.mark.parametrize('text,said', [
    (head+lines+'10.png,disc\n', "x.csv:12: there is no image"),
    (head+lines+'9.jpg,disc\n', "did you mean '9.png'?"),
    (head+lines+'../../../../etc/passwd,disc\n', "x.csv:12: the image '../../../../etc/passwd' is not inside of"),
    (head+lines+'/etc/passwd,disc\n', "x.csv:12: the image '/etc/passwd' is not inside of"),
    (head+lines+'a/../../x.png,disc\n', "x.csv:12: the image 'a/../../x.png' is not inside of"),
    (head+lines+'\0.png,disc\n', 'x.csv:12: '),
    (head+lines+'a'*5000+',disc\n', 'x.csv:12: there is no image'),
    (head+lines+',disc\n', "x.csv:12: 'image' is empty"),
    (head+lines+'9.png,\n', "x.csv:12: the image has no label, 'label' is empty"),
    (head+lines+'9.png,disc\n', "x.csv:12: the image '9.png' is already in"),
    (head+lines+'./9.png,square\n', "x.csv:12: the image '9.png' is already in"),
    (head+lines+'"9.png,disc\n', "x.csv:12: isn't valid CSV"),
    (head+lines+'9.png\n', 'x.csv:12: has 1 fields, the first row names 2: image, label'),
    (head, 'holds no examples'),
    ('', 'holds no examples'),
    ('picture,label\n'+lines, "x.csv:2: has no column 'image'; its columns are picture, label; name the one"),
    ('imge,label\n'+lines, """by train_kwargs: '{"image": "imge"}'"""),
    ('image,lable\n'+lines, """has no column 'label'; its columns are image, lable; name the one that is meant by train_kwargs: '{"label": "lable"}'"""),
    (head+'0.png,disc\n1.png,disc\n', "x.csv: has one class only, 'disc'"),
    (head+''.join(f'{i}.png,{i}\n' for i in range(10)), '10 examples to train with and 0 to validate with are too few'),
    ('image,label,is_valid\n'+lines.replace('\n', ',0\n')+'a.png,cow,1\n', "x.csv:12: the images to train with have no class 'cow'"),
    ('image,label,is_valid\n'+lines.replace('\n', ',0\n')+'a.png,dics,1\n', "did you mean 'disc'?"),
    ('image,label,is_valid\n'+lines.replace('\n', ',0\n'), "the column 'is_valid' names no image to validate with"),
    ('image,label,split\n'+lines.replace('\n', ',trian\n'), "x.csv:2: 'split' must be train, valid or test, or 0 or 1, got 'trian', did you mean 'train'?"),
    (head+lines+'a.png,disc;square\n', "x.csv:12: 'disc;square' looks like several labels, which are for the use case multilabel_classification"),
    ('image,disc,square\n0.png,0,1\n1.png,1,0\na.png,1,1\n', 'x.csv:4: the image has 2 labels, disc, square; such images are for the use case multilabel_classification'),
    ('image,disc,square\n0.png,0,1\n1.png,1,0\na.png,0,0\n', 'x.csv:4: the image has no label'),
    ('image,disc,square\n0.png,0,1\n1.png,1,0\na.png,0,2\n', "x.csv:4: 'square' must be 1 or 0"),
])
def test_tables_that_cannot_be_trained_with(text, said, tmp_path, capsys):
    draw_all(tmp_path)
    draw(tmp_path/'a.png')
    (tmp_path/'x.csv').write_text(text)
    assert said in refused(capsys, *single, '--data', tmp_path/'x.csv')

def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path/'x.csv').write_bytes((head+lines).encode()+'9.png,caf\xe9\n'.encode('latin1'))
    assert "x.csv:12: the byte 0xe9 isn't UTF-8" in refused(capsys, *single, '--data', tmp_path)

def test_a_class_that_is_only_in_the_file_for_validation(tmp_path, capsys):
    draw_all(tmp_path, 14)
    write(tmp_path/'train.csv', [['image','disc','square'], *([f'{i}.png', i%2, 1-i%2] for i in range(10))])
    write(tmp_path/'valid.csv', [['image','disc','square','cow'], *([f'{i}.png', i%2, 0, 1-i%2] for i in range(10, 14))])
    assert "valid.csv:2: the images to train with have no column 'cow'" in refused(capsys, *multi, '--data', tmp_path)

def test_an_image_in_both_parts(tmp_path, capsys):
    draw_all(tmp_path, 14)
    write(tmp_path/'train.csv', [['image','label'], *two_classes(10)])
    write(tmp_path/'valid.csv', [['image','label'], *two_classes(14)[9:]])
    assert f"valid.csv:2: the image '9.png' is already in {tmp_path/'train.csv'}:11" in refused(capsys, *single, '--data', tmp_path)

@pytest.mark.parametrize('args,said', [
    ([*multi,'--data','digits'], 'are for the use case image_classification'),
    ([*multi,'--data','{root}/images'], 'are for the use case image_classification'),
    ([*single,'--data','{root}/tags.csv'], "tags.csv:4: 'disc square' looks like several labels"),
    ([*single,'--data','{root}/bits.csv'], 'bits.csv:4: the image has 2 labels'),
    ([*single,'--data','{root}/nowhere.csv'], 'no such file or folder'),
    ([*single,'--data','{root}'], "expected a file with 'train' in its name, such as train.csv or train.jsonl, found bits.csv, single.csv, tags.csv"),
    ([*single,'--data','digits','--train-kwargs','{"label": "breed"}'], 'label is for images that are listed in a CSV, but the labels of digits are the names of folders'),
    ([*single,'--data','digits','--train-kwargs','{"single_label": true}'], 'single_label is for images that are listed in a CSV'),
    ([*single,'--data','{root}/single.csv','--train-kwargs','{"label": "lable"}'], "has no column 'lable', did you mean 'label'?"),
    ([*single,'--data','{root}/single.csv','--train-kwargs','{"folder": "imags"}'], "imags: no such folder, did you mean 'images'?"),
    ([*single,'--data','{root}/single.csv','--train-kwargs','{"label_delim": ";"}'], "there is no 'label_delim'"),
    ([*multi,'--data','{root}/tags.csv','--train-kwargs','{"label_delim": ";"}'], "label_delim: no value of 'labels' in"),
    ([*multi,'--data','{root}/tags.csv','--train-kwargs','{"label_delim": ""}'], "label_delim: no value of 'labels' in"),
    ([*multi,'--data','{root}/bits.csv','--train-kwargs','{"label_delim": ";"}'], "bits.csv:2: has no column 'label'"),
    ([*multi,'--data','{root}/tags.csv','--train-kwargs','{"size": 8}'], "can't take images of 3x8x8"),
    ([*multi,'--data','{root}/tags.csv','--eval-metric','accuracy'], "did you mean 'accuracy_multi'?"),
    ([*multi,'--data','{root}/tags.csv','--eval-metric','mAP'], 'accepted: accuracy_multi, f1, recall, precision'),
])
def test_usage_errors(args, said, root, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *(a.format(root=root) if '{root}' in a else a for a in args))
    assert not list(tmp_path.iterdir())

def test_a_head_that_does_not_match(made, tmp_path, capsys):
    draw_all(tmp_path, 12)
    file = write(tmp_path/'x.csv', [['image','tags'], *([f'{i}.png', 'abc'[i%3]] for i in range(12))])
    assert "doesn't fit 'squeezenet1_1' with 3 classes" in refused(capsys, *multi[2:], '--model', made/'model.pth', '--data', file)
