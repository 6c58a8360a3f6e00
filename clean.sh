#!/bin/sh
# Remove what a run wrote: the files of train.py and eval.py in LOG_DIR, nothing else.
#   sh clean.sh               asks first, cleans logdir
#   sh clean.sh --yes DIR     does not ask, cleans DIR
set -eu
yes=
dir=logdir
for word in "$@"; do
    case "$word" in
        --yes) yes=1 ;;
        -*) echo "usage: sh clean.sh [--yes] [LOG_DIR]" >&2; exit 2 ;;
        *) dir=$word ;;
    esac
done
if [ ! -d "$dir" ]; then
    echo "there is no folder $dir: nothing to clean"
    exit 0
fi
files=$(find "$dir" -maxdepth 1 -type f \( -name 'latest.pth' -o -name 'step_*.pth' \
    -o -name 'best.pth' -o -name 'final.pth' -o -name '*.pth.tmp' -o -name 'log.txt' \
    -o -name 'log.jsonl' -o -name 'lock' -o -name 'settings.txt' -o -name 'events.out.tfevents.*' \
    -o -name 'measure_*.json' -o -name 'measure_*.md' -o -name 'check_*.json' -o -name 'check_*.png' \
    -o -name 'log.jsonl.tmp' -o -name 'settings.txt.tmp' \)
    if [ -d "$dir/eval" ]; then
        find "$dir/eval" -maxdepth 1 -type f \( -name '*.json' -o -name '*.png' \
            -o -name '*.csv' -o -name '*_submit.tar' -o -name '*_submit.zip' \
            -o -name '*_submit.???.tmp' \)
        find "$dir/eval" -maxdepth 1 -type f \( -name '*.json.tmp' -o -name '*.csv.tmp' \)
        for folder in "$dir/eval"/*_submit; do
            if [ -d "$folder" ]; then find "$folder" -type f -name '*.png'; fi
        done
    fi)
if [ -z "$files" ]; then
    echo "no run has written into $dir: nothing to clean"
    exit 0
fi
echo "$files"
if [ -z "$yes" ]; then
    printf 'remove these %s files? [y/N] ' "$(echo "$files" | wc -l | tr -d ' ')"
    read -r answer || answer=
    case "$answer" in y|Y|yes) ;; *) echo "nothing was removed"; exit 1 ;; esac
fi
echo "$files" | while IFS= read -r file; do rm -f -- "$file"; done
if [ -d "$dir/eval" ]; then  # folders that are empty now
    for folder in "$dir/eval"/*_submit; do
        if [ -d "$folder" ]; then
            find "$folder" -depth -type d -exec rmdir {} \; 2>/dev/null || true
        fi
    done
fi
rmdir "$dir/eval" "$dir" 2>/dev/null || true
echo "removed"
