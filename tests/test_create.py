"`create.initialize` in training loops of every kind: what the recipe says is what the model gets"
import pytest,re,subprocess,sys
from pathlib import Path
from utils import *
import fastsparse_create as sparsify
from fastsparse_create.callback.core import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.quantization import *
from fastsparse_create.create.api import *
from fastsparse_create.create.schemas import *
from fastsparse_create.quantization.convert import is_quantized
from fastsparse_create.recipe.compile import Recipe
from fastsparse_create.recipe.generate import *
from fastsparse_create.selection import prunable

n_iter = 6

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8,24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24,16), nn.ReLU(), nn.Linear(16,4))

def batches(n=n_iter, bs=8):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(bs, 8, generator=g),torch.randint(4, (bs,), generator=g)) for _ in range(n)]

def train(model, opt, epochs, data=None):
    model.train()
    for _ in range(epochs):
        for xb,yb in data or batches():
            opt.zero_grad()
            F.cross_entropy(model(xb), yb).backward()
            opt.step()

def sgd(model): return torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)

def n_zeros(model): return {n:int((s.param==0).sum()) for n,s in prunable(model).items()}

def some_zeros(model):
    with torch.no_grad():
        for s in prunable(model).values(): s.param.mul_((torch.arange(s.param.numel())%2==0).view_as(s.param))

prunings = [True,False,None,'magnitude','global','constant','transfer','sparse-transfer','movement','acdc','obs','mfac','set','snfs','rigl']

@pytest.mark.parametrize('lr', lr_types)
@pytest.mark.parametrize('distillation', [False,True], ids=['','distillation'])
@pytest.mark.parametrize('quantization', [False,True], ids=['','int8'])
@pytest.mark.parametrize('pruning', prunings, ids=str)
def test_grid(pruning, quantization, distillation, lr, tmp_path):
    "Each combination trains, ends at the sparsity that it states, and its saved recipe gives an equal run"
    holds = pruning in ('constant','transfer','sparse-transfer')
    def start():
        model = net()
        if holds: some_zeros(model)
        return model,sgd(model)
    model,opt = start()
    before = n_zeros(model)
    variables = dict(num_epochs=2, init_lr=.05) | ({} if holds or not pruning else dict(sparsity=.75))
    manager,opt = sparsify.create.initialize(model, opt, n_iter, pruning, quantization, lr, distillation, recipe_variables=variables)
    train(model, opt, manager.max_epochs)
    manager.finalize()
    sizes,zeros = {n:s.param.numel() for n,s in prunable(model).items()},n_zeros(model)
    kind = {True:'global', 'magnitude':'global', 'obs':'global', 'mfac':'global', 'acdc':'global'}.get(pruning, pruning)
    if not pruning: assert sum(zeros.values())==0
    elif holds: assert zeros==before
    elif kind=='global': assert sum(zeros.values())==round(.75*sum(sizes.values()))
    elif kind=='movement': assert zeros=={n:round(.75*size) for n,size in sizes.items()}
    else: assert abs(n_masked(model)-.75*sum(sizes.values()))<=len(sizes)/2+1e-6  # a new connection is 0 until it learns
    assert is_quantized(model)==quantization and bool(manager.distillation_modifiers)==distillation
    manager.save_recipe(tmp_path/'recipe.yaml')
    again,opt = start()
    other = RecipeManager(tmp_path/'recipe.yaml', again, opt, n_iter)
    train(again, opt, other.max_epochs)
    other.finalize()
    assert same(model.state_dict(), again.state_dict())

@pytest.mark.parametrize('sparsity', [.1,.5,.9,.95])
@pytest.mark.parametrize('pruning', ['magnitude','movement','rigl','acdc','obs'])
def test_sparsity_is_what_was_asked_for(pruning, sparsity):
    model = net()
    manager,opt = sparsify.create.initialize(model, sgd(model), n_iter, pruning, recipe_variables=dict(sparsity=sparsity, num_epochs=2))
    train(model, opt, 2)
    assert abs(measured_sparsity(model)-sparsity)<.005

@pytest.mark.parametrize('pruning', [True,'acdc','rigl'])
@pytest.mark.parametrize('epochs', [1,2,3,5,14,15,33,100])
def test_any_number_of_epochs(epochs, pruning):
    model = net()
    manager,opt = sparsify.create.initialize(model, sgd(model), n_iter, pruning, recipe_variables=dict(num_epochs=epochs))
    assert manager.max_epochs==epochs
    for _ in range(epochs*n_iter): opt.step()
    manager.finalize()
    assert abs(measured_sparsity(model)-.8)<.005 and is_quantized(model)

