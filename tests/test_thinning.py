"Do thinned models compute what masked ones did, train as they would have, and refuse what can't be done before anything changes?"
import pickle,pytest,torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from utils import *
from copy import deepcopy
from fastsparse_create.channels import *
from fastsparse_create.create.manager import LoopManager
from fastsparse_create.criteria import *
from fastsparse_create.recipe.compile import *
from fastsparse_create.report import sparsity_report
from fastsparse_create.thinning import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.structured import *

torchvision = pytest.importorskip('torchvision.models')
x32 = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# a zoo

def _tv(name, **kwargs): return lambda: getattr(torchvision, name)(num_classes=5, **kwargs)
def _timm(name, **kwargs): return lambda: pytest.importorskip('timm').create_model(name, num_classes=5, **kwargs)

def _vgg():
    layers,n = [],3
    for c in (8,16): layers,n = layers+[nn.Conv2d(n, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],c
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(16*49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))

def _xresnet():
    from fastai.vision.all import xresnet18
    return xresnet18(n_out=5)

def _vision_learner():
    from fastai.vision.all import create_vision_model
    return create_vision_model(torchvision.resnet18, 5, pretrained=False)

def _unet():
    from fastai.vision.all import create_body
    from fastai.vision.models.unet import DynamicUnet
    return DynamicUnet(create_body(torchvision.resnet18(), cut=-2), 3, (32,32), self_attention=True)

class Tied(nn.Module):
    "Two layers with one weight"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.out = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8, 2)
        self.c.weight = self.b.weight
    def forward(self, x): return self.out(self.c(self.b(self.a(x).relu()).relu()).relu())

class Twice(nn.Module):
    "A layer that is called twice"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.out = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1),nn.Conv2d(8, 2, 1)
    def forward(self, x): return self.out(self.b(self.b(self.a(x).relu()).relu()).relu())

class Numbered(nn.Module):
    "Somebody wrote a number of channels into `view`"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Conv2d(3, 8, 3),nn.Conv2d(8, 6, 3),nn.Linear(6, 2)
    def forward(self, x): return self.c(self.b(self.a(x).relu()).relu().mean((2,3)).view(-1, 6))

def _transposed(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, 2, groups=12), nn.PReLU(12), nn.Conv2d(12, 2, 1))
def _grouped(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 2, 1))
def _depthwise2(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3, groups=8), nn.ReLU(), nn.Conv2d(24, 2, 1))

zoo = dict(resnet18=_tv('resnet18'), resnet50=_tv('resnet50'), mobilenet_v2=_tv('mobilenet_v2'), mobilenet_v3=_tv('mobilenet_v3_small'), densenet=_tv('densenet121'),
           squeezenet=_tv('squeezenet1_1'), regnet=_tv('regnet_x_400mf'), efficientnet=_tv('efficientnet_b0'), convnext=_timm('convnext_atto'), timm_vit=_timm('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2),
           vit=lambda: torchvision.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5), vgg=_vgg, xresnet=_xresnet, vision_learner=_vision_learner, unet=_unet,
           twice=Twice, numbered=Numbered, transposed=_transposed, grouped=_grouped, depthwise2=_depthwise2)
slow = {'resnet50','densenet','regnet','efficientnet','unet','mobilenet_v3','convnext','squeezenet'}

def trained(model, seed=0):
    "Parameters and statistics of which nothing is 0 or 1 by chance"
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        for t,low,high in ((m.running_mean,-.1,.1), (m.running_var,.5,2.), (m.weight.data,.5,1.5), (m.bias.data,-.5,.5)): t.uniform_(low, high, generator=g)
    for p in model.parameters():
        if p.ndim>1 and not p.any(): p.data.normal_(0, .05, generator=g)
    return model.eval()

def model_of(name):
    torch.manual_seed(0)
    return trained(zoo[name]())

def silence(model, group, channels):
    "Set what makes some channels to 0"
    for p in group.made: model.get_parameter(p.name).data.index_fill_(p.dim, positions(p, channels), 0)

@torch.no_grad()
def outputs(model, x=x32): return model(x)

def snapshot(model, opt=None):
    slots = [] if opt is None else [t.clone() for s in opt.state.values() for t in s.values() if torch.is_tensor(t)]
    return {n:t.clone() for n,t in model.state_dict().items()},slots,[(n,m.extra_repr()) for n,m in model.named_modules()]

def unchanged(a, b): return same(a[0], b[0]) and all(map(torch.equal, a[1], b[1])) and a[2]==b[2]

def _marked(names): return [pytest.param(n, marks=pytest.mark.slow if n in slow else []) for n in names]

