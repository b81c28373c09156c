"A fit that was interrupted and goes on ends as the one that wasn't, bit for bit"
import errno,itertools,os,resource,signal,subprocess,sys,time
from contextlib import contextmanager
import pytest
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import fine_tune
from utils import *
from fastsparse_create.callback.checkpoint import *
from fastsparse_create.callback.distillation import *
from fastsparse_create.callback.dynamic import *
from fastsparse_create.callback.dynamic_pruning import *
from fastsparse_create.callback.learning_rate import *
from fastsparse_create.callback.movement import *
from fastsparse_create.callback.powerpropagation import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.quantization import *
from fastsparse_create.callback.second_order import *
from fastsparse_create.callback.structured import *
from fastsparse_create.callback.topkast import *
from fastsparse_create.callback.training import *
from fastsparse_create.sparse.linear import *

n_iter,n_epoch = 6,4

class Stopped(Exception): pass

class StopAfter(Callback):
    "The power fails"
    order = 100
    def __init__(self, batch): self.batch = batch
    def after_batch(self):
        if self.training and self.learn.epoch*self.n_iter+self.iter+1==self.batch: raise Stopped('stopped')

def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.2), nn.Linear(16,2))

def stored_net():
    "Numbers of connections move between its layers"
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), SparseLinear(192,16,.8), nn.ReLU(), SparseLinear(16,16,.5), nn.ReLU(), nn.Linear(16,2))

def wide_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,32,3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32,16,3), *conv_net()[4:])

def learner(path, opt_func=partial(SGD, mom=.9), cbs=None, model=conv_net):
    "Batches in another order in each epoch, and dropout"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n_iter*4, 3, 8, 8, generator=g),torch.randn(n_iter*4, 2, generator=g)
    torch.manual_seed(1); random.seed(1); np.random.seed(1)
    dls = DataLoaders.from_dsets(Tensors(x, y), Tensors(x[:8], y[:8]), bs=4, device='cpu', num_workers=0)
    return tiny_learner(model(), opt_func, dls=dls, path=path, cbs=cbs)

def state_of(learn): return {**{k:v.clone() for k,v in learn.model.state_dict().items()}, **{f'{n}: {i}':m.clone() for n,p in learn.model.named_parameters() for i,m in enumerate(memory(learn.opt, p))}}

def one_cycle(learn, cbs): learn.fit_one_cycle(n_epoch, .05, cbs=cbs)

def interrupted(cbs, at, path, fit=one_cycle, every=1, **kwargs):
    "A fit that ends with the batch `at`, and the learner of the one that goes on"
    with pytest.raises(Stopped): fit(learner(path, **kwargs), [*cbs(), CheckpointCallback('cp', every), StopAfter(at)])
    again = learner(path, **kwargs)
    torch.rand(7); random.random(); np.random.rand()
    fit(again, [*cbs(), CheckpointCallback('cp', every, resume=True)])
    return again

def whole(cbs, path, fit=one_cycle, **kwargs):
    learn = learner(path, **kwargs)
    fit(learn, cbs())
    return learn

def assert_goes_on(cbs, at, path, every=1, **kwargs):
    a,b = whole(cbs, path/'whole', **kwargs),interrupted(cbs, at, path, every=every, **kwargs)
    assert same(state_of(a), state_of(b))
    assert [list(o) for o in a.recorder.values]==[list(o) for o in b.recorder.values]
    for name in ('lrs','losses','iters'): assert [float(o) for o in getattr(a.recorder, name)]==[float(o) for o in getattr(b.recorder, name)], name
    assert [p.requires_grad for p in a.model.parameters()]==[p.requires_grad for p in b.model.parameters()]
    return a,b

