"Distillation weighs the same in `fit`, and in a plain loop that knows nothing of it"
import pytest,warnings
from collections import OrderedDict,namedtuple
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from torch.utils.checkpoint import checkpoint
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation,GradientClip
from utils import *
from fastsparse_create.callback.distillation import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.quantization import *
from fastsparse_create.create.manager import *

def net(seed=0, d_hid=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4,d_hid), nn.BatchNorm1d(d_hid), nn.ReLU(), nn.Linear(d_hid,3))

def batches(n=6, bs=8, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, 4, generator=g),torch.randint(3, (bs,), generator=g)) for _ in range(n)]

class Wrapped(nn.Module):
    "Returns its logits in a container"
    def __init__(self, wrap, seed=0):
        super().__init__()
        self.body,self.wrap = net(seed),wrap
    def forward(self, x): return self.wrap(self.body(x))

Outputs = namedtuple('Outputs', 'logits extra')
containers = dict(tensor=(lambda o: o, lambda o: o), tuple=(lambda o: (o,None), lambda o: o[0]), list=(lambda o: [o], lambda o: o[0]), dict=(lambda o: {'logits':o, 'n':3}, lambda o: o['logits']),
                  ordered=(lambda o: OrderedDict(logits=o), lambda o: o['logits']), named=(lambda o: Outputs(o, 'x'), lambda o: o.logits))

def grads(model): return [p.grad.clone() for p in model.parameters() if p.grad is not None]

def assert_close_relative(a, b, tol=1e-5):
    "All gradients together: that of a bias before a batch norm is 0 but for rounding"
    assert [g.shape for g in a]==[g.shape for g in b]
    a,b = (torch.cat([g.flatten() for g in gs]) for gs in (a, b))
    assert (a-b).norm()<=tol*b.norm()

def by_hand(student, teacher, data, h, t, get=lambda o: o, n_acc=1):
    "The gradient of the formula, over all of `data`"
    for xb,yb in data:
        out = get(student(xb))
        with torch.no_grad(): wanted = get(teacher(xb))
        (((1-h)*F.cross_entropy(out, yb) + h*distillation_loss(out, wanted, t))/n_acc).backward()
    return grads(student)

def looped(student, data, modifier, get=lambda o: o, n_acc=1, scaler=None, **kwargs):
    "The gradients that a plain loop's first step gets"
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 10, 1, modifier, scaler=scaler, accumulates=n_acc, **kwargs)
    for xb,yb in data:
        loss = F.cross_entropy(get(student(xb)), yb)/n_acc
        (scaler.scale(loss) if scaler else loss).backward()
    if scaler: scaler.unscale_(opt)
    seen = grads(student)
    scaler.step(opt) if scaler else opt.step()
    if scaler: scaler.update()
    return seen,manager

@pytest.mark.parametrize('h', [0.,.3,1.])
@pytest.mark.parametrize('container', containers)
def test_gradient_in_a_plain_loop(container, h):
    wrap,get = containers[container]
    student,teacher = Wrapped(wrap),Wrapped(wrap, 1).eval()
    expected = by_hand(deepcopy(student), teacher, batches(1), h, 3., get)
    seen,manager = looped(student, batches(1), DistillationModifier(hardness=h, temperature=3., teacher=teacher), get)
    assert_close_relative(seen, expected)
    assert all(p.grad is None for p in teacher.parameters()) and manager.steps==1

@pytest.mark.parametrize('scale', [None,1.,2.**14,65536.*3])
@pytest.mark.parametrize('n_acc', [1,2,5])
def test_scaler_and_accumulation(n_acc, scale):
    student,teacher = net(),net(1).eval()
    expected = by_hand(deepcopy(student), teacher, batches(n_acc), .6, 2., n_acc=n_acc)
    scaler = None if scale is None else torch.amp.GradScaler('cpu', init_scale=scale)
    seen,_ = looped(student, batches(n_acc), DistillationModifier(hardness=.6, teacher=teacher), n_acc=n_acc, scaler=scaler)
    assert_close_relative(seen, expected)