@pytest.mark.parametrize('name', _marked(zoo))
def test_thinned_equals_masked(name):
    model = model_of(name)
    groups = [g for g in channel_groups(model, x32) if not g.reason]
    assert groups
    g = torch.Generator().manual_seed(1)
    for group in groups: silence(model, group, torch.randperm(group.size, generator=g)[:group.size//3])
    before,n = outputs(model),sum(p.numel() for p in model.parameters())
    report = thin_(model, x32)
    assert (outputs(model)-before).abs().max()<=1e-5*max(1., float(before.abs().max()))
    assert sum(p.numel() for p in model.parameters())<n
    assert all((r.left<r.channels)==r.status.startswith('thinned') for r in report.rows)
    F.mse_loss(model.train()(x32), torch.zeros_like(before)).backward()  # and it trains

@pytest.mark.parametrize('name', _marked(['resnet18','mobilenet_v2','vgg','xresnet','vision_learner','densenet','unet']))
def test_all_groups_are_removable(name): assert not [g for g in channel_groups(model_of(name), x32) if g.reason]

@pytest.mark.parametrize('name,word', [('vit','normalizes across'), ('timm_vit','normalizes across'), ('grouped','groups of equal size'), ('numbered','fails without')])
def test_what_has_to_stay_says_why(name, word):
    reasons = [g.reason for g in channel_groups(model_of(name), x32) if g.reason]
    assert reasons and any(word in r for r in reasons)

def test_groups_are_those_of_torch_pruning():
    tp = pytest.importorskip('torch_pruning')
    model = model_of('resnet18')
    graph = tp.DependencyGraph().build_dependency(deepcopy(model), x32)
    theirs = set()
    copied = {m:n for n,m in graph.model.named_modules()}
    for group in graph.get_all_groups():
        made = frozenset(copied[d.target.module] for d,_ in group if isinstance(d.target.module, nn.Conv2d) and graph.is_out_channel_pruning_fn(d.handler))
        if made: theirs.add(made)
    assert {frozenset(g.layers) for g in channel_groups(model, x32)}==theirs

def test_tracing_leaves_no_trace():
    model = model_of('vision_learner').train()
    before,state = snapshot(model),torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    channel_groups(model, x32)
    assert unchanged(snapshot(model), before) and torch.equal(torch.get_rng_state(), state) and modes==[m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())

def test_last_outputs_stay():
    model = model_of('vgg')
    model[-1].weight.data[:3],model[-1].bias.data[:3] = 0,0
    thin_(model, x32)
    assert outputs(model).shape==(2,5)
    prune_channels_(model, x32, amount=.9)
    assert outputs(model).shape==(2,5)

def test_never_a_whole_layer():
    model = mlp()
    model[0].weight.data.zero_(), model[0].bias.data.zero_()
    before = outputs(model, torch.randn(3, 4))
    thin_(model, torch.randn(2, 4))
    assert model[0].out_features==1 and (outputs(model, torch.randn(3, 4))-before).abs().max()<1e-6

def test_what_nothing_reads_goes_whatever_it_says():
    model,x = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)),torch.randn(3, 4)
    model[2].weight.data[:,:3] = 0
    before = outputs(model, x)
    thin_(model, x)
    assert model[0].out_features==5
    assert (outputs(model, x)-before).abs().max()<1e-6

def test_activations_that_are_not_zero_at_zero_stay():
    model,x = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)),torch.randn(3, 4)
    model[0].weight.data[:3],model[0].bias.data[:3] = 0,0
    report = thin_(model, x)
    assert model[0].out_features==8 and 'would change' in report.rows[0].status

def test_constants():
    model = mlp()
    model[0].weight.data[:5] = 0
    model[0].bias.data[:5] = 1.
    report = thin_(model, torch.randn(2, 4))
    assert model[0].out_features==16 and '5 channels' in report.rows[0].status
    thin_(model, torch.randn(2, 4), constants='drop')
    assert model[0].out_features==11

def test_rounding():
    model = mlp()
    model[0].weight.data[:5],model[0].bias.data[:5] = 0,0
    thin_(model, torch.randn(2, 4), round_to=4)
    assert model[0].out_features==12

# what goes with the model

def _optimizers():
    yield 'momentum',lambda ps: torch.optim.SGD(ps, lr=.1, momentum=.9),None
    yield 'Adam',lambda ps: torch.optim.Adam(ps, lr=.01),None
    yield 'fastai SGD',None,partial(SGD, mom=.9)
    yield 'fastai Adam',None,Adam
    yield 'fastai ranger',None,ranger

def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))

