#!/usr/bin/env bash
# ./run_all.sh          make .venv, install, run the default comparison, print the report
# ./run_all.sh test     make .venv, install, run the test suite
# ./run_all.sh table2   efficiency on a CUDA GPU: the paper's Table 2 first and where the steps' time goes, then every
#                       method, then other precisions, and last the estimates
# PYTHON=/path/to/python ./run_all.sh ...   use that interpreter as it is; nothing is installed
set -euo pipefail
cd "$(dirname "$0")"

set_up() {
  if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    return
  fi
  python=.venv/bin/python
  [ ! -x .venv/bin/bench ] || return 0
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "installing into .venv (a few minutes, most of it torch)"
      "$candidate" -m venv .venv
      "$python" -m pip install --quiet --constraint constraints.txt --editable '.[test]'
      return
    fi
  done
  echo "Python 3.11 or newer is needed and none was found; name one with PYTHON=..." >&2
  exit 2
}

case "${1:-}" in
  "")
    set_up
    # A cell that failed is a row of the report, not a reason to print none.
    "$python" -m bench run --methods ours,mtlora --backbone swin_tiny || status=$?
    "$python" -m bench report
    exit "${status:-0}"
    ;;
  test)
    set_up
    # One thread a worker: several test processes on few cores only get in each other's way otherwise.
    OMP_NUM_THREADS=1 "$python" -m pytest -n auto --dist loadfile "${@:2}"
    ;;
  table2)
    set_up
    # The most wanted first, so that it is there if the rest is cut off; a cell that fails is a row.
    out=${2:-runs/table2}
    trap 'exit 130' INT  # Ctrl-C ends it all, not one suite
    measure() { "$python" -m bench run --suite "$1" --device cuda --no-estimate --out "$out" "${@:2}" || status=$?; }
    measure table2
    "$python" -m bench profile --methods mtlora,ditask,tadformer,ours --image-size 448 --operators 10 --device cuda || status=$?
    measure table2_all
    for precision in tf32 bf16; do
      measure table2 --backbone swin_tiny --precision "$precision"
    done
    measure table2 --backbone swin_tiny --memory low
    measure table2 --methods 'ours[form=plain]'
    measure table2 --backbone swin_tiny --cudnn-benchmark
    # What needs no GPU comes last.
    "$python" -m bench estimate --records "$out" || status=$?
    "$python" -m bench report "$out"
    exit "${status:-0}"
    ;;
  *)
    echo "usage: ./run_all.sh [test | table2 [FOLDER]]" >&2
    exit 2
    ;;
esac
