"Several processes, each with data of its own: their masks and weights agree, bit for bit, after every step"
import json,random,re,subprocess,sys,traceback,zlib
from contextlib import contextmanager,nullcontext
from datetime import timedelta
import pytest
pytest.importorskip('accelerate')
from utils import *
import torch._dynamo,torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from fastsparse_create.callback.distributed import *
from fastai.callback.training import GradientAccumulation
from fastsparse_create.all import *
from fastsparse_create.create import *
from fastsparse_create.distributed import *

scenarios = {}

def ranks(*worlds):
    "A scenario: every process calls it with its rank, once for each number of processes"
    def _inner(f):
        for n in worlds: scenarios[f'{f.__name__}[{n}]'] = f,n
        return f
    return _inner

# what the processes agree on

def everybodys(o):
    "What each rank has to say"
    res = [None]*dist.get_world_size()
    dist.all_gather_object(res, o)
    return res

def bits(t): return zlib.crc32(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

def state_bits(model):
    "Name -> checksum of each parameter, and of each mask"
    model = unwrap_model(model)
    return {n:bits(p) for n,p in model.named_parameters()} | {f'mask of {p.name}':bits(p.mask) for p in [*masked_params(model), *sparse_params(model)]}

def assert_agree(model, where=''):
    mine,*others = everybodys(state_bits(model))
    for o in others: assert o==mine, (where, [n for n in mine.keys()|o.keys() if mine.get(n)!=o.get(n)])

@trusted
class Agreement(Callback):
    "Weights and masks of all ranks have the same bits after every step; their data doesn't"
    order,run_valid = 1000,False
    def after_batch(self):
        assert_agree(self.model, (self.epoch, self.iter))
        if self.iter==0: assert len(set(everybodys(bits(self.learn.x))))>1
    def after_fit(self): assert_agree(self.model, 'the end')

def _join(store, rank, world):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world, timeout=timedelta(seconds=60))
    AcceleratorState._reset_state(True)

def _rank(rank, world, names, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    torch.set_num_threads(1)
    res = {}
    for i,name in enumerate(names):
        _join(folder/f'store_{world}_{i}', rank, world)
        for seed in (random.seed,np.random.seed,torch.manual_seed): seed(rank)
        (folder/f'{world}_{i}').mkdir(exist_ok=True)
        try:
            scenarios[name][0](rank, world, folder/f'{world}_{i}')
            res[name] = ''
        except BaseException: res[name] = traceback.format_exc()
        dist.destroy_process_group()
    (folder/f'report_{world}_{rank}.json').write_text(json.dumps(res))

# every modifier

def net():
    "Every rank starts from weights of its own, as nobody has set a seed"
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,16), nn.ReLU(), nn.Linear(16,2))

def learner(model=None, n_trn=8, opt_func=partial(SGD, mom=.9), **kwargs):
    return tiny_learner(net() if model is None else model, opt_func, lr=.02, dls=tiny_dls(n_trn, 4, (3,6,6)), **kwargs)