def step(model, opt, x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()

@pytest.mark.parametrize('kind', [o[0] for o in _optimizers()])
def test_optimizer_state_moves_bit_for_bit(kind):
    _,make,opt_func = next(o for o in _optimizers() if o[0]==kind)
    model = small_net()
    opt = make(model.parameters()) if make else opt_func([params(model)], lr=.01)
    x,y = torch.randn(4, 3, 8, 8),torch.randn(4, 2)
    for _ in range(7): step(model, opt, x, y)
    for p in (model[0].weight,model[0].bias,model[1].weight,model[1].bias): p.data[2:5] = 0
    kept,ids = [0,1,5,6,7],[id(p) for p in model.parameters()]
    before = {n:[(t.clone()) for t in memory(opt, p)] for n,p in model.named_parameters()}
    weights_before = weights(model)
    thin_(model, x, opt=opt)
    assert ids==[id(p) for p in model.parameters()]
    for n in ('0.weight','0.bias','1.weight'):
        p = model.get_parameter(n)
        assert torch.equal(p, weights_before[n][kept]) and memory(opt, p) and all(torch.equal(a, b[kept]) for a,b in zip(memory(opt, p), before[n]))
    assert torch.equal(model[3].weight, weights_before['3.weight'][:,kept])
    assert all(torch.equal(a, b[:,kept]) for a,b in zip(memory(opt, model[3].weight), before['3.weight']))
    assert torch.isfinite(torch.tensor(step(model, opt, x, y)))

def test_gradients_and_statistics_move():
    model,x = small_net(),torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    for p in (model[0].weight,model[0].bias,model[1].weight,model[1].bias): p.data[:3] = 0
    grad,mean = model[0].weight.grad.clone(),model[1].running_mean.clone()
    thin_(model, x)
    assert torch.equal(model[0].weight.grad, grad[3:]) and torch.equal(model[1].running_mean, mean[3:]) and model[1].num_features==5

def test_averages_are_thinned_along():
    model,x = small_net(),torch.randn(4, 3, 8, 8)
    ema = AveragedModel(model, use_buffers=True)
    for p in (model[0].weight,model[0].bias,model[1].weight,model[1].bias): p.data[:3] = 0
    ema.update_parameters(model)
    thin_(model, x, ema=ema)
    ema.update_parameters(model)
    assert ema.module[0].weight.shape==model[0].weight.shape==(5,3,3,3)
    assert torch.isfinite(outputs(ema, x)).all()

def test_masks_move_and_hold():
    learn = sparse_learner(.5)
    model = learn.model
    model[0].weight_mask[:4],model[0].bias.data[:4] = False,0
    thin_(learn, torch.randn(2, 4))
    assert model[0].weight.shape==model[0].weight_mask.shape==(12,4) and model[2].weight_mask.shape[1]==12
    witness = Witness()
    learn.fit(1, cbs=witness)
    assert witness.steps and not witness.seen

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=0.), partial(SGD, mom=.9), Adam])
def test_training_after_thinning_is_that_of_the_masked_model(opt_func):
    def run(thins):
        learn = tiny_learner(opt_func=opt_func, wd=0.)
        cbs = [StructuredPruningModifier(0., .5, 0, 1, .5), *([LayerThinningModifier(update_epochs=[2.])] if thins else [])]
        learn.fit(4, cbs=cbs)
        return learn
    masked,thinned = run(False),run(True)
    assert thinned.model[0].out_features==8 and masked.model[0].out_features==16
    assert (torch.tensor(masked.recorder.losses)-torch.tensor(thinned.recorder.losses)).abs().max()<1e-5
    x = torch.randn(5, 4)
    assert (outputs(masked.model.eval(), x)-outputs(thinned.model.eval(), x)).abs().max()<1e-5

# one shot

@pytest.mark.parametrize('share', ['global','uniform'])
@pytest.mark.parametrize('name', _marked(['resnet18','mobilenet_v2','xresnet','densenet']))
def test_flops_budget(name, share):
    model = model_of(name)
    dense = sparsity_report(model, x32[:1]).model.flops
    prune_channels_(model, x32, flops=.4, share=share)
    left = sparsity_report(model, x32[:1]).model.flops
    assert .39<=left/dense<=.4+1e-9
    assert outputs(model).shape==(2,5)

