"Detection from the command line: YOLOv5 layouts to artifacts, and what is refused."
import shutil
import pytest
from fastai.vision.all import Image,load_learner,np,tensor,torch
from PIL import ImageDraw
pytest.importorskip('pycocotools')
from fastsparse_create.experiment import detection
from fastsparse_create.experiment.detection import *
from fastsparse_create.experiment.models import *
from fastsparse_create.experiment.training_aware import TrainingAware
from fastsparse_create.export.onnx import OnnxModel,onnx_ops
from fastsparse_create.masking import measured_sparsity
from fastsparse_create.quantization.convert import is_quantized
from commands import *

def make_objects(folder, n=8, parts=('train','val')):
    "Bright boxes on noise; the first image of each part holds none"
    rng = np.random.default_rng(0)
    for part,count in zip(parts, (n,4)):
        for d in ('images','labels'): (folder/d/part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            im,lines = Image.fromarray(rng.integers(0, 90, (48,64,3), dtype='uint8')),[]
            for c in range(2*(i>0)):
                x,y = (int(v) for v in rng.integers(4, 30, 2))
                ImageDraw.Draw(im).rectangle([x,y,x+16,y+14], fill=[(250,120,60),(60,120,250)][c])
                lines.append(f'{c} {(x+8)/64} {(y+7)/48} {16/64} {14/48}')
            im.save(folder/'images'/part/f'{part}{i}.png')
            (folder/'labels'/part/f'{part}{i}.txt').write_text('\n'.join(lines))
    (folder/'classes.txt').write_text('red\nblue\n')
    return folder

@pytest.fixture(scope='session')
def objects(tmp_path_factory): return make_objects(tmp_path_factory.mktemp('objects'))

small = ['--use-case', 'cv-detection', '--epochs', '1', '--model', 'ssdlite320_mobilenet_v3_large', '--train-kwargs', '{"bs": 4, "size": 96}']

@pytest.fixture(scope='session')
def made(objects, tmp_path_factory): return run(tmp_path_factory.mktemp('made'), *small, '--data', objects)

def test_a_detector_becomes_sparse_and_int8(made):
    dense,sparse = rows(made)
    assert float(sparse['sparsity'])==pytest.approx(.7, abs=1e-3) and {'mAP','loss'}<=set(dense)
    assert [r['what'] for r in rows(made, 'deployed.csv')]==['dense, PyTorch','dense, ONNX Runtime','model.onnx']
    assert 'QLinearConv' in onnx_ops(made/'model.onnx', optimized=True)
    page = (made/'report.html').read_text()
    assert 'labelled boxes on the left' in page and 'model.detect(model(images))' in page and 'red, blue' in page

def test_the_files_of_a_detector_agree(made):
    model = load_model(made/'model.pth')
    assert is_quantized(model) and measured_sparsity(model, '__ALL_PRUNABLE__')==pytest.approx(.7, abs=1e-3)
    x = torch.randn(3, 3, 96, 128)
    with torch.no_grad(): expected = model(x)
    got = OnnxModel(made/'model.onnx')(x)
    assert list(got)==list(expected)
    for k in got: assert (got[k]-expected[k]).norm()<.3*expected[k].norm()
    found = model.detect(got)
    assert len(found)==3 and set(found[0])=={'boxes','labels','scores'}
    with torch.no_grad(): again = load_learner(made/'learner.pkl').model.eval()(x)
    assert all(torch.allclose(again[k], expected[k], atol=1e-4) for k in expected)

def test_a_trained_detector_is_a_start(made, objects, tmp_path):
    for f in ('model.pth','learner.pkl'):
        exp = TrainingAware('od', str(made/f), str(objects), working_dir=tmp_path, train_kwargs={'bs':4, 'size':96})
        state = load_model(made/'model.pth').state_dict()
        assert all(torch.equal(v, state[k]) for k,v in exp.network().state_dict().items())

@pytest.mark.parametrize('name', ['retinanet_resnet50_fpn','fcos_resnet50_fpn','ssd300_vgg16','fasterrcnn_mobilenet_v3_large_320_fpn'])
def test_other_detectors_learn_and_find(name):
    torch.manual_seed(0)
    model = detector(name, 2, (64,96) if name!='ssd300_vgg16' else (300,300))
    boxes,labels = tensor([[[-.5,-.5,.5,.5],[0.,0.,0.,0.]],[[0.,0.,0.,0.]]*2]),tensor([[1,0],[0,0]])
    out = model(torch.randn(2, 3, *model.size))
    loss = model.loss(out, boxes, labels)
    loss.backward()
    assert loss.isfinite() and first_grad(model) is not None
    assert len(model.eval().detect(out))==2

def first_grad(model): return next(p.grad for p in model.parameters() if p.requires_grad)

def test_the_first_look_is_what_a_file_holds():
    model = detector('fasterrcnn_mobilenet_v3_large_320_fpn', 2, (64,64)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): a,b = model(x),model.exported(x)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not [n for n,_ in model.exported.named_parameters() if 'roi' in n]

def test_boxes_go_through_batches_unharmed(objects):
    data = load_detection(objects)
    o = DetectionOptions(bs=4, size=48, augment=False)
    dls = detection_dls(data, o)
    model = detection._model('ssdlite320_mobilenet_v3_large', data, o)
    xb,*yb = dls.valid.one_batch()
    (h,w),targets = model.size,model.targets(*yb)
    for f,t in zip(data.valid, targets):
        expected = tensor(data.boxes[f]).view(-1,4)*tensor([w/64,h/48]*2)
        assert torch.allclose(t['boxes'], expected, atol=1e-2) and [data.classes[i-1] for i in t['labels']]==data.labels[f]

def test_images_without_objects(objects):
    data = load_detection(objects)
    assert data.boxes[data.train[0]]==[]
    dls = detection_dls(data, DetectionOptions(bs=8, size=32))
    assert all(b[2].dtype==torch.long for b in (dls.one_batch(), dls.valid.one_batch()))

def test_layouts(objects, tmp_path):
    expected = load_detection(objects)
    flat = tmp_path/'flat'
    for d in ('images','labels'):
        (flat/d).mkdir(parents=True)
        for f in (objects/d).rglob('*.*'): shutil.copy(f, flat/d/f.name)
    data = load_detection(flat)
    assert [len(data.train), len(data.valid), data.classes]==[10,2,['0','1']]
    shutil.copytree(objects, tmp_path/'yaml')
    (tmp_path/'yaml'/'classes.txt').unlink()
    (tmp_path/'yaml'/'data.yaml').write_text('path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [red, blue]\n')
    for p in (tmp_path/'yaml', tmp_path/'yaml'/'data.yaml'):
        data = load_detection(p)
        assert data.classes==expected.classes and [len(data.train), len(data.valid)]==[8,4]

def test_missing_label_files_say_nothing_is_there(objects, tmp_path):
    root = tmp_path/'x'
    shutil.copytree(objects, root)
    (root/'labels'/'train'/'train1.txt').unlink()
    assert load_detection(root).boxes[root/'images'/'train'/'train1.png']==[]

def spoil_labels(text): return lambda r: (r/'labels'/'train'/'train1.txt').write_bytes(text)

@pytest.mark.parametrize('spoil,said', [
    (spoil_labels(b'0 .5 .5 .1 .1\n2 .5 .5 .1 .1'), 'train1.txt, line 2: class 2, but there are 2 classes, 0 to 1'),
    (spoil_labels(b'0 .5 .5 1.1 .1'), 'train1.txt, line 1: 1.1 is out of range'),
    (spoil_labels(b'0 .5 .5 -.1 .1'), 'line 1: -0.1 is out of range'),
    (spoil_labels(b'0 .5 .5 .1'), 'line 1: expected <class> <x_center>'),
    (spoil_labels(b'0 .1 .1 .2 .2 .3 .1'), 'as of a polygon'),
    (spoil_labels(b'red .5 .5 .1 .1'), 'line 1: expected numbers'),
    (spoil_labels(b'\xff\xfe0'), 'train1.txt: is not UTF-8'),
    (lambda r: (r/'images'/'train'/'train1.png').write_bytes(b'x'), 'train1.png: not a readable image'),
    (lambda r: (r/'images'/'train'/'train1.png').unlink(), 'train1.txt: there is no image of this name'),
    (lambda r: shutil.rmtree(r/'labels'), 'labels/train is missing'),
    (lambda r: [f.write_text('') for f in (r/'labels'/'val').iterdir()], 'no object in the validation images'),
    (lambda r: (r/'data.yaml').write_text('train: images/nowhere\nnames: [a, b]'), 'data.yaml: train: '),
    (lambda r: (r/'data.yaml').write_text('train: images/train\nval: images/train\nnames: [a, b]'), 'are those that are trained with'),
])
def test_objects_that_cannot_be_trained_with(spoil, said, objects, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(objects, root)
    spoil(root)
    text = refused(capsys, *small, '--data', root)
    assert said in text and str(root) in text

@pytest.mark.parametrize('args,said', [
    (['--model','ssdlite320'], 'ssdlite320_mobilenet_v3_large'),
    (['--model','resnet18'], 'accepted: fasterrcnn_mobilenet_v3_large_320_fpn'),
    (['--eval-metric','accuracy'], 'accepted: mAP, mAP_50, recall'),
])
def test_usage_errors(args, said, objects, capsys): assert said in refused(capsys, *small, '--data', objects, *args)

def test_a_head_that_does_not_match(made, objects, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(objects, root)
    (root/'classes.txt').write_text('red\nblue\ngreen\n')
    assert "doesn't fit 'ssdlite320_mobilenet_v3_large' with 3 classes" in refused(capsys, *small, '--model', made/'model.pth', '--data', root)

def test_the_extra_is_named(monkeypatch, objects, capsys):
    import sys
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    assert 'pip install fastsparse_create[detection]' in refused(capsys, *small, '--data', objects)
