"Files of a model say what the model says: sparse ones bit for bit, ONNX ones as far as they were checked, or there is no file"
import json,shutil,subprocess,sys,warnings,pytest
from copy import deepcopy
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models import resnet18,mobilenet_v3_small
from fastai.vision.all import Normalize,TensorImage,xresnet18
from fastsparse_create.benchmark import *
from fastsparse_create.export import onnx as export_module
from fastsparse_create.export.checkpoint import *
from fastsparse_create.export.onnx import *
from fastsparse_create.quantization.convert import *
from fastsparse_create.quantization.deploy import deploy_copy
from fastsparse_create.sparse.linear import *
from utils import *

def bits(t): return t.detach().contiguous().view(-1).view(torch.uint8) if t.numel() else t.detach().view(-1)
def identical(a, b): return a.dtype==b.dtype and a.shape==b.shape and torch.equal(bits(a), bits(b))
def identical_states(a, b): return a.keys()==b.keys() and all(identical(a[k], b[k]) for k in a)

def holder(**tensors):
    "A module with these buffers"
    m = nn.Module()
    for n,t in tensors.items(): m.register_buffer(n, t)
    return m

def small(n_out=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,16,3,2,1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3,2,1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,n_out))

def used(model, x, n=3):
    "With batch norms that have seen data"
    for _ in range(n): model.train()(x+torch.randn_like(x)/2)
    return model

# --- sparse files ---

dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool]

@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.parametrize('sparsity', [0,.5,.97,1])
def test_any_bits_survive(tmp_path, dtype, sparsity):
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (1200,size), dtype=torch.uint8) if dtype!=torch.bool else torch.randint(0, 2, (1200,1), dtype=torch.uint8)
    raw[torch.rand(1200)<sparsity] = 0
    x = raw.flatten().view(dtype).view(30,40)
    assert identical(read_sparse(save_sparse(holder(x=x), tmp_path/'f'))['x'], x)

def test_signed_zeros_and_nans_are_values(tmp_path):
    x = torch.zeros(1000)
    x[:5] = torch.tensor([-0., float('nan'), float('inf'), 1e-45, -float('nan')])
    loaded = read_sparse(save_sparse(holder(x=x), tmp_path/'f'))['x']
    assert identical(loaded, x) and loaded[0].signbit() and not loaded[9].signbit()

@pytest.mark.parametrize('x', [torch.zeros(()), torch.ones(()), torch.zeros(0), torch.zeros(3,0,2), torch.zeros(1), torch.zeros(7,13,11), torch.eye(40).t()[::2], torch.eye(64).expand(2,64,64),
                               torch.zeros(2,64,9,9).to(memory_format=torch.channels_last)], ids=lambda x: str(tuple(x.shape)))
def test_any_shape_and_stride(tmp_path, x): assert identical(read_sparse(save_sparse(holder(x=x), tmp_path/'f'))['x'], x.contiguous())

@pytest.mark.parametrize('sparsity,limit', [(.5,.545),(.8,.245),(.9,.14)])
def test_size(tmp_path, sparsity, limit):
    model = resnet18()
    sparsify_model(model, sparsity)
    dense = sum(t.numel()*4 for t in model.parameters())
    file = save_sparse(model, tmp_path/'f')
    assert file.stat().st_size<limit*dense
    assert identical_states(read_sparse(file), model.state_dict())

def test_size_of_quantized_codes(tmp_path):
    model,x = resnet18(),torch.randn(2,3,64,64)
    sparsify_model(model, .9)
    quantize_(model, x)
    deployed = deploy_copy(model, x)
    file = save_sparse(deployed, tmp_path/'f')
    assert file.stat().st_size<.065*sum(t.numel()*4 for t in model.parameters())
    assert identical_states(read_sparse(file), deployed.state_dict())

@pytest.mark.parametrize('enforced', [True,False])
def test_masked_as_the_saved_one(tmp_path, enforced):
    model = mlp()
    sparsify_model(model, .8)
    if not enforced: stop_enforcing(model)
    loaded = load_sparse(mlp(), save_sparse(model, tmp_path/'f'))
    assert identical_states(loaded.state_dict(), model.state_dict())
    assert [(p.name,p.is_enforced) for p in masked_params(loaded)]==[(p.name,p.is_enforced) for p in masked_params(model)]
    with torch.no_grad(): loaded[0].weight.add_(1)
    loaded(torch.ones(1,4))
    assert bool(violations(loaded))==(not enforced)