cases = dict(
    nothing       = lambda: [],
    gmp           = lambda: [GMPruningModifier(.05, .8, .5, 3., .25)],
    gmp_released  = lambda: [GMPruningModifier(.05, .8, 0., 2., .5, leave_enabled=False)],
    glob          = lambda: [GlobalMagnitudePruningModifier(.05, .8, 0., 3., .5)],
    nm            = lambda: [MagnitudePruningModifier(0., .5, 0., 3., .5, ['3.weight'], mask_type='2:4')],
    rigl          = lambda: [RigL(.6, every=2)],
    set           = lambda: [SET(.6, every=2)],
    snfs          = lambda: [SNFS(.6, every=3)],
    granet        = lambda: [GraNetPruningModifier(.3, .8, 0, 3.5, .4)],
    acdc          = lambda: [ACDCPruningModifier(.8, 0, 4, 1)],
    movement      = lambda: [MovementPruningModifier(.05, .8, 0., 3., .5)],
    obs           = lambda: [OBSPruningModifier(.05, .8, 0., 3., .5, num_grads=4)],
    mfac          = lambda: [MFACPruningModifier(.05, .8, 0., 3., .5, num_grads=4)],
    topkast       = lambda: [TopKASTPruningModifier(.8, .5, 0., 4., .5)],
    powerprop     = lambda: [PowerpropagationModifier(0., 3., alpha=2.), GMPruningModifier(.05, .8, 1., 3., .5)],
    qat           = lambda: [GMPruningModifier(.05, .8, 0., 2., .5), QuantizationModifier(start_epoch=1.5, disable_quantization_observer_epoch=3, freeze_bn_stats_epoch=3)],
    thinned       = lambda: [StructuredPruningModifier(0., .5, start_epoch=0., end_epoch=2., update_frequency=.5), LayerThinningModifier(update_epochs=[2.])],
    thinned_qat   = lambda: [StructuredPruningModifier(0., .5, start_epoch=0., end_epoch=1., update_frequency=.5), LayerThinningModifier(update_epochs=[1.]), QuantizationModifier(start_epoch=2.)],
    without_layer = lambda: [LayerPruningModifier('3', .5)],
    put_back      = lambda: [LayerPruningModifier(['3','re:4'], .5, 2.75)],
    without_masked= lambda: [GlobalMagnitudePruningModifier(.05, .8, 0., 3., .25), LayerPruningModifier('3', .75, 2.75)],
    without_some  = lambda: [LayerPruningModifier('3', .5, 2.75), LayerPruningModifier('4', 1.), TrainableParamsModifier(['3.weight'], False, start_epoch=.25)],
    without_qat   = lambda: [LayerPruningModifier('3', 1., 3.), GMPruningModifier(.05, .8, 0., 2., .5), QuantizationModifier(start_epoch=.5, disable_quantization_observer_epoch=3.5)],
    qat_without   = lambda: [LayerPruningModifier('3', .5, 3.), QuantizationModifier(start_epoch=1.)],
    thinned_out   = lambda: [StructuredPruningModifier(0., .5, start_epoch=0., end_epoch=1., update_frequency=.5), LayerThinningModifier(update_epochs=[1.]), LayerPruningModifier('3', 1.25, 3.)],
    set_lr        = lambda: [SetLearningRateModifier(.02, start_epoch=1.5)],
    weight_decay  = lambda: [SetWeightDecayModifier(.1, start_epoch=1.)],
    trainable     = lambda: [TrainableParamsModifier(['0.weight'], False, start_epoch=1., end_epoch=2.)],
    distilled     = lambda: [GMPruningModifier(.05, .8, 0., 3., .25), DistillationModifier(start_epoch=.5)],
    by_layers     = lambda: [GMPruningModifier(.05, .8, 0., 3., .25), PerLayerDistillationModifier(.05, start_epoch=.5)],
    best          = lambda: [SaveModelCallback(), GMPruningModifier(.05, .8, 0., 2., .25)],
    accumulated   = lambda: [GradientAccumulation(12), GMPruningModifier(.05, .8, .5, 3., .25)],
    stored        = lambda: [SNFS(every=2)],
    clipped       = lambda: [GradientClip(.1), RigL(.6, every=2)],
)

@pytest.mark.parametrize('at', [2,8,15,20])
@pytest.mark.parametrize('name', cases)
def test_goes_on(name, at, tmp_path): assert_goes_on(cases[name], at if name!='accumulated' else max(3, at), tmp_path, model=stored_net if name=='stored' else conv_net)

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW), ranger], ids=['Adam','AdamW of torch','ranger'])
@pytest.mark.parametrize('at', [8,18])
def test_optimizers(opt_func, at, tmp_path): assert_goes_on(cases['gmp'], at, tmp_path, opt_func=opt_func)