def test_in_place_operations_on_outputs():
    student,teacher = Wrapped(lambda o: (o,o*2)),Wrapped(lambda o: (o,o*2), 1).eval()
    seen,_ = looped(student, batches(1), DistillationModifier(teacher=teacher), lambda o: o[0].mul_(.5))
    reference = deepcopy(student)
    assert all(g.isfinite().all() for g in seen)

def test_outputs_that_the_loss_does_not_use_are_compared_too():
    "A model that computes its own loss, as those of Hugging Face do"
    class Own(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.body = net(seed)
        def forward(self, x, labels): 
            o = self.body(x)
            return {'loss':F.cross_entropy(o, labels), 'logits':o}
    student,teacher = Own(0),Own(1).eval()
    (xb,yb),reference = batches(1)[0],deepcopy(student)
    out = reference(xb, yb)
    (.5*out['loss'] + .5*distillation_loss(out['logits'], teacher(xb, yb)['logits'].detach())).backward()
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 10, 1, DistillationModifier(teacher=teacher))
    student(x=xb, labels=yb)['loss'].backward()
    assert_close_relative(grads(student), grads(reference))
    opt.step()

@pytest.mark.parametrize('kind', ['outputs','layers','layers, projected'])
def test_fit_equals_loop(kind):
    make = dict(outputs=lambda: DistillationModifier(start_epoch=1., end_epoch=2.5, teacher=net(1)),
                layers=lambda: PerLayerDistillationModifier(start_epoch=1., teacher=net(1)))
    cbs = lambda: [make.get(kind, lambda: PerLayerDistillationModifier(teacher=net(1, 24)))(), GMPruningModifier(.05, .8, .5, 2., .25)]
    data,(fitted,loop) = batches(),(net(),net())
    opt = torch.optim.SGD(fitted.parameters(), lr=.005, momentum=.9)
    learn = Learner(DataLoaders(data, data[:1], device='cpu'), fitted, loss_func=nn.CrossEntropyLoss(), opt_func=OptimWrapper(opt=opt), lr=.005)
    learn.logger = noop
    with learn.no_bar(): learn.fit(3, cbs=cbs())
    opt = torch.optim.SGD(loop.parameters(), lr=.005, momentum=.9)
    manager = LoopManager(loop, opt, len(data), 3, cbs())
    for _ in range(3):
        for xb,yb in data:
            opt.zero_grad()
            F.cross_entropy(loop(xb), yb).backward()
            opt.step()
    manager.finalize()
    for a,b in zip(fitted.state_dict().values(), loop.state_dict().values()): assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert n_masked(loop)>80 and not any(m._forward_hooks for m in loop.modules())

def test_self_is_the_student_when_distillation_starts():
    student,data = net(),batches()
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    distill = DistillationModifier(start_epoch=1.)
    manager = LoopManager(student, opt, len(data), 3, [distill, GMPruningModifier(.3, .8, 0., 2., .25)])
    for epoch in range(2):
        if epoch==1: before = deepcopy(student.state_dict())
        for xb,yb in data:
            opt.zero_grad()
            F.cross_entropy(student(xb), yb).backward()
            opt.step()
    teacher = distill._network.state_dict()
    assert all(torch.equal(teacher[k], before[k]) for k in teacher) and not any('mask' in k for k in teacher)
    assert not any('network' in k or 'teacher' in k for k in student.state_dict())
    held = {id(p) for pg in opt.param_groups for p in pg['params']}
    assert not any(id(p) in held for p in distill._network.parameters())

@pytest.mark.parametrize('make', [lambda: DistillationModifier(.5), lambda: PerLayerDistillationModifier(teacher=net(1, 24))], ids=['self','projected'])
def test_resumes_bit_for_bit(make):
    data = batches()
    def start():
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=.005, momentum=.9)
        return model,opt,LoopManager(model, opt, len(data), 4, [make(), GMPruningModifier(.05, .8, .5, 3., .25)])
    def epochs(model, opt, n):
        for _ in range(n):
            for xb,yb in data:
                opt.zero_grad()
                F.cross_entropy(model(xb), yb).backward()
                opt.step()
    whole,opt,manager = start()
    epochs(whole, opt, 4)
    first,opt,manager = start()
    epochs(first, opt, 2)
    saved = deepcopy((first.state_dict(), opt.state_dict(), manager.state_dict()))
    second,opt,manager = start()
    for o,state in zip((second,opt,manager), saved): o.load_state_dict(state)
    epochs(second, opt, 2)
    assert same(weights(whole), weights(second))