def test_trained_on_after_loading(tmp_path):
    learn,other = sparse_learner(),tiny_learner()
    learn.fit(1)
    load_sparse(other, save_sparse(learn, tmp_path/'f'))
    other.add_cb(Witness())
    other.fit(1)
    assert not other.witness.seen and n_masked(other.model)==n_masked(learn.model)

def test_connections_that_are_zero_stay_connections(tmp_path):
    model = mlp(d_hid=64)
    p = attach_masks(model, ['2.weight'])[0]
    mask = torch.rand_like(p.param)<.1
    set_mask(p, mask)
    with torch.no_grad(): p.param[mask.nonzero()[:5].unbind(1)] = 0
    loaded = load_sparse(mlp(d_hid=64), save_sparse(model, tmp_path/'f'))
    assert torch.equal(masked_params(loaded)[0].mask, mask) and torch.equal(loaded[2].weight, model[2].weight)

def test_weights_where_the_mask_is_zero(tmp_path):
    model = mlp(d_hid=64)
    sparsify_model(model, .9, ['2.weight'])
    stop_enforcing(model)
    with torch.no_grad(): model[2].weight[0] += 1
    assert identical_states(read_sparse(save_sparse(model, tmp_path/'f')), model.state_dict())

def test_buffers_that_only_sound_like_masks(tmp_path):
    model = holder(weight=torch.zeros(500), weight_mask=torch.rand(500)<.5, causal_mask=torch.ones(30,30).tril().bool())
    file = save_sparse(model, tmp_path/'f')
    assert identical_states(read_sparse(file), model.state_dict())
    load_sparse(deepcopy(model), file)

def test_shared_tensors_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Embedding(200,50), nn.Linear(50,200))
    model[1].weight = model[0].weight
    alone = save_sparse(nn.Embedding(200,50), tmp_path/'a').stat().st_size
    file = save_sparse(model, tmp_path/'f')
    assert file.stat().st_size<alone+2000
    loaded = deepcopy(model)
    with torch.no_grad(): loaded[0].weight.zero_()
    load_sparse(loaded, file)
    assert torch.equal(loaded[0].weight, model[0].weight) and loaded[0].weight is loaded[1].weight

def test_shared_and_masked(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(30,30), nn.ReLU(), nn.Linear(30,30))
        model[2].weight = model[0].weight
        return model
    model = tied()
    sparsify_model(model, .9)
    loaded = load_sparse(tied(), save_sparse(model, tmp_path/'f'))
    assert identical_states(loaded.state_dict(), model.state_dict()) and not violations(loaded)

def test_layers_that_store_no_zeros(tmp_path):
    model = nn.Sequential(SparseLinear(50,40,.9), nn.ReLU(), SparseLinear(40,2,.5))
    file = save_sparse(model, tmp_path/'f')
    other = load_sparse(nn.Sequential(SparseLinear(50,40,.5), nn.ReLU(), SparseLinear(40,2,.8)), file)
    x = torch.randn(3,50)
    assert torch.equal(other(x), model(x))

def test_quantized_models(tmp_path):
    x = torch.randn(4,3,16,16)
    def quantized():
        model = used(small(), x)
        sparsify_model(model, .5)
        quantize_(model.eval(), x)
        return model
    model,other = quantized(),quantized()
    with torch.no_grad(): model[0].weight.mul_(2)
    calibrate_(model, [x])
    load_sparse(other, save_sparse(model, tmp_path/'f'))
    assert torch.equal(other(x), model(x))

def test_plain_programs_can_read_it(tmp_path):
    model = mlp()
    sparsify_model(model, .8)
    with safe_open(save_sparse(model, tmp_path/'f'), 'pt') as f:
        where = torch.from_numpy(np.unpackbits(f.get_tensor('2.weight:bits').numpy(), bitorder='little')).bool()
        assert torch.equal(f.get_tensor('2.weight:values'), model[2].weight.flatten()[where[:256]])