def test_all_numbers_of_epochs_have_valid_phases():
    last = None
    for n in range(1, 101):
        m = {type(o).__name__:o for o in Recipe.from_string(generate_recipe(.9, n, int8=True)).compile()}
        p,q = m['MagnitudePruningModifier'],m['QuantizationModifier']
        lengths = [p.start_epoch, p.end_epoch-p.start_epoch, q.start_epoch-p.end_epoch, q.freeze_bn_stats_epoch-q.start_epoch, n-q.freeze_bn_stats_epoch]
        assert min(lengths)>0 and sum(lengths)==pytest.approx(n)
        assert last is None or all(a<b+1e-9 for a,b in zip(last, lengths))
        last = lengths

def test_phases_without_a_step_are_told(caplog):
    model = net()
    sparsify.create.initialize(model, sgd(model), 2, recipe_variables=dict(num_epochs=1))
    assert caplog.text.count('is shorter than a step')>=1

@pytest.mark.parametrize('target', ['vnni','tensorrt','onnxruntime'])
def test_targets(target):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,64,3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64,64,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,4))
    data = [(torch.randn(4,3,8,8),torch.randint(4,(4,))) for _ in range(n_iter)]
    manager,opt = sparsify.create.initialize(model, sgd(model), n_iter, recipe_variables=dict(target=target, num_epochs=2))
    train(model, opt, manager.max_epochs, data)
    manager.finalize()
    w = model[3].weight
    if target=='vnni': assert (w.movedim(1,-1).reshape(-1,4).count_nonzero(1)%4==0).all() and abs(measured_sparsity(model, manager.pruning_modifiers[0].selected())-.8)<.01
    if target=='tensorrt': assert (w.movedim(1,-1).reshape(-1,4).count_nonzero(1)==2).all()
    if target=='onnxruntime': assert w.shape[1]<64
    assert is_quantized(model)

# loops of others

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1,self.conv2 = nn.Conv2d(1,32,3,1),nn.Conv2d(32,64,3,1)
        self.dropout1,self.dropout2 = nn.Dropout(.25),nn.Dropout(.5)
        self.fc1,self.fc2 = nn.Linear(256,128),nn.Linear(128,10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = self.dropout2(x)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)

def digits(bs):
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader,TensorDataset
    d = load_digits()
    x,y = torch.tensor(d.images/16).float()[:,None],torch.tensor(d.target)
    valid = torch.arange(len(x))%5==0
    return DataLoader(TensorDataset(x[~valid], y[~valid]), batch_size=bs, shuffle=True, drop_last=True),DataLoader(TensorDataset(x[valid], y[valid]), batch_size=1000)

def train_example(model, device, train_loader, optimizer, epoch):
    "From PyTorch's MNIST example, as it stands there"
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()

def test_example(model, device, test_loader):
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            pred = output.argmax(dim=1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()
    return correct / len(test_loader.dataset)
test_example.__test__ = False

@pytest.mark.parametrize('distillation', [False,True])
def test_the_mnist_example(distillation):
    torch.manual_seed(1)
    device = torch.device('cpu')
    train_loader,test_loader = digits(64)
    model = Net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    manager,optimizer = sparsify.create.initialize(model, optimizer, len(train_loader), distillation=distillation, recipe_variables=dict(num_epochs=14, sparsity=.8, init_lr=1., final_lr=.01))
    accuracies = []
    for epoch in range(1, manager.max_epochs + 1):
        train_example(model, device, train_loader, optimizer, epoch)
        accuracies.append(test_example(model, device, test_loader))
    manager.finalize()
    pruned = manager.pruning_modifiers[0].selected()
    assert 'conv1.weight' not in pruned and abs(measured_sparsity(model, pruned)-.8)<1e-4
    assert accuracies[-1]>(.9 if distillation else .95) and is_quantized(model)  # its own teacher, copied early, holds it back

def test_scaler_and_accumulation():
    torch.manual_seed(1)
    train_loader,test_loader = digits(32)
    model,scaler,n_acc = Net(),torch.amp.GradScaler('cpu', init_scale=2.**10),2
    optimizer = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    manager,scaler = sparsify.create.initialize(model, optimizer, len(train_loader)//n_acc, distillation=True, scaler=scaler,
                                                recipe_variables=dict(num_epochs=8, sparsity=.8, init_lr=.1, final_lr=.001, gradient_accumulation_steps=n_acc))
    for epoch in range(manager.max_epochs):
        model.train()
        for i,(data,target) in enumerate(train_loader):
            with torch.autocast('cpu', torch.bfloat16, enabled=epoch<manager.quantization_start_epoch): loss = F.nll_loss(model(data).float(), target)/n_acc
            scaler.scale(loss).backward()
            if (i+1)%n_acc: continue
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    manager.finalize()
    assert manager.steps==len(train_loader)//n_acc*8 and not scaler.is_enabled()
    assert abs(measured_sparsity(model, manager.pruning_modifiers[0].selected())-.8)<1e-4
    assert test_example(model, 'cpu', test_loader)>.9

def test_skipped_steps_neither_advance_nor_unmask():
    model,scaler = net(),torch.amp.GradScaler('cpu', init_scale=2.**10)
    opt = sgd(model)
    manager,scaler = sparsify.create.initialize(model, opt, n_iter, 'rigl', False, scaler=scaler, recipe_variables=dict(num_epochs=2, sparsity=.75))
    for xb,yb in batches()*2:
        for bad in False,True:
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(xb), yb)*(math.inf if bad else 1)).backward()
            steps,before = manager.steps,weights(model)
            scaler.step(opt)
            scaler.update()
            assert manager.steps==steps+(not bad) and violations(model, opt)==[]
            if bad: assert same(before, weights(model))

