#!/usr/bin/env bash
# All tests: modules are what the notebooks export, README.md is what its notebook renders to, notebooks run, tests pass, the site of the documentation among them.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 MPLBACKEND=agg

before=$(cat fastsparse_create/*.py fastsparse_create/*/*.py nbs/*.ipynb nbs/*/*.ipynb | sha256sum)
nbdev-clean && nbdev-export
after=$(cat fastsparse_create/*.py fastsparse_create/*/*.py nbs/*.ipynb nbs/*/*.ipynb | sha256sum)
[ "$before" = "$after" ] || { echo 'nbdev-clean and nbdev-export change the tree: run them and commit the result'; exit 1; }
python scripts/readme.py --check
nbdev-test --n-workers 2
python -m pytest -q -n 2 tests
