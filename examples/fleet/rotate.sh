#!/bin/sh
# Rewrap a tree in parts, several at a time, with GNU parallel; run it again to go on.
#
#   rotate.sh TREE PARTS [OPTION OF parallel ...]
#
# On this machine, or with `--sshloginfile HOSTS` on several that mount TREE at the same place, each
# with a config of its own. The reports lie in the working directory: report.I.jsonl. rotation.log
# says which parts are done; remove it before the next rotation.
set -eu
tree=$1 parts=$2
shift 2
status=0
seq "$parts" | parallel --will-cite --joblog rotation.log --resume-failed --results 'report.{}.jsonl' "$@" \
    keymgmt rewrap "$tree" --shard "{}/$parts" --json >/dev/null || status=1
cat report.*.jsonl | jq -s 'map(select(has("models"))) | {
    parts: length, models: (map(.models) | add), changed: (map(.changed) | add),
    failed: (map(.failed) | add), exit_code: (map(.exit_code) | max)}'
exit $status