# resuming

resumable = [True,'movement','acdc','obs','mfac','set','snfs','rigl']

def trained(pruning, first, last, file_in=None, file_out=None):
    "A model after `last` of 4 epochs, or what is needed to go on"
    model = net()
    opt = sgd(model)
    manager,opt = sparsify.create.initialize(model, opt, n_iter, pruning, distillation=True, recipe_variables=dict(num_epochs=4, sparsity=.75))
    if file_in:
        for o,state in zip((manager,model,opt), torch.load(file_in, weights_only=True)): o.load_state_dict(state)
    train(model, opt, last-first)
    if file_out: torch.save([o.state_dict() for o in (manager,model,opt)], file_out)
    else: return model

@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
    "Where another process has left what it trained half, and what a third one has made of it"
    folder = tmp_path_factory.mktemp('resumed')
    head = f"import sys,warnings; warnings.simplefilter('ignore'); sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_create import *\nfor p in resumable:\n  for c in 1,2,3: "
    for code in "trained(p, 0, c, None, f'half_{p}_{c}.pt')", "torch.save(trained(p, c, 4, f'half_{p}_{c}.pt').state_dict(), f'whole_{p}_{c}.pt')":
        subprocess.run([sys.executable, '-c', head+code], cwd=folder, check=True)
    return folder

@pytest.mark.parametrize('cut', [1,2,3])
@pytest.mark.parametrize('pruning', resumable, ids=str)
def test_resumes_in_a_fresh_process(pruning, cut, resumed):
    "Masks, clock, ranges of activations, the teacher and the optimizer, bit for bit"
    assert same(trained(pruning, 0, 4).state_dict(), torch.load(resumed/f'whole_{pruning}_{cut}.pt', weights_only=True))

# mistakes

@pytest.mark.parametrize('kwargs,message', [
    (dict(pruning='magnitud'), "did you mean 'magnitude'"), (dict(pruning=3), 'is not known'), (dict(lr='cosin'), "did you mean 'cosine'"), (dict(quantization=None), 'quantization must be True or False'),
    (dict(recipe_variables=dict(sparcity=.9)), "did you mean 'sparsity'"), (dict(recipe_variables=dict(sparsity=1.5)), 'sparsity must be between 0 and 1'), (dict(recipe_variables=dict(num_epochs=0)), 'num_epochs must be at least 1'),
    (dict(recipe_variables=dict(num_epochs=1.5)), 'a whole number'), (dict(recipe_variables=dict(target='vni')), "did you mean 'vnni'"), (dict(recipe_variables=dict(mask_type='blok4')), 'block4'),
    (dict(recipe_variables=dict(target='vnni', mask_type='2:4')), "what target 'vnni' needs"), (dict(recipe_variables=dict(hardness=2)), 'hardness must be'), (dict(recipe_variables=3), 'RecipeVariables or a dict'),
    (dict(scaler=3), 'scaler must be'), (dict(distillation=True, distillation_teacher='nowhere.pth'), 'no file'), (dict(recipe_variables=dict(warmup_epochs=30)), "don't fit into 20 epochs"),
    (dict(recipe_variables=dict(init_sparsity=.9)), 'init_sparsity must be'), (dict(recipe_variables=dict(gradient_accumulation_steps=0)), 'accumulates must be at least 1'),
    (dict(recipe_variables=dict(params=['nothing'])), 'nothing'), (dict(distillation_teacher=net()), 'distillation is False'), (dict(distillation=True, distillation_teacher=3), 'distillation_teacher must be'),
    (dict(pruning='movement', recipe_variables=dict(global_sparsity=True)), "no effect with pruning 'movement'"), (dict(pruning='global', recipe_variables=dict(global_sparsity=False)), "contradicts pruning 'global'"),
    (dict(pruning='rigl', recipe_variables=dict(init_sparsity=.1)), "'rigl' is not gradual"), (dict(pruning='constant', recipe_variables=dict(sparsity=.9)), 'would have no effect'), (dict(pruning=None, recipe_variables=dict(mask_type='2:4')), 'nothing is pruned'),
    (dict(recipe_variables=dict(mask_type='2:4', global_sparsity=True)), "no effect with mask_type '2:4'"), (dict(quantization=False, recipe_variables=dict(quantization_epochs=2)), 'would have no effect'),
    (dict(recipe_variables=dict(global_sparsity='no')), 'global_sparsity must be True or False'), (dict(recipe_variables=dict(sparsity=None)), 'sparsity must be'), (dict(pruning=['obs']), 'is not known'),
    (dict(recipe_variables=dict(target='tensorrt', sparsity=.9)), "sparsity must be 0.5 for mask_type '2:4'"), (dict(steps_per_epoch=0), 'steps_per_epoch must be at least 1'), (dict(steps_per_epoch=2.5), 'whole number'),
])
def test_mistakes_change_nothing(kwargs, message):
    model = net()
    opt,before = sgd(model),{k:v.clone() for k,v in model.state_dict().items()}
    with pytest.raises((ValueError,TypeError), match=re.escape(message)): sparsify.create.initialize(model, opt, **{'steps_per_epoch':n_iter, **kwargs})
    assert same(before, model.state_dict()) and 'step' not in vars(opt)
    sparsify.create.initialize(model, opt, n_iter)