gmp = partial(GMPruningModifier, 0., .6, 0., 1.5, .25)
modifiers_of = dict(
    gmp = lambda: [gmp()],
    from_param = lambda: [GMPruningModifier('__FROM_PARAM__', {.6:'0.weight', .7:['7.weight','module.9.weight']}, .25, 1.5, .25)],
    global_magnitude = lambda: [GlobalMagnitudePruningModifier(.1, .8, 0., 1.5, .25)],
    two_to_four = lambda: [GMPruningModifier(0., .5, 0., 1.5, .25, params=['3','7'], mask_type='2:4')],
    blocks = lambda: [MagnitudePruningModifier(0., .5, 0., 1.5, .25, params=['7'], mask_type='block4')],
    acdc = lambda: [ACDCPruningModifier(.6, 0., 2., .5)],
    constant = lambda: [ConstantPruningModifier()],
    SET = lambda: [SETPruningModifier(.6, 0., 1.5, .25)],
    SNFS = lambda: [SNFSPruningModifier(.6, 0., 1.5, .25)],
    RigL = lambda: [RigLPruningModifier(.6, 0., 1.5, .25, num_grads=2)],
    RigL_later = lambda: [RigLPruningModifier(.6, .5, 1.5, .25)],
    GraNet = lambda: [GraNetPruningModifier(.3, .7, 0., 1.5, .25)],
    SRigL = lambda: [SRigLPruningModifier(.6, 0., 1.5, .25)],
    SET_nm = lambda: [SETPruningModifier(.5, 0., 1.5, .25, params=['3','7'], mask_type='2:4')],
    TopKAST = lambda: [TopKASTPruningModifier(.7, .4, 0., 1.5, .25)],
    powerpropagation = lambda: [PowerpropagationModifier(0., 2., alpha=2.), gmp()],
    movement = lambda: [MovementPruningModifier(0., .6, 0., 1.5, .25)],
    OBS = lambda: [OBSPruningModifier(0., .6, 0., 1.5, .25, num_grads=4)],
    MFAC = lambda: [MFACPruningModifier(0., .6, 0., 1.5, .25, num_grads=4)],
    QAT = lambda: [gmp(), QuantizationModifier(.5, disable_quantization_observer_epoch=1.25, freeze_bn_stats_epoch=1.25)],
    QAT_calibrated = lambda: [QuantizationModifier(.5, num_calibration_steps=2)],
    channels = lambda: [StructuredPruningModifier(0., .5, 0., 1., .25)],
    thinned = lambda: [StructuredPruningModifier(0., .5, 0., 1., .25), LayerThinningModifier(update_epochs=[1.25])],
    thinned_last = lambda: [StructuredPruningModifier(0., .5, 0., 1., .25), LayerThinningModifier()],
    without_layer = lambda: [LayerPruningModifier('3', .5, 1.5)],
    distilled = lambda: [gmp(), DistillationModifier(.5)],
    distilled_by_layer = lambda: [gmp(), PerLayerDistillationModifier(student_layer_names=['3'], teacher_layer_names=['0'], teacher=other_net())],
    learning_rate = lambda: [gmp(), SetLearningRateModifier(.05, start_epoch=0., end_epoch=.5), LearningRateFunctionModifier('linear', .05, .01, start_epoch=.5, end_epoch=2.), SetWeightDecayModifier(.1, .5)],
    frozen = lambda: [TrainableParamsModifier('7', False, start_epoch=.5, end_epoch=1.5, params_strict=True), gmp()],
    unfrozen = lambda: [TrainableParamsModifier('7', False, start_epoch=0., end_epoch=1.), gmp()],
    set_values = lambda: [SetParamModifier('9.bias', .5, start_epoch=.5), GradualParamModifier('7.bias', 0., 1., .5, 1.5, .25)])

def other_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3,5,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5,2))

def distributed(learn, broadcasts=True): return learn.distrib_ctx(sync_bn=False, cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=broadcasts)])

def _trains(name, rank, world, broadcasts, accumulates=False):
    learn = learner(n_trn=4*world)
    if name=='constant': sparsify_model(learn.model, .6, enforce_masks=False)
    with distributed(learn, broadcasts): learn.fit(2, cbs=[*modifiers_of[name](), Agreement(), *([GradientAccumulation(8)] if accumulates else [])])
    assert violations(learn.model, learn.opt)==[]
    if name.startswith('thinned'): assert learn.model[0].out_channels==4
    elif masked_params(learn.model): assert measured_sparsity(learn.model)>.2

def _grid(world, names, broadcasts, accumulates=False):
    for name in names:
        def scenario(rank, world, folder, name=name): _trains(name, rank, world, broadcasts, accumulates)
        scenarios[f"{name}{'' if broadcasts else ', no broadcasts'}{', accumulated' if accumulates else ''} [{world}]"] = scenario,world

_grid(2, modifiers_of, False)
_grid(2, modifiers_of, True)
_grid(2, modifiers_of, False, True)
_grid(4, modifiers_of, False)

# what the grid doesn't say

@ranks(2)
def masks_from_weights_of_each_rank(rank, world, folder):
    "Every rank has masked its own weights, and nobody shares buffers: the first one's masks hold"
    learn = learner()
    sparsify_model(learn, .6)
    first = everybodys(state_bits(learn.model)['mask of 3.weight'])
    assert len(set(first))==world
    with distributed(learn, False): learn.fit(1, cbs=Agreement())
    assert bits(masked_params(learn.model)[1].mask)==first[0] and violations(learn.model, learn.opt)==[]

def stored_net(): return nn.Sequential(nn.Flatten(), SparseLinear(108,16,.8), nn.ReLU(), SparseLinear(16,16,.5), nn.ReLU(), nn.Linear(16,2))

