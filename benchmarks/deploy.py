"""Latency of what a model is deployed as: eager PyTorch, ONNX, INT8, and INT8 after channels were removed.

    python benchmarks/deploy.py [--models resnet18 resnet50] [--batches 1 32] [--threads 1 2] [--levels 0.5 0.8] [--compiled]

All variants take turns, one call of each after the other. Weights are random: latency doesn't depend on them, as long as none are denormal. The levels are those of
`fastsparse.run training-aware --target onnxruntime`: channels are removed until so many FLOPs are left as the level says, in multiples of 16, and all but the first layer is INT8.
*ORT static* is ONNX Runtime's own static quantization of the fp32 file, as a yardstick for INT8 without removed channels.
"""
import argparse, os, platform, tempfile, torch, onnxruntime
from copy import deepcopy
from pathlib import Path
from torchvision.models import mobilenet_v3_large,resnet18,resnet50
from fastsparse_create.benchmark import *
from fastsparse_create.experiment.plan import few_inputs
from fastsparse_create.export.onnx import *
from fastsparse_create.quantization.convert import *
from fastsparse_create.recipe.generate import removed_flops
from fastsparse_create.thinning import *

models = dict(resnet18=resnet18, resnet50=resnet50, mobilenet=mobilenet_v3_large)
features = 'avx2','avx512f','avx512_vnni','avx_vnni','avx512_bf16','amx_int8','asimddp','i8mm'

def cpu():
    "What the processor can do, by its flags"
    try: flags = Path('/proc/cpuinfo').read_text()
    except OSError: return platform.processor()
    words = set(next((l for l in flags.splitlines() if l.startswith(('flags','Features'))), '').split())
    return f"{os.cpu_count()} CPUs with {' '.join(f for f in features if f in words) or platform.machine()}"

def trained_a_little(make):
    "A model whose batch norms have seen data"
    torch.manual_seed(0)
    model = make(num_classes=1000)
    with torch.no_grad():
        for _ in range(3): model(torch.randn(4,3,224,224))
    return model.eval()

def thinned(model, flops):
    model = deepcopy(model)
    prune_channels_(model, torch.randn(2,3,224,224), flops=flops, share='uniform', round_to=16)
    return model

def quantized(model, x, ignore=()):
    model = deepcopy(model)
    quantize_(model, x, ignore=ignore)
    return model

def ort_static(path, x, to):
    "ONNX Runtime's own quantizer"
    from onnxruntime.quantization import CalibrationDataReader,QuantFormat,QuantType,quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    class Reader(CalibrationDataReader):
        def __init__(self): self.batches = iter([{'input':x.numpy()}])
        def get_next(self): return next(self.batches, None)
    quant_pre_process(path, to.with_suffix('.pre'))
    quantize_static(to.with_suffix('.pre'), to, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8)
    return to

def variants(name, folder, levels):
    "Name -> what is timed, and the sizes of files in MB"
    model,x = trained_a_little(models[name]),torch.randn(8,3,224,224)
    fp32 = export_onnx(model, folder/'fp32.onnx', x)
    res = {'PyTorch, eager':model, 'ONNX fp32':fp32, 'ONNX INT8':export_onnx(quantized(model, x), folder/'int8.onnx', x, int8=True), 'ORT static':ort_static(fp32.path, x, folder/'static.onnx')}
    for level in levels:
        small = thinned(model, 1-removed_flops(level))
        res[f'level {level}, fp32'] = export_onnx(small, folder/f'fp32_{level}.onnx', x)
        res[f'level {level}, INT8'] = export_onnx(quantized(small, x, few_inputs(small, x[:2])), folder/f'int8_{level}.onnx', x, int8=True)
    return res

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', nargs='+', default=['resnet18','resnet50'], choices=list(models))
    p.add_argument('--batches', nargs='+', type=int, default=[1,32])
    p.add_argument('--threads', nargs='+', type=int, default=[1,2])
    p.add_argument('--levels', nargs='+', type=float, default=[.5,.8])
    p.add_argument('--rounds', type=int, default=40, help='of a batch of 1; larger batches get fewer')
    p.add_argument('--compiled', action='store_true', help='time torch.compile, too')
    args = p.parse_args()
    print(f'torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {cpu()}; images of 3x224x224\n')
    print('| model | batch | threads | variant | MB | ms | quartiles | CPU ms | times as fast as eager, by CPU time | as ONNX fp32, by CPU time |\n|---|---|---|---|---|---|---|---|---|---|')
    for name in args.models:
        with tempfile.TemporaryDirectory() as tmp:
            made = variants(name, Path(tmp), args.levels)
            size = {n:Path(m).stat().st_size/1e6 if not isinstance(m, torch.nn.Module) else sum(4*t.numel() for t in m.parameters())/1e6 for n,m in made.items()}
            for batch in args.batches:
                for n_threads in args.threads:
                    found = benchmark(made, torch.randn(batch,3,224,224), max(5, args.rounds//batch), n_threads=n_threads, compiled=args.compiled)
                    eager,fp32 = found.rows[:2]
                    for r in found.rows:
                        fast = [f'{a.ms/r.ms:.1f}, {a.cpu_ms/r.cpu_ms:.1f}' for a in (eager,fp32)]
                        mb = f'{size[r.model]:.1f}' if r.model in size else ''
                        print(f'| {name} | {batch} | {n_threads} | {r.model} | {mb} | {r.ms:.2f} | {r.ms_q1:.2f} to {r.ms_q3:.2f} | {r.cpu_ms:.2f} | {fast[0]} | {fast[1]} |', flush=True)

if __name__=='__main__': main()
