#!/usr/bin/env bash
# ./run_all.sh          make .venv, install, run the default comparison, print the report
# ./run_all.sh test     make .venv, install, run the test suite
# ./run_all.sh table2   every efficiency figure of the paper's Table 2 that the registry can run, on a CUDA GPU
# PYTHON=/path/to/python ./run_all.sh ...   use that interpreter as it is; nothing is installed
set -euo pipefail
cd "$(dirname "$0")"

if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
else
  python=.venv/bin/python
  if [ ! -x .venv/bin/bench ]; then
    base=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, found $("$base" --version)" >&2; exit 2; }
    "$base" -m venv .venv
    "$python" -m pip install --quiet --constraint constraints.txt --editable '.[test]'
  fi
fi

case "${1:-}" in
  "")
    "$python" -m bench run --methods ours,mtlora --backbone swin_tiny
    "$python" -m bench report
    ;;
  test)
    # One thread a worker: several test processes on few cores only get in each other's way otherwise.
    OMP_NUM_THREADS=1 "$python" -m pytest -n auto "${@:2}"
    ;;
  table2)
    "$python" -m bench run --suite table2 --device cuda --out "${2:-runs/table2}"
    "$python" -m bench report "${2:-runs/table2}"
    ;;
  *)
    echo "usage: ./run_all.sh [test | table2 [FOLDER]]" >&2
    exit 2
    ;;
esac
