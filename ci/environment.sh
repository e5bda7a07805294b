# Sourced by what runs in CI: makes .venv with this package, the extra named in $1, and torch for a
# CPU, all from nothing. PYTHON names another interpreter, VENV another folder, CONSTRAINTS another
# file of versions.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local name
  for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
    [ -n "$name" ] || continue
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$name" && return
  done
  echo "needs Python 3.10 or newer; set PYTHON to one" >&2
  return 1
}

# the default index has torch for CUDA, some gigabytes: prefer a build for the CPU
install_torch() {
  local version
  version=$(sed -n 's/^torch==//p' "$constraints")
  "$python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null && return
  echo "installing torch $version for a CPU"
  "$python" -m pip install -q "torch==$version+cpu" 2>/dev/null ||
    "$python" -m pip install -q "torch==$version" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
    "$python" -m pip install -q "torch==$version"
}

constraints=${CONSTRAINTS:-ci/constraints.txt}
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
  base=$(find_python)
  echo "making $venv with $("$base" --version)"
  "$base" -m venv "$venv"
fi
python=$venv/bin/python
install_torch
echo "installing gdn-portable[$1]"
# torch for a GPU, where there is no other, asks for a Triton of its own: none is pinned here
install() {
  "$python" -m pip install -q -c <(grep -v '^triton' "$constraints") "$@" \
    2> >(grep -v '^WARNING: Location' >&2)
}
install -e ".[$1]"
# and the pinned one takes its place
[ "$1" != test ] || "$python" -m pip install -q --no-deps -c "$constraints" triton