@pytest.mark.parametrize('at', [3,14])
def test_between_checkpoints_is_trained_again(at, tmp_path):
    assert_goes_on(cases['gmp'], at, tmp_path, every=2)
    if at>n_iter: assert_goes_on(cases['rigl'], at, tmp_path/'epochs', every=1.)

def test_fine_tune(tmp_path):
    def fit(learn, cbs): learn.fine_tune(2, .05, freeze_epochs=2, cbs=cbs)
    def splitter(m): return [params(m[:3]), params(m[3:])]
    modifiers = lambda: [GMPruningModifier(.05, .8, .5, 3., .25)]
    def make(path): return tiny_learner(conv_net(), dls=learner(path).dls, path=path, splitter=splitter)
    expected = make(tmp_path/'whole')
    fit(expected, modifiers())
    for i,(fits,at) in enumerate([(1,4),(2,3),(2,8)]):
        class Stop(StopAfter):
            def after_train(self): self.begun = True
            def before_train(self):
                if self.epoch==0: self.fits = getattr(self, 'fits', 0)+1
            def after_batch(self):
                if self.fits==fits: super().after_batch()
        path = tmp_path/str(i)
        with pytest.raises(Stopped): fit(make(path), [*modifiers(), CheckpointCallback('cp', 1), Stop(at)])
        again = make(path)
        fit(again, [*modifiers(), CheckpointCallback('cp', 1, resume=True)])
        assert same(state_of(expected), state_of(again)), (fits,at)

@pytest.mark.parametrize('ends', [-1.,3.5])
@pytest.mark.parametrize('starts', [.5,2.5])
def test_fine_tune_without_a_layer(starts, ends, tmp_path):
    "What is pruned in the second fit, all together, doesn't know of a layer that went in the first"
    modifiers = lambda: [LayerPruningModifier('3', starts, ends), GlobalMagnitudePruningModifier(.05, .8, 0., 4., .25)]
    def fit(learn, cbs): learn.fine_tune(2, .05, freeze_epochs=2, cbs=cbs)
    def make(path): return tiny_learner(conv_net(), dls=learner(path).dls, path=path, splitter=lambda m: [params(m[:3]), params(m[3:])])
    expected = make(tmp_path/'whole')
    fit(expected, modifiers())
    for at in (2,9,13,16,22):
        class Stop(Callback):
            order = 100
            def before_fit(self): self.n = getattr(self, 'n', 0)
            def after_batch(self):
                self.n += self.training
                if self.n==at: raise Stopped('stopped')
        path = tmp_path/str(at)
        with pytest.raises(Stopped): fit(make(path), [*modifiers(), CheckpointCallback('cp', 1), Stop()])
        again = make(path)
        fit(again, [*modifiers(), CheckpointCallback('cp', 1, resume=True)])
        assert same(state_of(expected), state_of(again)), at
        assert isinstance(again.model[3], nn.Identity if ends<0 else nn.Conv2d)

class Average(Callback):
    "As extensions of fastai keep it"
    run_valid = False
    def before_fit(self): self.ema_model = deepcopy(self.learn.model)
    def after_step(self):
        with torch.no_grad():
            for (n,a),(m,p) in zip(self.ema_model.named_parameters(), self.learn.model.named_parameters()):
                assert n==m
                a.lerp_(p, .1)

@pytest.mark.parametrize('at', [8,15,20])
def test_averages_without_a_layer(at, tmp_path):
    averages = []
    def cbs():
        averages.append(Average())
        return [averages[-1], *cases['put_back']()]
    assert_goes_on(cbs, at, tmp_path)
    assert same(averages[0].ema_model.state_dict(), averages[-1].ema_model.state_dict()) and len(averages)==3

def test_of_another_model_is_said_of_layers_that_are_out(tmp_path):
    "Before anything changes"
    with pytest.raises(Stopped): one_cycle(learner(tmp_path), [LayerPruningModifier('3', .5, 3.), CheckpointCallback('cp', 1), StopAfter(9)])
    for make,said in ((lambda: nn.Sequential(*conv_net()[:3], nn.Conv2d(16,16,1), *conv_net()[4:]), r'3.weight is of shape \(16, 16, 3, 3\), in this model of \(16, 16, 1, 1\)'),
                      (lambda: nn.Sequential(*conv_net()[:3], nn.Identity(), *conv_net()[4:]), 'only the checkpoint has 3.weight')):
        again = learner(tmp_path, model=make)
        before = weights(again.model)
        with pytest.raises(ValueError, match=f'another model: {said}'): one_cycle(again, [LayerPruningModifier('3', .5, 3.), CheckpointCallback('cp', 1, resume=True)])
        assert same(before, weights(again.model))