def test_amount_and_roundings():
    model = model_of('resnet18')
    report = prune_channels_(model, x32, amount=.5, share='uniform', round_to=8)
    assert all(r.left==r.channels//2 for r in report.rows)
    model = model_of('resnet18')
    report = prune_channels_(model, x32, amount=.95, min_keep=.25)
    assert all(r.left>=r.channels//4 for r in report.rows) and any(r.left==r.channels//4 for r in report.rows)

def test_criteria():
    def kept(criterion):
        model,x = small_net(),torch.randn(2, 3, 8, 8)
        model(x).sum().backward()
        prune_channels_(model, x, amount=.5, share='uniform', criterion=criterion)
        return model[0].weight.detach()
    by_magnitude,by_gradient,by_chance = (kept(c) for c in (magnitude,gradient,random_scores))
    assert by_magnitude.shape==by_gradient.shape==by_chance.shape and not by_magnitude.equal(by_gradient)
    assert by_chance.equal(kept(random_scores))

def test_ignored_layers_stay():
    model = model_of('resnet18')
    prune_channels_(model, x32, amount=.5, ignore=['conv1'])
    assert model.conv1.out_channels==64 and model.layer2[0].conv1.out_channels<128

def test_tied_weights():
    torch.manual_seed(0)
    model,x = Tied(),torch.randn(3, 6)
    prune_channels_(model, x, amount=.5, share='uniform')
    assert model.c.weight is model.b.weight
    assert model.b.in_features==model.b.weight.shape[1] and outputs(model, x).shape==(3,2)

# refusals

@pytest.mark.parametrize('kwargs,word', [(dict(flops=.0001),"can't be reached"), (dict(amount=.5, flops=.5),'either'), (dict(),'either'), (dict(amount=1.5),'between'),
                                         (dict(flops=.5, share='local'),'share'), (dict(flops=.5, round_to=0),'round_to'), (dict(flops=.5, ignore=['nothing']),'nothing'),
                                         (dict(flops=.5, criterion=gradient),'backward'), (dict(flops=.5, min_keep=2),'min_keep')])
def test_refusals_change_nothing(kwargs, word):
    model = model_of('vgg')
    before = snapshot(model)
    with pytest.raises(ValueError, match=word): prune_channels_(model, x32, **kwargs)
    assert unchanged(snapshot(model), before)

def test_examples_that_do_not_fit_are_refused():
    model = model_of('vgg')
    before = snapshot(model)
    for f in (thin_, partial(prune_channels_, amount=.5)):
        with pytest.raises(ValueError, match='example'): f(model, torch.randn(2, 4, 32, 32))
    assert unchanged(snapshot(model), before)

def test_optimizers_that_can_not_follow_are_refused():
    model,x = small_net(),torch.randn(2, 3, 8, 8)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    opt.state[model[0].weight]['rows'] = torch.zeros(8)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'rows'"): prune_channels_(model, x, amount=.5, opt=opt)
    assert unchanged(snapshot(model), before)

def test_averages_that_do_not_fit_are_refused():
    model,x = small_net(),torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    with pytest.raises(ValueError, match='ema'): prune_channels_(model, x, amount=.5, ema=mlp())
    assert unchanged(snapshot(model), before)

class Reader(nn.Module):
    "What Python reads of activations decides what is computed"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(4, 8),nn.Linear(8, 2)
    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h if h.sum().item()>0 else -h)

def test_models_that_can_not_be_traced_are_refused():
    with pytest.raises(ValueError, match='Python reads'): thin_(Reader(), torch.randn(2, 4))

def test_nothing_to_remove_is_an_error():
    with pytest.raises(ValueError, match='no channels'): prune_channels_(nn.Linear(4, 2), torch.randn(2, 4), amount=.5)
    with pytest.raises(TypeError, match='model'): thin_('model', torch.randn(2, 4))

def test_memory_format_stays():
    model = small_net().to(memory_format=torch.channels_last)
    prune_channels_(model, torch.randn(2, 3, 8, 8), amount=.5)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)

# files

def test_thin_like():
    model = model_of('mobilenet_v2')
    prune_channels_(model, x32, amount=.5)
    fresh = thin_like(zoo['mobilenet_v2'](), model.state_dict()).eval()
    fresh.load_state_dict(model.state_dict())
    assert outputs(fresh).equal(outputs(model))

def test_thin_like_a_file_of_a_learner(tmp_path):
    learn = tiny_learner(path=tmp_path)
    learn.fit(2, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[1])])
    learn.save('thin')
    again = tiny_learner(path=tmp_path)
    thin_like(again, tmp_path/'models'/'thin.pth')
    masks_from_file(again.model, tmp_path/'models'/'thin.pth')
    x = torch.randn(3, 4)
    assert outputs(again.model, x).equal(outputs(learn.model, x))
    learn.export(tmp_path/'thin.pkl')
    assert outputs(load_learner(tmp_path/'thin.pkl').model, x).equal(outputs(learn.model, x))

def test_thin_like_something_larger_is_refused():
    model = mlp(d_hid=8)
    with pytest.raises(ValueError, match="'0.weight'"): thin_like(model, mlp(d_hid=16).state_dict())

# modifiers

def test_sparsities_of_groups_follow_the_schedule():
    learn,seen = tiny_learner(),[]
    cb = StructuredPruningModifier(0., .75, 0, 2, .5, inter_func='linear')
    note = Note('after_batch', lambda s: int((~s.model[0].weight_mask.any(1)).sum()))
    learn.fit(3, cbs=[cb,note,Witness()])
    assert note.notes[::2]==[0,3,6,9,12,12]  # 4 batches an epoch
    assert not violations(learn.model, learn.opt)

@pytest.mark.parametrize('criterion', ['magnitude','random',lambda param, **_: -param.abs()])
def test_channels_are_chosen_by_the_criterion(criterion):
    learn = tiny_learner(lr=0.)
    f = dict(magnitude=magnitude, random=random_scores).get(criterion, criterion)
    groups = channel_groups(learn.model, torch.randn(2, 4))
    lowest = [group_scores(g, learn.model, f).argsort()[:8] for g in groups]
    learn.fit(1, cbs=StructuredPruningModifier(.5, .5, 0, 1, 1, criterion=criterion))
    for g,lost in zip(groups, lowest): assert (~learn.model.get_buffer(f'{g.layers[0]}.weight_mask').any(1)).nonzero().flatten().tolist()==sorted(lost.tolist())