@pytest.mark.parametrize('wrong,message', [(lambda: nn.Sequential(nn.Linear(4,16)), 'does not have'), (lambda: mlp(d_hid=8), 'of shape'), (lambda: mlp().half(), 'of dtype'),
                                           (lambda: nn.Sequential(*mlp(), nn.Linear(2,2)), 'lacks')])
def test_models_that_do_not_fit_are_left_alone(tmp_path, wrong, message):
    model,other = mlp(),wrong()
    sparsify_model(model, .5)
    file,before = save_sparse(model, tmp_path/'f'),deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message): load_sparse(other, file)
    assert identical_states(other.state_dict(), before)

def test_what_cannot_be_stored(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self): return {'a':1}
        def set_extra_state(self, state): pass
    for model,error in ((Extra(2,2),TypeError), (holder(x=torch.eye(3).to_sparse()),TypeError), (nn.Linear(2,2,device='meta'),ValueError), (holder(x=torch.zeros(3,dtype=torch.complex128)),TypeError), (3,TypeError)):
        with pytest.raises(error, match='save_sparse'): save_sparse(model, tmp_path/'f')
    assert not list(tmp_path.iterdir())

def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    import fastsparse_create.export.checkpoint as checkpoint
    file = save_sparse(mlp(), tmp_path/'f')
    before = file.read_bytes()
    def broken(tensors, name, metadata):
        Path(name).write_bytes(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(checkpoint, 'save_file', broken)
    with pytest.raises(OSError, match='disk full'): save_sparse(mlp(), file)
    assert file.read_bytes()==before and list(tmp_path.iterdir())==[file]

def test_links_are_followed(tmp_path):
    (tmp_path/'real').mkdir()
    link = tmp_path/'link'
    link.symlink_to(tmp_path/'real'/'f')
    save_sparse(mlp(), link)
    assert link.is_symlink() and (tmp_path/'real'/'f').is_file()

def test_folders_are_checked_first(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder'): save_sparse(mlp(), tmp_path/'none'/'f')
    with pytest.raises(IsADirectoryError, match='is a folder'): export_onnx(mlp(), tmp_path, torch.randn(2,4))
    assert not list(tmp_path.iterdir())

def sparse_file(path):
    model = mlp()
    sparsify_model(model, .8)
    return save_sparse(model, path)

def test_truncated_anywhere(tmp_path):
    content = sparse_file(tmp_path/'f').read_bytes()
    for n in [0, 1, 7, 8, 9, 100, len(content)//2, len(content)-1]:
        (tmp_path/'t').write_bytes(content[:n])
        with pytest.raises(ValueError, match='damaged|no file of'): read_sparse(tmp_path/'t')

def test_flipped_bytes_raise_only_what_is_promised(tmp_path):
    content,g = sparse_file(tmp_path/'f').read_bytes(),np.random.default_rng(0)
    n_header = int.from_bytes(content[:8], 'little')
    for i in [*range(8), *g.integers(8, 8+n_header, 150), *g.integers(8+n_header, len(content), 50)]:
        broken = bytearray(content)
        broken[i] ^= 1<<int(g.integers(8))
        (tmp_path/'t').write_bytes(broken)
        model = mlp()
        before = deepcopy(model.state_dict())
        try: load_sparse(model, tmp_path/'t')
        except ValueError: assert identical_states(model.state_dict(), before)

def crafted(path, tensors, **info):
    save_file(tensors, path, {'fastsparse_create':json.dumps({'version':1, 'shapes':{}, 'same':{}, 'masks':{}, **info})})
    return path

@pytest.mark.parametrize('tensors,info', [
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(1)}, {'shapes':{'a':[10**6,10**6]}}),
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(1)}, {'shapes':{'a':[2**62,2**62]}}),
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(1)}, {'shapes':{'a':[-8]}}),
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(1)}, {'shapes':{'a':[True]}}),
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(1)}, {'shapes':{'a':'8'}}),
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(2)}, {'shapes':{'a':[8]}}),
    ({'a:bits':torch.ones(1,dtype=torch.uint8), 'a:values':torch.ones(1,1)}, {'shapes':{'a':[8]}}),
    ({'a:bits':torch.ones(1), 'a:values':torch.ones(1)}, {'shapes':{'a':[8]}}),
    ({'a:bits':torch.full((1,),128,dtype=torch.uint8), 'a:values':torch.ones(1)}, {'shapes':{'a':[4]}}),
    ({'a':torch.ones(1)}, {'shapes':{'b':[8]}}),
    ({'a':torch.ones(1)}, {'same':{'b':'c'}}),
    ({'a':torch.ones(1)}, {'same':{'a':'a'}}),
    ({'a':torch.ones(1)}, {'same':{'b':['a']}}),
    ({'a':torch.ones(1)}, {'masks':{'a':True}}),
    ({'a':torch.ones(1)}, {'masks':['a']}),
    ({'a':torch.ones(1)}, {'shapes':None}),
    ({'a':torch.ones(1)}, {'version':2}),
])
def test_hostile_descriptions(tmp_path, tensors, info):
    with pytest.raises(ValueError): read_sparse(crafted(tmp_path/'f', tensors, **info))