def test_a_finished_fit_is_there(tmp_path):
    a = learner(tmp_path)
    one_cycle(a, [*cases['gmp'](), CheckpointCallback('cp')])
    b = learner(tmp_path)
    one_cycle(b, [*cases['gmp'](), CheckpointCallback('cp', resume=True)])
    assert same(state_of(a), state_of(b)) and [list(o) for o in a.recorder.values]==[list(o) for o in b.recorder.values]

def test_validation_and_predictions_leave_it_alone(tmp_path):
    learn = learner(tmp_path, cbs=CheckpointCallback('cp', resume=True))
    learn.validate()
    one_cycle(learn, [])
    learn.validate()
    learn.get_preds()
    assert len(list((tmp_path/'cp').iterdir()))==2

def test_stop_saves_and_ends(tmp_path):
    saver = CheckpointCallback('cp')
    class Ask(Callback):
        def after_batch(self):
            if self.training and self.train_iter==9: saver.stop()
    with pytest.raises(KeyboardInterrupt): one_cycle(learner(tmp_path), [*cases['gmp'](), Ask(), saver])
    again = learner(tmp_path)
    one_cycle(again, [*cases['gmp'](), CheckpointCallback('cp', resume=True)])
    assert latest_checkpoint(tmp_path/'cp')['epoch']==n_epoch and same(state_of(again), state_of(whole(cases['gmp'], tmp_path/'whole')))

def less(*names):
    "A checkpoint without one of its sections"
    def spoil(f):
        state = at = torch.load(f, weights_only=True)
        for n in names[:-1]: at = at[n]
        del at[names[-1]]
        torch.save(state, f)
    return spoil

damages = dict(cut=lambda f: f.write_bytes(f.read_bytes()[:-1000]), empty=lambda f: f.write_bytes(b''), changed=lambda f: f.write_bytes(f.read_bytes()[:3000]+b'12345678'+f.read_bytes()[3008:]),
               gone=lambda f: (f.unlink(), f.symlink_to('nowhere')))
strangers = dict(tensor=lambda f: torch.save({'a':torch.ones(3)}, f), list=lambda f: torch.save([1], f), dict=lambda f: torch.save({}, f), weights=lambda f: torch.save(conv_net().state_dict(), f),
                 **{' '.join(map(str, names)):less(*names) for names in (('random',),('random',0),('recorder',),('recorder','noted'),('notes','trainable'),('model',),('n_iter',),('optimizer',))})

@pytest.mark.parametrize('spoil', [pytest.param(f, id=n) for n,f in {**damages, **strangers}.items()])
def test_what_is_damaged_or_no_checkpoint_is_passed_over(spoil, tmp_path, caplog):
    with pytest.raises(Stopped): one_cycle(learner(tmp_path), [*cases['gmp'](), CheckpointCallback('cp', 1), StopAfter(9)])
    older,newer = sorted((tmp_path/'cp').iterdir())
    spoil(newer)
    again = learner(tmp_path)
    one_cycle(again, [*cases['gmp'](), CheckpointCallback('cp', 1, resume=True)])
    assert same(state_of(again), state_of(whole(cases['gmp'], tmp_path/'whole'))) and 'is damaged or gone' in caplog.text and newer.name in caplog.text

@contextmanager
def full_disk(size):
    "No file takes more bytes"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)

@pytest.mark.parametrize('size', [100,5000,20000])
def test_a_full_disk_leaves_the_checkpoint_before(size, tmp_path):
    with pytest.raises(Stopped): one_cycle(learner(tmp_path), [*cases['gmp'](), CheckpointCallback('cp', 1), StopAfter(9)])
    files = {f.name:f.read_bytes() for f in (tmp_path/'cp').iterdir()}
    assert min(map(len, files.values()))>size
    with full_disk(size), pytest.raises(OSError, match='File too large.*epoch_') as e: one_cycle(learner(tmp_path), [*cases['gmp'](), CheckpointCallback('cp', 1, resume=True)])
    assert e.value.errno==errno.EFBIG and files=={f.name:f.read_bytes() for f in (tmp_path/'cp').iterdir()}
    again = learner(tmp_path)
    one_cycle(again, [*cases['gmp'](), CheckpointCallback('cp', 1, resume=True)])
    assert same(state_of(again), state_of(whole(cases['gmp'], tmp_path/'whole')))