@ranks(2)
def stored_sparsely(rank, world, folder):
    "Patterns move, and numbers of connections too: `DistributedDataParallel` goes on with what is there"
    for make in (SET,RigL,SNFS,lambda **kw: SETPruningModifier(.8, 0., 2., .25, params=['module.1'])):
        learn = learner(stored_net(), 16)
        before = state_bits(learn.model)
        with distributed(learn, False): learn.fit(2, cbs=[make(every=2), Agreement()])
        assert before['mask of 1.weight']!=state_bits(learn.model)['mask of 1.weight'] and len(learn.recorder.mask_updates)>1

@ranks(2)
def learned_projections(rank, world, folder):
    learn = learner()
    distiller = modifiers_of['distilled_by_layer']()[1]
    with distributed(learn): learn.fit(1, cbs=distiller)
    a,b = everybodys([bits(w) for w in distiller._projections.values()])
    assert len(a)==1 and a==b

@ranks(2)
def options_stay(rank, world, folder):
    "The wrapper that looks again is the same object, with its options, hooks and `no_sync`"
    seen = []
    def hook(state, bucket):
        seen.append(state)
        return default_hooks.allreduce_hook(None, bucket)
    model = net()
    ddp = DDP(model, find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=3)
    ddp.register_comm_hook('here', hook)
    with ddp.no_sync():
        rebuild_(ddp)
        ddp(torch.randn(4,3,6,6)).sum().backward()
        assert not seen and not ddp.require_backward_grad_sync
    ddp(torch.randn(4,3,6,6)).sum().backward()
    assert set(seen)=={'here'} and ddp.find_unused_parameters and not ddp.broadcast_buffers and ddp.gradient_as_bucket_view and ddp.bucket_bytes_cap==3*2**20
    assert len(set(everybodys([bits(p.grad) for p in model.parameters()][0])))==1

# plain loops

recipe_of_module = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 2}
  - !GMPruningModifier {init_sparsity: 0., final_sparsity: {.6: ['module.3.weight'], .5: ['re:module\\.7']}, start_epoch: 0., end_epoch: 1.5, update_frequency: .25}
  - !TrainableParamsModifier {params: [module.9], trainable: false, start_epoch: .5, end_epoch: 1.}
  - !QuantizationModifier {start_epoch: 1., ignore: [module.9], submodules: [module.3, module.7, module.9]}
"""
recipe_of_channels = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 2}
  - !StructuredPruningModifier {init_sparsity: 0., final_sparsity: .5, start_epoch: 0., end_epoch: 1., update_frequency: .25, param_groups: [[module.0.weight]], params: [module.0.weight]}
  - !LayerThinningModifier {update_epochs: [1.25], param_group_dependency_map: {module.0.weight: []}}
  - !LayerPruningModifier {layers: [module.8], start_epoch: .5}
"""

def loop(ddp, opt, rank, n_steps, accumulates=1):
    "What everybody writes; every rank has data of its own"
    g = torch.Generator().manual_seed(100+rank)
    for step in range(n_steps):
        for i in range(accumulates):
            with ddp.no_sync() if i<accumulates-1 else nullcontext(): (ddp(torch.randn(4,3,6,6,generator=g)).square().mean()/accumulates).backward()
        opt.step()
        opt.zero_grad()
        assert_agree(ddp, step)

@ranks(2)
def plain_loops(rank, world, folder):
    for text,broadcasts in ((recipe_of_module,True),(recipe_of_channels,False)):
        model = net()
        ddp = DDP(model, broadcast_buffers=broadcasts)
        opt = torch.optim.Adam(ddp.parameters(), .01)
        manager = RecipeManager(text, ddp, opt, 8)
        loop(ddp, opt, rank, 16)
        manager.finalize()
        assert violations(model, opt)==[]
    assert model[0].out_channels==4 and isinstance(model[8], nn.Identity)

@ranks(2,4)
def initialized(rank, world, folder):
    for pruning,variables in ((True,{}),('set',{}),('rigl',{}),('obs',dict(gradient_accumulation_steps=2))):
        model = net()
        ddp = DDP(model, broadcast_buffers=False)
        opt = torch.optim.SGD(ddp.parameters(), .01, momentum=.9)
        distills = bool(variables)
        manager,opt = initialize(ddp, opt, 4, pruning=pruning, quantization=pruning is True, distillation=distills, recipe_variables=dict(num_epochs=4, init_lr=.01, params=['module.3.weight','module.7.weight'], **variables))
        loop(ddp, opt, rank, 16, accumulates=2 if variables else 1)
        manager.finalize()
        assert {p.name for p in masked_params(model)}=={'3.weight','7.weight'} and violations(model, opt)==[] and measured_sparsity(model)>.7