def test_other_files(tmp_path):
    save_file({'a':torch.ones(2)}, tmp_path/'plain')
    torch.save(mlp().state_dict(), tmp_path/'torch')
    save_file({'a':torch.ones(2)}, tmp_path/'deep', {'fastsparse_create':'['*100_000})
    for n in ('plain','torch','deep'):
        with pytest.raises(ValueError, match='no file of save_sparse'): read_sparse(tmp_path/n)
    for n in ('none','.'):
        with pytest.raises(FileNotFoundError): read_sparse(tmp_path/n)

# --- ONNX ---

@pytest.fixture
def images(): return torch.randn(12,3,32,32)

def snapshot(model): return deepcopy(model.state_dict()),[m.training for m in model.modules()],[len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules()],[p.requires_grad for p in model.parameters()],[id(p) for p in model.parameters()]

@pytest.mark.parametrize('int8', [False,True])
def test_the_model_is_not_changed_and_nothing_is_said(tmp_path, capfd, images, int8):
    model,calls = used(small(), images),[]
    sparsify_model(model, .7)
    if int8: quantize_(model, images)
    model.train()[0].eval()
    model[3].register_forward_hook(lambda *args: None)
    before,rng = snapshot(model),torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        export_onnx(model, tmp_path/'f.onnx', images, int8=int8)
    after = snapshot(model)
    assert identical_states(before[0], after[0]) and before[1:]==after[1:] and torch.equal(rng, torch.get_rng_state())
    assert not said and capfd.readouterr()==('','')
    assert [f.name for f in tmp_path.iterdir()]==['f.onnx']

@pytest.mark.parametrize('n', [1,2,7,33])
def test_batches_of_any_size(tmp_path, images, n):
    model = used(small(), images)
    file = OnnxModel(export_onnx(model, tmp_path/'f.onnx', images[:1]))
    x = torch.randn(n,3,32,32)
    assert torch.allclose(file(x), model.eval()(x), atol=1e-5)

def test_result(tmp_path, images):
    res = export_onnx(used(small(), images), tmp_path/'f.onnx', images)
    assert res.size==(tmp_path/'f.onnx').stat().st_size and res.opset==20 and res.batch_sizes==(1,3,8) and res.n_samples==12
    assert res.agreement==1 and res.margin==0 and res.rel_rms<1e-5 and 'onnxruntime' in res.runtime and not res.int8
    assert 'checked by onnxruntime' in repr(res) and res.inputs=={'input':'float batch×3×32×32'}

def test_weights_keep_their_names(tmp_path):
    import onnx
    export_onnx(mlp(), tmp_path/'f.onnx', torch.randn(2,4))
    assert {t.name for t in onnx.load(tmp_path/'f.onnx').graph.initializer}=={n for n,_ in mlp().named_parameters()}

@pytest.mark.parametrize('existing', [None,b'what was there'])
def test_a_file_that_differs_gets_no_name(tmp_path, images, monkeypatch, existing):
    file,model,write = tmp_path/'f.onnx',used(small(), images),export_module._to_proto
    if existing: file.write_bytes(existing)
    def wrong(module, *args):
        with torch.no_grad(): module.model[0].weight.mul_(1.01)
        return write(module, *args)
    monkeypatch.setattr(export_module, '_to_proto', lambda module,*args: wrong(deepcopy(module), *args))
    with pytest.raises(RuntimeError, match="not written, as it doesn't compute what the model does"): export_onnx(model, file, images)
    assert [f.read_bytes() for f in tmp_path.iterdir()]==([existing] if existing else [])