def test_what_a_kill_left_goes_with_the_next_fit(tmp_path):
    with pytest.raises(Stopped): one_cycle(learner(tmp_path), [CheckpointCallback('cp', 1), StopAfter(9)])
    name = max(f.name for f in (tmp_path/'cp').iterdir())
    stay = [tmp_path/'cp'/n for n in (f'.{name}.mine', f'.best.pth.{"0"*32}', f'{name}.{"0"*32}')]+[tmp_path/f'.{name}.{"0"*32}']
    go = [tmp_path/'cp'/f'.{name}.{c*32}' for c in 'a0']
    for f in stay+go: f.write_bytes(b'half')
    with pytest.raises(ValueError, match='pass resume=True'): one_cycle(learner(tmp_path), [CheckpointCallback('cp', 1)])
    assert all(f.exists() for f in stay+go)
    with pytest.raises(Stopped): one_cycle(learner(tmp_path), [CheckpointCallback('cp', 1, resume=True), StopAfter(12)])
    assert all(f.exists() for f in stay) and not any(f.exists() for f in go)

def test_what_does_not_fit_changes_nothing(tmp_path):
    with pytest.raises(Stopped): one_cycle(learner(tmp_path), [*cases['gmp'](), CheckpointCallback('cp', 1), StopAfter(9)])
    files = {f.name:f.read_bytes() for f in (tmp_path/'cp').iterdir()}
    def refused(said, cbs=(), fit=one_cycle, model=conv_net, opt_func=partial(SGD, mom=.9), splitter=trainable_params, **kwargs):
        learn = learner(tmp_path, opt_func, model=model)
        learn.splitter = splitter
        before = weights(learn.model)
        with pytest.raises(ValueError, match=said): fit(learn, [*cbs, CheckpointCallback('cp', 1, **kwargs)])
        assert same(before, weights(learn.model)) and all(p.mask.all() for p in masked_params(learn.model)) and files=={f.name:f.read_bytes() for f in (tmp_path/'cp').iterdir()}
    refused('pass resume=True', cases['gmp']())
    refused('made with .*GMPruning.*, this fit has none', resume=True)
    refused('a fit of 4 epochs, this one has 5', cases['gmp'](), lambda learn,cbs: learn.fit_one_cycle(5, cbs=cbs), resume=True)
    for said,model in {'only the checkpoint has 9.weight, 9.bias':lambda: conv_net()[:9], 'only this model has 10.weight, 10.bias':lambda: nn.Sequential(*conv_net(), nn.Linear(2,2)),
                       r'9.weight is of shape \(2, 16\), in this model of \(3, 16\)':lambda: nn.Sequential(*conv_net()[:9], nn.Linear(16,3)),
                       r'0.weight is of shape \(16, 3, 3, 3\), in this model of \(32, 3, 3, 3\)':wide_net}.items():
        refused(f'is of another model: {said}', cases['gmp'](), model=model, resume=True)
    for name,opt_func in {r'Optimizer\(.*adam_step\)':Adam, r'Optimizer\(.*sgd_step\)':SGD, 'OptimWrapper of SGD':partial(OptimWrapper, opt=torch.optim.SGD), r'Lookahead of Optimizer\(.*\)':ranger}.items():
        refused(rf'is of another optimizer, of Optimizer\(.*momentum_step\), this fit has {name}', cases['gmp'](), opt_func=opt_func, resume=True)
    refused('of 10 parameters, this fit has 6', cases['gmp'](), splitter=lambda m: [params(m[2:])], resume=True)
    refused('of 1 groups of parameters, this fit has 2', cases['gmp'](), splitter=lambda m: [params(m[:3]), params(m[3:])], resume=True)
    for names,said in {('optimizer','state'):'of 0 parameters, this fit has 10', ('optimizer','hypers'):'of 0 groups', ('optimizer','hypers',0,'mom'):'without mom'}.items():
        for f in (tmp_path/'cp').iterdir():
            f.write_bytes(files[f.name])
            less(*names)(f)
        were,files = files,{f.name:f.read_bytes() for f in (tmp_path/'cp').iterdir()}
        refused(said, cases['gmp'](), resume=True)
        files = were
    for f in (tmp_path/'cp').iterdir(): f.write_bytes(b'x')
    files = {f.name:f.read_bytes() for f in (tmp_path/'cp').iterdir()}
    refused('none of its 2 checkpoints can be read', cases['gmp'](), resume=True)