@ranks(2)
def loops_go_on_in_other_numbers_of_processes(rank, world, folder):
    "A loop of two processes, of which one goes on alone, and the other way round"
    def _managed(wraps):
        torch.manual_seed(0)
        model = net()
        ddp = DDP(model) if wraps else model
        opt = torch.optim.SGD(ddp.parameters(), .01, momentum=.9)
        return model,ddp,opt,LoopManager(ddp, opt, 4 if wraps else 8, 2, [RigLPruningModifier(.5, 0., 2., .25)])
    for first in (True,False):
        model,ddp,opt,manager = _managed(first)
        n = 5 if first else 10
        loop(ddp, opt, rank if first else 0, n)
        state = [model.state_dict(),opt.state_dict(),manager.state_dict()]
        masks = {p.name:p.mask.clone() for p in masked_params(model)}
        model,ddp,opt,manager = _managed(not first)
        attach_masks(model, list(masks))
        for o,s in zip((model,opt,manager), state): o.load_state_dict(s)
        assert manager.epoch==1.25 and manager.steps==(10 if first else 5)
        loop(ddp, opt, 0 if first else rank, 2*manager.steps_per_epoch-manager.steps)
        updates = [u.epoch for u in manager.recorder.mask_updates]
        assert updates==[1.25,1.5,1.75], updates
        manager.finalize()
        if not first: assert_agree(model)

# what is refused

@ranks(2)
def batch_norm_over_ranks(rank, world, folder):
    "PyTorch's `SyncBatchNorm` wants GPUs, and says so; without it statistics are those of each rank"
    learn = learner()
    with pytest.raises(ValueError, match='SyncBatchNorm layers only work with GPU modules'):
        with learn.distrib_ctx(cpu=True): learn.fit(1, cbs=[gmp()])

@ranks(2)
def fully_sharded(rank, world, folder):
    "FSDP2 is refused by name, and nothing has changed"
    mesh = init_device_mesh('cpu', (world,))
    def _sharded():
        model = net()
        fully_shard(model, mesh=mesh)
        return model
    opt = lambda m: torch.optim.SGD(m.parameters(), .01)
    named = r"sharded.*fully_shard \(FSDP2\).*use DistributedDataParallel"
    refused = {n:mods for n,mods in modifiers_of.items() if n not in ('learning_rate',)}
    for name,mods in refused.items():
        model = _sharded()
        keys,learn = set(vars(model)),learner(model)
        with pytest.raises(ValueError, match=named): learn.fit(1, cbs=mods())
        assert not any('_mask' in n for n,_ in model.named_buffers()) and keys==set(vars(model)), name
        assert not is_quantized(model)
    for call in (lambda m: sparsify_model(m, .5), attach_masks, lambda m: initialize(m, opt(m), 4), lambda m: RecipeManager(recipe_of_module, m, opt(m), 4)):
        model = _sharded()
        with pytest.raises(ValueError, match=named): call(model)
        assert not list(n for n,_ in model.named_buffers() if '_mask' in n)
    model = net()
    sparsify_model(model, .5)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r'FSDPSequential.*fully_shard \(FSDP2\).*make_permanent'): model(torch.randn(4,3,6,6))
    learn = learner(_sharded())
    learn.fit(1, cbs=[SetLearningRateModifier(.05), SetWeightDecayModifier(.1), EpochRangeModifier(0, 1)])

# checkpoints

def shuffled_learner(folder):
    "Every rank has a disk of its own"
    torch.manual_seed(0)
    random.seed(0)
    x = torch.randn(64, 4)
    dls = DataLoaders(DataLoader(Tensors(x, x[:,:2]), bs=4, shuffle=True, num_workers=0), DataLoader(Tensors(x[:8], x[:8,:2]), bs=4, num_workers=0))
    model = nn.Sequential(nn.Linear(4,16), nn.Dropout(.2), nn.ReLU(), nn.Linear(16,16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16,2))
    folder.mkdir(parents=True, exist_ok=True)
    learn = tiny_learner(model, Adam, .01, folder, dls)
    for seed in (random.seed,np.random.seed,torch.manual_seed): seed(dist.get_rank())
    return learn