def test_a_file_that_does_not_run_gets_no_name(tmp_path, monkeypatch):
    write = export_module._to_proto
    def wrong(*args):
        proto = write(*args)
        proto.graph.node[0].op_type = 'Nonsense'
        return proto
    monkeypatch.setattr(export_module, '_to_proto', wrong)
    with pytest.raises(RuntimeError, match="nothing was written, as onnxruntime .* can't run it"): export_onnx(mlp(), tmp_path/'f.onnx', torch.randn(2,4))
    assert not list(tmp_path.iterdir())

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(8,4)
    def forward(self, a, b=None): return {'sum':self.l(a)+b, 'parts':(a, [b]), 'nothing':None}

@pytest.mark.parametrize('as_dict', [False,True])
def test_several_inputs_and_outputs(tmp_path, as_dict):
    a,b = torch.randn(5,8),torch.randn(5,4)
    res = export_onnx(TwoInputs(), tmp_path/'f.onnx', {'b':b, 'a':a} if as_dict else (a,b))
    assert set(res.inputs)=={'a','b'}
    assert list(OnnxModel(res).outputs)==['sum','parts_0','parts_1_0']
    assert torch.equal(OnnxModel(res)(a=a, b=b)['parts_0'], a)

def bert():
    from transformers import BertConfig,BertForSequenceClassification
    torch.manual_seed(0)
    words = {'input_ids':torch.randint(0, 100, (6,16)), 'attention_mask':torch.ones(6, 16, dtype=torch.long)}
    words['attention_mask'][1,8:] = 0
    return BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100)).eval(),words

@pytest.mark.parametrize('opset', [20,13])
def test_transformers(tmp_path, opset):
    model,words = bert()
    res = export_onnx(model, tmp_path/'f.onnx', words, opset=opset)
    assert list(res.inputs)==['input_ids','attention_mask'] and res.rel_rms<1e-5 and OnnxModel(res).outputs==['logits']

def test_quantized_transformers(tmp_path):
    model,words = bert()
    quantize_(model, words)
    res = export_onnx(model, tmp_path/'f.onnx', words, int8=True)
    with torch.no_grad(): expected = model(**words).logits
    assert (OnnxModel(res, exact=True)(**words)-expected).norm()<.02*expected.norm() and onnx_ops(res, optimized=True)['MatMulIntegerToFloat']>=12

def unet():
    from fastai.vision.models.unet import DynamicUnet
    from fastai.vision.learner import create_body
    return DynamicUnet(create_body(resnet18(), pretrained=False, cut=-2), 3, (64,64))

models = {'resnet18':(resnet18,(2,3,64,64)), 'mobilenet':(mobilenet_v3_small,(2,3,64,64)), 'unet':(unet,(2,3,64,64)), 'lstm':(lambda: nn.LSTM(8,16,batch_first=True),(2,5,8)),
          'encoder':(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32,4,64,batch_first=True), 2),(3,7,32)), 'half':(lambda: nn.Linear(8,4).half(),(2,8)), 'regression':(lambda: nn.Linear(8,1),(2,8))}

@pytest.mark.slow
@pytest.mark.parametrize('opset', [20,13])
@pytest.mark.parametrize('name', models)
def test_kinds_of_models(tmp_path, name, opset):
    make,shape = models[name]
    model = make()
    x = torch.randn(shape).to(next(model.parameters()).dtype)
    res = export_onnx(model, tmp_path/'f.onnx', x, opset=opset)
    assert res.opset==opset and res.rel_rms<1e-4 and (res.agreement is None)==(name=='regression')

def test_layers_that_store_no_zeros_become_dense(tmp_path):
    model,x = nn.Sequential(SparseLinear(16,8,.8), nn.ReLU(), nn.Linear(8,2)),torch.randn(3,16)
    assert export_onnx(model, tmp_path/'f.onnx', x).rel_rms<1e-5
    assert isinstance(model[0], SparseLinear)

def test_masks_are_permanent_in_the_file(tmp_path):
    import onnx
    model = mlp()
    sparsify_model(model, .75)
    with torch.no_grad(): model[2].weight.add_(1)  # enforced again by the next forward pass
    export_onnx(model, tmp_path/'f.onnx', torch.randn(2,4))
    stored = {t.name:onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path/'f.onnx').graph.initializer}
    for p in masked_params(model): assert not stored[p.name][~p.mask.numpy()].any()