def test_other_arguments_are_told(tmp_path, caplog):
    def said(folder, old, new):
        with pytest.raises(Stopped): one_cycle(learner(tmp_path), [SetLearningRateModifier(.02, start_epoch=1.5), old, CheckpointCallback(folder, 1), StopAfter(9)])
        caplog.clear()
        one_cycle(learner(tmp_path), [SetLearningRateModifier(.02, start_epoch=1.5), new, CheckpointCallback(folder, 1, resume=True)])
        return [m for m in caplog.messages if 'goes on with' in m]
    first = lambda **kwargs: GMPruningModifier(**{**dict(init_sparsity=.05, final_sparsity=.8, start_epoch=0, end_epoch=3, update_frequency=.25), **kwargs})
    for i,(old,new) in enumerate([(first(),first(final_sparsity=.9)), (first(),first(end_epoch=2)), (first(),first(params=['0.weight'])), (RigL(.6, every=2),RigL(.6, every=2, grow_f=by_magnitude))]):
        text, = said(f'other{i}', old, new)
        assert text.count(f'{type(old).__name__}(')==2 and 'the checkpoint was made with' in text
    for i,(old,new) in enumerate([(first(),first(start_epoch=0., end_epoch=3.)), (RigL(.6, every=2),RigL(.6, every=2))]): assert said(f'same{i}', old, new)==[]

def by_magnitude(weight, **_): return weight.abs()

def test_interrupted_again_and_again(tmp_path):
    "Between two epochs, in the midst of the next one, and in it once more"
    class StopBetween(Callback):
        def before_epoch(self):
            if self.learn.epoch==2: raise Stopped('stopped')
    for stop in (StopBetween(),StopAfter(15),StopAfter(17)):
        with pytest.raises(Stopped): one_cycle(learner(tmp_path), [*cases['gmp'](), CheckpointCallback('cp', 1, resume=True), stop])
    again = learner(tmp_path)
    one_cycle(again, [*cases['gmp'](), CheckpointCallback('cp', 1, resume=True)])
    assert same(state_of(again), state_of(whole(cases['gmp'], tmp_path/'whole')))

# kills

def killed_in_a_child(path, seconds, cbs):
    "Train in a process of its own that is killed after so many seconds; was it?"
    pid = os.fork()
    if pid:
        if seconds: time.sleep(seconds), os.kill(pid, signal.SIGKILL)  # one that has ended takes no notice
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0,-signal.SIGKILL), f'ended with {code}'
        return code!=0
    learn = learner(path, Adam)
    one_cycle(learn, cbs())
    torch.save(state_of(learn), path/'end.pth')
    os._exit(0)

def kill_often(folder, n):
    "Fits, each killed at random moments until it has ended"
    rng,kills,modifiers = random.Random(0),0,lambda: [GMPruningModifier(.05, .8, .5, 3., .25), SaveModelCallback()]
    (folder/'whole').mkdir()
    assert not killed_in_a_child(folder/'whole', 0, modifiers)
    expected = torch.load(folder/'whole'/'end.pth', weights_only=True)
    for i in itertools.count():
        path = folder/str(i)
        path.mkdir()
        while killed_in_a_child(path, rng.uniform(.02, 1.), lambda: [*modifiers(), CheckpointCallback('cp', 1, resume=True)]): kills += 1
        assert same(torch.load(path/'end.pth', weights_only=True), expected) and not [f for f in (path/'cp').iterdir() if f.name.startswith('.')]
        if kills>=n: return kills

def test_killed_at_random_moments(tmp_path):
    "In a process that has not run backward, as that can't be forked then"
    code = f"import sys,warnings; warnings.simplefilter('ignore'); sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_checkpoint import *\nprint(kill_often(Path({str(tmp_path)!r}), 50))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==0 and int(done.stdout.split()[-1])>=50, done.stderr[-2000:]
