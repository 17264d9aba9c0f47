#!/usr/bin/env bash
# DR-IRL, stage by stage, on the model of your choice:
#   bash train.sh                 SmolLM2-135M-Instruct (90 MB, once), 25 minutes on two Zen 4 cores
#   bash train.sh FOLDER          any local Llama, Qwen2 or Qwen3 folder
#   bash train.sh tiny            a 1M-parameter model made on the spot, in two minutes
# The recipe is laptop (or tiny). How it departs from the paper, and why: python drirl.py recipes
# More flags go to every stage:   bash train.sh FOLDER --recipe gpu --run runs/mine
# Their paths start from this folder.
# All of them: python drirl.py --help. The same command goes on with an interrupted run.
set -euo pipefail
case "${1:-}" in /* | "" | -* | tiny) ;; *) set -- "$PWD/$1" "${@:2}" ;; esac
case "${DRIRL_IMPL:-}" in /* | "") ;; *) export DRIRL_IMPL="$PWD/$DRIRL_IMPL" ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

flags=(--recipe laptop --run runs/default)
if [ "${1:-}" = tiny ]; then
    shift
    base=runs/tiny/base all="$*"
    case "$all" in *--seed[\ =][1-9]*) all=${all##*--seed?} base+=-${all%% *} ;; esac # each its own
    flags=(--recipe tiny --run runs/tiny --model "$base")
    "$PYTHON" -m teach.tiny "$base" --run runs/tiny "$@" # a base model, from the corpus
elif [ -n "${1:-}" ] && [[ "$1" != -* ]]; then
    name=$(basename "$(cd "$1" 2>/dev/null && pwd || echo "$1")") # of . too
    flags=(--recipe laptop --run "runs/$name" --model "$1")
    shift
fi
# glibc keeps large tensors in its heap, in huge pages: 13% off a training step on two cores
tunables=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296
tunables+=:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables}"

program=(drirl.py)
if [ -n "${DRIRL_IMPL:-}" ]; then # a learner's functions: teach/capstone.py
    program=(-m teach.capstone)
    flags+=(--run "runs/of-$(basename "$DRIRL_IMPL")" --resume false)
fi
"$PYTHON" "${program[@]}" all "${flags[@]}" "$@"
# all is, one after the other, with the numbers of README's steps (each can run again alone:
# python drirl.py eval --run runs/default):
#   data      1. balanced Chain-of-Draft demonstrations
#   sft          warm start: supervised fine-tuning on them
#   irl       2. one shadow reward model per category by inverse RL
#   grpo      3. to 6. GRPO-S against these rewards
#   eval         before and after on held-out prompts: table, report.md, pictures
# --rival true also trains the rival: SFT continued for as long as irl and grpo took