@pytest.mark.parametrize('uint8', [False,True])
def test_pixels(tmp_path, uint8):
    model,mean,std = small(),torch.tensor([.5,.4,.3]),torch.tensor([.2,.25,.3])
    pixels = torch.randint(0, 256, (9,3,32,32), dtype=torch.uint8)
    x = (pixels/255-mean.view(3,1,1))/std.view(3,1,1)
    res = export_onnx(used(model, x), tmp_path/'f.onnx', x, normalize=(mean,std), uint8=uint8)
    assert res.inputs['input'].startswith('uint8' if uint8 else 'float')
    assert torch.allclose(OnnxModel(res)(pixels if uint8 else pixels/255), model.eval()(x), atol=1e-5)

class Items(list):
    def new_empty(self): return Items()

def image_learner():
    g = torch.Generator().manual_seed(0)
    items = Items((TensorImage(torch.rand(3,16,16,generator=g)),i%4) for i in range(32))
    dls = DataLoaders.from_dsets(items, items, bs=8, after_batch=Normalize.from_stats([.5,.4,.3],[.2,.25,.3],cuda=False), num_workers=0)
    learn = Learner(dls, small(), loss_func=CrossEntropyLossFlat(), path='.')
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn

def test_learners(tmp_path):
    learn = image_learner()
    learn.fit(1)
    state = learn.dls.train.rng.getstate()
    res = export_onnx(learn, tmp_path/'f.onnx', normalize=True)
    assert res.n_samples==8 and learn.dls.train.rng.getstate()==state
    pixels = torch.stack([x for x,_ in learn.dls.valid_ds])
    expected = learn.get_preds(dl=learn.dls.valid, act=noop)[0]
    assert torch.allclose(OnnxModel(res)(pixels), expected, atol=1e-5)

