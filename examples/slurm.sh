#!/bin/bash
# A run on several nodes under Slurm; adapt the first lines. sbatch examples/slurm.sh 900m parallel.data=fsdp
#SBATCH --job-name=llm-mlp
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300         # five minutes before the end: the run saves a checkpoint and leaves
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

RECIPE=${1:?which recipe or YAML file?}
shift
RUN=${RUN:-runs/$SLURM_JOB_NAME}  # on a file system that all nodes see, as are the data
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The first start has nothing to resume; a requeued job goes on from its last checkpoint.
RESUME=()
if compgen -G "$RUN/checkpoints/step-*" > /dev/null; then RESUME=(--resume); fi

# exec, so that Slurm's signal reaches torchrun, which passes it on.
exec srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
  -m llm_mlp train "$RECIPE" "$@" --out "$RUN" "${RESUME[@]}"