def test_overflows():
    student,teacher,scaler = net(),net(1),torch.amp.GradScaler('cpu', init_scale=2.**10)
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 10, 1, DistillationModifier(teacher=teacher), scaler=scaler)
    for set_to_none in True,False:
        for xb,yb in batches(4):
            for bad in True,False:
                opt.zero_grad(set_to_none=set_to_none)
                scaler.scale(F.cross_entropy(student(xb), yb)*(math.inf if bad else 1.)).backward()
                scaler.step(opt)
                scaler.update()
    assert manager.steps==8 and all(p.isfinite().all() for p in student.parameters())

@pytest.mark.parametrize('order', ['before forward','after forward','after step'])
@pytest.mark.parametrize('set_to_none', [True,False])
def test_skipped_steps_wherever_gradients_are_dropped(order, set_to_none):
    student,scaler = net(),torch.amp.GradScaler('cpu', init_scale=2.**10)
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 10, 1, DistillationModifier(teacher=net(1)), scaler=scaler)
    for i,(xb,yb) in enumerate(batches(6)):
        if order=='before forward': opt.zero_grad(set_to_none)
        loss = F.cross_entropy(student(xb), yb)*(math.inf if i<3 else 1.)
        if order=='after forward': opt.zero_grad(set_to_none)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        if order=='after step': opt.zero_grad(set_to_none)
    assert manager.steps==3 and all(p.isfinite().all() for p in student.parameters())

def test_several_forward_passes_of_one_backward_pass():
    "Refused, unless their number is told, by which the loss is divided"
    student,teacher = net(),net(1).eval()
    expected = by_hand(deepcopy(student), teacher, batches(2), .6, 2., n_acc=2)
    for n,error in ((1,pytest.raises(ValueError, match='2 forward passes')),(2,nullcontext())):
        model = deepcopy(student)
        opt = torch.optim.SGD(model.parameters(), lr=.1)
        manager = LoopManager(model, opt, 10, 1, DistillationModifier(hardness=.6, teacher=teacher), accumulates=n)
        sum(F.cross_entropy(model(xb), yb)/2 for xb,yb in batches(2)).backward()
        if n==2: assert_close_relative(grads(model), expected)
        with error: opt.step()

def test_fewer_forward_passes_than_announced(caplog):
    student = net()
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 3, 2, DistillationModifier(teacher=net(1)), accumulates=4)
    for i,(xb,yb) in enumerate(batches(6)):
        F.cross_entropy(student(xb), yb).backward()
        if i%2: opt.step()
    assert 'more than 2 forward passes, 4 were announced' in caplog.text

def test_a_scaler_that_is_not_told():
    student,scaler = net(),torch.amp.GradScaler('cpu')
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 3, 2, DistillationModifier(teacher=net(1)))
    xb,yb = batches(1)[0]
    scaler.scale(F.cross_entropy(student(xb), yb)).backward()
    with pytest.raises(ValueError, match='give it as scaler'): scaler.step(opt)

def test_teachers_are_not_told_the_labels():
    class Own(nn.Module):
        def __init__(self, seed, n_out=3):
            super().__init__()
            self.body,self.told = net(seed),[]
        def forward(self, x, labels=None):
            self.told.append(labels is not None)
            return self.body(x)
    for teacher in Own(1),net(1):
        student = Own(0)
        opt = torch.optim.SGD(student.parameters(), lr=.1)
        manager = LoopManager(student, opt, 3, 2, DistillationModifier(teacher=teacher))
        xb,yb = batches(1)[0]
        F.cross_entropy(student(x=xb, labels=yb), yb).backward()
        opt.step()
        assert getattr(teacher, 'told', [False])==[False] and student.told==[True]

