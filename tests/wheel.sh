#!/usr/bin/env bash
# The wheel in a clean environment, outside the repository: wheel.sh PYTHON WHEEL CONSTRAINTS
set -euo pipefail
wheel=$(realpath "$2") constraints=$(realpath "$3") folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" -m venv "$folder/venv"
PATH="$folder/venv/bin:$PATH"
cd "$folder"
pip install --quiet --disable-pip-version-check -c "$constraints" torch
pip install --quiet --disable-pip-version-check -c "$constraints" "$wheel"
gvpo --version
gvpo doctor
for command in "quickstart" "data gsm8k -o data" "eval --model m --data gsm8k -o e" "report ." "train --help"; do
  echo "\$ gvpo $command, without its extra"
  code=0; gvpo $command || code=$?
  test "$code" = 2
done
pip install --quiet --disable-pip-version-check -c "$constraints" "$wheel[trl,reasoning-gym]"
gvpo quickstart --output quickstart
gvpo data reasoning_gym:chain_sum --size 8 -o data
gvpo eval --model quickstart/model --data quickstart/held_out.jsonl --plain --reward exact --max-tokens 4 --batch-size 250 -o eval
gvpo report quickstart eval -o report.html
gvpo train --help >/dev/null
pip install --quiet --disable-pip-version-check -c "$constraints" "$wheel[verl]"
python -m gvpo.verl --help >/dev/null
gvpo doctor
echo "The wheel works."
