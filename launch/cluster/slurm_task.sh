#!/usr/bin/env bash
# One task of launch/cluster/slurm.sbatch: slurm_task.sh ENDED COMMAND...
#
# Runs COMMAND, asks it to end (SIGTERM, once) when there is a file ENDED/stop, and leaves its status in ENDED/TASK.
# The signal goes to COMMAND alone: one that SLURM sends to the whole step would end the reward processes with it.
set -uo pipefail

ended="$1"
shift
trap : TERM INT # whoever ends the whole step: COMMAND is told too, and has to end first
"$@" &
command=$!
asked=""
while kill -0 "$command" 2>/dev/null; do
    if [[ -z "$asked" && -e "$ended/stop" ]]; then
        asked=1
        kill -TERM "$command"
    fi
    sleep 1
done
code=0
wait "$command" || code=$?
echo "$code" >"$ended/$SLURM_PROCID"
# srun ends all tasks when one ends badly, because the others would wait for it for ever. To end on request is not bad:
# the first task may still be writing the checkpoint when the others are done.
case "$code" in 130 | 143) exit 0 ;; *) exit "$code" ;; esac
