#!/usr/bin/env bash
# Runs all that needs a GPU, the most telling first, in about 10 minutes; prints as it goes. Needs torch, torchvision
# and the packages of tests/requirements.txt; peers that are not installed are left out by name.
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
step() { echo; echo "== $* ($SECONDS s)"; "$@" 2>&1 | tr '\r' '\n' | grep -v '| [0-9]*/[0-9]* \['; }     # no bars

step python3 tests/bench.py speed
step python3 -m pytest -q tests/test_hmpl.py -k "float32_on_the_cpu or captured"
step python3 tests/bench.py peers
[ -d tests/roads ] || step python3 tests/draw_roads.py --out tests/roads
options="--data tests/roads --profile paper --size 1280x720 --setting full --labels own --clip none --pretrained none"
step python3 train.py $options --steps 60 --out "$out/paper"
step python3 evaluate.py --ckpt "$out/paper/finetune.pt" --show "$out/pictures" --json "$out/scores.json"
if [ "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    step torchrun --nproc_per_node=2 train.py $options --steps 60 --out "$out/two"
fi
echo "done in $SECONDS s"