def test_a_learner_without_data_needs_an_example(tmp_path):
    learn = image_learner()
    learn.export(tmp_path/'l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    with pytest.raises(ValueError, match='no data, give an example'): export_onnx(loaded, tmp_path/'f.onnx')
    export_onnx(loaded, tmp_path/'f.onnx', torch.randn(2,3,16,16), normalize=True)

@pytest.mark.parametrize('args,error,message', [
    (dict(example=None), ValueError, 'give an example'), (dict(example=3), TypeError, 'expected a tensor'), (dict(example=()), ValueError, 'is empty'), (dict(example=torch.tensor(1.)), TypeError, 'batch dimension'),
    (dict(example=torch.randn(2,5)), ValueError, "can't be run on the example"), (dict(example=(torch.ones(2,4), torch.ones(3,4))), ValueError, 'differ in size'), (dict(opset=12), ValueError, 'too old'), (dict(opset=99), ValueError, 'opset: 99 is not known'),
    (dict(int8=True), ValueError, 'quantize_ it first'), (dict(normalize=True), ValueError, 'no Normalize'), (dict(normalize=.5), ValueError, 'expected True or'), (dict(samples={'a':torch.ones(2,4)}), ValueError, 'samples: expected input'),
])
def test_errors(tmp_path, args, error, message):
    with pytest.raises(error, match=message): export_onnx(mlp(), tmp_path/'f.onnx', **{'example':torch.randn(2,4), **args})
    assert not list(tmp_path.iterdir())

def test_models_that_cannot_be_exported(tmp_path, capfd):
    class Decides(nn.Module):
        def forward(self, x): return x if x.sum()>0 else -x
    with pytest.raises(ValueError, match="Decides can't be exported"): export_onnx(Decides(), tmp_path/'f.onnx', torch.randn(2,4))
    assert capfd.readouterr()==('','') and not list(tmp_path.iterdir())

@pytest.mark.parametrize('package', ['onnx','onnxscript','onnxruntime'])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install fastsparse_create\[onnx\]'): export_onnx(mlp(), tmp_path/'f.onnx', torch.randn(2,4))

def test_importing_needs_no_extra():
    code = "import sys; sys.modules.update(dict.fromkeys(['onnx','onnxscript','onnxruntime'])); import fastsparse_create.export.onnx,fastsparse_create.benchmark"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

# --- INT8 ---

@pytest.fixture(scope='module', params=['resnet18','xresnet18'])
def deployed(request, tmp_path_factory):
    "Model, samples, float and INT8 file"
    torch.manual_seed(0)
    model,x,folder = resnet18(num_classes=10) if request.param=='resnet18' else xresnet18(n_out=10),torch.randn(16,3,64,64),tmp_path_factory.mktemp('int8')
    sparsify_model(used(model, x), .8)
    dense = export_onnx(model, folder/'float.onnx', x)
    quantize_(model.eval(), x)
    return model,x,dense,export_onnx(model, folder/'int8.onnx', x, int8=True)

def test_integer_operators(deployed):
    model,x,_,int8 = deployed
    ops = onnx_ops(int8, optimized=True)
    assert ops['QLinearConv']==sum(isinstance(m, nn.Conv2d) for m in model.modules()) and ops['QLinearAdd']==8 and 'Conv' not in ops
    assert 'BatchNormalization' not in onnx_ops(int8)

def test_the_integer_file_is_small_and_agrees(deployed):
    _,_,dense,int8 = deployed
    assert int8.size<.28*dense.size and int8.int8 and int8.rel_rms<.03 and int8.margin<.1

@pytest.mark.parametrize('n', [1,7,32])
def test_one_integer_file_for_all_batch_sizes(deployed, n):
    model,x,_,int8 = deployed
    x = x.repeat(2, 1, 1, 1)[:n]
    with torch.no_grad(): expected = model(x)
    assert (OnnxModel(int8)(x)-expected).square().mean()<.03**2*expected.square().mean()

def test_zeros_are_zeros_in_the_integer_file(deployed):
    import onnx
    model,_,_,int8 = deployed
    codes = [onnx.numpy_helper.to_array(t) for t in onnx.load(int8).graph.initializer if t.data_type==onnx.TensorProto.INT8 and len(t.dims)>1]
    masks = [p.mask.numpy() for p in masked_params(model)]
    assert sum((c!=0).sum() for c in codes)<=sum(m.sum() for m in masks)
    for m in masks: assert any(c.shape==m.shape and not c[~m].any() or c.T.shape==m.shape and not c.T[~m].any() for c in codes)

def test_openvino_reads_both(deployed):
    openvino = pytest.importorskip('openvino')
    model,x,dense,int8 = deployed
    for file,limit in ((dense,1e-4),(int8,.1)):  # without VNNI, sums of two products saturate at 16 bits
        out = torch.from_numpy(next(iter(openvino.Core().compile_model(os.fspath(file), 'CPU', {'INFERENCE_PRECISION_HINT':'f32'})([x.numpy()]).values())))
        expected = OnnxModel(file)(x)
        assert (out-expected).square().mean().sqrt()<limit*expected.square().mean().sqrt()

def test_integers_in_old_operators(deployed, tmp_path):
    model,x,_,_ = deployed
    old = export_onnx(model, tmp_path/'f.onnx', x, int8=True, opset=13)
    assert old.rel_rms<.03 and onnx_ops(old, optimized=True)['QLinearAdd']==8

@pytest.mark.parametrize('from_file', [False,True])
def test_quantize_qat_export(tmp_path, from_file):
    learn = image_learner()
    learn.fit(1)
    quantize_(learn)
    learn.fit(1)
    if from_file: learn.export(tmp_path/'l.pkl')
    res = quantize_qat_export(tmp_path/'l.pkl', tmp_path/'f.onnx', learn.dls.one_batch()[0]) if from_file else quantize_qat_export(learn, tmp_path/'f.onnx', normalize=True, uint8=True)
    assert res.int8 and onnx_ops(res, optimized=True)['QLinearConv']==2

def test_quantize_qat_export_wants_the_model(tmp_path):
    with pytest.raises(ValueError, match='give the quantized model'): quantize_qat_export(tmp_path/'a.onnx', tmp_path/'f.onnx')
    with pytest.raises(FileNotFoundError): quantize_qat_export(tmp_path/'a.pkl', tmp_path/'f.onnx')
    (tmp_path/'b.pkl').write_bytes(b'no pickle')
    with pytest.raises(ValueError, match='no Learner that can be loaded'): quantize_qat_export(tmp_path/'b.pkl', tmp_path/'f.onnx')

# --- benchmark ---

@pytest.mark.skipif(shutil.which('g++') is None and shutil.which('c++') is None, reason='torch.compile needs a C++ compiler')
def test_benchmark_of_a_compiled_model():
    torch._dynamo.reset()
    model = small().train()
    res = benchmark({'eager':model, 'other':small()}, torch.randn(2,3,16,16), n_rounds=2, compiled=True)
    assert [r.model for r in res.rows]==['eager','other','eager, compiled'] and model.training

def test_benchmark(tmp_path):
    model,x = mlp(),torch.randn(3,4)
    models = {'model':model.train(), 'file':export_onnx(model, tmp_path/'f.onnx', x), 'path':str(tmp_path/'f.onnx'), 'function':lambda x: time.sleep(.002)}
    n = torch.get_num_threads()
    res = benchmark(models, x, n_rounds=7, n_threads=2)
    df = res.to_df()
    assert torch.get_num_threads()==n and model.training
    assert list(df.model)==list(models) and (df.ms_q1<=df.ms).all() and (df.ms<=df.ms_q3).all() and df.ratio[0]==1
    assert df.ms[3]>=2 and df.cpu_ms[3]<1
    assert '3×4, 2 threads, median of 7 rounds' in repr(res) and '<table' in res._repr_html_()
    assert len(res.plot().patches)==4

def test_models_take_turns():
    order = []
    benchmark({n:lambda x,n=n: order.append((n,torch.get_num_threads(),torch.is_grad_enabled())) for n in 'ab'}, torch.ones(1), n_rounds=2, n_warmup=1, n_threads=1)
    assert order==[(n,1,False) for n in 'aabbaabbaabb']  # of two calls, the second is timed

def test_threads_come_back_after_an_error():
    n = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError): benchmark({'a':lambda x: 1/0}, torch.ones(1), n_threads=n+1)
    assert torch.get_num_threads()==n

