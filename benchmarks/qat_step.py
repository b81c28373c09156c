"""Cost of a training step with quantization, against the same step without.

    python benchmarks/qat_step.py [--models resnet18 xresnet18] [--size 224] [--batch 4] [--steps 30]

All variants of a model train in one process, a few steps each in turn, so that whatever else the machine does hits them alike. Times are
process CPU time. The first turn, in which the model is quantized, doesn't count.
"""
import argparse
from contextlib import redirect_stdout
from io import StringIO
from torchvision.models import resnet18,resnet50
from fastsparse_create.callback.quantization import *
from step_overhead import *

models = dict(resnet18=lambda: resnet18(num_classes=10), xresnet18=lambda: xresnet18(n_out=10), resnet50=lambda: resnet50(num_classes=10))

def sparse(learn, steps):
    sparsify_model(learn, .8)
    return [QuantizationModifier(0.)]

variants.clear()
variants.update({'dense': lambda learn,steps: [], 'QAT': lambda learn,steps: [QuantizationModifier(0.)],
                 'QAT, ranges fixed': lambda learn,steps: [QuantizationModifier(0., disable_quantization_observer_epoch=1/steps)], 'QAT, 80 % sparse': sparse})

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', nargs='+', default=['resnet18'], choices=list(models))
    p.add_argument('--variants', nargs='+', default=list(variants), choices=list(variants))
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--batch', type=int, default=4)
    p.add_argument('--steps', type=int, default=30)
    p.add_argument('--turn', type=int, default=2)
    args = arguments(p)
    torch.set_num_threads(1)
    for v in set(variants)-{'dense',*args.variants}: del variants[v]
    batch = torch.randn(args.batch,3,args.size,args.size),torch.randint(0,10,(args.batch,))
    with Record(args, f'CPU time; batch {args.batch} of 3x{args.size}x{args.size}, {args.steps} steps of SGD with momentum') as record:
        for name in args.models:
            with redirect_stdout(StringIO()): seconds = run(name, models[name], args.steps+args.turn, args.turn, batch)
            report(record, name, models[name](), {v:s[1:] for v,s in seconds.items()}, args.steps, {('QAT','resnet18'):1.8})

if __name__=='__main__': main()
