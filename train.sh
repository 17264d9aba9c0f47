#!/usr/bin/env bash
# DR-IRL, stage by stage, on the model of your choice:
#   bash train.sh                 SmolLM2-135M-Instruct (downloaded once, 90 MB), 10 to 20 minutes on two CPU cores
#   bash train.sh FOLDER          any local Llama, Qwen2 or Qwen3 folder
#   bash train.sh tiny            a 1M-parameter model made on the spot, no download, about two minutes
# Further flags go to every stage:   bash train.sh FOLDER --run runs/mine --device cuda --dtype bf16
# All of them: python drirl.py --help. A run that was interrupted goes on by the same command; --resume false starts anew.
# A stage can be run again by itself; it reads what the earlier ones wrote.
set -euo pipefail
case "${1:-}" in /*|""|--*|tiny) ;; *) set -- "$PWD/$1" "${@:2}" ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=runs/default
flags=()
tiny=no
if [ "${1:-}" = tiny ]; then
    shift
    tiny=yes
    run=runs/tiny
    flags=(--model runs/tiny/base --encoder words --sft-blocks 0 --grpo-blocks 0 --max-new-tokens 56 --dtype fp32
           --steps 150 --sft-batch 8 --sft-lr 2.5e-3 --irl-prompts 8 --helpful-prompts 32 --grpo-lr 5e-4)
elif [ -n "${1:-}" ] && [[ "$1" != --* ]]; then
    run=runs/$(basename "$1")
    flags=(--model "$1")
    shift
fi
flags=(--run "$run" ${flags[@]+"${flags[@]}"} "$@")     # no flags: macOS's bash takes an empty array for an unset one
# glibc keeps large tensors in its heap, in huge pages: 13% off a training step on two CPU cores
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456}"

if [ $tiny = yes ]; then
    "$PYTHON" drirl.py tiny "${flags[@]}"      # a base model and its tokenizer from the corpus
fi
"$PYTHON" drirl.py all "${flags[@]}"
# all is, one after the other (each can be run again by itself, for example: python drirl.py eval --run runs/default):
#   data      1. balanced Chain-of-Draft demonstrations
#   sft          warm start: supervised fine-tuning on them
#   irl       2. one shadow reward model per category by inverse RL
#   grpo      3. GRPO-S against these rewards
#   baseline     the rival: SFT continued for as long as 2. and 3. took
#   eval         all four on held-out prompts: table, report.md, pictures