def test_masks_cover_all_that_belongs_to_a_channel():
    learn = tiny_learner(convnet(), shape=(3,8,8))
    learn.fit(1, cbs=StructuredPruningModifier(.5, .5, 0, 1, 1))
    gone = ~learn.model[0].weight_mask.flatten(1).any(1)
    assert gone.sum()==4
    for t in (learn.model[0].bias, learn.model[1].weight, learn.model[1].bias): assert torch.equal(t==0, gone)
    assert not learn.model[3].weight[:,gone].any()

def test_listed_groups():
    learn = tiny_learner()
    learn.fit(1, cbs=StructuredPruningModifier(.5, .5, 0, 1, 1, param_groups=[['0.weight','2.weight']], params=['0.weight']))
    a,b = learn.model[0].weight_mask,learn.model[2].weight_mask
    assert torch.equal(a.any(1), b.any(1)) and a.any(1).sum()==8 and 'weight_mask' not in dict(learn.model[4].named_buffers())

@pytest.mark.parametrize('kwargs,word', [(dict(param_groups=[['0.weight'],['0.weight']]),'more than once'), (dict(mask_type='block4'),'mask_type'), (dict(budget='time'),'budget'),
                                         (dict(param_groups=[['0.weight']], budget='flops'),'param_groups'), (dict(criterion='magnitud'),"did you mean 'magnitude'"),
                                         (dict(criterion=gradient),'no gradients when channels are chosen'), (dict(criterion=lambda p: p),'add \\*\\*_'), (dict(final_sparsity=1.5),'final_sparsity')])
def test_arguments(kwargs, word):
    with pytest.raises((ValueError,TypeError), match=word): StructuredPruningModifier(**{**dict(init_sparsity=0., final_sparsity=.5, start_epoch=0, end_epoch=1, update_frequency=1), **kwargs})

def test_unknown_names_in_groups():
    with pytest.raises(Exception, match="did you mean '0.weight'"): tiny_learner().fit(1, cbs=StructuredPruningModifier(0., .5, 0, 1, 1, param_groups=[['0.weigth']]))

def test_flops_budget_of_a_schedule():
    learn = tiny_learner(convnet(), shape=(3,8,8))
    dense = sparsity_report(learn.model, torch.randn(1, 3, 8, 8)).model.flops
    learn.fit(2, cbs=[StructuredPruningModifier(0., .6, 0, 1, .25, budget='flops'), LayerThinningModifier()])
    left = sparsity_report(learn.model, torch.randn(1, 3, 8, 8)).model.flops
    assert .25<left/dense<=.4

def test_pruning_goes_on_after_a_thinning():
    learn = tiny_learner()
    learn.fit(4, cbs=[StructuredPruningModifier(0., .75, 0, 3, .5, inter_func='linear'), LayerThinningModifier(update_epochs=[1.,4.])])
    assert learn.model[0].out_features==4

def test_thinning_at_the_end_if_no_epoch_was_reached():
    learn = tiny_learner()
    learn.fit(2, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[7])])
    assert learn.model[0].out_features==8

def test_callbacks_go_on(tmp_path):
    learn = tiny_learner(path=tmp_path)
    model = learn.model
    learn.fit_one_cycle(4, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2]), SaveModelCallback(), Witness()])
    assert learn.model is model and len(learn.recorder.losses)==16 and len(learn.recorder.values)==4
    learn.fit(1)
    assert learn.model[0].out_features==8 and not violations(learn.model, learn.opt)

class Averaging(Callback):
    "A running average, as extensions of fastai keep it"
    run_valid = False
    def before_fit(self): self.average = deepcopy(self.learn.model)
    def after_step(self):
        with torch.no_grad():
            for a,p in zip(self.average.parameters(), self.learn.model.parameters()): a.lerp_(p, .1)

def test_averages_of_callbacks_are_found():
    learn,ema = tiny_learner(),Averaging()
    learn.fit(3, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2]), ema])
    assert ema.average[0].weight.shape==learn.model[0].weight.shape==(8,4)

def test_resumed_fits_know_what_was_removed(tmp_path):
    def cbs(): return [StructuredPruningModifier(0., .75, 0, 3, .5, inter_func='linear'), LayerThinningModifier(update_epochs=[1.5,4.])]
    straight = tiny_learner()
    straight.fit(4, cbs=cbs())
    learn,file = tiny_learner(path=tmp_path),tmp_path/'models'/'at_1.pth'
    learn.fit(4, cbs=[*cbs(), SaveModelCallback(fname='at', every_epoch=True, with_opt=True)])
    again = tiny_learner(path=tmp_path)
    thin_like(again, file)
    masks_from_file(again.model, file)
    again.load('at_1', with_opt=True)
    again.fit(4, start_epoch=2, cbs=cbs())
    assert straight.model[0].out_features==again.model[0].out_features==4
    assert same(weights(straight.model), weights(again.model))

def test_stopped_before_thinning():
    learn = tiny_learner()
    class Stop(Callback):
        def after_epoch(self): raise CancelFitException
    learn.fit(3, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2]), Stop()])
    assert learn.model[0].out_features==16 and not violations(learn.model, learn.opt)

def test_zeros_that_are_held_later_fit():
    learn = tiny_learner()
    learn.fit(4, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[1]), ConstantPruningModifier(start_epoch=2)])
    assert learn.model[0].out_features==8

