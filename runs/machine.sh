#!/usr/bin/env bash
# One machine's part of a training run on several GPUs or machines: start it on each of them, with the same options.
#
#     MACHINES=2 MACHINE_RANK=0 MAIN_ADDRESS=10.0.0.1 runs/machine.sh OUT --captions ... [options of clipmatch train]
#
# MACHINES      how many there are (1)
# MACHINE_RANK  the number of this one, from 0 (0)
# MAIN_ADDRESS  name or address of number 0, as the others reach it (127.0.0.1)
# MAIN_PORT     a port of it that is free (29500)
# PROCESSES     on each machine (as many as it has GPUs, or 1)
#
# OUT and the pictures must be on a disk that all of them see. If OUT holds a run already, that is resumed with its own
# settings, on whatever number of machines and processes.
set -euo pipefail
OUT=${1:?folder for the run}
shift
MACHINES=${MACHINES:-1}
MACHINE_RANK=${MACHINE_RANK:-0}
PROCESSES=${PROCESSES:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}
if [ -f "$OUT/last/state.json" ]; then set -- --resume; fi

if [ $((MACHINES * PROCESSES)) = 1 ]; then # accelerate starts two or more
    exec clipmatch train --out "$OUT" "$@"
fi
exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
    --num_machines "$MACHINES" --num_processes $((MACHINES * PROCESSES)) --machine_rank "$MACHINE_RANK" \
    --main_process_ip "${MAIN_ADDRESS:-127.0.0.1}" --main_process_port "${MAIN_PORT:-29500}" \
    --module clipmatch.cli train --out "$OUT" "$@"