@trusted
class Promised(Callback):
    "The sparsity in each batch is the one that the schedule has for this moment, whatever an epoch's number of batches is"
    order,run_valid = 300,False
    def after_batch(self):
        pruner = self.learn.gm_pruning_modifier
        due = max(0., min(1.5, math.floor((self.epoch+self.iter/self.n_iter)*4+1e-9)/4))
        expected = pruner.sparsity_at(due, .1, .8)
        assert abs(measured_sparsity(self.model, pruner._names)-expected)<.01, (self.epoch, self.iter, self.n_iter, due)

def pruners(): return [GMPruningModifier(.1, .8, 0., 1.5, .25, params=['3']), RigLPruningModifier(.5, 0., 2., .25, params=['0'])]

@contextmanager
def alone():
    "As if no others had been started"
    was = {k:os.environ.pop(k) for k in ('RANK','WORLD_SIZE')}
    try: yield
    finally: os.environ.update(was)

@contextmanager
def started(n, rank, world, folder):
    "As if `n` processes had been started, of which this is one or isn't"
    if n in (1,world):
        yield rank<n
        return
    dist.destroy_process_group()
    os.environ['WORLD_SIZE'] = str(n)
    if rank<n: _join(folder/f'store_of_{n}', rank, n)
    yield rank<n
    if rank<n: dist.destroy_process_group()
    os.environ['WORLD_SIZE'] = str(world)
    _join(folder/f'store_after_{n}', rank, world)

def fit_checkpointed(folder, processes, at=None, **kwargs):
    "A fit in one process or in all, interrupted `at` a batch of an epoch"
    learn = shuffled_learner(folder)
    cbs = [*pruners(), Promised(), CheckpointCallback('cp', **{'every':1, **kwargs}), *([Interrupt('after_batch', *at)] if at else [])]
    cbs += [Agreement()] if processes>1 else []
    with distributed(learn) if processes>1 else alone():
        until_interrupted(learn.fit_one_cycle, 3, .01, cbs=cbs) if at else learn.fit_one_cycle(3, .01, cbs=cbs)
    return learn

def _goes_on(folder, rank, before, now, at):
    "The learner of a fit that `now` processes go on with; None where this is none of them"
    world,learn = dist.get_world_size(),None
    folder.mkdir(exist_ok=True)
    with started(before, rank, world, folder) as is_there:
        if is_there: fit_checkpointed(folder/str(rank), before, at)
    dist.barrier()
    assert rank==0 or not list((folder/str(rank)).rglob('*.pth'))  # only the first one writes
    with started(now, rank, world, folder) as is_there:
        if is_there: learn = fit_checkpointed(folder/str(rank), now, resume=True)
    dist.barrier()
    return learn

@ranks(2)
def goes_on_bit_for_bit(rank, world, folder):
    whole = fit_checkpointed(folder/f'whole{rank}', 2)
    for i,at in enumerate([(3,0),(7,0),(1,1),(5,2)]):
        learn = _goes_on(folder/str(i), rank, 2, 2, at)
        assert same(weights(whole.model), weights(learn.model)) and same(dict(whole.model.named_buffers()), dict(learn.model.named_buffers()) if not rank else dict(whole.model.named_buffers())), at