def test_a_model_must_be_one():
    with pytest.raises(TypeError, match='model must be a module'): sparsify.create.initialize(lambda x: x, sgd(net()), n_iter)

@pytest.mark.parametrize('pruning', ['transfer',False,None])
def test_targets_of_sparse_models(pruning):
    "What is sparse stays as it is, and is quantized for the target"
    model = net()
    if pruning is not None: some_zeros(model)
    manager,_ = sparsify.create.initialize(model, sgd(model), n_iter, pruning, recipe_variables=dict(target='tensorrt'))
    assert manager.quantization_modifiers[0].scheme=='tensorrt' and len(manager.pruning_modifiers)==(pruning is not None)

@pytest.mark.parametrize('lr,warns', [(1e-3,False),(5e-3,False),(.1,True)])
def test_another_learning_rate_is_told(lr, warns, caplog):
    model = net()
    sparsify.create.initialize(model, torch.optim.SGD(model.parameters(), lr=lr), n_iter)
    assert ('in place of the optimizer' in caplog.text)==warns

def test_collapsing_layers_are_told(caplog):
    model = net()
    manager,opt = sparsify.create.initialize(model, sgd(model), n_iter, recipe_variables=dict(sparsity=.995, num_epochs=2, params='__ALL_PRUNABLE__', global_sparsity=False))
    train(model, opt, 2)
    assert caplog.text.count('no more than the minimum is left of 5.weight (1 of 64 weights)')==1 and n_zeros(model)['5.weight']==63

def test_small_layers_are_not_cut_off():
    model = net()
    with torch.no_grad(): model[-1].weight.mul_(1e-6)
    manager,opt = sparsify.create.initialize(model, sgd(model), n_iter, recipe_variables=dict(sparsity=.9, num_epochs=2, params='__ALL_PRUNABLE__'))
    train(model, opt, 2)
    assert n_zeros(model)['5.weight']==63 and sum(n_zeros(model).values())==round(.9*(192+384+64))

def test_running_averages():
    from fastsparse_create.quantization.convert import quantize_like
    model = net()
    manager,opt = sparsify.create.initialize(model, sgd(model), n_iter, recipe_variables=dict(num_epochs=3))
    average = torch.optim.swa_utils.AveragedModel(model)
    for epoch in range(3):
        for xb,yb in batches():
            opt.zero_grad()
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            if is_quantized(model) and not is_quantized(average): quantize_like(average.module, model.state_dict())
            average.update_parameters(model)
    manager.finalize()
    average.eval()(batches()[0][0])
    assert measured_sparsity(average.module)>.75 and is_quantized(average)

def test_a_state_of_another_plan():
    states = []
    for epochs in 2,3:
        model = net()
        manager,_ = sparsify.create.initialize(model, sgd(model), n_iter, recipe_variables=dict(num_epochs=epochs))
        states.append(manager.state_dict())
    with pytest.raises(ValueError, match='the state is that of another recipe'): manager.load_state_dict(states[0])

def test_optimizer_and_scaler_are_what_they_were():
    model = net()
    opt,scaler = sgd(model),torch.amp.GradScaler('cpu')
    manager,same_opt = sparsify.create.initialize(model, opt, n_iter)
    assert same_opt is opt and isinstance(opt, torch.optim.Optimizer) and opt.param_groups[0]['momentum']==.9
    torch.optim.lr_scheduler.StepLR(opt, 2)
    manager.finalize()
    model = net()
    assert sparsify.create.initialize(model, sgd(model), n_iter, scaler=scaler)[1] is scaler