@pytest.mark.parametrize('more', [lambda: GradientAccumulation(16), lambda: GradientClip(.1), lambda: MixedPrecision(), lambda: ChannelsLast()])
def test_other_callbacks(more):
    learn = tiny_learner(convnet(), shape=(3,8,8))
    witness = Witness()
    learn.fit(3, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2]), more(), witness])
    assert learn.model[0].out_channels==4 and witness.steps and not witness.seen

def test_frozen_layers_are_thinned_along():
    learn = tiny_learner(splitter=halves)
    learn.freeze_to(1)
    learn.fit(1, cbs=[StructuredPruningModifier(0., .5, 0, .5, .5), LayerThinningModifier()])
    learn.unfreeze()
    learn.fit(1)
    assert learn.model[0].out_features==8 and [len(pg) for pg in learn.opt.param_lists]==[2,4]

def test_lr_find_and_export_with_modifiers_attached(tmp_path):
    learn = tiny_learner(path=tmp_path, n_trn=30)
    learn.add_cbs([StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2])])
    learn.lr_find(show_plot=False, num_it=20)
    assert learn.model[0].out_features==16
    learn.fit(3)
    learn.lr_find(show_plot=False, num_it=20)
    learn.get_preds()
    learn.export('thin.pkl')
    assert load_learner(tmp_path/'thin.pkl').model[0].out_features==learn.model[0].out_features==8

def test_dependency_map_chooses():
    learn = tiny_learner()
    learn.fit(2, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier({'0.weight':['2.weight']}, update_epochs=[1])])
    assert (learn.model[0].out_features,learn.model[2].out_features)==(8,16)

def test_dependency_map_is_strict():
    with pytest.raises(Exception, match='no parameter'): tiny_learner().fit(1, cbs=LayerThinningModifier({'9.weight':[]}))
    with pytest.raises(Exception, match="can't be thinned"): tiny_learner().fit(1, cbs=LayerThinningModifier({'4.weight':[]}))
    tiny_learner().fit(1, cbs=LayerThinningModifier({'9.weight':[]}, strict=False))

def test_recipes():
    recipe = Recipe.from_string("""
modifiers:
    - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 2.0}
    - !StructuredPruningModifier {init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0.0, end_epoch: 1.0, update_frequency: 0.5, mask_type: channel}
    - !LayerThinningModifier {update_epochs: [1.0], structure_type: filter}
    - !LayerPruningModifier {layers: ['3'], start_epoch: 1.0}
""")
    learn = tiny_learner()
    learn.fit_recipe(recipe, lr=.01)
    assert learn.model[0].out_features==8 and type(learn.model[3]) is nn.Identity
    assert str(Recipe.from_string(str(recipe)))==str(recipe)

@pytest.mark.parametrize('opt_func', [partial(torch.optim.SGD, lr=.05, momentum=.9), partial(torch.optim.AdamW, lr=.01)])
def test_plain_loops(opt_func):
    model,data = mlp(),[(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(4)]
    opt = opt_func(model.parameters())
    manager = LoopManager(model, opt, 4, 3, [StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2])])
    for _ in range(3):
        for x,y in data: step(model, opt, x, y)
    manager.finalize()
    assert model[0].out_features==8
    assert all(t.shape==p.shape for p,s in opt.state.items() for t in s.values() if torch.is_tensor(t) and t.ndim)
    step(model, opt, *data[0])

def test_layers_are_left_out_and_put_back():
    learn = tiny_learner()
    layer,note = learn.model[2],Note('after_batch', lambda s: type(s.model[2]).__name__)
    learn.fit(3, cbs=[LayerPruningModifier('2', start_epoch=1, end_epoch=2), note])
    assert learn.model[2] is layer and note.notes==['Linear']*4+['Identity']*4+['Linear']*4

def test_nothing_moves_a_layer_that_is_out():
    "Masks and momentum notwithstanding; what prunes meanwhile goes on with the others"
    learn = tiny_learner(n_trn=8)
    layer,note = learn.model[2],Note('after_batch', lambda s: weights(layer))
    learn.fit(3, cbs=[GMPruningModifier(.3, .8, 0, .5, .25), GMPruningModifier(.1, .8, 1.5, 3, .5, ['0.weight']), LayerPruningModifier('2', start_epoch=1, end_epoch=2), note])
    assert all(same(note.notes[7], n) for n in note.notes[8:16]) and not same(note.notes[7], note.notes[16])
    learn.fit(4, cbs=[GMPruningModifier(.8, .9, 0, 3, .5), LayerPruningModifier('2', start_epoch=1, end_epoch=2)])
    assert abs(measured_sparsity(learn.model)-.9)<.01 and learn.model[2] is layer

def test_layers_that_are_needed_are_refused():
    learn = tiny_learner()
    with pytest.raises(Exception, match="without '0'"): learn.fit(1, cbs=LayerPruningModifier('0'))
    with pytest.raises(Exception, match='no layer'): learn.fit(1, cbs=LayerPruningModifier('none'))
    assert isinstance(learn.model[0], nn.Linear)

