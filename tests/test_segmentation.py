"Segmentation from the command line: masks and polygons to artifacts, and what is refused."
import shutil
import pytest
from fastai.vision.all import Image,Path,load_learner,np,torch
from PIL import ImageDraw
from fastsparse_create.experiment.models import *
from fastsparse_create.experiment.segmentation import *
from fastsparse_create.export.onnx import OnnxModel,onnx_ops
from fastsparse_create.masking import measured_sparsity
from fastsparse_create.quantization.convert import is_quantized
from commands import *

def make_shapes(folder, n=8, polygons=False, split=True):
    "Bright boxes on noise, with their masks or polygons"
    rng = np.random.default_rng(0)
    kind = 'labels' if polygons else 'masks'
    for part,count in (('train',n),('val',4)):
        for i in range(count):
            x,y = (int(v) for v in rng.integers(4, 30, 2))
            im,mask = Image.fromarray(rng.integers(0, 90, (48,64,3), dtype='uint8')),Image.new('L', (64,48), 0)
            for o,fill in ((im,(250,120,60)),(mask,1)): ImageDraw.Draw(o).rectangle([x,y,x+16,y+14], fill=fill)
            place = Path(part) if split else Path()
            for d in ('images',kind): (folder/d/place).mkdir(parents=True, exist_ok=True)
            im.save(folder/'images'/place/f'{part}{i}.png')
            if polygons:
                corners = [(x,y),(x+17,y),(x+17,y+15),(x,y+15)]
                (folder/kind/place/f'{part}{i}.txt').write_text('0 '+' '.join(f'{a/64:.5f} {b/48:.5f}' for a,b in corners)+'\n')
            else: mask.save(folder/kind/place/f'{part}{i}.png')
    (folder/'classes.txt').write_text('box\n' if polygons else 'ground\nbox\n')
    return folder

@pytest.fixture(scope='session')
def masks(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('masks'))

@pytest.fixture(scope='session')
def polygons(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('polygons'), polygons=True)

case = '--use-case cv-segmentation --epochs 1'.split()
small = [*case, '--model', 'lraspp_mobilenet_v3_large', '--train-kwargs', '{"bs": 4, "size": 32}']

@pytest.fixture(scope='session')
def made(masks, tmp_path_factory):
    "A whole experiment with a U-Net"
    return run(tmp_path_factory.mktemp('made'), *case, '--model', 'unet_resnet18', '--data', masks, '--train-kwargs', '{"bs": 4, "size": 32}')

def test_a_unet_becomes_sparse_and_int8(made):
    dense,sparse = rows(made)
    assert float(sparse['sparsity'])==pytest.approx(.7, abs=1e-3) and {'mean_iou','loss'}<=set(dense)
    assert [r['what'] for r in rows(made, 'deployed.csv')]==['dense, PyTorch','dense, ONNX Runtime','model.onnx']
    assert 'QLinearConv' in onnx_ops(made/'model.onnx', optimized=True)
    page = (made/'report.html').read_text()
    assert 'mask on the left' in page and 'ground, box' in page and 'logits.argmax(1)' in page

def test_the_files_of_a_unet_agree(made, masks):
    model,learn = load_model(made/'model.pth'),load_learner(made/'learner.pkl')
    assert is_quantized(model) and measured_sparsity(model, '__ALL_PRUNABLE__')==pytest.approx(.7, abs=1e-3)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad(): expected = learn.model.eval()(x)
    assert expected.shape==(3,2,32,32) and torch.allclose(model(x), expected, atol=1e-4)
    got = OnnxModel(made/'model.onnx')(x)
    assert (got-expected).norm()<.2*expected.norm()
    assert learn.predict(next((masks/'images'/'val').iterdir()))[0].shape==(32,32)

def test_the_zeros_are_in_the_onnx_file(made):
    import onnx
    from onnx.numpy_helper import to_array
    weights = [to_array(t) for t in onnx.load(made/'model.onnx').graph.initializer if t.data_type==onnx.TensorProto.INT8 and len(t.dims)==4]
    zeros = sum((w==0).sum() for w in weights)/sum(w.size for w in weights)
    assert zeros>=.69

def test_a_trained_unet_is_a_start(made, masks, tmp_path, quick):
    folder = run(tmp_path, *case, '--data', masks, '--model', made/'model.pth', '--optim-level', '0', '--train-kwargs', '{"bs": 4, "size": 32}')
    assert [r['model'] for r in rows(folder)]==['dense'] and torch.load(folder/'model.pth', weights_only=True)['arch']=='unet_resnet18'

def test_polygons(polygons, tmp_path, quick):
    folder = run(tmp_path, *small, '--data', polygons, '--eval-metric', 'dice')
    assert torch.load(folder/'model.pth', weights_only=True)['classes']==['background','box'] and list(rows(folder)[1])[1:3]==['dice','mean_iou']

def test_polygons_cover_what_masks_cover(masks, polygons):
    a,b = load_segmentation(masks),load_segmentation(polygons)
    wrong = [(np.array(Image.open(a.masks[f]))!=np.array(Image.open(b.masks[g]))).mean() for f,g in zip(a.train, b.train)]
    assert max(wrong)<.03