def test_keywords_and_errors():
    res = benchmark({'a':TwoInputs()}, {'a':torch.ones(2,8), 'b':torch.ones(2,4)}, n_rounds=1)
    assert res.rows[0].ratio==1
    for models,kwargs,error in (({},{},ValueError), ({'a':len},{'n_rounds':0},ValueError), ({'a':3},{},TypeError)):
        with pytest.raises(error): benchmark(models, torch.ones(1), **kwargs)

@pytest.mark.parametrize('models,said', [(lambda m: [m], r"models must be a dict \{name: model\}, got a list"), (lambda m: m, r"models must be a dict \{name: model\}, got a Sequential"), (lambda m: {}, 'there are no models')])
def test_models_have_names(models, said, tmp_path):
    for f in (lambda ms: benchmark(ms, torch.ones(1,4)),lambda ms: deploy_variants(ms, torch.ones(1,4), tmp_path)):
        with pytest.raises((TypeError,ValueError), match=f'(benchmark|deploy_variants): {said}'): f(models(mlp()))

def test_a_missing_file_is_named(tmp_path):
    "Before anything is timed"
    for path in (tmp_path/'none.onnx', str(tmp_path/'none.onnx'), tmp_path):
        with pytest.raises(FileNotFoundError, match=f'^{path}: no such file$'): benchmark({'a':lambda x: pytest.fail('was timed'), 'b':path}, torch.ones(1,4))

def test_names_that_are_no_files(tmp_path):
    "Before any file is written"
    with pytest.raises(ValueError, match="deploy_variants: 'a/b' can't be the name of a file: leave out '/'"): deploy_variants({'first':mlp(), 'a/b':mlp()}, torch.ones(1,4), tmp_path)
    assert not list(tmp_path.iterdir())

def test_deploy_variants(tmp_path, images):
    dense,sparse,int8 = (used(small(), images) for _ in range(3))
    sparsify_model(sparse, .9)
    quantize_(int8.eval(), images)
    res = deploy_variants({'dense':dense, 'sparse':sparse, 'int8':int8}, images[:1], tmp_path)
    assert list(res)==['dense','dense, ONNX','sparse','sparse, ONNX','sparse, sparse kernels','int8, ONNX INT8']
    assert len(benchmark(res, images[:1], n_rounds=1).rows)==6