@ranks(2,4)
def goes_on_in_other_numbers_of_processes(rank, world, folder):
    for before,now in ((2,1),(1,2)) if world==2 else ((2,4),(4,2)):
        for i,at in enumerate([(2,0),(10//before,1),(16//before-1,1)]):
            learn = _goes_on(folder/f'{before}{now}{i}', rank, before, now, at)
            if learn is None: continue
            n_iter = 16//now
            done = min(math.ceil(at[0]*before/now), n_iter-1)
            assert learn.train_iter==3*n_iter and math.isclose(learn.pct_train, 1.) and len(learn.recorder.values)==3
            assert len(learn.recorder.lrs)==at[1]*16//before+at[0] + 3*n_iter-at[1]*n_iter-done
            updates = [round(u.epoch, 6) for u in learn.recorder.mask_updates]
            assert all(b-a>.2 for a,b in zip(updates, updates[1:])) and updates[-1]==1.75, updates
            n = learn.model[0].weight_mask.count_nonzero().item()
            assert n==32 and violations(learn.model, learn.opt)==[]

@ranks(2)
def ends_together(rank, world, folder):
    "One process is told to stop; both end with the next checkpoint, and go on from there"
    @trusted
    class Told(Callback):
        def after_batch(self):
            if self.training and self.epoch==0 and self.iter==4 and rank==1: self.learn.checkpoint.stop()
    learn = shuffled_learner(folder/str(rank))
    with distributed(learn): until_interrupted(learn.fit_one_cycle, 3, .01, cbs=[*pruners(), Told(), CheckpointCallback('cp', every=3)])
    assert learn.train_iter==6
    learn = shuffled_learner(folder/str(rank))
    with distributed(learn), pytest.raises(ValueError, match='holds checkpoints'): learn.fit(3, cbs=[*pruners(), CheckpointCallback('cp', every=3)])
    assert fit_checkpointed(folder/str(rank), 2, resume=True).train_iter==24

# the test

def run_ranks(names, folder):
    "Every scenario in the processes that it asks for; they are forks of one, as imports take longer than most scenarios"
    for world in sorted({scenarios[n][1] for n in names}):
        mine,pids = [n for n in names if scenarios[n][1]==world],[]
        for rank in range(world):
            pid = os.fork()
            if not pid:
                try: _rank(rank, world, mine, folder)
                finally: os._exit(0)
            pids.append(pid)
        for p in pids: os.waitpid(p, 0)

@pytest.fixture(scope='module')
def reports(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    names = [i.callspec.params['name'] for i in request.session.items if i.fspath==Path(__file__) and getattr(i, 'callspec', None)]
    done = subprocess.run([sys.executable, '-W', 'ignore', __file__, folder, *names], capture_output=True, text=True, timeout=1200)
    return {f.stem:json.loads(f.read_text()) for f in folder.glob('report_*.json')},done.stderr

@pytest.mark.slow
@pytest.mark.parametrize('name', scenarios)
def test_ranks(name, reports):
    found,stderr = reports
    said = [found.get(f'report_{scenarios[name][1]}_{r}', {}).get(name, stderr or 'is missing') for r in range(scenarios[name][1])]
    assert not any(said), '\n'.join(filter(None, said))

def test_what_follows_a_synchronized_batch_norm():
    "`distrib_ctx` leaves `SyncBatchNorm` behind: channels go, layers are quantized and rows of zeros removed as with any other"
    torch.manual_seed(0)
    one = net()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(one))
    assert isinstance(other[1], nn.SyncBatchNorm)
    for model in (one,other): learner(model).fit(2, cbs=[*modifiers_of['thinned'](), QuantizationModifier(1.5)])
    assert other[0].out_channels==4 and same(weights(one), weights(other)) and quantized_modules(one).keys()==quantized_modules(other).keys()
    for model in (one,other): dequantize_(model), learner(model).fit(1, cbs=StructuredPruningModifier(0., .5, 0., 1., .25))
    x = torch.randn(2,3,6,6)
    (_,a),(_,b) = (compact(m, x) for m in (one,other))
    assert a.rows==b.rows and any(r.status=='compacted' for r in a.rows)

@pytest.mark.slow
def test_launched_as_the_lesson_says(tmp_path):
    "Its script, by its command, in two processes without GPUs: both end with the same masks"
    cells = [(c['cell_type'],''.join(c['source'])) for c in json.loads((Path(__file__).parents[1]/'nbs/19a_callback.distributed.ipynb').read_text())['cells']]
    command = first(re.findall('^ACCELERATE_USE_CPU=true accelerate launch .*train.py$', '\n'.join(s for kind,s in cells if kind=='markdown'), re.M))
    lesson = {}
    exec(first(s for kind,s in cells if kind=='code' and s.startswith('script = ')), lesson)
    note = "torch.save({p.name:p.mask for p in masked_params(learn.model)}, f'masks_of_{rank_distrib()}.pth')\n"
    (tmp_path/'train.py').write_text(lesson['script']+note)
    paths = dict(PATH=os.pathsep.join([str(Path(sys.executable).parent),os.environ['PATH']]), PYTHONPATH=os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    done = subprocess.run(command.replace('launch', 'launch --main_process_port 0'), shell=True, cwd=tmp_path, env={**os.environ, **paths, 'OMP_NUM_THREADS':'1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode==0, done.stderr[-3000:]
    a,b = (torch.load(f, weights_only=True) for f in sorted(tmp_path.glob('masks_of_*.pth')))
    assert a.keys()=={'0.weight','2.weight'} and same(a, b) and all(abs((~m).float().mean()-.8)<.01 for m in a.values())
    assert len(torch.load(max((tmp_path/'checkpoints').iterdir()), weights_only=True)['random'])==2

if __name__=='__main__': run_ranks(sys.argv[2:] or list(scenarios), Path(sys.argv[1]))