@pytest.mark.parametrize('padded', [False,True])
def test_text_models_with_padding(padded):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)).eval()
    mask = torch.ones(2,6).long()
    mask[1,4:] = 0 if padded else 1
    batch = dict(input_ids=torch.randint(3,50,(2,6)), attention_mask=mask)
    prune_channels_(model, batch, amount=.5)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features<48 and model(**batch).logits.shape==(2,2)

class ReadsActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.head = nn.Embedding(9, 8),nn.Linear(8, 2)
    def forward(self, x):
        h = self.emb(x)
        return self.head(h if h.sum().item()>0 else -h)

def test_activations_that_python_reads_are_refused():
    with pytest.raises(ValueError, match='Python reads activations'): prune_channels_(ReadsActivations(), torch.randint(9,(2,4)), amount=.5)

def test_a_teacher_keeps_its_channels():
    class Distills(Callback):
        def __init__(self, teacher): self.teacher = teacher
    learn = tiny_learner()
    teacher = deepcopy(learn.model)
    sizes = [p.shape for p in teacher.parameters()]
    learn.fit(2, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[1]), Distills(teacher)])
    assert [p.shape for p in teacher.parameters()]==sizes!=[p.shape for p in learn.model.parameters()]

# attention

class Written(nn.Module):
    "Attention by hand; its output is put together by the width of the input, or by itself"
    def __init__(self, is_fixed=False):
        super().__init__()
        self.is_fixed,self.n_head = is_fixed,4
        self.qkv,self.proj = nn.Linear(16, 48),nn.Linear(16, 16)
    def forward(self, x):
        b,t,c = x.shape
        q,k,v = (o.view(b, t, self.n_head, -1).transpose(1, 2) for o in self.qkv(x).chunk(3, -1))
        out = ((q@k.transpose(-2, -1)).softmax(-1)@v).transpose(1, 2)
        return self.proj(out.reshape(b, t, c if self.is_fixed else -1))

class Seen(nn.Module):
    "Somebody looks at the weights of an attention, of each head or of all"
    def __init__(self, **kwargs):
        super().__init__()
        self.attention,self.kwargs = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=kwargs.pop('add_bias_kv', False)),kwargs
    def forward(self, x): return self.attention(x, x, x, **self.kwargs)

def _words(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
_ids = torch.randint(1, 50, (2,7), generator=torch.Generator().manual_seed(1))

def _hf(name, config, **kwargs):
    def _make():
        transformers = pytest.importorskip('transformers')
        return getattr(transformers, name)(getattr(transformers, config)(vocab_size=50, **kwargs))
    return _make

_bert = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16)
attentions = dict(
    encoder=(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), _words(2, 5, 16)),
    length_first=(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2), _words(5, 2, 16)),
    cross=(lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (_words(2, 5, 16),_words(2, 4, 16))),
    as_many_heads_as_outputs=(lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, bias=False), _words(4, 4, 16)),
    written=(Written, _words(2, 5, 16)),
    vit=(zoo['vit'], x32), timm_vit=(zoo['timm_vit'], x32),
    swin=(_timm('swin_tiny_patch4_window7_224', img_size=32, window_size=4, depths=(2,1), num_heads=(2,4), embed_dim=16), x32),
    bert=(_hf('BertForSequenceClassification', 'BertConfig', **_bert), dict(input_ids=_ids, attention_mask=torch.ones_like(_ids).triu(-4))),
    bert_eager=(_hf('BertForSequenceClassification', 'BertConfig', attn_implementation='eager', **_bert), _ids),
    distilbert=(_hf('DistilBertForSequenceClassification', 'DistilBertConfig', dim=32, n_heads=4, n_layers=1, hidden_dim=48), _ids),
    gpt2=(_hf('GPT2ForSequenceClassification', 'GPT2Config', n_embd=32, n_head=4, n_layer=1, n_positions=16, use_cache=False, pad_token_id=0, bos_token_id=None, eos_token_id=None), _ids),
    t5=(_hf('T5EncoderModel', 'T5Config', d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48), _ids))

def attention_of(name):
    torch.manual_seed(0)
    f,x = attentions[name]
    model = f()
    for p in model.parameters(): p.data += .1*torch.randn_like(p)  # biases that aren't 0
    return model.eval(),x

def run(model, x):
    res = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    return next(t for t in (res if isinstance(res, (tuple,Tensor)) else res.to_tuple()) if torch.is_tensor(t)) if not torch.is_tensor(res) else res

def heads_in(model, x): return [g for g in channel_groups(model, x) if not g.reason and g.size in (2,3,4)]