def test_layouts(tmp_path, masks, polygons):
    flat = load_segmentation(make_shapes(tmp_path/'flat', split=False))
    assert [len(flat.train), len(flat.valid)]==[10,2] and 'chosen by seed' in flat.split
    assert load_segmentation(tmp_path/'flat', seed=1).valid!=flat.valid
    for part in ('train','valid'):
        for kind in ('images','masks'): shutil.copytree(masks/kind/part.replace('valid', 'val'), tmp_path/'parts'/part/kind)
    assert [len(o) for o in (load_segmentation(tmp_path/'parts').train, load_segmentation(tmp_path/'parts').valid)]==[8,4]
    shutil.copytree(polygons, tmp_path/'yaml')
    (tmp_path/'yaml'/'classes.txt').unlink()
    (tmp_path/'yaml'/'data.yaml').write_text('path: .\ntrain: images/train\nval: images/val\nnames: {0: box}\n')
    for p in (tmp_path/'yaml', tmp_path/'yaml'/'data.yaml'): assert load_segmentation(p).classes==['background','box']

def test_255_is_not_learned(masks, tmp_path):
    root = tmp_path/'x'
    shutil.copytree(masks, root)
    for f in (root/'masks'/'train').iterdir(): Image.open(f).point(lambda v: 255 if v==0 else v).save(f)
    data = load_segmentation(root)
    assert data.classes==['ground','box']
    pred,y = torch.zeros(1,2,4,4),torch.full((1,4,4), unknown)
    y[0,0] = 1
    pred[:,1] = 1.
    assert segmentation.loss()(pred, y).isfinite()

def test_few_broken_images_are_skipped_and_told(tmp_path):
    root = make_shapes(tmp_path/'x', n=40)
    (root/'images'/'train'/'train3.png').write_bytes(b'no image')
    data = load_segmentation(root)
    assert len(data.train)==39 and [f.name for f in data.skipped]==['train3.png']
    assert 'train3.png' in segmentation.facts(data, SegmentationOptions())['Left out']

@pytest.mark.parametrize('spoil,said', [
    (lambda r: (r/'images'/'train'/'train0.png').write_bytes(b''), 'train0.png: not a readable image'),
    (lambda r: (r/'masks'/'train'/'train0.png').write_bytes(b''), 'its mask train0.png is not readable'),
    (lambda r: (r/'masks'/'train'/'train0.png').unlink(), 'train0.png: there is no mask for this image'),
    (lambda r: (r/'images'/'train'/'train0.png').unlink(), 'train0.png: there is no image of this name'),
    (lambda r: shutil.rmtree(r/'masks'), 'masks/train or labels/train is missing'),
    (lambda r: shutil.rmtree(r/'images'), 'has no images/'),
    (lambda r: shutil.rmtree(r/'images'/'train'), 'no train/'),
    (lambda r: Image.new('L', (64,48), 9).save(r/'masks'/'val'/'val0.png'), 'a pixel has the class 9, but there are 2 classes'),
    (lambda r: Image.new('RGB', (64,48)).save(r/'masks'/'val'/'val0.png'), 'this one holds colours (RGB)'),
    (lambda r: Image.new('L', (48,64)).save(r/'masks'/'val'/'val0.png'), 'a mask of 48x64 pixels, but its image has 64x48'),
    (lambda r: (r/'classes.txt').write_bytes(b'caf\xe9\n'), 'classes.txt: is not UTF-8'),
    (lambda r: (r/'classes.txt').write_text('a\na\n'), "the name 'a' is there twice"),
    (lambda r: (r/'data.yaml').write_text('train: ['), 'data.yaml, line 1: no valid YAML'),
])
def test_masks_that_cannot_be_trained_with(spoil, said, masks, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(masks, root)
    spoil(root)
    text = refused(capsys, *small, '--data', root)
    assert said in text and str(root) in text

@pytest.mark.parametrize('line,said', [
    ('0 .1 .1 .2 .2', 'three or more points'), ('1 .1 .1 .2 .2 .3 .1', 'class 1, but there are 1 classes'), ('0 .1 .1 .2 .2 .3', 'three or more points'),
    ('0 .1 .1 .2 1.2 .3 .1', '1.2 is out of range'), ('0 .1 .1 .2 nan .3 .1', 'expected numbers')])
def test_polygons_that_cannot_be_trained_with(line, said, polygons, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(polygons, root)
    (root/'labels'/'train'/'train1.txt').write_text('\n'+line)
    text = refused(capsys, *small, '--data', root)
    assert f"{root/'labels'/'train'/'train1.txt'}, line 2: " in text and said in text

@pytest.mark.parametrize('args,said', [
    (['--model','unet_resnet81'], "did you mean 'unet_resnet18'"),
    (['--model','vit_b_16'], "can't be the encoder of a U-Net"),
    (['--model','lraspp_mobilenet_v3_larg'], "did you mean 'lraspp_mobilenet_v3_large'"),
    (['--eval-metric','mean_iuo'], "did you mean 'mean_iou'?"),
    (['--train-kwargs','{"size": 16}'], 'size must be at least 32'),
])
def test_usage_errors(args, said, masks, capsys): assert said in refused(capsys, *small, '--data', masks, *args)

def test_a_head_that_does_not_match(made, polygons, tmp_path, capsys):
    root = tmp_path/'x'
    shutil.copytree(polygons, root)
    (root/'classes.txt').write_text('box\nball\n')
    assert "doesn't fit 'unet_resnet18' with 3 classes" in refused(capsys, *case, '--model', made/'model.pth', '--data', root)
