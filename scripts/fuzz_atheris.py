"""The targets of fuzz.py, with inputs that atheris (libFuzzer) makes from the branches that they take in the library.

    pip install atheris
    python scripts/fuzz_atheris.py csv -runs=100000   # a target, and options of libFuzzer, -help=1 lists them
    python scripts/fuzz_atheris.py all -runs=10000    # one target after the other
"""
import logging, subprocess, sys, tempfile, warnings
from pathlib import Path
import atheris
with atheris.instrument_imports(include=['fastsparse_create']): import fuzz

def start(name, options):
    "Fuzz one target until an input does what it may not; libFuzzer ends the process"
    logging.disable()
    warnings.simplefilter('ignore')
    corpus = Path(tempfile.mkdtemp(dir=fuzz.folder))
    encoding = 'latin-1' if name in ('weights','quantized','safetensors') else 'utf-8'
    for i,text in enumerate(fuzz.targets[name][2]): (corpus/str(i)).write_bytes(text.encode(encoding, 'surrogateescape'))
    for text in fuzz.targets[name][2]: fuzz.outcome(name, text)  # what is imported and cached on first use counts for none
    def one(data): fuzz.outcome(name, data.decode(encoding, 'surrogateescape')[:fuzz.CHARS])
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()

if __name__=='__main__':
    if len(sys.argv)<2 or sys.argv[1] not in ('all',*fuzz.targets): sys.exit(f"fuzz_atheris.py: expected all or a target: {', '.join(fuzz.targets)}")
    name,*options = sys.argv[1:]
    if name!='all': start(name, options)
    sys.exit(any([subprocess.run([sys.executable, __file__, t, *options]).returncode for t in fuzz.targets]))