def test_refusals():
    def step(student, loss, **kwargs):
        opt = torch.optim.SGD(student.parameters(), lr=.1)
        manager = LoopManager(student, opt, 10, 1, DistillationModifier(teacher=net(1)), **kwargs)
        before = weights(student)
        for xb,yb in batches(2): loss(student, xb, yb).backward()
        with pytest.raises(ValueError) as e: opt.step()
        assert same(before, weights(student))
        return str(e.value)
    assert 'gradients of 2 forward passes led to this step' in step(net(), lambda m,x,y: F.cross_entropy(m(x), y)/2)
    assert 'had no effect' in step(net(), lambda m,x,y: F.cross_entropy(m[2:](m[:2](x)), y))
    assert 'had no effect' in step(net().eval(), lambda m,x,y: F.cross_entropy(m(x), y))
    student = net()
    with pytest.raises(ValueError, match='student itself'): looped(student, batches(1), DistillationModifier(teacher=student))
    with pytest.raises(ValueError, match='of shape'): looped(net(), batches(1), DistillationModifier(teacher=nn.Linear(4,5)))
    with pytest.raises(ValueError, match='give one as distillation_teacher'): looped(net(), batches(1), DistillationModifier(teacher='given'))

def test_bare_steps_are_let_through():
    student = net()
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    manager = LoopManager(student, opt, 3, 1, DistillationModifier(teacher=net(1)))
    for _ in range(3): opt.step()
    assert manager.steps==3

@pytest.mark.parametrize('n_acc', [1,2])
def test_fit_with_accumulation(n_acc):
    "fastai's callback divides what is differentiated, the teacher's part included"
    class DL(list): bs = 8
    data,student,teacher = DL(batches(2)),net(),net(1).eval()
    expected,seen = by_hand(deepcopy(student), teacher, data[:n_acc], .4, 2., n_acc=n_acc),[]
    learn = Learner(DataLoaders(data, data[:1], device='cpu'), student, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=0.)
    learn.logger = noop
    note = Note('before_step', lambda cb: grads(cb.model), order=8)
    extra = [GradientAccumulation(16)] if n_acc==2 else []
    student[1].momentum = 0.  # the second batch would see other statistics, which doesn't matter in training mode
    with learn.no_bar(): learn.fit(1, cbs=[DistillationModifier(hardness=.4, teacher=teacher), note, *extra])
    assert_close_relative(note.notes[0], expected)

def test_validation_predictions_and_lr_find_are_left_alone():
    learn = tiny_learner(net(), d_out=3)
    before = learn.validate()[0]
    learn.add_cb(DistillationModifier(teacher=net(1)))
    assert learn.validate()[0]==before
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=30)
    learn.fit(1)
    assert learn.recorder.metric_names[-2]=='distillation' and learn.recorder.values[-1][-1]>0

def test_teachers(tmp_path):
    "A `Learner`, the file of one, and weights"
    teacher = tiny_learner(net(1), d_out=3, path=tmp_path)
    teacher.export(tmp_path/'teacher.pkl')
    torch.save(sparsified(net(1)).state_dict(), tmp_path/'teacher.pth')
    for t in teacher,tmp_path/'teacher.pkl',str(tmp_path/'teacher.pth'):
        found = find_teacher(t, net())
        assert found[0].weight.shape==(16,4)
    torch.save(nn.Linear(2,2).state_dict(), tmp_path/'other.pth')
    with pytest.raises(ValueError, match='no weights of the student'): find_teacher(tmp_path/'other.pth', net())

def sparsified(model):
    sparsify_model(model, .5)
    return model

def test_quantization_switches_the_scaler_off(caplog):
    student,scaler = net(),torch.amp.GradScaler('cpu', init_scale=2.**10)
    opt = torch.optim.SGD(student.parameters(), lr=.05)
    manager = LoopManager(student, opt, 6, 2, [QuantizationModifier(1.), DistillationModifier(teacher=net(1))], scaler=scaler)
    enabled = []
    for _ in range(2):
        for xb,yb in batches():
            opt.zero_grad()
            scaler.scale(F.cross_entropy(student(xb), yb)).backward()
            scaler.step(opt)
            scaler.update()
            enabled.append(scaler.is_enabled())
    assert enabled==[True]*6+[False]*6 and manager.steps==12
    assert caplog.text.count('without autocast')==1
    manager.finalize()