@pytest.mark.parametrize('name', attentions)
def test_attention_without_heads_equals_the_masked_one(name):
    model,x = attention_of(name)
    groups = heads_in(model, x)
    assert groups and all(g.size in (2,3,4) for g in groups)
    for g in groups: silence(model, g, torch.tensor([1]))
    with torch.no_grad(): before = run(model, x)
    n = sum(p.numel() for p in model.parameters())
    thin_(model, x)
    assert {g.size for g in heads_in(model, x)} <= {g.size-1 for g in groups}-{1}
    with torch.no_grad(): assert (run(model, x)-before).abs().max()<=1e-5*max(1., float(before.abs().max()))  # without gradients, nn.TransformerEncoder takes its fast path if it can
    assert sum(p.numel() for p in model.parameters())<n
    for m in (deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(run(m, x), run(model, x))
    run(model.train(), x).square().mean().backward()
    assert all(p.grad is None or p.grad.shape==p.shape for p in model.parameters())

@pytest.mark.parametrize('name', ['encoder','vit','bert','gpt2','swin'])
def test_thin_like_counts_heads(name):
    model,x = attention_of(name)
    prune_channels_(model, x, amount=.5, share='uniform')
    fresh,_ = attention_of(name)
    thin_like(fresh, model.state_dict()).load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, x), run(model, x))

def test_padding_and_the_fast_path():
    model,x = attention_of('encoder')
    padding = torch.tensor([[False]*5, [False]*3+[True]*2])
    silence(model, heads_in(model, x)[0], torch.tensor([2]))
    with torch.no_grad(): before = model(x, src_key_padding_mask=padding)
    thin_(model, x)
    with torch.no_grad(): after = model(x, src_key_padding_mask=padding)
    assert model.layers[0].self_attn.num_heads==3 and torch.allclose(before[~padding], after[~padding], atol=1e-5)

def test_roundings_count_outputs_of_heads():
    model,x = attention_of('encoder')
    assert [g.step(8) for g in heads_in(model, x)]==[2,2]  # heads of 4 outputs
    report = prune_channels_(model, x, amount=.4, share='uniform', round_to=8)
    assert {r.layer:r.left for r in report.rows}=={f'layers.{i}.{n}':left for i in (0,1) for n,left in (('self_attn',24),('linear1',24))}

def test_reports_count_all_rows_of_a_channel():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 16),nn.Linear(8, 2)
        def forward(self, x): return self.b(F.glu(self.a(x)))
    report = prune_channels_(Gated(), torch.randn(2, 4), amount=.5)
    assert [(r.layer,r.channels,r.left) for r in report.rows]==[('a',16,8)]

@pytest.mark.parametrize('f,word', [(lambda: Written(True), 'fails without'), (lambda: Seen(average_attn_weights=False), 'another shape'), (lambda: Seen(), 'outputs would change'),
                                    (lambda: Seen(add_bias_kv=True, need_weights=False), "add_bias_kv or add_zero_attn can't lose heads")])
def test_heads_that_stay_say_why(f, word):
    groups = [g for g in channel_groups(f(), _words(2, 5, 16)) if g.size==4]
    assert not groups or [g.reason for g in groups if word in g.reason]

def test_shared_keys_keep_their_heads():
    model = _hf('LlamaForCausalLM', 'LlamaConfig', num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, use_cache=False)().eval()
    assert any('fails without' in g.reason for g in channel_groups(model, _ids))
    prune_channels_(model, _ids, amount=.3)
    assert model.model.layers[0].self_attn.q_proj.out_features==32 and model.model.layers[0].mlp.up_proj.out_features<48

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam])
def test_heads_leave_while_training(opt_func):
    torch.manual_seed(0)
    learn = tiny_learner(nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=True), nn.Flatten(), nn.Linear(80, 2)), opt_func=opt_func, shape=(5,16))
    seen = Note('after_batch', lambda s: (s.model[0].self_attn.num_heads, s.model[0].linear1.out_features))
    learn.fit(3, cbs=[StructuredPruningModifier(0., .5, 0, 1, .5), LayerThinningModifier(update_epochs=[2]), seen])
    assert seen.notes==[(4,32)]*8+[(2,16)]*4
    assert all(t.shape==p.shape for p,s in learn.opt.state.items() for t in s.values() if torch.is_tensor(t) and t.ndim)

@pytest.mark.parametrize('name', ['encoder','bert'])
def test_thinned_attention_is_quantized_and_exported(name, tmp_path):
    pytest.importorskip('onnxruntime')
    from fastsparse_create.quantization.convert import calibrate_,dequantize_,quantize_
    from fastsparse_create.export.onnx import OnnxModel,export_onnx
    model,x = attention_of(name)
    prune_channels_(model, x, amount=.4, share='uniform')
    x = x['input_ids'] if isinstance(x, dict) else x
    assert export_onnx(model, tmp_path/'floats.onnx', x).max_abs<1e-4
    quantize_(model, x)
    calibrate_(model, [x]*2)
    export_onnx(model, tmp_path/'int8.onnx', x, int8=True)
    with torch.no_grad(): rounded,got = run(model, x),OnnxModel(tmp_path/'int8.onnx', exact=True)(x)
    assert (next(iter(got.values())) if isinstance(got, dict) else got).sub(rounded).norm()<.1*rounded.norm()
    with torch.no_grad(): assert (run(dequantize_(model), x)-rounded).norm()<.2*rounded.norm()
